//! `hapax up` and `hapax send`: every answer a client can get, from the real binary.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use hapax_tests::process::{guest, hapax};
use serde_json::Value;

struct Server {
    child: Child,
    address: String,
    folder: tempfile::TempDir,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\noutbox = {{ file = \"outbox.jsonl\" }}\n\n\
             [processors.orders]\ncomponent = {:?}\n\n[processors.odd]\ncomponent = {:?}\nattempts_max = 2\n",
            guest("order-intake"),
            guest("hapax-fixtures"),
        );
        std::fs::write(folder.path().join("hapax.toml"), config).unwrap();
        let mut child = hapax()
            .args(["up", "--json", "--config"])
            .arg(folder.path().join("hapax.toml"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).unwrap();
        let address = first["listening"].as_str().unwrap().to_owned();
        Self { child, address, folder }
    }

    fn post(&self, processor: &str, headers: &[&str], body: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let mut request =
            format!("POST /v1/processors/{processor}/messages HTTP/1.1\r\nhost: h\r\nconnection: close\r\n");
        for header in headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        write!(stream, "{request}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    fn stop(mut self) -> (i32, tempfile::TempDir) {
        let kill = std::process::Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let code = self.child.wait().unwrap().code().unwrap();
        (code, std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const JSON: &str = "content-type: application/json";
const STRUCTURED: &str = "content-type: application/cloudevents+json";

fn order(id: &str, amount: i64) -> String {
    format!(
        r#"{{"specversion":"1.0","id":"{id}","source":"/shop","type":"order.placed","data":{{"order_id":"{id}","customer":"c","amount_cents":{amount}}}}}"#
    )
}

#[test]
fn a_message_over_http_and_its_duplicates() {
    let server = Server::start();
    let first = server.post("orders", &[STRUCTURED], &order("o-1", 5));
    assert_eq!(first.status, 200, "{}", first.body);
    assert!(!first.head.contains("idempotent-replayed") && first.head.contains("content-type: application/json"));
    let again = server.post("orders", &[STRUCTURED], &order("o-1", 5));
    assert_eq!((again.status, &again.body), (200, &first.body), "the stored result, byte for byte");
    assert!(again.head.contains("idempotent-replayed: true"), "{}", again.head);

    let other = server.post("orders", &[STRUCTURED], &order("o-1", 6));
    assert_eq!(other.status, 422);
    assert!(other.body.contains("mismatch"), "{}", other.body);

    // Binary mode: the same message is the same message.
    let binary = [JSON, "ce-id: o-1", "ce-source: /shop", "ce-type: order.placed"];
    let same = server.post("orders", &binary, r#"{"order_id":"o-1","customer":"c","amount_cents":5}"#);
    assert!(same.status == 200 && same.head.contains("idempotent-replayed: true"), "{} {}", same.head, same.body);

    // A plain body under a key.
    let plain = [JSON, "idempotency-key: k-1"];
    let body = r#"{"order_id":"o-2","customer":"c","amount_cents":7}"#;
    assert_eq!(server.post("orders", &plain, body).status, 200);
    assert!(server.post("orders", &plain, body).head.contains("idempotent-replayed: true"));

    let rejected = server.post("orders", &[STRUCTURED], &order("o-3", -1));
    assert!(rejected.status == 422 && rejected.body.contains("failed"), "{}", rejected.body);

    let (code, folder) = server.stop();
    assert_eq!(code, 0);
    let outbox = std::fs::read_to_string(folder.path().join("outbox.jsonl")).unwrap();
    assert_eq!(outbox.lines().count(), 2, "{outbox}");
    let store = folder.path().join("store");
    let state = hapax().args(["state", "get", "orders", "balance/c", "--store"]).arg(store).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "12");
}

#[test]
fn what_cannot_be_taken_is_told_in_words() {
    let server = Server::start();
    for (processor, headers, body, status, word) in [
        ("orders", vec![STRUCTURED], "nonsense".to_owned(), 400, "not JSON"),
        ("orders", vec![STRUCTURED], r#"{"source":"/s","type":"t"}"#.to_owned(), 400, "\"field\":\"id\""),
        ("orders", vec![JSON], "{}".to_owned(), 400, "\"field\":\"id\""),
        ("orders", vec![JSON, "ce-id: 1", "ce-source: /s"], "{}".to_owned(), 400, "\"field\":\"type\""),
        ("orders", vec!["content-type: application/cloudevents-batch+json"], "[]".to_owned(), 415, "not supported yet"),
        ("orders", vec![STRUCTURED], "x".repeat(10 << 20), 413, "1048576"),
        ("nobody", vec![STRUCTURED], order("o-1", 1), 404, "odd, orders"),
    ] {
        let answer = server.post(processor, &headers, &body);
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.body.contains(word), "`{word}` is not in {}", answer.body);
        assert!(answer.head.contains("application/problem+json"));
    }
}

#[test]
fn a_failure_that_may_pass_is_the_clients_to_send_again() {
    let server = Server::start();
    let failing = r#"{"id":"r","source":"/s","type":"retry","data":null}"#;
    let first = server.post("odd", &[STRUCTURED], failing);
    assert_eq!(first.status, 503, "{}", first.body);
    assert!(first.head.contains("retry-after:"), "{}", first.head);
    // Sent again until it has had its two attempts; early ones are put off.
    let last = loop {
        let answer = server.post("odd", &[STRUCTURED], failing);
        if answer.status != 503 {
            break answer;
        }
    };
    assert!(last.status == 422 && last.body.contains("failed 2 times"), "{}", last.body);
}

#[test]
fn send_prints_the_answers() {
    let server = Server::start();
    let url = format!("http://{}", server.address);
    let data = r#"{"order_id":"o","customer":"c","amount_cents":1}"#;
    let send = || {
        let args = ["send", "orders", "--json", "--url", &url, "--id", "o", "--data", data];
        let output = hapax().args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(send()["replayed"], false);
    assert_eq!(send()["replayed"], true);
    let nobody = hapax().args(["send", "orders", "--url", "http://127.0.0.1:1", "--id", "o"]).output().unwrap();
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("is the host running?"), "{nobody:?}");
}
