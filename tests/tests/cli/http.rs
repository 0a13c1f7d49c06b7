//! `hapax up` and `hapax send`: every answer a client can get, from the real binary.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Scope, scope};

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
        Self::with("outbox = { file = \"outbox.jsonl\" }", "attempts_max = 2")
    }

    /// A host with these settings of its own, and these of the processor `odd`.
    fn with(settings: &str, odd: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\n{settings}\n\n\
             [processors.orders]\ncomponent = {:?}\n\n[processors.odd]\ncomponent = {:?}\n{odd}\n",
            guest("order-intake"),
            guest("hapax-fixtures"),
        );
        std::fs::write(folder.path().join("hapax.toml"), config).unwrap();
        Self::up(hapax(), folder)
    }

    /// `hapax up` in this folder.
    fn up(mut hapax: Command, folder: tempfile::TempDir) -> Self {
        hapax.args(["up", "--json", "--config"]).arg(folder.path().join("hapax.toml"));
        let mut child = hapax.stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).unwrap();
        let address = first["listening"].as_str().unwrap().to_owned();
        Self { child, address, folder }
    }

    fn post(&self, processor: &str, headers: &[&str], body: &str) -> Answer {
        let length = format!("content-length: {}", body.len());
        let headers = [headers, &[&length]].concat();
        self.ask(&format!("POST /v1/processors/{processor}/messages"), &headers, body)
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path}"), &[], "")
    }

    fn ask(&self, what: &str, headers: &[&str], body: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let mut head = format!("{what} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n");
        for header in headers {
            head.push_str(header);
            head.push_str("\r\n");
        }
        write!(stream, "{head}\r\n{body}").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// Posts this message of `odd` twice at once, where it is held until something else is done:
    /// answers how the one of the two that did not run was refused, and where to learn how the
    /// other one ends.
    fn hold<'s>(&'s self, scope: &'s Scope<'s, '_>, message: &'s str) -> (Answer, Receiver<Answer>) {
        let (answers, answered) = channel();
        for answers in [answers.clone(), answers] {
            scope.spawn(move || answers.send(self.post("odd", &[STRUCTURED], message)));
        }
        (answered.recv().unwrap(), answered)
    }

    fn signal_to_stop(&self) {
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    fn stop(mut self) -> (i32, tempfile::TempDir) {
        self.signal_to_stop();
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
        ("orders", vec!["content-type: application/cloudevents-batch+json"], "[]".to_owned(), 415, "NAME/batch"),
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
        let args = ["send", "orders", "--json", "--host", &url, "--id", "o", "--data", data];
        let output = hapax().args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(send()["replayed"], false);
    assert_eq!(send()["replayed"], true);
    let nobody = hapax().args(["send", "orders", "--host", "http://127.0.0.1:1", "--id", "o"]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(12), "{nobody:?}");
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("is the host running?"), "{nobody:?}");
}

/// Proves G31.
#[test]
fn where_waiting_is_off_a_message_in_flight_is_answered_409() {
    let server = Server::with("", "wait_in_flight = false\ndeadline_ms = 60000");
    let held = r#"{"id":"h","source":"/s","type":"held","subject":"gate"}"#;
    scope(|scope| {
        let (refused, ended) = server.hold(scope, held);
        assert!(refused.status == 409 && refused.body.contains("in-flight"), "{} {}", refused.head, refused.body);
        assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
        let gate = r#"{"id":"g","source":"/s","type":"counter","subject":"gate"}"#;
        assert_eq!(server.post("odd", &[STRUCTURED], gate).status, 200);
        let ended = ended.recv().unwrap();
        assert_eq!((ended.status, &*ended.body), (200, "let go"));
        assert!(!ended.head.contains("idempotent-replayed"), "{}", ended.head);
    });
    let again = server.post("odd", &[STRUCTURED], held);
    assert!(again.status == 200 && again.head.contains("idempotent-replayed: true"), "{}", again.head);
}

