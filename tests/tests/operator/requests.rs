//! Operators' commands over the real binary: on a store and to a running host, what they do, what
//! they refuse, and what is left when the host dies over it.

use std::path::Path;

use hapax_tests::mutation::turns_red;
use hapax_tests::server::{Printed, Server, configure, on_store};
use serde_json::{Value, json};

/// What repairs the fault of `broken`.
const REPAIR: &str = r#"{"id":"repair","source":"/s","type":"counter","subject":"part"}"#;

/// A message that is refused until `REPAIR` has run. All of them have one ordering key.
fn broken(id: &str) -> String {
    format!(r#"{{"id":"{id}","source":"/s","type":"repairable","subject":"part","partitionkey":"p"}}"#)
}

fn folder(odd: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), odd);
    folder
}

fn fails(server: &Server, ids: &[&str]) {
    for id in ids {
        assert_eq!(server.post(&broken(id)).0, 422);
    }
}

/// What `odd` has processed of the broken ones, in order.
fn done(folder: &Path) -> Vec<String> {
    let printed = on_store(folder, &["state", "list", "odd", "done"]);
    assert_eq!(printed.code, Some(0), "{printed:?}");
    printed.out.trim().split_once('\t').map_or_else(Vec::new, |(_, list)| serde_json::from_str(list).unwrap())
}

fn each(lines: &[Value], name: &str) -> Vec<String> {
    lines.iter().map(|line| line[name].as_str().unwrap().to_owned()).collect()
}

const LETTERS: [&str; 3] = ["dlq", "list", "--json"];

fn nothing_kept(printed: &Printed) -> bool {
    printed.code == Some(0) && printed.out.is_empty()
}

/// Their keys stand in another order than they came in.
const CAME: [&str; 4] = ["d", "b", "c", "a"];

/// Proves G44, G111.
#[test]
fn what_is_redriven_after_the_repair_completes_once_and_in_order() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &CAME);
    let held_messages = server.asked(&LETTERS).lines();
    assert_eq!(each(&held_messages, "id"), ["a", "b", "c", "d"]);
    assert_eq!(each(&held_messages, "standing"), ["dead"; 4]);
    // Before the repair it fails again, and is what it was.
    let key = held_messages[0]["key"].as_str().unwrap();
    assert_eq!(server.asked(&["dlq", "redrive", key]).code, Some(0));
    let all_dead =
        |printed: &Printed| each(&printed.lines(), "standing").iter().all(|hold_reason| hold_reason == "dead");
    let again = server.until(&LETTERS, all_dead).lines();
    assert_eq!(each(&again, "id"), ["a", "b", "c", "d"]);
    assert!(again[0]["at_ms"].as_u64() > held_messages[0]["at_ms"].as_u64(), "it ran again");
    assert_eq!(server.post(REPAIR).0, 200);
    let printed = server.asked(&["dlq", "redrive", "--all", "--reason", "repaired", "--actor", "me"]);
    assert!(printed.code == Some(0) && printed.out.contains("redrive: 4 done, 0 refused"), "{printed:?}");
    server.until(&LETTERS, nothing_kept);
    // A duplicate gets the result that it has now.
    assert_eq!(server.post(&broken("d")), (200, "1".to_owned()));
    assert_eq!(server.stop(), Some(0));
    assert_eq!(done(folder.path()), ["d", "b", "c", "a"], "each once, in the order in which they had come");
    let history = on_store(folder.path(), &["records", "history", "default/odd/%2Fs/b", "--json"]).lines();
    assert_eq!(history[0]["rebuilt"], true);
    let events = each(history[0]["events"].as_array().unwrap(), "event");
    assert_eq!(events, ["received", "dead-lettered", "redriven", "completed"]);
}

#[test]
fn mutation_redriven_without_its_record_is_found() {
    turns_red(
        module_path!(),
        "what_is_redriven_after_the_repair_completes_once_and_in_order",
        "redrive-without-record",
    );
}

#[test]
fn mutation_redriven_out_of_order_is_found() {
    turns_red(module_path!(), "what_is_redriven_after_the_repair_completes_once_and_in_order", "redrive-out-of-order");
}

