//! Sagas of real guests over the real binary: a trip of several messages, and a guest that does
//! what its message says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;

use hapax_tests::payments::Payments;
use hapax_tests::process::{guest, hapax};
use hapax_tests::server::{Printed, on_store};
use serde_json::{Value, json};

/// A folder with a service and a store, and a guest that may call that service.
struct House {
    folder: tempfile::TempDir,
    payments: Payments,
    guest: &'static str,
    /// Further lines of the processor's configuration.
    settings: String,
}

impl House {
    fn of(guest: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let payments = Payments::start(folder.path());
        let settings = format!("http = [{:?}]\nbackoff_base_ms = 1", payments.url());
        Self { folder, payments, guest, settings }
    }

    fn url(&self, path: &str) -> String {
        self.payments.url() + path
    }

    /// One message after the other; what became of each, with what was undone.
    fn run(&self, events: &[Value]) -> Vec<Value> {
        let component = guest(self.guest);
        let (settings, url) = (&self.settings, self.payments.url());
        let config = format!(
            "store = \"store\"\n[processors.p]\ncomponent = {component:?}\n{settings}\n[processors.p.config]\nservice = {url:?}\n"
        );
        let path = self.folder.path();
        std::fs::write(path.join("hapax.toml"), config).unwrap();
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        std::fs::write(path.join("input.jsonl"), lines).unwrap();
        let mut command = hapax();
        command.args(["run", "--json", "--concurrency", "1", "--processor", "p"]);
        command.arg("--config").arg(path.join("hapax.toml")).arg("--input").arg(path.join("input.jsonl"));
        let mut lines = Printed::by(command.arg("--outbox").arg(path.join("outbox.jsonl"))).lines();
        lines.pop();
        lines
    }

    fn sent(&self) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.folder.path().join("outbox.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| (line["type"].as_str().unwrap().to_owned(), line["data"].to_string())).collect()
    }

    fn state(&self) -> Vec<String> {
        let listed = on_store(self.folder.path(), &["state", "list", "p"]);
        listed.out.lines().map(str::to_owned).collect()
    }
}

fn event(id: &str, kind: &str, data: Value) -> Value {
    json!({
        "specversion": "1.0", "id": id, "source": "/s", "type": kind, "datacontenttype": "application/json", "data": data,
    })
}

fn outcomes(lines: &[Value]) -> Vec<String> {
    let one = |line: &Value| format!("{} {}", line["id"].as_str().unwrap(), line["outcome"].as_str().unwrap());
    lines.iter().map(one).collect()
}

/// Proves G68.
#[test]
fn a_trip_of_which_a_part_cannot_be_had_is_cancelled_the_last_booking_first() {
    let house = House::of("travel-booking");
    let part = |id: &str, kind: &str, trip: &str| event(id, &format!("trip.{kind}"), json!({ "trip": trip }));
    let lines = house.run(&[
        part("t-1", "flight", "rome"),
        part("t-2", "flight", "oslo"),
        part("t-3", "hotel", "rome"),
        part("t-4", "confirm", "oslo"),
        part("t-5", "car", "rome"),
        part("t-6", "car", "oslo"),
        part("t-7", "flight", "rome"),
    ]);
    let mut ended = outcomes(&lines);
    ended.sort_unstable();
    let expected = [
        "t-1 completed",
        "t-2 completed",
        "t-3 completed",
        "t-4 completed",
        "t-5 compensated",
        "t-5 compensating",
        "t-6 dead-lettered",
        "t-7 dead-lettered",
    ];
    assert_eq!(ended, expected);
    let done = house.payments.books().into_iter().filter(|entry| entry.applied && entry.body["trip"] == "rome");
    let done: Vec<_> = done.map(|entry| format!("{} {}", entry.path, entry.body["kind"].as_str().unwrap())).collect();
    let expected = [
        "/bookings flight",
        "/bookings hotel",
        "/bookings/cancel car",
        "/bookings/cancel hotel",
        "/bookings/cancel flight",
    ];
    assert_eq!(done, expected);
    assert_eq!(house.payments.applied("oslo"), ["/bookings"]);
    let cancelled: Vec<_> = house.sent().into_iter().filter(|(kind, _)| kind == "trip.cancelled").collect();
    let cancelled: Vec<_> = cancelled.iter().map(|(_, data)| data.as_str()).collect();
    assert_eq!(cancelled, ["\"car\"", "\"hotel\"", "\"flight\""]);
    for (trip, state) in [("rome", "compensated"), ("oslo", "completed")] {
        let shown = on_store(house.folder.path(), &["--json", "saga", "show", trip]).lines().remove(0);
        assert_eq!(shown["state"], state, "{shown}");
    }
}

