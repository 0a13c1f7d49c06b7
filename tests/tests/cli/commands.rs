//! The command line, end to end: the main job twice on one store, and every kind of bad input with
//! its error and exit code.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use hapax_tests::process::{guest, hapax};
use serde_json::Value;

fn order(id: &str, amount: i64) -> String {
    format!(
        r#"{{"specversion":"1.0","id":"{id}","source":"/shop","type":"order.placed","data":{{"order_id":"{id}","customer":"c-1","amount_cents":{amount}}}}}"#
    )
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// `hapax run --json` of order-intake on this folder's store.
    fn run(&self, input: &str, more: &[&str]) -> Output {
        self.run_component(&guest("order-intake").display().to_string(), input, more)
    }

    fn run_component(&self, component: &str, input: &str, more: &[&str]) -> Output {
        let mut command = hapax();
        command.args(["run", "--json", "--processor", "orders", "--component", component, "--input", input]);
        command.arg("--store").arg(self.path("store")).args(more);
        command.output().unwrap()
    }
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn summary(output: &Output) -> Value {
    lines(output).last().unwrap_or_else(|| panic!("{output:?}"))["summary"].clone()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(!text.contains("stack backtrace"), "{text}");
}

#[test]
fn the_same_file_twice_changes_nothing_and_says_so() {
    let folder = Folder::new();
    let text = [order("o-1", 100), order("o-2", 250), order("o-1", 100), order("o-3", -5), String::new()].join("\n");
    let input = folder.file("input.jsonl", text);
    let outbox = folder.path("outbox.jsonl");
    let first = folder.run(&input, &["--outbox", &outbox]);
    assert!(first.status.success(), "{}", stderr(&first));
    let counts = summary(&first);
    assert_eq!([&counts["received"], &counts["completed"], &counts["duplicates"], &counts["failed"]], [4, 2, 1, 1]);
    assert_eq!(counts["duplicate_rate"], 0.25);
    let sent = std::fs::read_to_string(&outbox).unwrap();
    assert_eq!(sent.lines().count(), 2);

    let second = folder.run(&input, &["--outbox", &outbox]);
    let counts = summary(&second);
    assert_eq!([&counts["received"], &counts["completed"], &counts["duplicates"]], [4, 0, 4]);
    assert_eq!(std::fs::read_to_string(&outbox).unwrap(), sent);
    let state =
        hapax().args(["state", "get", "orders", "balance/c-1", "--store", &folder.path("store")]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "350");

    let plain = hapax()
        .args(["run", "--processor", "orders", "--store", &folder.path("store"), "--input", &input, "--component"])
        .arg(guest("order-intake"))
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&plain.stdout).contains("Nothing changed"), "{plain:?}");
}