/// Proves G45.
#[test]
fn what_is_redriven_on_a_stopped_store_runs_at_the_next_start() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &CAME);
    assert_eq!(server.post(REPAIR).0, 200);
    assert_eq!(server.stop(), Some(0));
    assert_eq!(on_store(folder.path(), &["dlq", "redrive", "--all"]).code, Some(0));
    let held_messages = on_store(folder.path(), &LETTERS).lines();
    assert_eq!(each(&held_messages, "standing"), ["redriven"; 4]);
    let key = held_messages[0]["key"].as_str().unwrap();
    on_store(folder.path(), &["dlq", "redrive", key]).refused(13, &[key, "is on its way already"]);
    let other = copy(folder.path());
    let server = Server::start(folder.path(), None);
    server.until(&LETTERS, nothing_kept);
    assert_eq!(server.stop(), Some(0));
    assert_eq!(done(folder.path()), CAME);
    // Likewise at a run whose input is empty: it ends when they have ended.
    std::fs::write(other.path().join("input.jsonl"), "").unwrap();
    let mut run = hapax_tests::process::hapax();
    run.args(["run", "--json", "--processor", "odd", "--component"]).arg(hapax_tests::process::guest("hapax-fixtures"));
    run.arg("--store").arg(other.path().join("store")).arg("--input").arg(other.path().join("input.jsonl"));
    let ended = Printed::by(&mut run).lines();
    assert_eq!(each(&ended[..4], "outcome"), ["completed"; 4]);
    assert_eq!(done(other.path()), CAME);
}

/// Proves G47.
#[test]
fn what_is_discarded_is_gone_and_its_record_stays() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a", "b"]);
    let key = server.asked(&LETTERS).lines()[0]["key"].as_str().unwrap().to_owned();
    assert_eq!(server.asked(&["dlq", "discard", &key, "--reason", "spam"]).code, Some(0));
    server.asked(&["dlq", "show", &key]).refused(9, &["there is no dead letter", &key]);
    server.asked(&["dlq", "discard", &key]).refused(9, &["there is no dead letter", &key]);
    assert_eq!(each(&server.asked(&LETTERS).lines(), "id"), ["b"]);
    assert_eq!(server.post(REPAIR).0, 200);
    let (status, body) = server.post(&broken("a"));
    assert!(status == 422 && body.contains("not repaired yet"), "the stored error: {status} {body}");
    assert_eq!(server.stop(), Some(0));
    assert_eq!(done(folder.path()), [""; 0]);
}

/// Nobody would ever run it, so its record must not say that it is due.
#[test]
fn what_is_redriven_and_then_discarded_is_dead_as_before() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a"]);
    assert_eq!(server.post(REPAIR).0, 200);
    assert_eq!(server.stop(), Some(0));
    for deed in ["redrive", "discard"] {
        assert_eq!(on_store(folder.path(), &["dlq", deed, "--all"]).code, Some(0));
        let held_messages = on_store(folder.path(), &LETTERS).lines();
        assert_eq!(each(&held_messages, "standing"), ["redriven"], "`--all` takes only what is dead");
    }
    let discard = ["dlq", "discard", "--all", "--standing", "redriven"];
    assert_eq!(on_store(folder.path(), &discard).code, Some(0));
    let record = on_store(folder.path(), &["records", "show", "default/odd/%2Fs/a", "--json"]).lines().remove(0);
    assert_eq!((&record["state"], &record["dead_letters"]), (&json!("dead-lettered"), &json!([])));
    assert!(record["expires_ms"].is_u64(), "{record}");
    let history = on_store(folder.path(), &["records", "history", "default/odd/%2Fs/a", "--json"]).lines().remove(0);
    assert_eq!(history["rebuilt"], true, "{history}");
    let server = Server::start(folder.path(), None);
    assert_eq!(server.post(&broken("a")).0, 422);
    assert_eq!(server.stop(), Some(0));
}