/// What the fixture is to do, as the payload of its message.
fn plan(id: &str, ops: Value) -> Value {
    event(id, "plan", ops)
}

/// Proves G65.
#[test]
fn a_guest_that_traps_for_good_is_undone_and_what_its_way_back_writes_stays() {
    let house = House::of("saga-fixture");
    let undo = |what: &str| json!([{ "op": "set", "key": what, "value": "undone" }, { "op": "send", "kind": what }]);
    let lines = house.run(&[plan(
        "m-1",
        json!([
            { "op": "set", "key": "never", "value": 1 },
            { "op": "step", "name": "a", "undo": undo("a") },
            { "op": "step", "name": "b", "undo": undo("b") },
            { "op": "trap" },
        ]),
    )]);
    assert_eq!(outcomes(&lines), ["m-1 compensating", "m-1 compensated"]);
    assert!(lines[0]["error"].as_str().unwrap().contains("as it was told"), "{}", lines[0]);
    assert_eq!(house.state(), ["a\t\"undone\"", "b\t\"undone\""]);
    assert_eq!(house.sent().iter().map(|(kind, _)| kind.as_str()).collect::<Vec<_>>(), ["b", "a"]);
}

/// Proves G76.
#[test]
fn a_re_run_of_a_guest_is_answered_from_the_journal() {
    let house = House::of("saga-fixture");
    let call =
        |path: &str| json!({ "op": "call", "method": "POST", "url": house.url(path), "body": { "order_id": "o" } });
    let ops = json!([call("/charges"), { "op": "retry-until", "attempt": 3 }, call("/shipments")]);
    let lines = house.run(&[plan("m-1", ops)]);
    assert_eq!(outcomes(&lines), ["m-1 completed"]);
    assert_eq!(lines[0]["result"], json!([{ "status": 200, "body": "{}" }, { "status": 200, "body": "{}" }]));
    let books = house.payments.books();
    assert_eq!(books.iter().map(|entry| entry.path.as_str()).collect::<Vec<_>>(), ["/charges", "/shipments"]);
    assert!(books.iter().all(|entry| entry.key.len() == 32 && entry.trace.starts_with("00-")), "{books:?}");
    assert_ne!(books[0].key, books[1].key);
}

/// Proves G81.
#[test]
fn what_a_guest_was_not_granted_it_does_not_get() {
    let house = House::of("saga-fixture");
    let call = |url: &str| json!([{ "op": "call", "method": "GET", "url": url, "body": null }]);
    let elsewhere = house.payments.url().replace("127.0.0.1", "127.0.0.2");
    let lines = house.run(&[
        plan("m-1", call("http://169.254.169.254/latest/meta-data")),
        plan("m-2", call(&elsewhere)),
        plan("m-3", call("no url")),
        plan("m-4", json!([{ "op": "step", "name": "z", "undo": [] }])),
        plan("m-5", json!([{ "op": "pivot" }, { "op": "step", "name": "a", "undo": [] }])),
    ]);
    let expected: Vec<_> = (1..6).map(|number| format!("m-{number} dead-lettered")).collect();
    assert_eq!(outcomes(&lines), expected);
    let error = |number: usize| lines[number - 1]["error"].as_str().unwrap();
    assert!(error(1).contains("granted") && error(2).contains("granted"), "{} / {}", error(1), error(2));
    assert!(error(4).contains("`z`") && error(4).contains("`a`"), "{}", error(4));
    assert!(error(5).contains("pivoted"), "{}", error(5));
    assert_eq!(house.payments.books(), []);
}

#[test]
fn a_lock_of_a_guest_has_a_new_fence_each_time() {
    let house = House::of("saga-fixture");
    let lock = json!([{ "op": "lock", "name": "till", "ttl_ms": 1_000 }]);
    let lines = house.run(&[plan("m-1", lock.clone()), plan("m-2", lock)]);
    assert_eq!([&lines[0]["result"], &lines[1]["result"]], [&json!([1]), &json!([2])]);
}

