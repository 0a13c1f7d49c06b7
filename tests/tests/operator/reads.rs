//! State and event streams are read from a store and from a running host alike, and a source of
//! `hapax.toml` feeds its processor.

use std::path::Path;
use std::time::{Duration, Instant};

use hapax_tests::process::{guest, hapax};
use hapax_tests::server::{Printed, Server, on_store};

/// Configures the processor `counter` with a source. Its messages run in the order of the source:
/// the sample has no ordering keys, and a withdrawal that overtakes its deposit is rejected.
fn configure(folder: &Path, source: &str) {
    let component = guest("event-counter");
    let head = format!("store = \"store\"\nlisten = \"127.0.0.1:0\"\n{source}");
    let config = format!("{head}\n[processors.counter]\ncomponent = {component:?}\nordering = \"source\"\n");
    std::fs::write(folder.join("hapax.toml"), config).unwrap();
}

/// Asks until the answer is there, for as long as a start may take.
fn eventually(ask: impl Fn() -> Printed, is_there: impl Fn(&Printed) -> bool) -> Printed {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let printed = ask();
        if is_there(&printed) || Instant::now() > end {
            return printed;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_source_feeds_its_processor_and_a_host_shows_state_and_streams_as_its_store_does() {
    let folder = tempfile::tempdir().unwrap();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../plugins/event-counter/sample.jsonl");
    configure(folder.path(), &format!("[[sources]]\nprocessor = \"counter\"\nfile = {sample:?}\n"));
    let server = Server::start(folder.path(), None);
    // The reference: the same file by `hapax run`, on a store of its own.
    let run = hapax()
        .args(["run", "--component"])
        .arg(guest("event-counter"))
        .args(["--concurrency", "1", "--input", sample, "--store"])
        .arg(folder.path().join("reference"))
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    let reference =
        |arguments: &[&str]| Printed::by(hapax().args(arguments).arg("--store").arg(folder.path().join("reference")));
    let streams = reference(&["streams", "--processor", "event-counter"]);
    assert!(!streams.out.is_empty(), "{streams:?}");
    let of_host =
        eventually(|| server.asked(&["streams", "--processor", "counter"]), |printed| printed.out == streams.out);
    assert_eq!(of_host.out, streams.out);
    let stream = streams.out.split('\t').next().unwrap();
    let questions: [&[&str]; 4] = [
        &["streams", "--processor", "counter", stream, "--json"],
        &["streams", "--processor", "counter", stream, "--after", "1"],
        &["state", "list", "counter", "--json"],
        &["state", "list", "counter", "--limit", "1"],
    ];
    let answers: Vec<_> = questions.iter().map(|question| server.asked(question).out).collect();
    server.asked(&["state", "get", "counter", "no-such-key"]).refused(9, &["no-such-key", "hapax state list counter"]);
    server.asked(&["streams", "--processor", "counter", "no-such-stream"]).refused(9, &["no-such-stream"]);
    let (status, body) = server.ask("GET /v1/state/counter?limit=0", &[], "");
    assert_eq!(status, 400, "{body}");
    let (status, body) = server.ask("GET /v1/streams/counter?prefix=a", &[], "");
    assert_eq!(status, 400, "{body}");
    server
        .asked(&["streams", "--processor", "counter", "no-such-stream", "--after", "1"])
        .refused(9, &["no-such-stream"]);
    server.asked(&["state", "list", "nobody"]).refused(9, &["nobody", "counter"]);
    server.asked(&["streams", "--processor", "nobody"]).refused(9, &["nobody", "counter"]);
    server.stop();
    for (question, answer) in questions.iter().zip(answers) {
        assert_eq!(on_store(folder.path(), question).out, answer, "{question:?}");
    }
}

#[test]
fn a_source_that_cannot_be_right_is_refused_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let up = || Printed::by(hapax().args(["up", "--config"]).arg(folder.path().join("hapax.toml")));
    configure(folder.path(), "[[sources]]\nprocessor = \"nobody\"\nfile = \"in.jsonl\"\n");
    up().refused(2, &["nobody", "counter"]);
    configure(folder.path(), "[[sources]]\nprocessor = \"counter\"\nfile = \"in.jsonl\"\n");
    up().refused(2, &["in.jsonl"]);
}