/// Proves G48.
#[test]
fn what_is_evicted_is_new_when_it_comes_again() {
    let folder = folder("attempts_max = 9\nbackoff_base_ms = 600000\nbackoff_max_ms = 600000");
    let server = Server::start(folder.path(), None);
    let message = r#"{"id":"a","source":"/s","type":"counter"}"#;
    assert_eq!(server.post(message), (200, "1".to_owned()));
    assert_eq!(server.post(message), (200, "1".to_owned()), "a duplicate");
    let evict = ["records", "evict", "default/odd/%2Fs/a", "--reason", "again", "--actor", "me"];
    assert_eq!(server.asked(&evict).code, Some(0));
    assert_eq!(server.post(message), (200, "2".to_owned()), "it ran again");
    assert_eq!(server.post(r#"{"id":"r","source":"/s","type":"retry"}"#).0, 503);
    server.asked(&["records", "evict", "default/odd/%2Fs/r"]).refused(13, &["retry-due", "it has not ended"]);
    server.asked(&["records", "evict", "default/odd/%2Fs/none"]).refused(9, &["there is no record"]);
    let filter = r#"{"filter":{},"actor":"me"}"#;
    let (status, body) = server.ask("POST /v1/records/evict", &["content-type: application/json"], filter);
    assert!(status == 400 && body.contains("by their keys"), "{status} {body}");
    assert_eq!(server.stop(), Some(0));
    assert_eq!(on_store(folder.path(), &evict).code, Some(0));
    let server = Server::start(folder.path(), None);
    assert_eq!(server.post(message), (200, "3".to_owned()));
    assert_eq!(server.stop(), Some(0));
}

/// Everything that commands could change.
fn everything(server: &Server) -> Vec<String> {
    let records = server.asked(&["records", "list", "--json"]).out;
    let audit = server.asked(&["audit", "--processor", "odd", "--json"]).out;
    vec![server.asked(&LETTERS).out, records, audit]
}

/// Proves G49.
#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &CAME);
    let key = server.asked(&LETTERS).lines()[0]["key"].as_str().unwrap().to_owned();
    let before = everything(&server);
    for (deed, count) in [
        (&["dlq", "redrive", "--all"][..], 4),
        (&["dlq", "redrive", &key], 1),
        (&["dlq", "discard", "--all", "--limit", "3"], 3),
        (&["records", "evict", "default/odd/%2Fs/a"], 1),
    ] {
        let printed = server.asked(&[deed, &["--dry-run"]].concat());
        assert_eq!(printed.code, Some(0), "{printed:?}");
        assert!(
            printed.out.contains(&format!("{count} done")) && printed.out.contains("nothing was done"),
            "{printed:?}"
        );
        assert_eq!(everything(&server), before, "{deed:?}");
    }
    // What would be refused is refused, too.
    server.asked(&["dlq", "redrive", &key.replace("%2Fs/a", "%2Fs/z"), "--dry-run"]).refused(9, &["no dead letter"]);
    assert_eq!(everything(&server), before);
}

#[test]
fn mutation_a_dry_run_that_does_it_is_found() {
    turns_red(module_path!(), "a_dry_run_says_what_would_be_done_and_does_nothing", "dry-run-does-it");
}

/// Proves G49.
#[test]
fn each_deed_is_a_line_in_the_trail() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a", "b"]);
    let key = |id: &str| {
        let held_messages = server.asked(&LETTERS).lines();
        held_messages.iter().find(|held_message| held_message["id"] == id).unwrap()["key"].as_str().unwrap().to_owned()
    };
    let (a, b) = (key("a"), key("b"));
    let who = ["--actor", "ada", "--reason", "ticket 7"];
    for deed in [&["dlq", "redrive", &a][..], &["dlq", "discard", &b], &["records", "evict", "default/odd/%2Fs/b"]] {
        assert_eq!(server.asked(&[deed, &who].concat()).code, Some(0));
    }
    // What is refused is not done, and is not told.
    server.asked(&["dlq", "discard", &b]).refused(9, &[]);
    let trail = server.asked(&["audit", "--processor", "odd", "--json"]).lines();
    let told: Vec<_> =
        trail.iter().map(|deed| [&deed["actor"], &deed["action"], &deed["key"], &deed["reason"]]).collect();
    let expected = [("redrive", &*a), ("discard", &b), ("evict", "default/odd/%2Fs/b")];
    assert_eq!(json!(told), json!(expected.map(|(action, key)| ["ada", action, key, "ticket 7"])));
    let last = trail[2]["at_ms"].as_u64().unwrap() + 1;
    let later = time_of(last);
    assert_eq!(server.asked(&["audit", "--processor", "odd", "--since", &later]).out, "");
    assert_eq!(
        server.asked(&["audit", "--processor", "odd", "--since", "1h", "--limit", "2", "--json"]).lines().len(),
        2
    );
    assert!(server.asked(&["audit", "--processor", "odd"]).out.contains("ada evict default/odd/%2Fs/b: ticket 7"));
    // The host's own keys are not the processor's state.
    assert_eq!(server.stop(), Some(0));
    assert_eq!(on_store(folder.path(), &["state", "list", "odd"]).out, "");
}