#[test]
fn standard_input_is_read() {
    let folder = Folder::new();
    let mut child = hapax()
        .args(["run", "--json", "--store", &folder.path("store"), "--component"])
        .arg(guest("order-intake"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(order("o-1", 5).as_bytes()).unwrap();
    assert_eq!(summary(&child.wait_with_output().unwrap())["completed"], 1);
}

#[test]
fn input_that_is_no_message_is_named_and_the_rest_is_processed() {
    let folder = Folder::new();
    let huge = format!(r#"{{"id":"h","source":"/s","type":"t","data":"{}"}}"#, "x".repeat(10 << 20));
    let text = ["not json", r#"{"source":"/s","type":"t"}"#, &huge, &order("o-1", 5)].join("\n");
    let output = folder.run(&folder.file("input.jsonl", text), &[]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let lines = lines(&output);
    let invalid: Vec<_> = lines.iter().filter(|line| line["outcome"] == "invalid").collect();
    let said = |at: usize| format!("{} {}", invalid[at]["position"], invalid[at]["error"]);
    assert_eq!(invalid.len(), 3);
    assert!(said(0).contains("line 1") && said(0).contains("JSON"), "{}", said(0));
    assert!(said(1).contains("line 2") && said(1).contains("id"), "{}", said(1));
    assert!(said(2).contains("line 3") && said(2).contains("1048576"), "{}", said(2));
    assert_eq!(summary(&output)["completed"], 1);
}

#[test]
fn components_that_do_not_fit_are_refused_in_words() {
    let folder = Folder::new();
    let input = folder.file("input.jsonl", order("o-1", 5));
    let whole = std::fs::read(guest("order-intake")).unwrap();
    let cut = folder.file("cut.wasm", &whole[..whole.len() / 2]);
    refused(&folder.run_component(&cut, &input, &[]), 4, &["cut.wasm", "truncated or damaged", "build it again"]);
    let wrong = guest("wrong-world").display().to_string();
    refused(&folder.run_component(&wrong, &input, &[]), 4, &["hapax:processor/handler"]);
    let one_way = guest("one-way").display().to_string();
    refused(&folder.run_component(&one_way, &input, &[]), 4, &["`saga`", "exports no `compensation`"]);
    let text = folder.file("text.wasm", "no wasm");
    refused(&folder.run_component(&text, &input, &[]), 4, &["text.wasm", "this is not WASM"]);
    refused(&folder.run_component("/nowhere.wasm", &input, &[]), 4, &["/nowhere.wasm"]);
    let check = hapax().args(["check", "--component", &wrong]).output().unwrap();
    refused(&check, 4, &["hapax:processor/handler"]);
}

#[test]
fn a_store_in_use_is_refused() {
    let folder = Folder::new();
    let _open = hapax_store::RedbStore::open(&folder.0.path().join("store")).unwrap();
    let input = folder.file("input.jsonl", order("o-1", 5));
    refused(&folder.run(&input, &[]), 6, &["in use by another process"]);
}

#[test]
fn a_store_of_another_version_or_emptied_is_refused() {
    let folder = Folder::new();
    let input = folder.file("input.jsonl", order("o-1", 5));
    let store = folder.0.path().join("store");
    assert!(folder.run(&input, &[]).status.success());
    let format = hapax_tests::raw::set_format(&store, 99);
    refused(&folder.run(&input, &[]), 5, &["format 99", "Use the hapax that wrote it"]);
    assert_eq!(hapax_tests::raw::set_format(&store, format), 99);
    assert_eq!(summary(&folder.run(&input, &[]))["duplicates"], 1, "nothing was lost by refusing it");
    std::fs::write(store.join("records.redb"), "").unwrap();
    refused(&folder.run(&input, &[]), 5, &["damaged"]);
    refused(&hapax().args(["records", "list", "--store", "/nowhere"]).output().unwrap(), 5, &["holds no store"]);
}

/// The limit of a file's size stands in for a disk that is full: the same path through the host, on
/// any machine.
#[test]
fn a_full_disk_stops_the_host_and_loses_nothing() {
    let folder = Folder::new();
    let many: String = (0..4_000).map(|number| order(&format!("o-{number}"), 1) + "\n").collect();
    let input = folder.file("input.jsonl", many);
    assert!(folder.run(&folder.file("none.jsonl", ""), &[]).status.success());
    let size = std::fs::metadata(folder.0.path().join("store/records.redb")).unwrap().len();
    let limited = |blocks: u64| {
        Command::new("bash")
            .arg("-c")
            .arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\""))
            .arg("bash")
            .arg(std::env::var_os("HAPAX_BIN").unwrap())
            .args(["run", "--json", "--processor", "orders", "--input", &input, "--store", &folder.path("store")])
            .arg("--component")
            .arg(guest("order-intake"))
            .output()
            .unwrap()
    };
    // `ulimit -f` counts blocks of 1,024 bytes.
    let full = limited(size / 1_024);
    refused(&full, 7, &["disk is full"]);
    let rerun = folder.run(&input, &[]);
    assert!(rerun.status.success(), "{}", stderr(&rerun));
    let counts = summary(&rerun);
    assert_eq!(counts["completed"].as_u64().unwrap() + counts["duplicates"].as_u64().unwrap(), 4_000);
    let state =
        hapax().args(["state", "get", "orders", "balance/c-1", "--store", &folder.path("store")]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "4000");
}

#[test]
fn a_processor_that_is_not_there_is_told_with_those_that_are() {
    let folder = Folder::new();
    let config =
        format!("store = 's'\nlisten = '127.0.0.1:0'\n[processors.orders]\ncomponent = {:?}\n", guest("order-intake"));
    let mut host = hapax()
        .args(["up", "--json", "--config", &folder.file("hapax.toml", config)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(host.stdout.take().unwrap()), &mut first).unwrap();
    let address = serde_json::from_str::<Value>(&first).unwrap()["listening"].as_str().unwrap().to_owned();
    let sent = hapax().args(["send", "nobody", "--id", "1", "--host", &format!("http://{address}")]).output().unwrap();
    host.kill().unwrap();
    host.wait().unwrap();
    let told = String::from_utf8_lossy(&sent.stdout);
    assert_eq!(sent.status.code(), Some(3), "{told}");
    assert!(told.contains("there is no processor `nobody`; there are: orders"), "{told}");
}

#[test]
fn a_configuration_or_an_option_that_cannot_be_right_is_named() {
    let folder = Folder::new();
    let check =
        |config: &str| hapax().args(["check", "--config", &folder.file("hapax.toml", config)]).output().unwrap();
    refused(&check("store = "), 2, &["hapax.toml", "line 1"]);
    refused(&check("store = 's'\n[processors]\n"), 2, &["it names no processor; add [processors.NAME]"]);
    refused(
        &check("store = 's'\n[processors.p]\ncomponent = 'p.wasm'\ndeadline = 1\n"),
        2,
        &["unknown field `deadline`"],
    );
    refused(&check("store = 's'\n[processors.p]\ncomponent = 'p.wasm'\n"), 4, &["cannot read the component", "p.wasm"]);
    refused(&hapax().args(["check", "--config", "/nowhere.toml"]).output().unwrap(), 2, &["/nowhere.toml", "--config"]);
    refused(&hapax().args(["check", "--log", "a=b=c"]).output().unwrap(), 2, &["--log a=b=c"]);
    let input = folder.path("absent.jsonl");
    refused(&folder.run(&input, &[]), 2, &["cannot read the input", "absent.jsonl"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let component = guest("order-intake");
    let address = taken.local_addr().unwrap().to_string();
    let config = format!("store = 's'\nlisten = '{address}'\n[processors.p]\ncomponent = {component:?}\n");
    let up = hapax().args(["up", "--config", &folder.file("hapax.toml", config)]).output().unwrap();
    refused(&up, 2, &["cannot listen on", &address, "`listen`"]);
    let input = folder.file("input.jsonl", order("o-1", 5));
    refused(&folder.run(&input, &["--outbox", "/nowhere/outbox"]), 11, &["/nowhere/outbox"]);
}

#[test]
fn logs_are_json_where_nobody_watches() {
    let folder = Folder::new();
    let other = order("o-1", 5) + "\n" + &order("o-1", 6);
    let output = folder.run(&folder.file("input.jsonl", other), &["--log", "info"]);
    let log = stderr(&output);
    let lines: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    assert!(
        lines.iter().any(|line| line["level"] == "ERROR" && line["target"] == "hapax_core::pipeline::hold"),
        "{log}"
    );
}

#[test]
fn records_are_listed_and_shown() {
    let folder = Folder::new();
    folder.run(&folder.file("input.jsonl", order("o-1", 5) + "\n" + &order("o-2", 0)), &[]);
    let store = folder.path("store");
    let list = hapax().args(["records", "list", "--json", "--store", &store]).output().unwrap();
    let listed = lines(&list);
    let states: Vec<_> =
        listed.iter().map(|line| (line["id"].as_str().unwrap(), line["state"].as_str().unwrap())).collect();
    assert_eq!(states, [("o-1", "completed"), ("o-2", "dead-lettered")]);
    let key = listed[1]["key"].as_str().unwrap();
    let show = hapax().args(["records", "show", key, "--json", "--store", &store]).output().unwrap();
    let shown = &lines(&show)[0];
    assert!(shown["dead_letters"][0]["data"].as_str().unwrap().contains("\"o-2\""), "{shown}");
    refused(&hapax().args(["records", "show", "a/b/c/d", "--store", &store]).output().unwrap(), 9, &["no record"]);
    refused(
        &hapax().args(["state", "get", "orders", "nothing", "--store", &store]).output().unwrap(),
        9,
        &["no state"],
    );
}

/// Proves G32.
#[test]
fn a_signal_drains() {
    let folder = Folder::new();
    let many: String = (0..20_000).map(|number| order(&format!("o-{number}"), 1) + "\n").collect();
    let input = folder.file("input.jsonl", many);
    let mut child = hapax()
        .args(["run", "--json", "--processor", "orders", "--store", &folder.path("store"), "--input", &input])
        .arg("--component")
        .arg(guest("order-intake"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    // It has begun: now it is told to stop.
    std::io::BufRead::read_line(&mut out, &mut text).unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    std::io::Read::read_to_string(&mut out, &mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(10));
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let completed = last["summary"]["completed"].as_u64().unwrap();
    assert!(completed > 0 && completed < 20_000, "{last}");
    let rerun = folder.run(&input, &[]);
    assert_eq!(summary(&rerun)["completed"].as_u64().unwrap() + completed, 20_000, "each completed exactly once");
}

/// A line of the log, or of a list, that a message could forge or move.
fn assert_nothing_moves_the_cursor(output: &Output) {
    for (name, bytes) in [("standard output", &output.stdout), ("standard error", &output.stderr)] {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let is_odd = |character: char| {
            (character.is_control() && !matches!(character, '\n' | '\t'))
                || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        };
        assert!(!text.contains(is_odd), "{name}: {text:?}");
        // The further lines of an error are indented.
        assert!(!text.lines().any(|line| line.starts_with(" FORGED")), "{name}: {text:?}");
    }
}

/// Each field of a message, and the text of its error, has characters that forge a line, clear the
/// screen, turn the text round.
/// Proves G139.
#[test]
fn control_characters_of_messages_never_reach_the_output_or_the_log_as_they_are() {
    const ODD: &str = r"x\n FORGED completed\r\u001b[2K\u001b]0;x\u0007\u0008\u007f\u0085\u009b31m\u202e\u2066\u2028y";
    let folder = Folder::new();
    let message = |id: &str, kind: &str, data: &str| {
        format!(
            r#"{{"id":"{id}{ODD}","source":"/s{ODD}","type":"{kind}","subject":"{ODD}","partitionkey":"{ODD}","data":{data}}}"#
        )
    };
    let bad_order = format!(r#"{{"order_id":"{ODD}","customer":"{ODD}","amount_cents":-1}}"#);
    let good_order = format!(r#"{{"order_id":"{ODD}","customer":"{ODD}","amount_cents":1}}"#);
    let text = [
        message("a", "order.placed", &good_order),
        message("a", "order.placed", &bad_order),
        message("b", "order.placed", &bad_order),
        message("c", &format!("unknown{ODD}"), &format!("\"{ODD}\"")),
        format!(r#"{{"id":7,"source":"{ODD}","{ODD}":1}}"#),
        format!(r#"{{"id":"d","source":"/s","type":"t","{ODD}":1}}"#),
    ];
    let input = folder.file("input.jsonl", text.join("\n"));
    let store = folder.path("store");
    let component = guest("order-intake").display().to_string();
    let run = ["run", "--processor", "orders", "--component", &component, "--input", &input, "--log", "trace"];
    for more in [&["--verbose"][..], &["--json"], &[]] {
        let output = hapax().args(run).args(["--store", &store]).args(more).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert_nothing_moves_the_cursor(&output);
    }
    let list = |what: &[&str], json: bool| {
        let mut command = hapax();
        command.args(what).args(["--store", &store]).args(json.then_some("--json"));
        let output = command.output().unwrap();
        assert_nothing_moves_the_cursor(&output);
        String::from_utf8(output.stdout).unwrap()
    };
    let listed = list(&["dlq", "list", "--json"], false);
    let keys: Vec<Value> = listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(keys.len() >= 2, "{listed}");
    for json in [false, true] {
        assert!(list(&["dlq", "list"], json).contains("\\u001b"));
        assert!(list(&["dlq", "list", "--limit", "1"], json).contains("\\u001b"));
        for key in &keys {
            let key = key["key"].as_str().unwrap();
            if !key.contains('\0') {
                assert!(list(&["dlq", "show", key], json).contains("\\u001b"));
            }
        }
        assert!(list(&["records", "list"], json).contains("\\u001b"));
        assert!(list(&["state", "list", "orders"], json).contains("\\u001b"));
        list(&["audit", "--processor", "orders"], json);
        list(&["streams", "--processor", "orders"], json);
        list(&["dlq", "redrive", "--all", "--dry-run"], json);
        list(&["dlq", "show", "a/b/c/d\u{1b}[2K\n FORGED#00000000000000000000000000000000"], json);
    }
}

#[test]
fn mutation_output_unescaped_is_found() {
    hapax_tests::mutation::turns_red(
        module_path!(),
        "control_characters_of_messages_never_reach_the_output_or_the_log_as_they_are",
        "output-unescaped",
    );
}

/// Messages that fail often enough to open a circuit breaker.
fn failing(folder: &Folder, settings: &str) -> Command {
    let messages = (0..300).map(|id| format!(r#"{{"id":"m-{id}","source":"/s","type":"retry"}}"#));
    let input = folder.file("input.jsonl", messages.collect::<Vec<_>>().join("\n"));
    let component = guest("hapax-fixtures");
    let config = format!("store = \"store\"\n[processors.odd]\ncomponent = {component:?}\n{settings}");
    let config = folder.file("hapax.toml", config);
    let mut command = hapax();
    command.args(["run", "--json", "--processor", "odd", "--config", &config, "--input", &input]);
    command
}

const QUICK: &str = "attempts_max = 2\nbackoff_base_ms = 1\nbackoff_max_ms = 2\n";

/// Proves G138.
#[test]
fn a_run_takes_its_file_to_the_end_without_a_circuit_breaker_unless_it_is_asked_for() {
    let folder = Folder::new();
    let settings = format!("{QUICK}[processors.odd.breaker]\nopen_ms = 3600000\n");
    let output = failing(&folder, &settings).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(summary(&output)["dead_lettered"], 300);
    assert!(stderr(&output).contains("uses no circuit breaker; with --breaker"), "{}", stderr(&output));

    // It is open for an hour: the command waits, says so, and still ends when it is told to.
    let folder = Folder::new();
    let mut child =
        failing(&folder, &settings).arg("--breaker").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    while !said.contains("waiting: ") {
        said = lines.next().expect("it says what it waits for").unwrap();
    }
    assert!(said.contains("messages have no outcome yet") && said.contains("the circuit breaker is open"), "{said}");
    stop(&child);
    let (code, output) = (child.wait().unwrap().code(), std::io::read_to_string(child.stdout.take().unwrap()).unwrap());
    assert_eq!(code, Some(10), "{output}");
}

/// Proves G138.
#[test]
fn a_run_that_waits_for_retries_says_so_and_ends_when_it_is_told_to() {
    let folder = Folder::new();
    let settings = "attempts_max = 1000\nbackoff_base_ms = 3600000\nbackoff_max_ms = 3600000\n";
    let mut child = failing(&folder, settings)
        .args(["--concurrency", "2"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let said =
        lines.find(|line| line.as_ref().unwrap().contains("waiting: ")).expect("it says what it waits for").unwrap();
    assert!(said.contains("32 messages have no outcome yet; 0 run"), "{said}");
    stop(&child);
    assert_eq!(child.wait().unwrap().code(), Some(10));
}

fn stop(child: &std::process::Child) {
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
}
