//! The outbox of the real binary: hosts in a chain of which the second refuses, the commands for
//! refused messages, and the outbox file over kills and rotations.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use hapax_tests::mutations;
use hapax_tests::process::{Job, guest, hapax};
use hapax_tests::random::Random;
use hapax_tests::server::{Printed, Server, on_store};
use serde_json::{Value, json};

/// Time after which a test that hangs fails.
const HUNG: Duration = Duration::from_secs(60);

/// A folder with a configuration: these settings of the host, and the fixtures as `odd`.
fn configure(folder: &Path, settings: &str) {
    let component = guest("hapax-fixtures");
    let config = format!(
        "store = \"store\"\nlisten = \"127.0.0.1:0\"\n{settings}\n[processors.odd]\ncomponent = {component:?}\n"
    );
    std::fs::write(folder.join("hapax.toml"), config).unwrap();
}

fn to(second: &Server) -> String {
    format!("outbox = {{ url = \"{}/v1/processors/odd/messages\" }}", second.url())
}

/// A message of `odd` that has it send this on, as a message of the type `kind`.
fn sends(id: &str, kind: &str, data: &str) -> String {
    json!({
        "specversion": "1.0", "id": id, "source": "/s", "type": "send", "subject": kind,
        "datacontenttype": "text/plain", "data": data,
    })
    .to_string()
}

