//! The real binary over a saga: killed at every fault point, forward and back, and over a service
//! that fails, hangs, breaks off and answers twice. What is believed are the service's own books.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};

use hapax_tests::payments::{Entry, Misbehaviour, Payments};
use hapax_tests::process::Job;
use hapax_tests::server::Printed;
use serde_json::Value;

const FORWARD: [&str; 3] = ["/reservations", "/charges", "/shipments"];
const BACK: [&str; 3] = ["/shipments/cancel", "/charges/refund", "/reservations/release"];

/// An order that is sold, and one that cannot be shipped; each delivered twice.
fn orders() -> String {
    let line = |id: &str, order: &str| {
        format!(
            "{}\n",
            serde_json::json!({
                "specversion": "1.0", "id": id, "source": "/shop", "type": "order.placed",
                "datacontenttype": "application/json",
                "data": { "order_id": order, "card": "4111", "amount_cents": 1200 },
            })
        )
    };
    let (sold, failed) = (line("m-1", "o-1"), line("m-2", "unshippable-2"));
    format!("{sold}{failed}{sold}{failed}")
}

/// `hapax run` of payment-saga over the orders, with this service; one message after the other, so
/// that each passage of a fault point is always the same one's.
fn job(service: &str) -> Job {
    let mut job = Job::new("payment-saga", &orders());
    let set = format!("service={service}");
    job.arguments = ["--concurrency", "1", "--http", service, "--set", &set].map(str::to_owned).to_vec();
    job
}

/// What is wrong with what the runs left behind, by the books of the service and by the store.
/// Empty if every step was taken once, none undone of the order that was sold, and all of the
/// other, in reverse.
fn faults(job: &Job, payments: &Payments) -> Vec<String> {
    let mut faults = Vec::new();
    let mut equal = |what: &str, is: &dyn std::fmt::Debug, should: &dyn std::fmt::Debug| {
        let (is, should) = (format!("{is:?}"), format!("{should:?}"));
        if is != should {
            faults.push(format!("{what}: {is}, and should be {should}"));
        }
    };
    equal("steps taken of o-1", &payments.applied("o-1"), &FORWARD);
    let failed = payments.applied("unshippable-2");
    equal("what became of unshippable-2", &failed, &[&FORWARD[..2], &BACK].concat());
    let books = payments.books();
    equal("calls that were made under two keys", &under_two_keys(&books), &[""; 0]);
    let listed = Printed::by(hapax_tests::process::hapax().args(["records", "list"]).arg("--store").arg(job.store()));
    let mut states: Vec<_> = listed.out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    states.sort_unstable();
    equal("records", &states, &["compensated", "completed"]);
    let sagas = Printed::by(hapax_tests::process::hapax().args(["saga", "list"]).arg("--store").arg(job.store()));
    let sagas: Vec<_> = sagas.out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    equal("sagas", &sagas, &["compensated"]);
    let sent = std::fs::read_to_string(job.outbox()).unwrap_or_default();
    let sent: Vec<Value> = sent.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sent: Vec<_> = sent.iter().map(|line| (line["type"].clone(), line["subject"].clone())).collect();
    equal("messages sent", &sent, &[("order.confirmed", "o-1")].map(|(kind, of)| (Value::from(kind), Value::from(of))));
    faults
}

/// Paths and orders that were asked for under more than one idempotency key.
fn under_two_keys(books: &[Entry]) -> Vec<String> {
    let mut keys: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for entry in books {
        keys.entry(format!("{} of {}", entry.path, entry.body["order_id"])).or_default().insert(&entry.key);
    }
    keys.into_iter().filter(|(_, keys)| keys.len() > 1).map(|(what, _)| what).collect()
}

