//! Messages that have begun and are never delivered again, sagas that outlive their message's
//! record, and records that later messages have taken over: what is compensated, and what stays as
//! it is.

use std::sync::Arc;

use hapax_core::{
    AbandonedParts, Actor, Handling, IdempotencyStorage as _, Inspect as _, Message, NativeProcessor, Operator,
    OperatorAction, Outcome, RecordKey, SagaAction, SagaId, SagaState, Scope, Select, Strategy, VersionOrder,
    run_abandoned, unfinished_messages,
};
use hapax_tests::plans::{Op, Reply, call, plan, step};
use hapax_tests::sagas::{Host, World};
use tokio::sync::watch;

const HORIZON_MS: u64 = 24 * 60 * 60 * 1_000;

/// Handling of a client that is told to come again, and goes away.
const GOES_AWAY: Handling = Handling { wait_in_flight: false, retry_here: false };

fn key(message: &Message) -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), message)
}

async fn unfinished(world: &World) -> usize {
    unfinished_messages(&world.store, &Scope::of("p"), u64::MAX, None, 10).await.unwrap().len()
}

/// Searches once for abandoned messages.
async fn search(world: &World, host: &Host) {
    let parts = AbandonedParts {
        scope: Scope::of("p"),
        store: Arc::new(world.store.clone()),
        clock: Arc::new(world.clock.clone()),
        consumers: host.consumers.clone(),
    };
    let (_stop, stopped) = watch::channel(true);
    run_abandoned(parts, stopped).await.unwrap();
}

fn operator(world: &World, host: &Host) -> Operator {
    let clock = Arc::new(world.clock.clone());
    Operator::new(Arc::new(world.store.clone()), host.committer().clone(), clock, host.consumers.clone())
}

fn by(reason: &str) -> Actor {
    Actor { actor: "ops".into(), reason: reason.into() }
}

async fn put_off(host: &Host, message: &Message) {
    let outcome = host.consumers[0].handle(message.clone(), GOES_AWAY).await.unwrap();
    assert!(matches!(outcome, Outcome::Retry { .. }), "{outcome:?}");
}

fn failing_for_now() -> Message {
    plan("m-1", &[step("a"), call("/a"), Op::RetryUntil(9)])
}

/// Proves G151.
#[tokio::test]
async fn a_message_that_is_never_delivered_again_is_given_up_and_compensated() {
    let world = World::new();
    let host = world.host().await;
    put_off(&host, &failing_for_now()).await;
    assert_eq!(unfinished(&world).await, 1);
    search(&world, &host).await;
    assert_eq!(world.record("p", &failing_for_now()).await.state.name(), "retry-due", "it may still come");
    world.clock.advance(HORIZON_MS + 60_000);
    search(&world, &host).await;
    assert_eq!(world.record("p", &failing_for_now()).await.state.name(), "compensating");
    host.undo().await.unwrap();
    assert_eq!(world.books.applied(), ["/a m-1", "/undo/a m-1"]);
    assert_eq!(world.record("p", &failing_for_now()).await.state.name(), "compensated");
    assert_eq!(unfinished(&world).await, 0);
    assert_eq!(world.left(&Scope::of("p")).await, [""; 0], "answers");
}

/// Dies while its first run waits for an answer: nobody delivers it again.
/// Proves G152.
#[tokio::test]
async fn a_message_over_which_the_host_died_is_given_up_and_compensated() {
    let world = World::new();
    world.books.reply("/a", &[Reply::Status(500)]);
    let message = plan("m-1", &[Op::Join("trip".into()), step("a"), call("/a")]);
    // Claim, registration: then it dies.
    let host = world.mortal(2, false).await;
    assert!(host.consumers[0].handle(message.clone(), GOES_AWAY).await.is_err());
    assert_eq!(world.record("p", &message).await.state.name(), "in-progress");
    let host = world.host().await;
    world.clock.advance(HORIZON_MS + 60_000);
    search(&world, &host).await;
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"], "as a member of the saga that it has joined");
    assert_eq!(world.saga(&SagaId::named("trip").unwrap()).await, SagaState::Compensated);
    assert_eq!(unfinished(&world).await, 0);
}

