//! Sagas against a reference: random plans of steps, calls, pivots and failures, over one message
//! or several in one saga, compensations that fail for a while, and hosts that die at any write.
//! What the service has booked, what the store holds and what is sent is what plain sequential code
//! comes to. `HAPAX_CASES` for the long form.

use std::collections::BTreeMap;

use hapax_core::{IdempotencyStorage as _, Outbox as _, Scope};
use hapax_tests::plans::{Op, Reply, plan};
use hapax_tests::sagas::World;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// A message, and what befalls the hosts that have it.
#[derive(Debug, Clone)]
struct Case {
    /// Whether it joins the saga of all that do.
    joins: bool,
    ops: Vec<Op>,
    /// Hosts that die over it: after so many writes, the last of them written or not.
    deaths: Vec<(u64, bool)>,
}

/// What all comes to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// What took effect at the service, in order.
    booked: Vec<String>,
    records: Vec<&'static str>,
    state: BTreeMap<String, String>,
    sent: Vec<String>,
}

/// A saga, as the reference has it.
#[derive(Debug, Default)]
struct Saga {
    steps: Vec<(String, String)>,
    pivoted: bool,
    closed: bool,
}

/// Attempts that a message has.
const ATTEMPTS: u32 = 3;

/// The reference: plain sequential code that nothing ever happens to.
fn reference(cases: &[Case]) -> Outcome {
    let mut world = Outcome::default();
    let mut shared = Saga::default();
    for (number, case) in cases.iter().enumerate() {
        let id = format!("m-{number}");
        let mut message_key = Saga::default();
        let saga = if case.joins { &mut shared } else { &mut message_key };
        world.take(&id, case, saga);
    }
    world
}

impl Outcome {
    fn take(&mut self, id: &str, case: &Case, saga: &mut Saga) {
        let (reached, completes) =
            if saga.closed && case.joins { (0, false) } else { how_far(&case.ops, saga.pivoted) };
        for op in &case.ops[..reached] {
            match op {
                Op::Step(name) => saga.steps.push((name.clone(), id.to_owned())),
                Op::Call(path) => self.booked.push(format!("{path} {id}")),
                Op::Pivot => saga.pivoted = true,
                _ => {}
            }
        }
        if completes {
            for op in &case.ops {
                match op {
                    Op::Set(key, value) => drop(self.state.insert(key.clone(), value.clone())),
                    Op::Send(kind) => self.sent.push(kind.clone()),
                    Op::Complete => saga.closed = true,
                    _ => {}
                }
            }
            return self.records.push("completed");
        }
        if saga.pivoted || saga.steps.is_empty() || saga.closed {
            saga.closed |= !saga.pivoted;
            return self.records.push("dead-lettered");
        }
        saga.closed = true;
        for (name, id) in saga.steps.drain(..).rev() {
            self.booked.push(format!("/undo/{name} {id}"));
            self.state.insert(format!("undone/{name}"), id);
            self.sent.push(format!("undone.{name}"));
        }
        self.records.push("compensated");
    }
}

/// How many of its operations a message takes, over all its attempts, and whether it completes.
fn how_far(ops: &[Op], mut pivoted: bool) -> (usize, bool) {
    for (index, op) in ops.iter().enumerate() {
        match op {
            Op::Pivot => pivoted = true,
            Op::Step(_) if pivoted => return (index, false),
            Op::RetryUntil(attempt) if *attempt > ATTEMPTS => return (index, false),
            Op::Reject => return (index, false),
            _ => {}
        }
    }
    (ops.len(), true)
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let op = prop_oneof![
        5 => name().prop_map(|name| Op::Step(name.into())),
        4 => prop::sample::select(vec!["/x", "/y"]).prop_map(|path| Op::Call(path.into())),
        1 => Just(Op::Pivot),
        2 => (name(), 0..100_u32).prop_map(|(key, value)| Op::Set(key.into(), value.to_string())),
        1 => name().prop_map(|kind| Op::Send(kind.into())),
        1 => (2..5_u32).prop_map(Op::RetryUntil),
        2 => Just(Op::Reject),
    ];
    prop::collection::vec(op, 1..8)
}

fn cases() -> impl Strategy<Value = Vec<Case>> {
    let deaths = prop::collection::vec((0..14_u64, any::<bool>()), 0..4);
    let case = (any::<bool>(), any::<bool>(), ops(), deaths).prop_map(|(joins, completes, mut ops, deaths)| {
        if joins {
            ops.insert(0, Op::Join("trip".into()));
            ops.extend(completes.then_some(Op::Complete));
        }
        Case { joins, ops, deaths }
    });
    prop::collection::vec(case, 1..5)
}

async fn lived(cases: &[Case], stubborn: &[(&'static str, usize)]) -> Outcome {
    let world = World::new();
    for (path, times) in stubborn {
        world.books.reply(path, &vec![Reply::Status(503); *times]);
    }
    let mut lived = Outcome::default();
    for (number, case) in cases.iter().enumerate() {
        let message = plan(&format!("m-{number}"), &case.ops);
        for (left, writes_the_last) in &case.deaths {
            let host = world.mortal(*left, *writes_the_last).await;
            if host.deliver(&message).await.is_ok() {
                let _ = host.undo().await;
            }
        }
        let host = world.host().await;
        host.deliver(&message).await.unwrap();
        let mut rounds = 0;
        while world.record("p", &message).await.state.name() == "compensating" {
            world.clock.advance(120_000);
            host.undo().await.unwrap();
            rounds += 1;
            assert!(rounds < 50, "it is never undone");
        }
        lived.records.push(world.record("p", &message).await.state.name());
    }
    let rows = world.store.view(&Scope::of("p")).scan("", None, 1_000).await.unwrap();
    lived.state = rows.into_iter().map(|(key, _, value)| (key, String::from_utf8(value.to_vec()).unwrap())).collect();
    let sent = world.store.pending(None, 1_000).await.unwrap();
    lived.sent = sent.into_iter().map(|row| row.message.kind).collect();
    lived.booked = world.books.applied();
    lived
}

/// Few cases by default. With a mutation in the code nothing is kept, and nothing is made small.
fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct(concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/saga.txt"));
    let mutated = std::env::var("HAPAX_MUTATION").is_ok();
    ProptestConfig {
        cases: std::env::var("HAPAX_CASES").map_or(150, |cases| cases.parse().unwrap()),
        failure_persistence: (!mutated).then(|| Box::new(file) as _),
        max_shrink_iters: if mutated { 0 } else { 5_000 },
        ..ProptestConfig::default()
    }
}

/// Proves G14, G118.
#[test]
fn whatever_dies_a_saga_comes_to_what_the_reference_says() {
    let stubborn = || (0..3_usize, 0..3_usize).prop_map(|(a, b)| vec![("/undo/a", a), ("/undo/b", b)]);
    proptest!(config(), |(cases in cases(), stubborn in stubborn())| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let lived = runtime.block_on(lived(&cases, &stubborn));
        prop_assert_eq!(lived, reference(&cases));
    });
}

hapax_tests::mutations! {
    mutation_the_reference_finds_the_forward_order: whatever_dies_a_saga_comes_to_what_the_reference_says is red with "undo-in-forward-order";
    mutation_the_reference_finds_a_step_that_is_not_durable: whatever_dies_a_saga_comes_to_what_the_reference_says is red with "step-not-durable";
    mutation_the_reference_finds_a_key_of_each_attempt: whatever_dies_a_saga_comes_to_what_the_reference_says is red with "step-key-of-the-attempt";
}