#[test]
fn a_guest_joins_and_completes_a_saga_by_name() {
    let house = House::of("saga-fixture");
    let join = json!({ "op": "join", "saga": "deal" });
    let lines = house.run(&[
        plan("m-1", json!([join, { "op": "step", "name": "a", "undo": [] }])),
        plan("m-2", json!([join, { "op": "complete" }])),
        plan("m-3", json!([join, { "op": "reject", "reason": "late" }])),
    ]);
    assert_eq!(outcomes(&lines), ["m-1 completed", "m-2 completed", "m-3 dead-lettered"]);
    assert!(lines[2]["error"].as_str().unwrap().contains("completed"), "{}", lines[2]);
}

/// The guest names the secret; the service gets it, and nobody else does.
/// Proves G84.
#[test]
fn a_secret_is_put_in_by_the_host_and_the_guest_never_has_it() {
    let mut house = House::of("saga-fixture");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let service = std::thread::spawn(move || {
        let (connection, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(connection);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            reader.read_line(&mut head).unwrap();
        }
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
        head
    });
    std::fs::write(house.folder.path().join("token"), "s3cret\n").unwrap();
    house.settings = format!("http = [{url:?}]\nsecrets = {{ token = {{ file = \"token\", for = [{url:?}] }} }}");
    let with =
        json!([{ "op": "call-with", "url": url, "header": "authorization", "value": "Bearer {{secret:token}}" }]);
    let lines = house.run(&[plan("m-1", with)]);
    assert_eq!(outcomes(&lines), ["m-1 completed"]);
    assert!(service.join().unwrap().contains("authorization: Bearer s3cret\r\n"));
    let mut files = vec![house.folder.path().join("store")];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(6).any(|window| window == b"s3cret"), "it is in {}", path.display());
        }
    }
}

/// Proves G87.
#[test]
fn settings_that_would_not_work_are_refused_at_the_start() {
    let house = House::of("saga-fixture");
    let refused = |settings: &str, words: &[&str]| {
        let component = guest("saga-fixture");
        let config = format!("store = \"store\"\n[processors.p]\ncomponent = {component:?}\n{settings}\n");
        let path = house.folder.path().join("wrong.toml");
        std::fs::write(&path, config).unwrap();
        let mut command = hapax();
        command.args(["run", "--processor", "p", "--config"]).arg(path);
        Printed::by(&mut command).refused(2, words);
    };
    refused("lease_ms = 500", &["lease_ms", "deadline_ms"]);
    refused("redelivery_after_ms = 20000", &["redelivery_after_ms", "lease_ms"]);
    refused("http = [\"example.com\"]", &["example.com", "https://api.example.com"]);
    refused("http_timeout_ms = 5", &["http_timeout_ms", "no calls are granted"]);
    refused("compensation_attempts_max = 0", &["compensation_attempts_max"]);
    refused(
        "http = [\"https://a.test\"]\nsecrets = { t = { env = \"HAPAX_NO_SUCH\" } }",
        &["secrets.t", "HAPAX_NO_SUCH"],
    );
    refused(
        "http = [\"https://a.test\"]\nsecrets = { t = { file = \"wrong.toml\", for = [\"https://b.test\"] } }",
        &["secrets.t", "https://b.test"],
    );
    refused("http = [\"https://a.test\"]\nhttp_ca_file = \"none.pem\"", &["http_ca_file"]);
}

#[test]
fn a_check_says_what_a_component_undoes_and_finds_wrong_settings() {
    let house = House::of("payment-saga");
    let component = guest("payment-saga");
    let mut check = hapax();
    check.args(["--json", "check", "--component"]).arg(&component);
    assert_eq!(Printed::by(&mut check).lines()[0]["steps"], json!(["reserve", "charge", "ship"]));
    let path = house.folder.path().join("wrong.toml");
    let config = format!("store = \"store\"\n[processors.p]\ncomponent = {component:?}\nlease_ms = 10\n");
    std::fs::write(&path, config).unwrap();
    let mut check = hapax();
    check.args(["check", "--config"]).arg(path);
    Printed::by(&mut check).refused(2, &["lease_ms"]);
}