#[tokio::test]
async fn an_operator_gives_a_message_up_at_once() {
    let world = World::new();
    let host = world.host().await;
    put_off(&host, &failing_for_now()).await;
    let operator = operator(&world, &host);
    let evicted = operator.evict(&key(&failing_for_now()), &by("")).await;
    assert!(evicted.is_err(), "it has not ended");
    operator.perform(&OperatorAction::GiveUp(key(&failing_for_now())), &by("the client is gone")).await.unwrap();
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"]);
    let record = world.record("p", &failing_for_now()).await;
    let error = record.state.error().unwrap();
    assert!(error.contains("the client is gone") && error.contains("not yet"), "{error}");
    let refused = operator.perform(&OperatorAction::GiveUp(key(&failing_for_now())), &by("")).await;
    assert!(refused.unwrap_err().to_string().contains("compensated"));
    assert_eq!(operator.trail("p", 10).await.unwrap()[0].action, "give-up");
}

/// Without steps nothing of it is left, and its body is not known: it is forgotten, and counts as new
/// should it come again.
#[tokio::test]
async fn a_message_without_steps_is_forgotten() {
    let world = World::new();
    let host = world.host().await;
    let message = plan("m-1", &[Op::RetryUntil(9)]);
    put_off(&host, &message).await;
    world.clock.advance(HORIZON_MS + 60_000);
    search(&world, &host).await;
    assert_eq!(world.store.record(&key(&message)).await.unwrap(), None);
    assert_eq!(unfinished(&world).await, 0);
    put_off(&host, &message).await;
}

/// Past its pivot a message that is given up is a dead letter, and its saga stays: redriven, it goes
/// forward only. Discarded, nothing of it is left.
#[tokio::test]
async fn a_message_past_its_pivot_is_given_up_and_never_compensated() {
    let world = World::new();
    let host = world.host().await;
    let message = plan("m-1", &[step("a"), call("/a"), Op::Pivot, Op::RetryUntil(9)]);
    put_off(&host, &message).await;
    let operator = operator(&world, &host);
    operator.perform(&OperatorAction::GiveUp(key(&message)), &by("gone")).await.unwrap();
    let saga = SagaId::of_message(&key(&message));
    assert_eq!(world.saga(&saga).await, SagaState::Pivoted);
    let held = world.store.held_under(&key(&message)).await.unwrap();
    assert_eq!(held.len(), 1, "a member of a saga is known as a whole");
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), [""; 0]);
    operator.discard(&held[0].key(&key(&message)), &by("")).await.unwrap();
    assert_eq!(world.left(&Scope::of("p").shared()).await, [""; 0]);
}

/// A message that was overtaken is given up by its own key, which the list tells.
#[tokio::test]
async fn an_overtaken_message_is_given_up_by_its_own_key() {
    let world = by_version();
    let host = world.host().await;
    put_off(&host, &version("m-1", "1", &[step("a"), call("/a"), Op::RetryUntil(9)])).await;
    put_off(&host, &version("m-2", "2", &[step("b"), call("/b"), Op::RetryUntil(9)])).await;
    let first = RecordKey::new(Scope::of("p"), "/plans".into(), "e@1".into());
    operator(&world, &host).perform(&OperatorAction::GiveUp(first), &by("")).await.unwrap();
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"]);
    assert_eq!((entity(&world).await.state.name(), unfinished(&world).await), ("retry-due", 1), "of the second one");
}

/// The host died over a message while its clock was a year ahead: it is given up in its time.
#[tokio::test]
async fn a_message_of_a_clock_that_was_ahead_is_given_up() {
    const YEAR_MS: u64 = 31_536_000_000;
    let world = World::new();
    let host = world.host().await;
    world.clock.advance(YEAR_MS);
    put_off(&host, &failing_for_now()).await;
    world.clock.set(1_000_000);
    search(&world, &host).await;
    assert_eq!(world.record("p", &failing_for_now()).await.state.name(), "retry-due", "from now on it is waited for");
    world.clock.advance(HORIZON_MS + 60_000);
    search(&world, &host).await;
    host.undo().await.unwrap();
    assert_eq!(world.record("p", &failing_for_now()).await.state.name(), "compensated");
    assert_eq!(unfinished(&world).await, 0);
}

/// The component that is at work now takes no steps: what the earlier one registered is
/// compensated all the same when the message fails for good.
/// Proves G154.
#[tokio::test]
async fn steps_of_an_earlier_component_are_compensated() {
    let world = World::new();
    let host = world.host().await;
    put_off(&host, &failing_for_now()).await;
    let refuses =
        Arc::new(NativeProcessor::new(|_, _| Box::pin(async { Err(hapax_core::Failure::Reject("no".into())) })));
    let stepless = host.inner_as("p", refuses);
    world.clock.advance(60_000);
    let outcome = stepless.handle(failing_for_now(), GOES_AWAY).await.unwrap();
    assert!(matches!(outcome, Outcome::Compensating { .. }), "{outcome:?}");
    assert_eq!(unfinished(&world).await, 0);
}