/// Proves G32.
#[test]
fn while_it_drains_it_says_so_and_what_it_took_ends() {
    let mut server = Server::with("", "wait_in_flight = false\ndeadline_ms = 5000");
    assert_eq!(server.get("/readyz").status, 200);
    scope(|scope| {
        let (refused, ended) = server.hold(scope, r#"{"id":"h","source":"/s","type":"held","subject":"never"}"#);
        assert_eq!(refused.status, 409, "{}", refused.body);
        server.signal_to_stop();
        let ready = loop {
            let ready = server.get("/readyz");
            if ready.status != 200 {
                break ready;
            }
        };
        assert!(ready.status == 503 && ready.body.contains("the host is stopping"), "{}", ready.body);
        let late = server.post("orders", &[STRUCTURED], &order("late", 1));
        assert!(late.status == 503 && late.body.contains("the host is stopping"), "{}", late.body);
        assert_eq!(server.get("/healthz").status, 200);
        let ended = ended.recv().unwrap();
        assert!(ended.status == 503 && ended.body.contains("deadline"), "{}", ended.body);
    });
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let store = server.folder.path().join("store");
    let listed = hapax().args(["records", "list", "--json", "--store"]).arg(store).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("retry-due") && !listed.contains("late"), "{listed}");
}

/// The limit of a file's size stands in for a disk that is full.
/// Proves G33.
#[test]
fn once_its_store_has_failed_the_host_is_not_ready() {
    let (code, folder) = Server::with("", "").stop();
    assert_eq!(code, 0);
    let files = std::fs::read_dir(folder.path().join("store")).unwrap();
    let largest = files.map(|file| file.unwrap().metadata().unwrap().len()).max().unwrap();
    let mut limited = Command::new("bash");
    // `ulimit -f` counts blocks of 1,024 bytes.
    limited.args(["-c", &format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", largest.div_ceil(1_024)), "bash"]);
    limited.arg(hapax().get_program());
    let server = Server::up(limited, folder);
    assert_eq!(server.get("/readyz").status, 200);
    let large = "x".repeat(900_000);
    let echo = |number| format!(r#"{{"id":"e-{number}","source":"/s","type":"echo","data":"{large}"}}"#);
    let mut answers = (0..500).map(|number| server.post("odd", &[STRUCTURED], &echo(number)));
    let full = answers.find(|answer| answer.status != 200).expect("500 results of 900 kB are over the limit");
    assert!(full.status == 503 && full.body.contains("disk is full"), "{}", full.body);
    let ready = server.get("/readyz");
    assert!(ready.status == 503 && ready.body.contains("disk is full"), "{}", ready.body);
    assert_eq!(server.get("/healthz").status, 200);
}

/// The committer panics with the first message that is to be written.
/// Proves G140.
#[test]
fn a_panic_of_the_committer_counts_as_a_failed_store() {
    let (_, folder) = Server::with("", "").stop();
    let mut command = hapax();
    command.env("HAPAX_MUTATION", "committer-panics");
    let mut server = Server::up(command, folder);
    assert_eq!(server.get("/readyz").status, 200);
    let answer = server.post("orders", &[STRUCTURED], &order("o-1", 1));
    assert!(answer.status == 503 && answer.body.contains("unavailable"), "{}", answer.body);
    let ready = server.get("/readyz");
    assert!(ready.status == 503 && ready.body.contains("the committer panicked"), "{}", ready.body);
    let later = server.post("orders", &[STRUCTURED], &order("o-2", 1));
    assert_eq!(later.status, 503, "{}", later.body);
    assert_eq!(server.child.wait().unwrap().code(), Some(8), "it ends by itself");
}

/// An order as a plain body, with these headers beside it.
fn versioned(server: &Server, id: &str, headers: &[&str]) -> Answer {
    let message_key = [&format!("ce-id: {id}")[..], "ce-source: /shop", "ce-type: order.placed", "ce-specversion: 1.0"];
    let body = format!(r#"{{"order_id":"{id}","customer":"c-{id}","amount_cents":1}}"#);
    server.post("orders", &[&message_key[..], &["content-type: application/json"], headers].concat(), &body)
}

const STRICT: &str = "
[processors.orders.strategy]
kind = \"version\"
entity = { header = \"X-Entity\" }
version = { header = \"X-Version\" }
order = \"strict\"
";

impl Server {
    /// A host whose processor `orders` has these settings.
    fn with_orders(settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\n[processors.orders]\ncomponent = {:?}\n{settings}\n",
            guest("order-intake")
        );
        std::fs::write(folder.path().join("hapax.toml"), config).unwrap();
        Self::up(hapax(), folder)
    }
}

#[test]
fn versions_in_headers_are_parked_and_stale_over_http() {
    let server = Server::with_orders(STRICT);
    let at = |id: &str, version: &str| versioned(&server, id, &["x-entity: e", &format!("x-version: {version}")]);
    let early = at("o-2", "2");
    assert_eq!(early.status, 202, "{}", early.body);
    let body: Value = serde_json::from_str(&early.body).unwrap();
    assert_eq!((&body["outcome"], &body["awaits"]), (&"parked".into(), &1.into()));
    assert_eq!(at("o-1", "1").status, 200);
    // The host runs it by itself: whoever asks then gets its result, or waits for it.
    let second = at("o-2", "2");
    assert_eq!(second.status, 200, "{}", second.body);
    let stale = at("o-1", "1");
    assert_eq!(stale.status, 422, "{}", stale.body);
    assert!(stale.body.contains("\"stale\""), "{}", stale.body);
    let nameless = versioned(&server, "o-3", &["x-entity: e"]);
    assert_eq!(nameless.status, 422);
    assert!(nameless.body.contains("header `x-version`"), "{}", nameless.body);
}

/// Proves G58.
#[test]
fn a_configuration_that_would_forget_too_soon_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("hapax.toml");
    let check = |settings: &str| {
        let processor = format!("[processors.orders]\ncomponent = {:?}\n{settings}\n", guest("order-intake"));
        std::fs::write(&config, format!("store = \"store\"\n{processor}")).unwrap();
        let output = hapax().args(["check", "--config"]).arg(&config).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = check("retention_ms = 1000");
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("redelivery_horizon_ms") && text.contains("allow_short_retention"), "{text}");
    assert_eq!(check("retention_ms = 1000\nallow_short_retention = true").0, 0);
    assert_eq!(check("retention_ms = 1000\nredelivery_horizon_ms = 1000").0, 0);
    for (setting, word) in [
        ("strategy = \"vector-clock\"", "strategy"),
        ("strategy = { kind = \"content-hash\", only = [\"/a\"], without = [\"/b\"] }", "not both"),
        ("strategy = { kind = \"content-hash\", only = [\"a\"] }", "JSON pointer"),
        ("strategy = { kind = \"version\", first = 3 }", "order = \"strict\""),
        ("attempts_max = 0", "1 to 1000"),
        ("strategy = { kind = \"version\", entity = { cookie = \"x\" } }", "strategy"),
    ] {
        let (code, text) = check(setting);
        assert_eq!(code, 2, "{setting}: {text}");
        assert!(text.contains(word), "{setting}: {text}");
    }
}

#[test]
fn a_file_runs_through_a_configured_processor() {
    let folder = tempfile::tempdir().unwrap();
    let component = guest("order-intake");
    let strategy = "{ kind = \"version\", version = { attribute = \"sequence\" }, order = \"strict\" }";
    let config = format!("store = \"store\"\n[processors.orders]\ncomponent = {component:?}\nstrategy = {strategy}\n");
    std::fs::write(folder.path().join("hapax.toml"), config).unwrap();
    let order = |version: u32| {
        let data = serde_json::json!({ "order_id": version.to_string(), "customer": "c", "amount_cents": version });
        let event = serde_json::json!({
            "specversion": "1.0", "id": version.to_string(), "source": "/shop", "type": "order.placed", "subject": "e",
            "sequence": version.to_string(), "data": data,
        });
        event.to_string() + "\n"
    };
    // 5 waits for 4, which never comes.
    std::fs::write(folder.path().join("input.jsonl"), [3, 1, 2, 5].map(order).concat()).unwrap();
    let run = |processor: &str| {
        let mut command = hapax();
        command.args(["run", "--json", "--concurrency", "1", "--config", "hapax.toml", "--processor", processor]);
        let output = command.args(["--input", "input.jsonl"]).current_dir(folder.path()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let last = text.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok()).unwrap_or_default();
        (output.status.code(), last["summary"].clone(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, summary, error) = run("orders");
    assert_eq!(code, Some(0), "{error}");
    assert_eq!((&summary["completed"], &summary["parked"], &summary["received"]), (&3.into(), &1.into(), &4.into()));
    let state = hapax()
        .args(["state", "get", "orders", "balance/c"])
        .current_dir(folder.path())
        .args(["--store", "store"])
        .output();
    assert_eq!(String::from_utf8(state.unwrap().stdout).unwrap().trim(), "6", "1, 2 and 3");
    let (code, _, error) = run("nobody");
    assert_eq!(code, Some(2));
    assert!(error.contains("no processor nobody") && error.contains("orders"), "{error}");
}
