//! `hapax status` and the circuit breakers of a running host, from the real binary.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use hapax_tests::process::{guest, hapax};
use serde_json::Value;

struct Host {
    child: Child,
    address: String,
}

impl Host {
    /// `hapax up` in `folder`, with these settings of the processor `odd` and these of the host.
    fn up(folder: &Path, odd: &str, settings: &str) -> Self {
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\n{settings}\n\n\
             [processors.odd]\ncomponent = {:?}\n{odd}\n\n[processors.orders]\ncomponent = {:?}\n",
            guest("hapax-fixtures"),
            guest("order-intake"),
        );
        let file = folder.join("hapax.toml");
        std::fs::write(&file, config).unwrap();
        let mut child = hapax().args(["up", "--json", "--config"]).arg(file).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).unwrap();
        Self { child, address: first["listening"].as_str().unwrap().to_owned() }
    }

    fn hapax(&self, arguments: &[&str]) -> Output {
        hapax().args(arguments).args(["--host", &format!("http://{}", self.address)]).output().unwrap()
    }

    /// Sends a message; its status and body.
    fn send(&self, processor: &str, id: &str, kind: &str, data: &str) -> (u64, Value) {
        let output = self.hapax(&["send", processor, "--json", "--id", id, "--type", kind, "--data", data]);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        (answer["status"].as_u64().unwrap(), answer["body"].clone())
    }

    fn status(&self) -> Value {
        let output = self.hapax(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "{request}").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.to_ascii_lowercase()
    }

    fn stop(mut self) {
        assert!(Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_processor_that_fails_too_often_is_paused_and_status_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let odd = |open_ms: u64| {
        format!("attempts_max = 1\n[processors.odd.breaker]\ncalls_min = 4\nopen_ms = {open_ms}\nprobes = 2")
    };
    let host = Host::up(folder.path(), &odd(60_000), "");
    assert_eq!(host.status()["processors"]["odd"]["breaker"]["state"], "closed");
    for number in 0..4 {
        assert_eq!(host.send("odd", &format!("r-{number}"), "retry", "null").0, 422, "its only attempt");
    }
    let (status, body) = host.send("odd", "m", "echo", "1");
    assert_eq!((status, &body["code"]), (503, &"paused".into()), "{body}");
    let request = "POST /v1/processors/odd/messages HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 2\r\n\
                   ce-id: m\r\nce-source: /hapax-send\r\nce-type: echo\r\n\r\n{}";
    let raw = host.ask(request);
    let after: u64 = raw.split_once("retry-after: ").unwrap().1.split_once("\r\n").unwrap().0.parse().unwrap();
    assert!(raw.starts_with("http/1.1 503") && (1..=60).contains(&after), "{raw}");
    assert_eq!(host.send("odd", "r-0", "retry", "null").0, 422, "what has ended is answered as ever");
    let order = r#"{"order_id":"o","customer":"c","amount_cents":5}"#;
    assert_eq!(host.send("orders", "o", "order.placed", order).0, 200, "another processor goes on");

    let status = host.status();
    let odd_status = &status["processors"]["odd"];
    assert_eq!((&odd_status["breaker"]["state"], &odd_status["breaker"]["opened"]), (&"open".into(), &1.into()));
    let outcomes = &odd_status["outcomes"];
    assert_eq!(
        (&outcomes["dead-lettered"], &outcomes["paused"], &outcomes["duplicate"]),
        (&4.into(), &2.into(), &1.into())
    );
    assert_eq!((&status["store"]["dead_letters"], &status["outbox"]["pending"]), (&4.into(), &1.into()), "{status}");
    assert_eq!(status["outbox"]["breaker"], Value::Null);
    let shown = String::from_utf8(host.hapax(&["status"]).stdout).unwrap();
    assert!(shown.contains("odd: ") && shown.contains("4 dead-lettered"), "{shown}");
    assert!(shown.contains("circuit breaker: open for ") && shown.contains("orders: 1 completed"), "{shown}");
    let other = host.ask("POST /v1/status HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    assert!(other.starts_with("http/1.1 405") && other.contains("application/problem+json"), "{other}");
    host.stop();

    // Started again it is still open; with a shorter time to be open, for no longer than that.
    let host = Host::up(folder.path(), &odd(60_000), "");
    assert_eq!(host.send("odd", "m", "echo", "1").0, 503);
    assert_eq!(host.status()["store"]["dead_letters"], 4);
    host.stop();
    let host = Host::up(folder.path(), &odd(1), "");
    // A millisecond is over as soon as the first of these has come.
    while host.send("odd", "m", "echo", "1").0 == 503 {}
    assert_eq!(host.send("odd", "n", "echo", "1").0, 200);
    assert_eq!(host.status()["processors"]["odd"]["breaker"]["state"], "closed");
    host.stop();
}

#[test]
fn a_destination_that_is_not_there_is_left_alone_and_the_host_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    // Nobody listens on port 1.
    let settings = "outbox = { url = \"http://127.0.0.1:1/\" }\n[outbox_breaker]\ncalls_min = 1\nopen_ms = 60000";
    let host = Host::up(folder.path(), "", settings);
    let order = r#"{"order_id":"o","customer":"c","amount_cents":5}"#;
    assert_eq!(host.send("orders", "o", "order.placed", order).0, 200);
    let outbox = loop {
        let outbox = host.status()["outbox"].clone();
        if outbox["breaker"]["state"] == "open" {
            break outbox;
        }
    };
    assert_eq!((&outbox["pending"], &outbox["breaker"]["opened"]), (&1.into(), &1.into()));
    host.stop();
    let host = Host::up(folder.path(), "", settings);
    assert_eq!(host.status()["outbox"]["breaker"]["state"], "open", "found as it was left");
    host.stop();
}

#[test]
fn who_asks_nobody_is_told_what_to_do() {
    let output = hapax().args(["status", "--host", "http://127.0.0.1:1"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(12) && text.contains("is the host running?"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let host = Host::up(folder.path(), "", "");
    let url = format!("http://{}/nowhere", host.address);
    let output = hapax().args(["status", "--host", &url]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(12) && text.contains("answered 404"), "{text}");
    host.stop();
}

#[test]
fn a_breaker_that_cannot_be_meant_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let component = format!("component = {:?}", guest("order-intake"));
    for (config, words) in [
        (format!("[processors.p]\n{component}\n[processors.p.breaker]\nprobes = 0"), "processors.p: breaker: probes"),
        (format!("[outbox_breaker]\ncalls_min = 11\n[processors.p]\n{component}"), "outbox_breaker: calls_min is 11"),
    ] {
        let file = folder.path().join("hapax.toml");
        std::fs::write(&file, format!("store = \"s\"\n{config}\n")).unwrap();
        let output = hapax().args(["check", "--config"]).arg(file).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && text.contains(words), "{text}");
    }
}