fn version(id: &str, version: &str, ops: &[Op]) -> Message {
    let mut message = plan(id, ops);
    message.subject = Some("e".into());
    message.extensions.insert("version".into(), version.into());
    message
}

fn by_version() -> World {
    let mut world = World::new();
    let [entity, version] = ["subject", "version"].map(|name| Select::Attribute(name.into()));
    world.options.strategy = Strategy::Version { entity, version, order: VersionOrder::Monotonic };
    world
}

async fn entity(world: &World) -> hapax_core::Record {
    let key = RecordKey::new(Scope::of("p"), "/plans".into(), "e".into());
    world.store.record(&key).await.unwrap().unwrap()
}

/// A stale message is never delivered again: what it did is compensated.
/// Proves G153.
#[tokio::test]
async fn a_message_that_was_overtaken_and_never_comes_again_is_compensated() {
    let world = by_version();
    let host = world.host().await;
    put_off(&host, &version("m-1", "1", &[step("a"), call("/a"), Op::RetryUntil(2)])).await;
    let second = host.deliver(&version("m-2", "2", &[step("b"), call("/b")])).await;
    assert!(matches!(second, Ok(Outcome::Completed { .. })), "{second:?}");
    world.clock.advance(HORIZON_MS + 60_000);
    search(&world, &host).await;
    host.undo().await.unwrap();
    assert_eq!(world.books.applied(), ["/a m-1", "/b m-2", "/undo/a m-1"]);
    assert_eq!(entity(&world).await.state.name(), "completed", "of the second message");
    assert_eq!(unfinished(&world).await, 0);
}

/// The first version's saga is stuck, and a later version runs meanwhile: when the saga ends, the
/// record is the later version's, and stays as it is.
/// Proves G149.
#[tokio::test]
async fn a_saga_leaves_the_record_of_a_later_message_alone() {
    let world = by_version();
    let host = world.host().await;
    world.books.reply("/undo/a", &[Reply::Status(500); 3]);
    let first = version("m-1", "1", &[step("a"), call("/a"), Op::Reject]);
    assert!(matches!(host.deliver(&first).await, Ok(Outcome::Compensating { .. })));
    host.undo().await.unwrap();
    assert_eq!(entity(&world).await.state.name(), "compensation-failed");
    world.books.reply("/undo/b", &[Reply::Status(500); 3]);
    let second = version("m-2", "2", &[step("b"), call("/b"), Op::Reject]);
    assert!(matches!(host.deliver(&second).await, Ok(Outcome::Compensating { .. })));
    let saga = SagaId::of_message(&RecordKey::new(Scope::of("p"), "/plans".into(), "e@1".into()));
    assert_eq!(world.saga(&saga).await, SagaState::Stuck);
    let retry = OperatorAction::Saga(SagaAction::Retry, saga.clone());
    operator(&world, &host).perform(&retry, &by("")).await.unwrap();
    host.undo().await.unwrap();
    assert_eq!(world.saga(&saga).await, SagaState::Compensated);
    // Its own saga is stuck now, whatever became of the first one.
    let record = entity(&world).await;
    assert_eq!((record.state.name(), record.position.unwrap().to_string()), ("compensation-failed", "2".to_owned()));
    assert_eq!(world.books.undone(), ["a m-1"]);
}

/// An operator has forgotten a compensated message: it counts as new, and so does its saga.
/// Proves G155.
#[tokio::test]
async fn an_evicted_message_is_not_refused_by_its_old_saga() {
    let world = World::new();
    let host = world.host().await;
    let message = plan("m-1", &[step("a"), call("/a"), step("b"), Op::RetryUntil(2), Op::Reject]);
    host.deliver(&message).await.unwrap();
    host.undo().await.unwrap();
    operator(&world, &host).evict(&key(&message), &by("")).await.unwrap();
    let again = host.deliver(&plan("m-1", &[step("c"), call("/c")])).await.unwrap();
    assert!(matches!(again, Outcome::Completed { .. }), "{again:?}");
    // Its saga has come and gone with it; nothing of the old one is left but the entry of its end.
    let left = world.left(&Scope::of("p").shared()).await;
    assert!(left.iter().all(|key| key.starts_with("saga/ended/")), "{left:?}");
    world.clock.advance(100 * HORIZON_MS);
    host.undo().await.unwrap();
    assert_eq!(world.left(&Scope::of("p").shared()).await, [""; 0]);
}