/// Posts, although the host may die before it answers.
fn post_anyway(host: &Server, event: &str) {
    let Ok(mut stream) = TcpStream::connect(&host.address) else { return };
    let length = event.len();
    let head = "POST /v1/processors/odd/messages HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: \
                application/cloudevents+json\r\n";
    let _ = write!(stream, "{head}content-length: {length}\r\n\r\n{event}");
    let _ = stream.read_to_end(&mut Vec::new());
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < HUNG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Number of messages to be sent, and number of refused ones.
fn outbox(host: &Server) -> (u64, u64) {
    let (status, body) = host.ask("GET /v1/status", &[], "");
    assert_eq!(status, 200, "{body}");
    let outbox = &serde_json::from_str::<Value>(&body).unwrap()["outbox"];
    (outbox["pending"].as_u64().unwrap(), outbox["refused"].as_u64().unwrap())
}

fn refused(host: &Server) -> Vec<Value> {
    host.asked(&["outbox", "list", "--json"]).lines()
}

/// Two hosts in a chain; the second takes messages of up to 600 bytes.
fn chain(folders: &[tempfile::TempDir; 2]) -> [Server; 2] {
    configure(folders[1].path(), "max_message_bytes = 600");
    let second = Server::start(folders[1].path(), None);
    configure(folders[0].path(), &to(&second));
    [Server::start(folders[0].path(), None), second]
}

fn folders() -> [tempfile::TempDir; 2] {
    [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]
}

/// Proves G164, G166.
#[test]
fn of_two_hosts_the_first_goes_on_when_the_second_refuses_and_shows_it() {
    let folders = folders();
    let [first, second] = chain(&folders);
    for (id, kind, data) in [
        ("m-1", "echo", "one"),
        ("m-2", "reject", "two"),
        ("m-3", "echo", &*"3".repeat(1_000)),
        ("m-4", "echo", "four"),
    ] {
        assert_eq!(first.post(&sends(id, kind, data)).0, 200);
    }
    until("each has left the outbox", || outbox(&first).0 == 0);
    // The second host has taken three, and holds the one that it rejects: that is not the first's.
    let at_second = second.asked(&["records", "list", "--json"]).lines();
    assert_eq!(at_second.len(), 3, "{at_second:?}");
    assert_eq!(second.asked(&["dlq", "list", "--json"]).lines().len(), 1);
    let listed = refused(&first);
    let [letter] = &listed[..] else { panic!("{listed:?}") };
    assert_eq!(
        (&letter["status"], &letter["processor"], &letter["type"]),
        (&413.into(), &"odd".into(), &"echo".into())
    );
    assert!(letter["error"].as_str().unwrap().contains("over the limit of 600"), "{letter}");
    let status = first.asked(&["status"]);
    assert!(status.out.contains("outbox: 0 to be sent, 1 REFUSED: see `hapax outbox list`"), "{}", status.out);
    assert_eq!(first.stop(), Some(0));
}

/// Proves G166.
#[test]
fn what_the_second_host_has_settled_is_delivered_also_when_it_comes_again() {
    let folders = folders();
    let [first, second] = chain(&folders);
    assert_eq!(first.stop(), Some(0));
    let mut first = Server::start(folders[0].path(), Some("outbox-sent"));
    post_anyway(&first, &sends("m-1", "reject", "one"));
    until("it dies before the mark", || first.has_died());
    let first = Server::start(folders[0].path(), None);
    until("it is sent again", || outbox(&first).0 == 0);
    assert_eq!((outbox(&first), second.asked(&["dlq", "list", "--json"]).lines().len()), ((0, 0), 1));
}

/// Proves G165.
#[test]
fn a_refusal_is_neither_lost_nor_doubled_wherever_the_host_dies() {
    for point in ["outbox-sent", "outbox-marked", "group-written", "group-durable", "outbox-refused-in-two"] {
        let folders = folders();
        let [first, _second] = chain(&folders);
        assert_eq!(first.stop(), Some(0));
        // The first group is that of the message itself.
        let passage = if point.starts_with("group") { 2 } else { 1 };
        let mut first = Server::start(folders[0].path(), Some(&format!("{point}:{passage}")));
        post_anyway(&first, &sends("m-1", "echo", &"1".repeat(1_000)));
        until("it dies, or has gone on", || first.has_died() || outbox_of_living(&first) == Some((0, 1)));
        drop(first);
        let first = Server::start(folders[0].path(), None);
        until("the outbox is empty", || outbox(&first).0 == 0);
        assert_eq!(refused(&first).len(), 1, "at {point}");
    }
}

/// The same as `outbox`, of a host that may die meanwhile.
fn outbox_of_living(host: &Server) -> Option<(u64, u64)> {
    let mut stream = TcpStream::connect(&host.address).ok()?;
    write!(stream, "GET /v1/status HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let outbox = serde_json::from_str::<Value>(text.split_once("\r\n\r\n")?.1).ok()?["outbox"].clone();
    Some((outbox["pending"].as_u64()?, outbox["refused"].as_u64()?))
}

/// Proves G167.
#[test]
fn an_operator_lists_shows_redrives_and_discards_over_both_ways() {
    let folders = folders();
    let [first, second] = chain(&folders);
    let large = "x".repeat(1_000);
    for id in ["m-1", "m-2", "m-3"] {
        assert_eq!(first.post(&sends(id, "echo", &large)).0, 200);
    }
    until("all are refused", || outbox(&first) == (0, 3));
    let ids: Vec<String> = refused(&first).iter().map(|letter| letter["id"].as_str().unwrap().to_owned()).collect();
    assert!(ids.is_sorted());
    let page = first.asked(&["outbox", "list", "--limit", "2", "--json"]);
    assert!(page.lines().len() == 2 && page.err.contains(&format!("--after '{}'", ids[1])), "{page:?}");
    assert_eq!(first.asked(&["outbox", "list", "--after", &ids[1], "--json"]).lines().len(), 1);
    assert_eq!(first.asked(&["outbox", "list", "--processor", "other", "--json"]).lines().len(), 0);
    let shown = first.asked(&["outbox", "show", &ids[0]]);
    for words in ["status:       413", "processor:    odd", "over the limit of 600", &large] {
        assert!(shown.out.contains(words), "{words} is not in {}", shown.out);
    }
    first
        .asked(&["outbox", "show", "nothing"])
        .refused(9, &["there is no refused message nothing", "hapax outbox list"]);
    first.asked(&["outbox", "discard", "nothing"]).refused(9, &["there is no refused message nothing"]);
    first.asked(&["outbox", "redrive"]).refused(2, &["--all"]);
    let dry = first.asked(&["outbox", "discard", "--all", "--dry-run"]);
    assert!(dry.out.contains("discard: 3 done, 0 refused; this was a dry run"), "{dry:?}");
    let done = first.asked(&["outbox", "discard", &ids[0], "--actor", "ada", "--reason", "not needed"]);
    assert!(done.code == Some(0) && done.out.contains("discard: 1 done, 0 refused"), "{done:?}");
    // Redriven while the second still refuses, it comes back.
    assert_eq!(first.asked(&["outbox", "redrive", &ids[1], "--actor", "ada"]).code, Some(0));
    until("it is refused again", || outbox(&first) == (0, 2));
    assert_eq!(first.stop(), Some(0));

    // The same on a stopped store; the second host is corrected meanwhile.
    let at_first = |arguments: &[&str]| -> Printed { on_store(folders[0].path(), arguments) };
    assert_eq!(at_first(&["outbox", "list", "--json"]).lines().len(), 2);
    assert_eq!(second.stop(), Some(0));
    configure(folders[1].path(), "");
    let second = Server::start(folders[1].path(), None);
    configure(folders[0].path(), &to(&second));
    let done = at_first(&["outbox", "redrive", "--all", "--error", "over the limit", "--actor", "ada"]);
    assert!(done.out.contains("redrive: 2 done, 0 refused"), "{done:?}");
    assert_eq!(at_first(&["outbox", "list", "--json"]).lines().len(), 0);
    let first = Server::start(folders[0].path(), None);
    until("they are delivered", || outbox(&first) == (0, 0));
    let at_second = second.asked(&["records", "list"]).out;
    assert!(at_second.contains(&ids[1]) && at_second.contains(&ids[2]) && !at_second.contains(&ids[0]), "{at_second}");
    let audit = first.asked(&["audit", "--processor", "odd"]).out;
    assert!(audit.contains(&format!("ada outbox-discard {}: not needed", ids[0])), "{audit}");
    assert_eq!(audit.matches("ada outbox-redrive").count(), 3, "{audit}");
}

/// Proves G169.
#[test]
fn a_wrong_address_is_told_and_nothing_is_lost() {
    let folders = folders();
    let [first, second] = chain(&folders);
    assert_eq!(first.stop(), Some(0));
    let wrong = to(&second).replace("processors/odd", "processors/nobody");
    configure(folders[0].path(), &wrong);
    let first = Server::start(folders[0].path(), None);
    assert_eq!(first.post(&sends("m-1", "echo", "one")).0, 200);
    let status = first.until(&["status"], |status| status.out.contains("NOT SENT, to be repaired"));
    assert!(status.out.contains("answered 404") && status.out.contains("outbox: 1 to be sent\n"), "{}", status.out);
    assert_eq!(first.stop(), Some(0));
    configure(folders[0].path(), &to(&second));
    let first = Server::start(folders[0].path(), None);
    until("it is delivered", || outbox(&first) == (0, 0));
    assert_eq!(second.asked(&["records", "list", "--json"]).lines().len(), 1);
}

/// The lines of an outbox file, which has no torn one: their ids.
fn ids(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned();
    text.lines().map(id).collect()
}

/// JSON takes six bytes for each byte of these messages: they are large, and larger in the file
/// than in the outbox.
/// Proves G171.
#[test]
fn no_message_stands_twice_in_the_outbox_file_wherever_the_host_dies() {
    const MESSAGES: usize = 300;
    let data = "\u{1}".repeat(30_000);
    let input: String = (0..MESSAGES).map(|number| sends(&format!("m-{number}"), "t", &data) + "\n").collect();
    let mut job = Job::new("hapax-fixtures", &input);
    // All are in the outbox before any is sent, so that the batches are as large as they can be.
    let mut without_outbox = hapax();
    without_outbox.args(["run", "--component"]).arg(guest("hapax-fixtures")).arg("--store").arg(job.store());
    without_outbox.arg("--input").arg(job.store().with_file_name("input.jsonl"));
    assert_eq!(Printed::by(&mut without_outbox).code, Some(0));
    let mut deaths = 0;
    for fault in ["outbox-sent:1", "outbox-sent:2", "outbox-sent:1", "outbox-marked:1"] {
        deaths += u32::from(!job.run(Some(fault)));
    }
    assert_eq!(deaths, 4);
    let mut random = Random::of(hapax_tests::random::seed());
    for _ in 0..4 {
        job.run_and_kill(Duration::from_millis(300 + random.below(1_500)));
    }
    assert!(job.run(None));
    let ids = ids(&job.outbox());
    assert_eq!((ids.len(), ids.iter().collect::<BTreeSet<_>>().len()), (MESSAGES, MESSAGES));
}

/// Proves G172.
#[test]
fn the_outbox_file_is_rotated_under_a_running_host() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), "outbox = { file = \"outbox.jsonl\" }");
    let (file, old) = (folder.path().join("outbox.jsonl"), folder.path().join("outbox.jsonl.1"));
    let host = Server::start(folder.path(), None);
    let sent = |id: &str| {
        assert_eq!(host.post(&sends(id, "t", id)).0, 200);
        until("it is sent", || outbox(&host).0 == 0);
    };
    sent("m-1");
    sent("m-2");
    // As logrotate's `copytruncate` does it.
    std::fs::copy(&file, &old).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(0).unwrap();
    sent("m-3");
    assert!(!std::fs::read(&file).unwrap().contains(&0), "a hole");
    assert_eq!((ids(&old).len(), ids(&file).len()), (2, 1));
    // As it does it with `create`, and a signal afterwards.
    std::fs::rename(&file, &old).unwrap();
    sent("m-4");
    assert!(!file.exists());
    host.signal("HUP");
    until("the new file is used", || {
        sent(&format!("m-{}", std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos()));
        file.exists()
    });
    let before = ids(&old).len();
    sent("m-5");
    assert_eq!((ids(&old).len(), host.stop()), (before, Some(0)));
}

mutations! {
    mutation_a_settled_message_counts_as_refused_is_found:
        of_two_hosts_the_first_goes_on_when_the_second_refuses_and_shows_it is red with "settled-counts-as-refused";
    mutation_mark_and_dead_letter_in_two_commits_is_found:
        a_refusal_is_neither_lost_nor_doubled_wherever_the_host_dies is red with "refused-in-two-commits";
    mutation_a_batch_larger_than_what_is_remembered_is_found:
        no_message_stands_twice_in_the_outbox_file_wherever_the_host_dies is red with "outbox-batch-unbounded";
    mutation_an_outbox_file_that_is_not_opened_for_append_is_found:
        the_outbox_file_is_rotated_under_a_running_host is red with "outbox-not-for-append";
}
