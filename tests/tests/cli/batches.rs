//! Batches over the real binary: over HTTP with both kinds of components, and killed in the middle.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use hapax_tests::mutation::turns_red;
use hapax_tests::process::{Job, guest, hapax};
use serde_json::{Value, json};

struct Server {
    child: Child,
    address: String,
    folder: tempfile::TempDir,
}

impl Server {
    /// A host with one processor of each kind; both do what a message's type says.
    fn start() -> Self {
        Self::with("batch_wait_ms = 20")
    }

    /// The same with these settings of the one that takes batches.
    fn with(batching: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let quick = "backoff_base_ms = 1\nbackoff_max_ms = 2\nattempts_max = 3\n";
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\nmax_batch_items = 10\n\n\
             [processors.one]\ncomponent = {:?}\n{quick}\n[processors.many]\ncomponent = {:?}\n{batching}\n{quick}",
            guest("hapax-fixtures"),
            guest("batch-fixtures"),
        );
        std::fs::write(folder.path().join("hapax.toml"), config).unwrap();
        let mut up = hapax();
        up.args(["up", "--json", "--config"]).arg(folder.path().join("hapax.toml"));
        let mut child = up.stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).unwrap();
        Self { child, address: first["listening"].as_str().unwrap().to_owned(), folder }
    }

    /// Status and body.
    fn post(&self, processor: &str, content_type: &str, body: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST /v1/processors/{processor}/batch HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\
             content-type: {content_type}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
    }

    /// Sends these; answers the ids that are to be sent again, and each one's outcome and result.
    fn send(&self, processor: &str, messages: &[Value]) -> (Vec<String>, Vec<(String, Value)>) {
        let body = Value::from(messages).to_string();
        let (status, body) = self.post(processor, "application/cloudevents-batch+json", &body);
        assert_eq!(status, 200, "{body}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let failures = body["batchItemFailures"].as_array().unwrap();
        let failures = failures.iter().map(|failure| text(&failure["itemIdentifier"])).collect();
        let results = body["results"].as_array().unwrap();
        (failures, results.iter().map(|result| (text(&result["outcome"]), result["result"].clone())).collect())
    }

    /// Stops the host; answers what it left in the state of a processor.
    fn state(mut self, processor: &str) -> BTreeMap<String, String> {
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        let store = self.folder.path().join("store");
        let output = hapax().args(["state", "list", processor, "--store"]).arg(store).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| line.split_once('\t').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both kinds of components, and what each calls a message that counts, and one that fails until
/// its third attempt.
const KINDS: [(&str, &str, &str); 2] = [("one", "counter", "retry-until-3"), ("many", "count", "retry")];

fn event(id: &str, kind: &str, subject: &str) -> Value {
    json!({ "specversion": "1.0", "id": id, "source": "/s", "type": kind, "subject": subject, "data": {} })
}

fn behind(mut event: Value, key: &str) -> Value {
    event["partitionkey"] = key.into();
    event
}

fn state(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Proves G54, G114.
#[test]
fn one_failed_item_never_repeats_or_blocks_the_others() {
    for (processor, count, _) in KINDS {
        let server = Server::start();
        let messages = [
            event("m-1", count, "a"),
            event("m-2", "trap", "b"),
            event("m-3", "reject", "c"),
            event("m-4", count, "d"),
            json!({ "id": "m-5" }),
            json!([]),
        ];
        let (again, results) = server.send(processor, &messages);
        assert_eq!(again, ["m-2", "m-5", "#5"], "{processor}: {results:?}");
        let outcomes: Vec<&str> = results.iter().map(|(outcome, _)| outcome.as_str()).collect();
        assert_eq!(outcomes, ["completed", "retry", "dead-lettered", "completed", "invalid", "invalid"], "{processor}");
        assert_eq!((&results[0].1, &results[3].1), (&json!(1), &json!(1)));
        // The whole batch again, as a queue would if it knew no better: what has ended is answered
        // and does not run.
        let mut outcomes = Vec::new();
        while outcomes.get(1).is_none_or(|outcome| outcome == "retry") {
            let results = server.send(processor, &messages).1;
            outcomes = results.into_iter().map(|(outcome, _)| outcome).collect();
        }
        assert_eq!(outcomes, ["duplicate", "dead-lettered", "duplicate", "duplicate", "invalid", "invalid"]);
        assert_eq!(server.state(processor), state(&[("a", "1"), ("d", "1")]), "{processor}");
    }
}

#[test]
fn mutation_a_batch_that_fails_together_is_found() {
    turns_red(module_path!(), "one_failed_item_never_repeats_or_blocks_the_others", "batch-fails-together");
}

#[test]
fn each_items_effects_commit_with_it_alone() {
    // They wait until all three are there: one call.
    let server = Server::with("batch_max = 3\nbatch_wait_ms = 60000");
    let messages = [event("m-1", "count", "a"), event("m-2", "reject", "b"), event("m-3", "count", "c")];
    let (again, results) = server.send("many", &messages);
    let outcomes: Vec<&str> = results.iter().map(|(outcome, _)| outcome.as_str()).collect();
    assert_eq!((again, outcomes), (vec![], vec!["completed", "dead-lettered", "completed"]));
    assert_eq!(server.state("many"), state(&[("a", "1"), ("c", "1")]));
}

#[test]
fn mutation_effects_that_all_go_to_one_item_are_found() {
    turns_red(module_path!(), "each_items_effects_commit_with_it_alone", "batch-select-ignored");
}

/// Proves G54.
#[test]
fn the_rest_of_a_keys_items_wait() {
    for (processor, count, retry) in KINDS {
        let server = Server::start();
        let messages = [
            behind(event("m-1", count, "k"), "k"),
            behind(event("m-2", retry, "k"), "k"),
            behind(event("m-3", count, "k"), "k"),
            behind(event("m-4", count, "other"), "other"),
        ];
        let (again, results) = server.send(processor, &messages);
        assert_eq!(again, ["m-2", "m-3"], "{processor}: what comes behind the failed one waits, another key does not");
        assert_eq!([&results[0].1, &results[3].1], [&json!(1), &json!(1)]);
        let (mut left, mut answers) = (messages[1..3].to_vec(), BTreeMap::new());
        while !left.is_empty() {
            let (again, results) = server.send(processor, &left);
            for (message, (_, result)) in left.iter().zip(results) {
                answers.insert(message["id"].as_str().unwrap().to_owned(), result);
            }
            left.retain(|message| again.iter().any(|id| message["id"] == id.as_str()));
        }
        assert_eq!(answers, BTreeMap::from([("m-2".to_owned(), json!(2)), ("m-3".to_owned(), json!(3))]));
        assert_eq!(server.state(processor), state(&[("k", "3"), ("other", "1")]));
    }
}

#[test]
fn mutation_an_item_that_overtakes_is_found() {
    turns_red(module_path!(), "the_rest_of_a_keys_items_wait", "batch-overtakes");
}

#[test]
fn what_is_no_batch_is_told_in_words() {
    let server = Server::start();
    let many = Value::from((0..11).map(|n| event(&n.to_string(), "count", "a")).collect::<Vec<_>>()).to_string();
    let batch = "application/cloudevents-batch+json";
    for (processor, content_type, body, status, word) in [
        ("many", "application/cloudevents+json", "[]", 415, "application/cloudevents-batch+json"),
        ("many", batch, "{}", 400, "no JSON array"),
        ("many", batch, &many, 413, "over the limit of 10"),
        ("nobody", batch, r#"[{"id":"i","source":"/s","type":"t"}]"#, 404, "many, one"),
    ] {
        let (is, body) = server.post(processor, content_type, body);
        assert_eq!(is, status, "{body}");
        assert!(body["detail"].as_str().unwrap().contains(word), "{body}");
    }
    assert_eq!(server.send("many", &[]), (vec![], vec![]));
}

#[test]
fn settings_of_batches_are_refused_where_there_are_none() {
    let folder = tempfile::tempdir().unwrap();
    for (component, line, words) in [
        ("hapax-fixtures", "batch_max = 8", "batch_max is set, but its component handles one message a call"),
        ("hapax-fixtures", "batch_wait_ms = 8", "batch_wait_ms is set"),
        ("batch-fixtures", "batch_max = 0", "batch_max is 0"),
    ] {
        let file = folder.path().join("hapax.toml");
        let config = format!("store = \"s\"\n[processors.p]\ncomponent = {:?}\n{line}\n", guest(component));
        std::fs::write(&file, config).unwrap();
        let output = hapax().args(["check", "--config"]).arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{text}");
    }
}

/// Messages that count on keys of their own and on shared ones, some twice.
fn counted(count: usize) -> (String, BTreeSet<String>, BTreeMap<String, i64>) {
    let (mut text, mut ids, mut state) = (String::new(), BTreeSet::new(), BTreeMap::new());
    for number in 0..count {
        let (id, subject) = (format!("m-{number}"), format!("key-{}", number % 20));
        let line = event(&id, "count", &subject).to_string() + "\n";
        text += &line.repeat(if number.is_multiple_of(3) { 2 } else { 1 });
        *state.entry(subject).or_default() += 1;
        ids.insert(id);
    }
    (text, ids, state)
}

/// Proves G55.
#[test]
fn killed_in_the_middle_of_a_batch_each_item_is_there_once() {
    let (text, ids, state) = counted(60);
    for point in ["invoked", "group-written", "group-durable", "before-ack", "acked"] {
        let mut job = Job::new("batch-fixtures", &text);
        let deaths = [1, 5, 3, 20].map(|passage| u32::from(!job.run(Some(&format!("{point}:{passage}")))));
        assert!(deaths.iter().sum::<u32>() > 0, "the fault point {point} never killed: it is not on the way");
        assert!(job.run(None));
        assert_eq!(job.faults(&ids, &state, false), [""; 0], "at {point}");
    }
}
