//! HTTP clients that keep their connections: each sends its next message when the last one is
//! answered. Made ahead; parses no more than hyper does.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::measure::{Run, Sample};

/// One message as a request in CloudEvents' binary mode.
pub(crate) fn request(processor: &str, id: &str, media_type: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::post(format!("/v1/processors/{processor}/messages"))
        .header(HOST, "localhost")
        .header("ce-specversion", "1.0")
        .header("ce-id", id)
        .header("ce-source", "/bench")
        .header("ce-type", "t")
        .header(CONTENT_TYPE, media_type)
        .body(Full::new(body))
        .unwrap()
}

/// Sends all over `connections` that stay open. Every answer must be 200.
pub(crate) async fn drive(address: SocketAddr, connections: usize, requests: Vec<Request<Full<Bytes>>>) -> Run {
    let messages = requests.len() as u64;
    let mut open = Vec::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        open.push(sender);
    }
    let requests = Arc::new(Mutex::new(requests.into_iter()));
    let since = Instant::now();
    let client = |sender| tokio::spawn(client(sender, requests.clone(), since));
    let clients: Vec<_> = open.into_iter().map(client).collect();
    let mut samples = Vec::new();
    for client in clients {
        samples.extend(client.await.unwrap());
    }
    Run::new(samples, messages, since.elapsed(), f64::NAN)
}

type Requests = Arc<Mutex<std::vec::IntoIter<Request<Full<Bytes>>>>>;

async fn client(mut sender: http1::SendRequest<Full<Bytes>>, requests: Requests, since: Instant) -> Vec<Sample> {
    let mut samples = Vec::new();
    loop {
        let Some(request) = requests.lock().unwrap().next() else { return samples };
        let began = Instant::now();
        sender.ready().await.unwrap();
        let response = sender.send_request(request).await.unwrap();
        let (status, body) = (response.status(), response.into_body().collect().await.unwrap().to_bytes());
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        samples.push(Sample::of(since, began));
    }
}
