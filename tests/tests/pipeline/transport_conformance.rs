//! Every source and every publisher passes the suite of `tests/src/transport_conformance.rs`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use hapax_tests::transport_conformance::{
    IDS, REFUSED, publisher, publisher_that_is_away, publisher_that_is_refused, source,
};
use hapax_transport::{HttpPublisher, JsonlPublisher, JsonlSource};
use serde_json::{Value, json};

#[tokio::test]
async fn the_jsonl_source_passes_the_suite() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("in.jsonl");
    let event = |id: &str| json!({ "specversion": "1.0", "id": id, "source": "/s", "type": "t" }).to_string();
    let [one, two, three] = IDS.map(event);
    std::fs::write(&file, format!("{one}\n{two}\nthis is no message\n{three}\n")).unwrap();
    source(|| JsonlSource::open(&file, 1 << 20).unwrap()).await;
}

#[tokio::test]
async fn the_jsonl_publisher_passes_the_suite() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.jsonl");
    let ids = || {
        let text = std::fs::read_to_string(&file).unwrap();
        let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned();
        text.lines().map(id).collect()
    };
    publisher(|| JsonlPublisher::open(&file).unwrap(), ids).await;
}

/// A server that answers 204, and `status` to the messages [`REFUSED`]: its URL, and the ids that
/// came.
fn serve(status: &'static str) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let posted = Arc::new(Mutex::new(Vec::new()));
    let ids = posted.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let posted = posted.clone();
            std::thread::spawn(move || answer(stream.unwrap(), status, &posted));
        }
    });
    (url, ids)
}

#[tokio::test]
async fn the_http_publisher_passes_the_suite() {
    let (url, ids) = serve("400 Bad Request");
    publisher(|| HttpPublisher::new(&url).unwrap(), || ids.lock().unwrap().clone()).await;
}

#[tokio::test]
async fn an_http_publisher_tells_of_each_message_whether_it_is_refused() {
    let (url, ids) = serve("400 Bad Request");
    publisher_that_is_refused(&mut HttpPublisher::new(&url).unwrap(), || ids.lock().unwrap().clone()).await;
}

/// Takes the requests of one connection, and answers each.
fn answer(mut stream: std::net::TcpStream, status: &str, posted: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let (mut id, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("ce-id: ") {
                id = value.to_owned();
            }
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        reader.by_ref().take(length).read_to_end(&mut Vec::new()).unwrap();
        let status = if REFUSED.contains(&&*id) { status } else { "204 No Content" };
        posted.lock().unwrap().push(id);
        let length = if status.starts_with("204") { "" } else { "content-length: 0\r\n" };
        write!(stream, "HTTP/1.1 {status}\r\n{length}\r\n").unwrap();
    }
}

#[tokio::test]
async fn an_http_publisher_whose_server_is_away_says_that_it_may_come_back() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    publisher_that_is_away(&mut HttpPublisher::new(&format!("http://{closed}/")).unwrap()).await;
}