#[test]
fn mutation_a_deed_that_is_not_told_is_found() {
    turns_red(module_path!(), "each_deed_is_a_line_in_the_trail", "deed-unaudited");
}

/// RFC 3339 of milliseconds since the Unix epoch, by another's code.
fn time_of(at_ms: u64) -> String {
    let seconds = format!("@{}.{:03}", at_ms / 1_000, at_ms % 1_000);
    let date = std::process::Command::new("date").args(["-u", "-d", &seconds, "+%Y-%m-%dT%H:%M:%S.%3NZ"]).output();
    String::from_utf8(date.unwrap().stdout).unwrap().trim().to_owned()
}

#[test]
fn filters_find_what_they_name() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a"]);
    assert_eq!(server.post(r#"{"id":"b","source":"/other","type":"reject"}"#).0, 422);
    assert_eq!(server.post(r#"{"id":"c","source":"/s","type":"invalid"}"#).0, 422);
    let held_messages = server.asked(&LETTERS).lines();
    let found = |more: &[&str]| each(&server.asked(&[&LETTERS[..], more].concat()).lines(), "id").concat();
    assert_eq!(found(&[]), "bac", "in the order of the keys");
    assert_eq!(found(&["--type", "reject"]), "b");
    assert_eq!(found(&["--source", "/s"]), "ac");
    assert_eq!(found(&["--error", "on purpose"]), "bc");
    assert_eq!(found(&["--error", "on purpose", "--source", "/s"]), "c");
    assert_eq!(found(&["--processor", "odd"]), "bac");
    assert_eq!(found(&["--processor", "other"]), "");
    assert_eq!(found(&["--standing", "dead"]), "bac");
    assert_eq!(found(&["--standing", "parked"]), "");
    assert_eq!(found(&["--since", "1h"]), "bac");
    assert_eq!(found(&["--until", "1h"]), "");
    let of_b = time_of(held_messages[0]["at_ms"].as_u64().unwrap());
    assert_eq!(found(&["--since", &of_b]), "bc", "that moment is in it");
    assert_eq!(found(&["--until", &of_b]), "a", "that moment is not in it");
    // A page, and the one after it.
    let first = server.asked(&[&LETTERS[..], &["--limit", "2"]].concat());
    assert_eq!(each(&first.lines(), "id").concat(), "ba");
    let last = held_messages[1]["key"].as_str().unwrap();
    assert!(first.err.contains(&format!("--after '{last}'")), "{}", first.err);
    let second = server.asked(&[&LETTERS[..], &["--after", last]].concat());
    assert!(each(&second.lines(), "id").concat() == "c" && second.err.is_empty(), "{second:?}");
    // Only what the filters find is done, the earliest first.
    assert_eq!(server.asked(&["dlq", "discard", "--all", "--source", "/s", "--limit", "1"]).code, Some(0));
    assert_eq!(found(&[]), "bc");
}

#[test]
fn a_parked_message_shows_what_it_waits_for_and_what_it_blocks() {
    let folder = folder("[processors.odd.strategy]\nkind = \"version\"\norder = \"strict\"\n");
    let server = Server::start(folder.path(), None);
    let version = |version: u32| {
        format!(r#"{{"id":"v{version}","source":"/s","type":"counter","subject":"e","version":"{version}"}}"#)
    };
    for early in [4, 2, 3] {
        assert_eq!(server.post(&version(early)).0, 202);
    }
    let mut parked = server.asked(&["dlq", "list", "--standing", "parked", "--json"]).lines();
    parked.sort_by_key(|held_message| held_message["position"].as_str().unwrap().to_owned());
    assert_eq!(each(&parked, "id"), ["v2", "v3", "v4"]);
    assert!(parked.iter().all(|held_message| held_message["awaits"] == 1), "{parked:?}");
    let key = |index: usize| parked[index]["key"].as_str().unwrap();
    let shown = server.asked(&["dlq", "show", key(0), "--json"]).lines().remove(0);
    assert_eq!(shown["blocks"], json!([key(1), key(2)]));
    assert_eq!(shown["state"], Value::Null, "nothing of its entity has run");
    let people = server.asked(&["dlq", "show", key(0)]).out;
    assert!(people.contains("waits for:   version 1, until 20") && people.contains(key(2)), "{people}");
    server.asked(&["dlq", "redrive", key(0)]).refused(13, &["is parked: it runs by itself"]);
    assert_eq!(server.asked(&["dlq", "discard", key(2)]).code, Some(0));
    assert_eq!(server.post(&version(1)), (200, "1".to_owned()));
    server.until(&LETTERS, nothing_kept);
    let record = server.asked(&["records", "list", "--json"]).lines().remove(0);
    assert_eq!(
        (&record["state"], &record["result"]),
        (&json!("completed"), &json!(3)),
        "1, 2 and 3 ran, 4 is discarded"
    );
}

#[test]
fn another_body_under_a_key_is_not_redriven() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a"]);
    assert_eq!(server.post(r#"{"id":"a","source":"/s","type":"counter"}"#).0, 422);
    let held_messages = server.asked(&LETTERS).lines();
    assert_eq!(held_messages.len(), 2);
    let other =
        held_messages.iter().find(|held_message| held_message["type"] == "counter").unwrap()["key"].as_str().unwrap();
    server.asked(&["dlq", "redrive", other]).refused(13, &["another body", "discard it"]);
    // Of many, the others are done; and it is told which were not.
    let printed = server.asked(&["dlq", "redrive", "--all", "--json"]);
    assert_eq!(printed.code, Some(13));
    let told: Value = serde_json::from_str(&printed.out).unwrap();
    assert_eq!((told["done"].as_array().unwrap().len(), &told["refused"][0]["key"]), (1, &json!(other)));
}

#[test]
fn what_no_processor_would_run_is_not_redriven() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a"]);
    assert_eq!(server.stop(), Some(0));
    let config = std::fs::read_to_string(folder.path().join("hapax.toml")).unwrap();
    std::fs::write(folder.path().join("hapax.toml"), config.replace("processors.odd", "processors.other")).unwrap();
    let server = Server::start(folder.path(), None);
    let key = server.asked(&LETTERS).lines()[0]["key"].as_str().unwrap().to_owned();
    server.asked(&["dlq", "redrive", &key]).refused(13, &["this host has no processor `odd`"]);
    assert_eq!(server.asked(&["dlq", "discard", &key]).code, Some(0));
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_host_and_its_stopped_store_print_the_same() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &["a", "\u{fc} %2F?#&+"]);
    assert_eq!(server.post(REPAIR).0, 200);
    let odd = server.asked(&LETTERS).lines()[1]["key"].as_str().unwrap().to_owned();
    assert!(odd.contains("%252F?#&+#"), "{odd}");
    let record = odd.rsplit_once('#').unwrap().0;
    assert_eq!(server.asked(&["dlq", "redrive", "--all", "--error", "yet", "--limit", "1"]).code, Some(0));
    server.until(&LETTERS, |printed| printed.lines().len() == 1);
    let questions: [&[&str]; 7] = [
        &["dlq", "list"],
        &["dlq", "list", "--source", "/s", "--limit", "1"],
        &["dlq", "show", &odd],
        &["records", "list", "--processor", "odd"],
        &["records", "show", record],
        &["records", "history", record],
        &["audit", "--processor", "odd"],
    ];
    let ask_all = |ask: &dyn Fn(&[&str]) -> Printed| -> Vec<String> {
        let both = questions.iter().flat_map(|question| [question.to_vec(), [question, &["--json"][..]].concat()]);
        both.map(|question| ask(&question)).map(|printed| format!("{:?} {}", printed.code, printed.out)).collect()
    };
    let online = ask_all(&|question| server.asked(question));
    assert!(online.iter().all(|answer| answer.starts_with("Some(0) ") && answer.len() > 20), "{online:#?}");
    assert_eq!(server.stop(), Some(0));
    let offline = ask_all(&|question| on_store(folder.path(), question));
    assert_eq!(online, offline);
}

#[test]
fn what_cannot_be_right_is_told_in_words() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    let is_refused = |command: &str, code: i32, words: &[&str]| {
        server.asked(&command.split(' ').collect::<Vec<_>>()).refused(code, words);
    };
    is_refused("dlq redrive", 2, &["KEY", "--all"]);
    is_refused("dlq discard --type t", 2, &["KEY", "--all"]);
    is_refused("dlq redrive some/key --all", 2, &["--all"]);
    is_refused("dlq redrive a/b/c/d#00000000000000000000000000000000 --type t", 2, &["with --all only"]);
    is_refused("dlq redrive nonsense", 2, &["`nonsense` is not the key of a dead letter", "hapax dlq list"]);
    is_refused("dlq show a/b/c#12", 2, &["`a/b/c#12` is not the key"]);
    is_refused("dlq show a/b/c/d#00000000000000000000000000000000", 9, &["there is no dead letter a/b/c/d#"]);
    is_refused("dlq list --since yesterday", 2, &["since", "`yesterday` is no time", "2h"]);
    is_refused("dlq list --standing lost", 2, &["lost", "dead, parked, redriven"]);
    is_refused("dlq list --limit 0", 2, &["limit: 0 asks for nothing"]);
    is_refused("dlq list --limit 10001", 2, &["10001 is more than 10000"]);
    is_refused("dlq list --after nonsense", 2, &["`nonsense` is not the key"]);
    is_refused("records show a/b", 2, &["`a/b` is not a record key", "%2F"]);
    is_refused("records history a/b/c/d", 9, &["there is no record a/b/c/d", "hapax records list"]);
    is_refused("audit", 2, &["--processor"]);
    let store = folder.path().join("store");
    let locked = on_store(folder.path(), &LETTERS);
    locked.refused(6, &["--host", "in use by another process"]);
    let both =
        Printed::by(hapax_tests::process::hapax().args(["dlq", "list", "--host", "http://h", "--store"]).arg(&store));
    both.refused(2, &["--host", "--store"]);
    let elsewhere = |url: &str| Printed::by(hapax_tests::process::hapax().args(["dlq", "list", "--host", url]));
    elsewhere("http://127.0.0.1:1").refused(12, &["is the host running?", "127.0.0.1:1"]);
    elsewhere("127.0.0.1").refused(2, &["must begin with http://"]);
    elsewhere(&format!("{}/sub", server.url())).refused(12, &["404", "is it one?"]);
    on_store(&folder.path().join("nowhere"), &LETTERS).refused(5, &["holds no store"]);
}

#[test]
fn http_for_operators_answers_bad_requests_in_words() {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    let json = "content-type: application/json";
    for (what, headers, body, status, word) in [
        ("POST /v1/dlq/redrive", &[json][..], "{", 400, "the order"),
        ("POST /v1/dlq/redrive", &[json], r#"{"key":"k"}"#, 400, "unknown field `key`"),
        ("POST /v1/dlq/redrive", &[json], r#"{"actor":"me"}"#, 400, "`keys`"),
        ("POST /v1/dlq/redrive", &[json], r#"{"filter":{}}"#, 400, "actor"),
        ("POST /v1/dlq/redrive", &[json], r#"{"filter":{"after":"x"},"actor":"me"}"#, 400, "for lists only"),
        ("POST /v1/dlq/discard", &[json], r#"{"keys":["k"],"filter":{},"actor":"me"}"#, 400, "not both"),
        ("POST /v1/dlq/discard", &[], r#"{"filter":{},"actor":"me"}"#, 415, "application/json"),
        (
            "POST /v1/dlq/discard",
            &["content-type: text/plain"],
            r#"{"filter":{},"actor":"me"}"#,
            415,
            "application/json",
        ),
        ("GET /v1/dlq?nonsense=1", &[], "", 400, "unknown field `nonsense`"),
        ("GET /v1/dlq?limit=many", &[], "", 400, "many"),
        ("GET /v1/dlq?limit=1&limit=2", &[], "", 400, "twice"),
        ("GET /v1/dlq?standing=lost", &[], "", 400, "`dead`"),
        ("GET /v1/dlq/a%FFb", &[], "", 400, "not UTF-8"),
        ("GET /v1/dlq/a/b/c/d", &[], "", 404, "%2F"),
        ("GET /v1/records/a%2Fb%2Fc%2Fd", &[], "", 404, "there is no record"),
        ("GET /v1/audit", &[], "", 400, "processor"),
        ("DELETE /v1/dlq", &[], "", 405, "POST to"),
        ("GET /v1/feed?wait_ms=99999", &[], "", 400, "30000"),
    ] {
        let (answered, text) = server.ask(what, headers, body);
        assert!(answered == status && text.contains(word), "{what} {body}: {answered} {text}");
    }
    let listed = server.ask("GET /v1/dlq", &[], "");
    assert_eq!(listed, (200, r#"{"letters":[],"next":null}"#.to_owned()));
}

/// Where the host can die over a redrive, and at which passage: until its commit is durable, and
/// while the message runs.
const DEATHS: [(&str, u32); 11] = [
    ("operator-planned", 1),
    ("group-gathered", 1),
    ("group-written", 1),
    ("journal-written", 1),
    ("group-durable", 1),
    ("operator-durable", 1),
    ("invoked", 1),
    ("invoked", 2),
    ("group-written", 2),
    ("group-durable", 2),
    ("group-durable", 3),
];

/// A store with messages that failed before their fault was repaired.
fn repaired() -> tempfile::TempDir {
    let folder = folder("");
    let server = Server::start(folder.path(), None);
    fails(&server, &CAME);
    assert_eq!(server.post(REPAIR).0, 200);
    assert_eq!(server.stop(), Some(0));
    folder
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let whole = format!("{}/.", from.display());
    assert!(std::process::Command::new("cp").args(["-r", &whole]).arg(to.path()).status().unwrap().success());
    to
}

/// Each message is either kept, or has completed: none is in neither place, none is lost.
fn none_is_lost(folder: &Path, at: &str) {
    let held_messages = each(&on_store(folder, &LETTERS).lines(), "id");
    let done = done(folder);
    for id in CAME {
        let (kept, done) =
            (held_messages.iter().any(|kept| kept == id), done.iter().filter(|done| *done == id).count());
        assert!(matches!((kept, done), (true, 0) | (false, 1)), "{at}: {id} is kept: {kept}, done: {done} times");
    }
}

/// Has everything that is dead run again, until nothing is kept; then each has completed once, in
/// order.
fn all_complete(folder: &Path, at: &str) {
    let server = Server::start(folder, None);
    assert_eq!(server.asked(&["dlq", "redrive", "--all"]).code, Some(0));
    server.until(&LETTERS, nothing_kept);
    assert_eq!(server.stop(), Some(0));
    assert_eq!(done(folder), CAME, "{at}");
}

/// Proves G6.
#[test]
fn the_host_may_die_over_a_redrive_and_each_message_completes_once() {
    let template = repaired();
    for (point, passage) in DEATHS {
        let folder = copy(template.path());
        let at = format!("{point}:{passage}");
        let mut server = Server::start(folder.path(), Some(&at));
        // The answer may be lost with the host.
        let _ = server.asked(&["dlq", "redrive", "--all"]);
        while !server.has_died() {
            let kept = server.asked(&LETTERS);
            assert!(!nothing_kept(&kept), "{at} never killed: it is not on the way");
        }
        none_is_lost(folder.path(), &at);
        all_complete(folder.path(), &at);
    }
}

/// Proves G6, G46.
#[test]
fn a_command_may_die_over_a_stopped_store() {
    let template = repaired();
    for point in
        ["operator-planned", "group-gathered", "group-written", "journal-written", "group-durable", "operator-durable"]
    {
        for deed in ["redrive", "discard"] {
            let folder = copy(template.path());
            let mut command = hapax_tests::process::hapax();
            command.args(["dlq", deed, "--all", "--store"]).arg(folder.path().join("store")).env("HAPAX_FAULT", point);
            assert_eq!(Printed::by(&mut command).code, None, "{point} never killed");
            let left = on_store(folder.path(), &LETTERS).lines();
            let trail = on_store(folder.path(), &["audit", "--processor", "odd", "--json"]).lines();
            // Done or not, it is told as it is.
            let undone = left.iter().filter(|held_message| held_message["standing"] == "dead").count();
            assert_eq!(undone + trail.len(), CAME.len(), "{deed} at {point}: {left:?} {trail:?}");
            if deed == "redrive" {
                none_is_lost(folder.path(), point);
                all_complete(folder.path(), point);
            }
        }
    }
}
