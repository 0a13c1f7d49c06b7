//! What an operator does about a saga that is halted, on the command line and over HTTP; and which
//! component undoes what an earlier one did. Over the real binary and a service with books.

use std::path::{Path, PathBuf};

use hapax_tests::payments::{Misbehaviour, Payments};
use hapax_tests::process::{guest, hapax};
use hapax_tests::server::{Printed, Server, on_store};
use serde_json::{Value, json};

/// A shop whose refunds are refused for as long as the test says.
struct Shop {
    folder: tempfile::TempDir,
    payments: Payments,
}

impl Shop {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let payments = Payments::start(folder.path());
        let shop = Self { folder, payments };
        shop.configure(&guest("payment-saga"));
        shop
    }

    fn configure(&self, component: &Path) {
        let url = self.payments.url();
        let config = format!(
            "store = \"store\"\nlisten = \"127.0.0.1:0\"\n[processors.odd]\ncomponent = {component:?}\nhttp = [{url:?}]\n\
             compensation_attempts_max = 2\nbackoff_base_ms = 1\n[processors.odd.config]\nservice = {url:?}\n"
        );
        std::fs::write(self.path().join("hapax.toml"), config).unwrap();
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn event() -> String {
        json!({
            "specversion": "1.0", "id": "m-1", "source": "/shop", "type": "order.placed",
            "datacontenttype": "application/json",
            "data": { "order_id": "unshippable-1", "card": "4111", "amount_cents": 5 },
        })
        .to_string()
    }

    /// `hapax run` over these lines.
    fn run(&self, input: &str) -> Printed {
        self.run_with(input, None)
    }

    fn run_with(&self, input: &str, fault: Option<&str>) -> Printed {
        let file = self.path().join("input.jsonl");
        std::fs::write(&file, input).unwrap();
        let mut command = hapax();
        command.args(["run", "--json", "--processor", "odd", "--config"]).arg(self.path().join("hapax.toml"));
        Printed::by(command.arg("--input").arg(file).envs(fault.map(|fault| ("HAPAX_FAULT", fault))))
    }

    /// Runs an order that cannot be shipped, and whose charge cannot be given back.
    fn halted(refusals: usize) -> Self {
        let shop = Self::new();
        shop.payments.misbehave("/charges/refund", &vec![Misbehaviour::Status(503); refusals]);
        let lines = shop.run(&Self::event()).lines();
        let outcomes: Vec<_> = lines.iter().filter_map(|line| line["outcome"].as_str()).collect();
        assert_eq!(outcomes, ["compensating", "compensation-failed"]);
        shop
    }

    fn on_store(&self, arguments: &[&str]) -> Printed {
        on_store(self.path(), arguments)
    }

    fn state(&self, what: &str) -> String {
        let listed = self.on_store(&["--json", what, "list"]).lines();
        assert_eq!(listed.len(), 1, "{listed:?}");
        listed[0]["state"].as_str().unwrap().to_owned()
    }

    /// The way back, by the books.
    fn undone(&self) -> Vec<String> {
        self.payments.applied("unshippable-1").split_off(2)
    }
}

const ID: &str = "default/odd/%2Fshop/m-1";

/// Proves G73.
#[test]
fn what_is_halted_is_shown_with_all_that_happened() {
    let shop = Shop::halted(2);
    assert_eq!((shop.state("saga"), shop.state("records")), ("stuck".into(), "compensation-failed".into()));
    let halted = shop.on_store(&["--json", "saga", "list", "--state", "stuck"]).lines();
    assert_eq!(halted[0]["id"], ID);
    assert_eq!(shop.on_store(&["--json", "saga", "list", "--state", "compensated"]).lines(), [] as [Value; 0]);
    let shown = shop.on_store(&["--json", "saga", "show", ID]).lines().remove(0);
    let hold_reason: Vec<_> = shown["steps"].as_array().unwrap().iter().map(|step| step["standing"].clone()).collect();
    assert_eq!(hold_reason, ["registered", "registered", "compensated"]);
    assert_eq!(shown["steps"][1]["attempts"], 2);
    assert!(shown["failure"]["error"].as_str().unwrap().contains("/shipments refuses"), "{shown}");
    let log: Vec<_> = shown["log"].as_array().unwrap().iter().map(|event| event["event"].clone()).collect();
    let expected = [
        "joined",
        "registered",
        "registered",
        "registered",
        "compensation-started",
        "compensated",
        "compensation-failed",
        "stuck",
    ];
    assert_eq!(log, expected);
    let text = shop.on_store(&["saga", "show", ID]).out;
    assert!(text.contains("step:     1: charge of message 0, registered, not compensated after 2 attempts"), "{text}");
    // A duplicate gets the failure, and nothing is done again.
    let again = shop.run(&Shop::event()).lines();
    assert_eq!(again[0]["outcome"], "duplicate");
    assert_eq!(shop.undone(), ["/shipments/cancel"]);
}