/// The new message's saga is open when the old one's retention ends: it is not forgotten with it.
#[tokio::test]
async fn a_saga_that_is_open_again_is_not_forgotten_with_the_old_one() {
    let world = World::new();
    let host = world.host().await;
    let message = plan("m-1", &[step("a"), call("/a"), Op::Reject]);
    host.deliver(&message).await.unwrap();
    host.undo().await.unwrap();
    operator(&world, &host).evict(&key(&message), &by("")).await.unwrap();
    put_off(&host, &plan("m-1", &[step("b"), call("/b"), Op::RetryUntil(9)])).await;
    world.clock.advance(100 * HORIZON_MS);
    host.undo().await.unwrap();
    let saga = SagaId::of_message(&key(&message));
    assert_eq!(world.saga(&saga).await, SagaState::Open);
    search(&world, &host).await;
    host.undo().await.unwrap();
    // The service knows the compensation's key from the first time: the saga tells, not its books.
    assert_eq!(world.saga(&saga).await, SagaState::Compensated);
}

/// A retention without end is longer than the index has digits for.
/// Proves G160.
#[tokio::test]
async fn a_saga_with_an_endless_retention_stays() {
    let mut world = World::new();
    world.options.retention_ms = 99_999_999_999_999;
    world.clock.set(1_700_000_000_000);
    let host = world.host().await;
    let message = plan("m-1", &[step("a"), Op::Reject]);
    host.deliver(&message).await.unwrap();
    host.undo().await.unwrap();
    host.undo().await.unwrap();
    assert_eq!(world.saga(&SagaId::of_message(&key(&message))).await, SagaState::Compensated);
}

/// Times that were written by a clock that was a year ahead hold nobody up.
/// Proves G157.
#[tokio::test]
async fn a_clock_that_was_a_year_ahead_holds_nothing_up() {
    const YEAR_MS: u64 = 31_536_000_000;
    let world = World::new();
    let host = world.host().await;
    world.books.reply("/undo/a", &[Reply::Status(500)]);
    world.clock.advance(YEAR_MS);
    put_off(&host, &plan("m-1", &[Op::RetryUntil(2)])).await;
    host.deliver(&plan("m-2", &[step("a"), Op::Reject])).await.unwrap();
    host.undo_what_is_due().await.unwrap();
    assert_eq!(world.books.arrived().len(), 1, "the compensation has failed once");
    world.clock.set(1_000_000);
    let again = host.consumers[0].handle(plan("m-1", &[Op::RetryUntil(2)]), GOES_AWAY).await.unwrap();
    assert!(matches!(again, Outcome::Completed { .. }), "{again:?}");
    host.undo_what_is_due().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-2"]);
}

/// Two sagas whose failed messages share a record: each action has its own line.
/// Proves G159.
#[tokio::test]
async fn actions_on_two_sagas_of_one_record_are_both_in_the_trail() {
    let world = by_version();
    let host = world.host().await;
    for number in ["1", "2"] {
        world.books.reply("/undo/a", &[Reply::Status(500); 3]);
        let message = version(&format!("m-{number}"), number, &[step("a"), Op::Reject]);
        assert!(matches!(host.deliver(&message).await, Ok(Outcome::Compensating { .. })));
        host.undo().await.unwrap();
    }
    let of = |version: &str| {
        let key = RecordKey::new(Scope::of("p"), "/plans".into(), format!("e@{version}").into());
        OperatorAction::Saga(SagaAction::Resolve, SagaId::of_message(&key))
    };
    let operator = operator(&world, &host);
    for result in operator.perform_all(&[of("1"), of("2")], &by("seen to")).await {
        result.unwrap();
    }
    assert_eq!(operator.trail("p", 10).await.unwrap().len(), 2);
}

hapax_tests::mutations! {
    mutation_a_message_that_is_not_indexed_is_found: a_message_that_is_never_delivered_again_is_given_up_and_compensated is red with "unfinished-not-indexed";
    mutation_a_saga_that_touches_any_record_is_found: a_saga_leaves_the_record_of_a_later_message_alone is red with "saga-touches-any-record";
    mutation_an_ended_saga_that_stays_is_found: an_evicted_message_is_not_refused_by_its_old_saga is red with "ended-saga-stays";
    mutation_times_of_any_length_are_found: a_saga_with_an_endless_retention_stays is red with "times-of-any-length";
    mutation_due_times_that_are_believed_are_found: a_clock_that_was_a_year_ahead_holds_nothing_up is red with "due-times-believed";
    mutation_an_action_audited_by_its_record_is_found: actions_on_two_sagas_of_one_record_are_both_in_the_trail is red with "audited-by-record";
}
