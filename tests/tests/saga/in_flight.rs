//! Sagas while runs of their messages are under way, here or under another owner's claim: a step is
//! compensated after the run that may take it, never beside it. Owners over one store, on a clock
//! that the test turns.

use std::time::Duration;

use hapax_core::{
    Handling, IdempotentConsumer, Message, Options, Outcome, SagaId, SagaLog, SagaState, Scope, Select, StoreError,
    Strategy, VersionOrder,
};
use hapax_tests::owners::{BEGINS_MS, Owners};
use hapax_tests::plans::{Op, Reply, call, plan, step};
use hapax_tests::stepped::{eventually, let_others_run};
use tokio::task::JoinHandle;

/// Duration of a claim here.
const LEASE_MS: u64 = 30_000;

fn owner(world: &Owners, name: &str) -> IdempotentConsumer {
    world.consumer("p", Options { owner: name.into(), lease_ms: LEASE_MS, ..Options::default() })
}

/// A message of the saga `trip`, by its attribute.
fn part(id: &str, ops: &[Op]) -> Message {
    let mut message = plan(id, ops);
    message.extensions.insert("saga".into(), "trip".into());
    message
}

fn begin(owner: &IdempotentConsumer, message: &Message) -> JoinHandle<Result<Outcome, StoreError>> {
    let (owner, message) = (owner.clone(), message.clone());
    let handling = Handling { wait_in_flight: false, retry_here: false };
    tokio::spawn(async move { owner.handle(message, handling).await })
}