/// Proves G74.
#[test]
fn what_is_retried_is_undone_to_the_end() {
    let shop = Shop::halted(2);
    assert_eq!(shop.on_store(&["saga", "retry", ID, "--dry-run"]).code, Some(0));
    assert_eq!(shop.state("saga"), "stuck", "a dry run does nothing");
    let done = shop.on_store(&["saga", "retry", ID, "--reason", "the service is back"]);
    assert_eq!(done.out, format!("retry {ID}\nretry: 1 done, 0 refused\n"), "{done:?}");
    assert_eq!((shop.state("saga"), shop.state("records")), ("compensating".into(), "compensating".into()));
    let lines = shop.run("").lines();
    assert_eq!(lines[0]["outcome"], "compensated");
    assert_eq!((shop.state("saga"), shop.state("records")), ("compensated".into(), "compensated".into()));
    assert_eq!(shop.undone(), ["/shipments/cancel", "/charges/refund", "/reservations/release"]);
    let deeds = shop.on_store(&["--json", "audit", "--processor", "odd"]).lines();
    assert_eq!((deeds.len(), &deeds[0]["action"], &deeds[0]["key"]), (1, &json!("saga-retry"), &json!(ID)));
    assert_eq!(deeds[0]["reason"], "the service is back");
}

/// A compensation that kills the host counts its deaths as attempts: it is stuck in the end, and an
/// operator decides.
/// Proves G158.
#[test]
fn a_compensation_that_kills_the_host_is_stuck_in_the_end() {
    let shop = Shop::new();
    let mut deaths = 0;
    while shop.run_with(&Shop::event(), Some("compensating=m-1")).code.is_none() {
        deaths += 1;
        assert!(deaths <= 2, "two attempts are allowed");
    }
    assert_eq!((deaths, shop.state("saga")), (2, "stuck".to_owned()));
    let shown = shop.on_store(&["--json", "saga", "show", ID]).lines().remove(0).to_string();
    assert!(shown.contains("the host died 2 times while it ran this compensation"), "{shown}");
    assert_eq!(shop.on_store(&["saga", "retry", ID]).code, Some(0));
    shop.run("");
    assert_eq!(shop.state("saga"), "compensated");
    assert_eq!(shop.undone(), ["/shipments/cancel", "/charges/refund", "/reservations/release"]);
}

/// A message that is claimed has as many attempts as any other, however the host dies over it.
#[test]
fn deaths_over_a_claimed_message_count_once_each() {
    let shop = Shop::new();
    let mut deaths = 0;
    while shop.run_with(&Shop::event(), Some("running=m-1")).code.is_none() {
        deaths += 1;
        assert!(deaths <= 5, "five attempts are allowed");
    }
    assert_eq!(deaths, 5);
}

/// A step whose compensation kills the host can be skipped while the host is down.
#[test]
fn a_step_of_a_saga_that_is_being_compensated_is_skipped() {
    let shop = Shop::new();
    assert_eq!(shop.run_with(&Shop::event(), Some("compensating=m-1")).code, None);
    assert_eq!(shop.state("saga"), "compensating");
    let skipped = shop.on_store(&["saga", "skip", ID, "--reason", "cancelled by hand"]);
    assert_eq!(skipped.code, Some(0), "{skipped:?}");
    shop.run("");
    assert_eq!(shop.state("saga"), "compensated");
    assert_eq!(shop.undone(), ["/charges/refund", "/reservations/release"]);
}