/// Kills at every `step`th passage of each point, lets another host go on, and looks.
fn killed_at_every(points: &[&str], step: usize) {
    for point in points {
        for passage in (1..).step_by(step) {
            let folder = tempfile::tempdir().unwrap();
            let payments = Payments::start(folder.path());
            let mut job = job(&payments.url());
            if job.run(Some(&format!("{point}:{passage}"))) {
                assert!(passage > 1, "the fault point {point} never killed: it is not on the way");
                break;
            }
            assert!(job.run(None));
            assert_eq!(faults(&job, &payments), [""; 0], "at passage {passage} of {point}");
        }
    }
}

/// Proves G12.
#[test]
fn killed_at_every_point_on_the_way_forward_each_step_is_taken_once() {
    killed_at_every(
        &["claimed", "step-called", "step-registered", "call-out", "call-answered", "answer-kept", "invoked"],
        1,
    );
}

/// Proves G13.
#[test]
fn killed_at_every_point_on_the_way_back_each_step_is_undone_once_in_reverse() {
    killed_at_every(
        &["compensation-begins", "step-compensated", "compensation-recorded", "saga-ending", "saga-ended"],
        1,
    );
}

/// Proves G14.
#[test]
fn killed_at_every_write_the_saga_comes_to_the_same_end() {
    killed_at_every(&["group-written", "group-durable"], 2);
}

/// However the service behaves, what it did for an order is the same in the end.
/// Proves G79.
#[test]
fn however_the_service_misbehaves_each_step_is_taken_and_undone_once() {
    use Misbehaviour::{Hang, NoAnswer, Status, TwoAnswers};
    for how in [Status(503), Status(429), NoAnswer, TwoAnswers, Hang] {
        let folder = tempfile::tempdir().unwrap();
        let payments = Payments::start(folder.path());
        for path in FORWARD.iter().chain(&BACK) {
            payments.misbehave(path, &[how]);
        }
        // What hangs is given up after the deadline of the run: the default is a second.
        let mut job = job(&payments.url());
        assert!(job.run(None));
        assert_eq!(faults(&job, &payments), [""; 0], "{how:?}");
    }
}

/// The service in a process of its own, which dies with everything but its books.
struct Apart {
    child: Child,
    url: String,
}

impl Apart {
    fn start(folder: &std::path::Path, address: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_payments"));
        let mut child = command.arg(folder).arg(address).stdout(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut url).unwrap();
        Self { child, url: url.trim().to_owned() }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Proves G15.
#[test]
fn a_service_that_dies_in_between_is_asked_again_under_the_same_keys() {
    let folder = tempfile::tempdir().unwrap();
    let service = Apart::start(folder.path(), "127.0.0.1:0");
    let url = service.url.clone();
    let mut first = job(&url);
    assert!(!first.run(Some("call-answered:2")), "the host dies with the answer to the charge");
    drop(service);
    let service = Apart::start(folder.path(), url.trim_start_matches("http://"));
    assert!(first.run(None));
    drop(service);
    let payments = Payments::start(folder.path());
    assert_eq!(faults(&first, &payments), [""; 0]);
}

/// The same checks over a host with a fault put in on purpose: they must find something.
fn mutation_is_found(mutation: &str, fault: Option<&str>) {
    let folder = tempfile::tempdir().unwrap();
    let payments = Payments::start(folder.path());
    let mut job = job(&payments.url());
    job.environment.push(("HAPAX_MUTATION", mutation.to_owned()));
    if let Some(fault) = fault {
        assert!(!job.run(Some(fault)), "{fault} was not passed");
    }
    job.run(None);
    assert_ne!(faults(&job, &payments), [""; 0], "the mutation {mutation} was not found");
}

#[test]
fn mutation_undone_in_forward_order_by_the_host_is_found() {
    mutation_is_found("undo-in-forward-order", None);
}

#[test]
fn mutation_a_step_registered_after_its_effect_is_found() {
    mutation_is_found("step-not-durable", None);
}

#[test]
fn mutation_a_key_of_each_attempt_is_found() {
    mutation_is_found("step-key-of-the-attempt", Some("call-answered:1"));
}