async fn trip_is(world: &Owners, state: SagaState) {
    let log = SagaLog::new(&world.store, &Scope::of("p"));
    for _ in 0..30_000 {
        if log.read(&SagaId::named("trip").unwrap()).await.unwrap().saga.state == state {
            return;
        }
        // A compensator that waits for the end of a claim looks again after a while.
        world.clock.advance(1);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("the trip never became {state:?}");
}

/// The hotel's booking is under way when the car is refused: it is cancelled after its booking has
/// come to its end.
/// Proves G141.
#[tokio::test]
async fn a_step_in_flight_is_compensated_after_its_run() {
    let world = Owners::new().await;
    world.books.reply("/hotel", &[Reply::Held]);
    let one = owner(&world, "one");
    let _compensator = world.compensating(&one);
    let hotel = begin(&one, &part("hotel", &[step("a"), call("/hotel")]));
    world.books.arrival("/hotel").await;
    let car = begin(&one, &part("car", &[Op::Reject])).await.unwrap().unwrap();
    assert!(matches!(car, Outcome::Compensating { .. }), "{car:?}");
    let_others_run().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(world.books.undone(), [""; 0], "its run may still take the step");
    world.books.let_go();
    let hotel = hotel.await.unwrap().unwrap();
    assert!(
        matches!(&hotel, Outcome::DeadLettered { error } if error.contains("no message joins it any more")),
        "{hotel:?}"
    );
    trip_is(&world, SagaState::Compensated).await;
    assert_eq!(world.books.undone(), ["a hotel"]);
    // The compensation knows the booking by the key of its call.
    let arrived = world.books.arrived();
    assert_eq!(arrived[1].step_key, arrived[0].key);
}

/// Another owner's run is under way: its claim is waited for.
/// Proves G142.
#[tokio::test]
async fn a_step_under_a_live_claim_elsewhere_is_not_compensated() {
    let world = Owners::new().await;
    world.books.reply("/hotel", &[Reply::Silence]);
    let (one, two) = (owner(&world, "one"), owner(&world, "two"));
    let hotel = begin(&one, &part("hotel", &[step("a"), call("/hotel")]));
    world.books.arrival("/hotel").await;
    let _compensator = world.compensating(&two);
    let car = begin(&two, &part("car", &[Op::Reject])).await.unwrap().unwrap();
    assert!(matches!(car, Outcome::Compensating { .. }), "{car:?}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(world.books.undone(), [""; 0], "the claim of the other owner is live");
    // The other owner is dead: its claim runs out.
    hotel.abort();
    let _ = hotel.await;
    while !world.books.undone().contains(&"a hotel".to_owned()) {
        world.clock.advance(1_000);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(world.clock_ms() < BEGINS_MS + 100 * LEASE_MS, "never compensated");
    }
    assert!(world.clock_ms() >= BEGINS_MS + LEASE_MS, "not before the claim has ended");
    trip_is(&world, SagaState::Compensated).await;
}

/// A run that has stood still for longer than its claim takes its step after the compensation: when
/// it ends, the step is compensated once more, under another key.
/// Proves G143.
#[tokio::test]
async fn a_run_that_ends_in_a_compensated_saga_reopens_its_steps() {
    let world = Owners::new().await;
    world.books.reply("/hotel", &[Reply::Held]);
    let (one, two) = (owner(&world, "one"), owner(&world, "two"));
    let hotel = begin(&one, &part("hotel", &[step("a"), call("/hotel")]));
    world.books.arrival("/hotel").await;
    world.clock.leap(BEGINS_MS + LEASE_MS);
    let compensator = world.compensating(&two);
    begin(&two, &part("car", &[Op::Reject])).await.unwrap().unwrap();
    trip_is(&world, SagaState::Compensated).await;
    assert_eq!(world.books.undone(), ["a hotel"]);
    world.books.let_go();
    hotel.await.unwrap().unwrap();
    eventually("compensated once more", || {
        world.clock.advance(1);
        world.books.undone().len() == 2
    })
    .await;
    trip_is(&world, SagaState::Compensated).await;
    drop(compensator);
    let keys: Vec<_> =
        world.books.arrived().iter().filter(|call| call.path == "/undo/a").map(|call| call.key.clone()).collect();
    assert_ne!(keys[0], keys[1], "the service would take it for the first one");
}

/// Many versions of an entity wait while the one before them is compensated: they run in their
/// order, each of them.
/// Proves G145.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn messages_behind_a_compensation_keep_their_turns() {
    let world = Owners::new().await;
    let [entity, version] = ["subject", "version"].map(|name| Select::Attribute(name.into()));
    let strategy = Strategy::Version { entity, version, order: VersionOrder::Monotonic };
    let consumer = world.consumer("p", Options { strategy, ..Options::default() });
    let version = |version: u64, ops: &[Op]| {
        let mut message = plan(&format!("m-{version}"), ops);
        message.subject = Some("e".into());
        message.extensions.insert("version".into(), version.to_string());
        message.extensions.insert("partitionkey".into(), "e".into());
        message
    };
    let failed = begin(&consumer, &version(1, &[step("a"), Op::Reject])).await.unwrap().unwrap();
    assert!(matches!(failed, Outcome::Compensating { .. }), "{failed:?}");
    let accepted: Vec<_> = (2..=30).map(|number| consumer.accept(version(number, &[]), Handling::default())).collect();
    let waiting = accepted.into_iter().map(|accepted| {
        let consumer = consumer.clone();
        tokio::spawn(async move { consumer.process(accepted).await })
    });
    let waiting: Vec<_> = waiting.collect();
    // Each that has its turn asks again and again; so would one that has lost it.
    for _ in 0..60 {
        let_others_run().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        world.clock.advance(200);
    }
    let _compensator = world.compensating(&consumer);
    eventually("compensated", || world.books.undone().len() == 1).await;
    let deadline = std::time::Instant::now();
    while waiting.iter().any(|task| !task.is_finished()) {
        assert!(deadline.elapsed().as_secs() < 30, "never");
        world.clock.advance(200);
        let_others_run().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for task in waiting {
        let outcome = task.await.unwrap().unwrap();
        assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
    }
}

hapax_tests::mutations! {
    mutation_a_turn_lost_while_waiting_is_found: messages_behind_a_compensation_keep_their_turns is red with "turn-lost-while-waiting";
    mutation_a_step_compensated_in_flight_is_found: a_step_in_flight_is_compensated_after_its_run is red with "compensates-a-step-in-flight";
    mutation_a_step_that_stays_compensated_is_found: a_run_that_ends_in_a_compensated_saga_reopens_its_steps is red with "steps-stay-compensated";
}