/// Proves G74.
#[test]
fn what_is_skipped_is_left_out_and_the_rest_is_undone() {
    let shop = Shop::halted(2);
    shop.on_store(&["saga", "skip", ID]).refused(13, &["reason"]);
    shop.on_store(&["saga", "skip", ID, "--dry-run"]).refused(13, &["reason"]);
    assert_eq!(shop.on_store(&["saga", "skip", ID, "--reason", "refunded by hand"]).code, Some(0));
    shop.run("");
    assert_eq!((shop.state("saga"), shop.state("records")), ("compensated".into(), "compensated".into()));
    assert_eq!(shop.undone(), ["/shipments/cancel", "/reservations/release"]);
    let shown = shop.on_store(&["--json", "saga", "show", ID]).lines().remove(0);
    assert_eq!(shown["steps"][1]["standing"], "skipped");
}

/// Proves G74.
#[test]
fn what_is_resolved_is_over() {
    let shop = Shop::halted(2);
    shop.on_store(&["saga", "resolve", ID, "--reason", " "]).refused(13, &["reason"]);
    assert_eq!(shop.on_store(&["saga", "resolve", ID, "--reason", "all seen to"]).code, Some(0));
    assert_eq!((shop.state("saga"), shop.state("records")), ("resolved".into(), "compensated".into()));
    shop.run("");
    assert_eq!(shop.undone(), ["/shipments/cancel"]);
    let history = shop.on_store(&["records", "history", ID]).out;
    assert!(history.contains("compensation-resolved") && history.contains("the one that is stored"), "{history}");
}

#[test]
fn what_is_no_saga_is_told_in_words() {
    let shop = Shop::halted(2);
    shop.on_store(&["saga", "show", "default/odd/%2Fshop/m-2"]).refused(9, &["no saga", "hapax saga list"]);
    shop.on_store(&["saga", "retry", "trip-1"]).refused(9, &["no saga trip-1"]);
    shop.on_store(&["saga", "list", "--limit", "0"]).refused(2, &["limit"]);
    assert_eq!(shop.state("saga"), "stuck");
}

/// Proves G73.
#[test]
fn a_running_host_is_asked_over_http_and_goes_on_at_once() {
    let shop = Shop::new();
    shop.payments.misbehave("/charges/refund", &[Misbehaviour::Status(503); 2]);
    let host = Server::start(shop.path(), None);
    let (status, body) = host.post(&Shop::event());
    assert_eq!(status, 422, "{body}");
    let halted = host.until(&["--json", "saga", "list", "--state", "stuck"], |listed| !listed.out.is_empty());
    assert_eq!(halted.lines()[0]["id"], ID);
    let (status, body) = host.ask("GET /v1/status", &[], "");
    let sagas = serde_json::from_str::<Value>(&body).unwrap()["sagas"].clone();
    assert_eq!((status, sagas), (200, json!({ "compensating": 0, "stuck": 1 })));
    let (status, body) = host.ask("GET /v1/sagas?state=stuck", &[], "");
    assert_eq!(status, 200, "{body}");
    let json_type = ["content-type: application/json"];
    let order = json!({ "keys": [ID], "actor": "ann", "reason": "it is back" }).to_string();
    let (status, body) = host.ask("POST /v1/sagas/retry", &json_type, &order);
    assert_eq!((status, serde_json::from_str::<Value>(&body).unwrap()["done"].clone()), (200, json!([ID])));
    host.until(&["--json", "saga", "list"], |listed| listed.lines()[0]["state"] == "compensated");
    assert_eq!(shop.undone(), ["/shipments/cancel", "/charges/refund", "/reservations/release"]);
    let (status, body) = host.ask("POST /v1/sagas/skip", &json_type, &order);
    assert_eq!(status, 409, "{body}");
    for (order, what) in [("{}", "give `keys`"), (r#"{"keys":[""],"actor":"ann"}"#, "1 to 256"), ("[", "the order")] {
        let (status, body) = host.ask("POST /v1/sagas/resolve", &json_type, order);
        assert!(status == 400 && body.contains(what), "{status} {body}");
    }
    assert_eq!(host.ask("GET /v1/sagas?state=lost", &[], "").0, 400);
    for unknown in ["none", "retry", "skip", "resolve"] {
        let (status, body) = host.ask(&format!("GET /v1/sagas/{unknown}"), &[], "");
        assert!(status == 404 && body.contains(&format!("no saga {unknown}")), "{status} {body}");
    }
    assert_eq!(host.stop(), Some(0));
}

/// The same component but for its bytes: as somebody's next version.
fn next_version(folder: &Path) -> PathBuf {
    let mut bytes = std::fs::read(guest("payment-saga")).unwrap();
    // A custom section: its id, its size, its name.
    bytes.extend([0, 5, 4]);
    bytes.extend(b"next");
    let path = folder.join("next.wasm");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn kept_components(shop: &Shop) -> Vec<PathBuf> {
    let folder = std::fs::read_dir(shop.path().join("store/components")).unwrap();
    folder.map(|entry| entry.unwrap().path()).collect()
}

/// Proves G17.
#[test]
fn the_component_that_took_a_step_undoes_it_after_another_took_its_place() {
    let shop = Shop::new();
    assert_eq!(shop.run_with(&Shop::event(), Some("compensation-begins")).code, None, "it dies");
    let first = kept_components(&shop);
    assert_eq!(first.len(), 1);
    shop.configure(&next_version(shop.path()));
    let lines = shop.run("").lines();
    assert_eq!(lines[0]["outcome"], "compensated");
    assert_eq!(shop.undone(), ["/shipments/cancel", "/charges/refund", "/reservations/release"]);
    assert_eq!(kept_components(&shop).len(), 2);
    // Nothing needs the first one any more.
    shop.run("");
    let left = kept_components(&shop);
    assert!(left.len() == 1 && left != first, "{left:?}");
}

/// The next version takes no steps any more: it has nothing to undo with, and no claim to what the
/// earlier one did.
#[test]
fn a_component_without_a_way_back_leaves_undoing_to_the_one_before_it() {
    let shop = Shop::new();
    assert_eq!(shop.run_with(&Shop::event(), Some("compensation-begins")).code, None, "it dies");
    shop.configure(&guest("order-intake"));
    assert_eq!(shop.run("").lines()[0]["outcome"], "compensated");
    assert_eq!(shop.undone(), ["/shipments/cancel", "/charges/refund", "/reservations/release"]);
}

/// Proves G75.
#[test]
fn a_component_that_is_gone_halts_its_sagas_by_name() {
    let shop = Shop::new();
    assert_eq!(shop.run_with(&Shop::event(), Some("compensation-begins")).code, None, "it dies");
    let first = kept_components(&shop).remove(0);
    let away = shop.path().join("away.wasm");
    std::fs::rename(&first, &away).unwrap();
    shop.configure(&next_version(shop.path()));
    let lines = shop.run("").lines();
    assert_eq!(lines[0]["outcome"], "compensation-failed");
    let shown = shop.on_store(&["--json", "saga", "show", ID]).lines().remove(0);
    let error = shown["steps"][2]["error"].as_str().unwrap();
    assert!(error.contains(first.file_name().unwrap().to_str().unwrap()) && error.contains("`odd`"), "{error}");
    // Back in its place, it goes on.
    std::fs::rename(&away, &first).unwrap();
    shop.on_store(&["saga", "retry", ID, "--reason", "it is there again"]);
    assert_eq!(shop.run("").lines()[0]["outcome"], "compensated");
}

hapax_tests::mutations! {
    mutation_deaths_counted_by_claims_are_found: deaths_over_a_claimed_message_count_once_each is red with "deaths-counted-by-claims";
    mutation_deaths_of_compensations_uncounted_are_found: a_compensation_that_kills_the_host_is_stuck_in_the_end is red with "deaths-of-compensations-uncounted";
}
