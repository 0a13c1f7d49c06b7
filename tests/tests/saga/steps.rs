//! Sagas over native processors: what is registered before it is taken is undone exactly when its
//! message, or its saga, fails for good, the last step first, whatever dies in between.

use std::sync::Arc;

use hapax_core::{
    Cursor, Failure, Feed, FeedPage, Handling, Message, NativeProcessor, Outcome, RecordKey, RecordState, SagaId,
    SagaLog, SagaState, Scope, Select, StoredOutcome, Strategy, VersionOrder,
};
use hapax_tests::plans::{Op, Planned, Reply, call, plan, step};
use hapax_tests::sagas::{Host, World};

fn message_key(message: &Message) -> SagaId {
    SagaId::of_message(&RecordKey::by_message_id(&Scope::of("p"), message))
}

/// A message of the saga `trip`, by its attribute.
fn part(id: &str, ops: &[Op]) -> Message {
    let mut message = plan(id, ops);
    message.extensions.insert("saga".into(), "trip".into());
    message
}

/// Reserve, charge, ship; the last step is refused.
fn failing() -> Message {
    plan("m-1", &[step("a"), call("/a"), step("b"), call("/b"), step("c"), call("/c"), Op::Reject])
}

/// Proves G65, G117.
#[tokio::test]
async fn what_fails_for_good_is_undone_the_last_step_first() {
    let world = World::new();
    let host = world.host().await;
    assert!(matches!(host.deliver(&failing()).await, Ok(Outcome::Compensating { .. })));
    assert_eq!(world.record("p", &failing()).await.state.name(), "compensating");
    assert!(matches!(host.deliver(&failing()).await, Ok(Outcome::InFlight { .. })), "the forward way never restarts");
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["c m-1", "b m-1", "a m-1"]);
    assert_eq!(world.record("p", &failing()).await.state.name(), "compensated");
    assert_eq!(world.saga(&message_key(&failing())).await, SagaState::Compensated);
    assert_eq!(*world.reported.lock(), ["m-1 compensated"]);
    let again = host.deliver(&failing()).await.unwrap();
    assert!(matches!(again, Outcome::Duplicate(StoredOutcome::Failed(error)) if error.contains("as it was told")));
    host.undo().await.unwrap();
    assert_eq!(world.books.undone().len(), 3, "once each");
}

/// Proves G66.
#[tokio::test]
async fn nothing_is_undone_for_what_completes_and_nothing_is_left_of_it() {
    let world = World::new();
    let host = world.host().await;
    let message =
        plan("m-1", &[step("a"), call("/a"), Op::RetryUntil(2), step("b"), call("/b"), Op::Send("done".into())]);
    assert!(matches!(host.deliver(&message).await, Ok(Outcome::Completed { .. })));
    host.undo().await.unwrap();
    assert_eq!(world.books.applied(), ["/a m-1", "/b m-1"]);
    assert_eq!(world.left(&Scope::of("p")).await, [""; 0], "journal");
    assert_eq!(world.left(&Scope::of("p").shared()).await, [""; 0], "saga");
}

/// The way back of a step commits with the note that it is undone: state and messages once each,
/// whatever dies.
/// Proves G14.
#[tokio::test]
async fn a_crash_at_every_write_gives_the_same_saga_and_the_same_books() {
    for writes_the_last in [false, true] {
        for left in 0.. {
            let world = World::new();
            let host = world.mortal(left, writes_the_last).await;
            let died = host.deliver(&failing()).await.is_err() || host.undo().await.is_err();
            let at = format!("after {left} writes, the last one written: {writes_the_last}");
            let host = world.host().await;
            let outcome = host.deliver(&failing()).await.unwrap();
            let fits =
                matches!(outcome, Outcome::Compensating { .. } | Outcome::InFlight { .. } | Outcome::Duplicate(_));
            assert!(fits, "{at}: {outcome:?}");
            host.undo().await.unwrap();
            assert_eq!(world.record("p", &failing()).await.state.name(), "compensated", "{at}");
            assert_eq!(world.saga(&message_key(&failing())).await, SagaState::Compensated, "{at}");
            let books = ["/a m-1", "/b m-1", "/c m-1", "/undo/c m-1", "/undo/b m-1", "/undo/a m-1"];
            assert_eq!(world.books.applied(), books, "{at}");
            let sent = hapax_core::Outbox::pending(&world.store, None, 100).await.unwrap();
            let sent: Vec<_> = sent.into_iter().map(|row| row.message.kind).collect();
            assert_eq!(sent, ["undone.c", "undone.b", "undone.a"], "{at}");
            if !died {
                assert!(left > 10, "it never died");
                break;
            }
        }
    }
}

/// Proves G116.
#[tokio::test]
async fn a_step_is_registered_before_its_effect() {
    let world = World::new();
    let host = world.host().await;
    world.books.reply("/a", &[Reply::Silence]);
    let message = plan("m-1", &[step("a"), call("/a"), Op::Reject]);
    // The host dies while it waits for the answer.
    dies_over(&world, &host, &message, "/a").await;
    assert_eq!(world.books.applied(), ["/a m-1"]);
    let log = SagaLog::new(&world.store, &Scope::of("p"));
    let saga = log.read(&message_key(&message)).await.unwrap().saga;
    assert_eq!(saga.steps.len(), 1, "what was taken was registered before");
    let host = world.host().await;
    host.deliver(&message).await.unwrap();
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"]);
}

/// Delivers, and has the host die once `path` was called and is not answered.
async fn dies_over(world: &World, host: &Host, message: &Message, path: &str) {
    tokio::select! {
        outcome = host.deliver(message) => panic!("it waits for an answer that never comes: {outcome:?}"),
        () = world.books.arrival(path) => {}
    }
}

/// Proves G76, G119.
#[tokio::test]
async fn a_re_run_is_answered_from_the_journal_under_the_same_keys() {
    let world = World::new();
    // The second attempt calls again what was not answered for good, and nothing else.
    world.books.reply("/b", &[Reply::Status(503)]);
    let message = plan("m-1", &[call("/a"), call("/b"), Op::RetryUntil(3), call("/c")]);
    let host = world.host().await;
    assert!(matches!(host.deliver(&message).await, Ok(Outcome::Completed { .. })));
    let arrived = world.books.arrived();
    let paths: Vec<_> = arrived.iter().map(|call| call.path.as_str()).collect();
    assert_eq!(paths, ["/a", "/b", "/b", "/c"]);
    assert_eq!(arrived[1].key, arrived[2].key, "the same on every attempt");
    assert!(arrived[0].key != arrived[1].key && arrived[0].key.len() == 32, "and each call's own");
    let other = plan("m-2", &[call("/a")]);
    host.deliver(&other).await.unwrap();
    assert_ne!(world.books.arrived()[4].key, arrived[0].key, "and each message's own");
    assert!(arrived.iter().all(|call| call.trace.split('-').nth(1) == arrived[0].trace.split('-').nth(1)), "one trace");
}

/// Proves G78.
#[tokio::test]
async fn a_refusal_is_forgotten_by_the_next_attempt_and_what_was_done_is_not() {
    let world = World::new();
    world.books.reply("/b", &[Reply::Status(404)]);
    let ask = |path: &str| Op::Ask(path.into(), "x".into());
    let message = plan("m-1", &[ask("/a"), ask("/b"), ask("/c"), Op::RetryUntil(2)]);
    let Ok(Outcome::Completed { output }) = world.host().await.deliver(&message).await else { panic!("not completed") };
    assert_eq!(output.data, "200 200 200");
    let paths: Vec<_> = world.books.arrived().iter().map(|call| call.path.clone()).collect();
    assert_eq!(paths, ["/a", "/b", "/c", "/b", "/c"]);
    assert_eq!(world.books.applied(), ["/a x", "/c x", "/b x"], "what was called again has its key");
}

/// Proves G77, G120.
#[tokio::test]
async fn a_run_that_calls_something_else_than_before_is_stopped_and_undone() {
    let world = World::new();
    let first = plan("m-1", &[step("a"), call("/a"), call("/b")]);
    let host = world.host().await;
    world.books.reply("/b", &[Reply::Silence]);
    dies_over(&world, &host, &first, "/b").await;
    // The same message, and a processor that makes something else of it.
    let host = world.host_over(Arc::new(world.store.clone()), Planned::calling_below("one", "/other")).await;
    let outcome = host.deliver(&first).await.unwrap();
    let Outcome::Compensating { error } = &outcome else { panic!("{outcome:?}") };
    assert!(
        error.contains("diverged at its call 1") && error.contains("outside/a") && error.contains("/other/a"),
        "{error}"
    );
    host.undo().await.unwrap();
    assert_eq!(world.books.applied(), ["/a m-1", "/b m-1", "/undo/a m-1"]);
}

/// Proves G67.
#[tokio::test]
async fn behind_the_pivot_there_is_no_way_back() {
    let world = World::new();
    let host = world.host().await;
    let message = plan("m-1", &[step("a"), call("/a"), Op::Pivot, call("/b"), Op::Reject]);
    assert!(matches!(host.deliver(&message).await, Ok(Outcome::DeadLettered { .. })));
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), [""; 0]);
    let late = plan("m-2", &[Op::Pivot, step("a")]);
    let outcome = host.deliver(&late).await.unwrap();
    assert!(matches!(&outcome, Outcome::DeadLettered { error } if error.contains("pivoted")), "{outcome:?}");
}

/// Proves G68, G69.
#[tokio::test]
async fn a_saga_of_several_messages_is_undone_over_its_processors_in_one_order() {
    let world = World::new();
    let host = world.host().await;
    let joins = |id: &str, ops: &[Op]| plan(id, &[&[Op::Join("trip".into())], ops].concat());
    let messages = [
        part("m-1", &[step("a"), call("/a")]),
        joins("m-2", &[step("b"), call("/b")]),
        part("m-3", &[step("c"), call("/c")]),
    ];
    host.deliver_to(0, &messages[0]).await.unwrap();
    host.deliver_to(1, &messages[1]).await.unwrap();
    host.deliver_to(0, &messages[2]).await.unwrap();
    let last = part("m-4", &[step("d"), Op::Reject]);
    assert!(matches!(host.deliver_to(1, &last).await, Ok(Outcome::Compensating { .. })));
    // The host dies on the way, and another one goes on.
    let host = world.host().await;
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["d m-4", "c m-3", "b m-2", "a m-1"]);
    assert_eq!(world.record("q", &last).await.state.name(), "compensated");
    assert_eq!(world.record("p", &messages[0]).await.state.name(), "completed", "it did complete");
    let late = host.deliver(&part("m-5", &[step("a")])).await.unwrap();
    assert!(matches!(&late, Outcome::DeadLettered { error } if error.contains("compensated")), "{late:?}");
}

/// Its attribute alone makes a message part of a saga, also one that does nothing else with it.
#[tokio::test]
async fn a_message_that_only_names_its_saga_fails_and_ends_with_it() {
    let world = World::new();
    let host = world.host().await;
    host.deliver(&part("m-1", &[step("a"), call("/a")])).await.unwrap();
    let failed = host.deliver(&part("m-2", &[Op::Reject])).await.unwrap();
    assert!(matches!(failed, Outcome::Compensating { .. }), "{failed:?}");
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"]);
    let late = host.deliver(&part("m-3", &[Op::Set("late".into(), "yes".into())])).await.unwrap();
    assert!(matches!(&late, Outcome::DeadLettered { error } if error.contains("compensated")), "{late:?}");
}

#[tokio::test]
async fn so_does_one_whose_processor_takes_no_steps() {
    let world = World::new();
    let host = world.host().await;
    let refuses = NativeProcessor::new(|_, _| Box::pin(async { Err(Failure::Reject("as it was told".into())) }));
    host.deliver(&part("m-1", &[step("a"), call("/a")])).await.unwrap();
    let failed = host.inner(Arc::new(refuses)).handle(part("m-2", &[]), Handling::default()).await.unwrap();
    assert!(matches!(failed, Outcome::Compensating { .. }), "{failed:?}");
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), ["a m-1"]);
}

/// Proves G69.
#[tokio::test]
async fn a_saga_that_is_complete_is_not_undone_any_more() {
    let world = World::new();
    let host = world.host().await;
    let joins = |id: &str, ops: &[Op]| plan(id, &[&[Op::Join("trip".into())], ops].concat());
    host.deliver(&joins("m-1", &[step("a"), call("/a")])).await.unwrap();
    assert!(matches!(host.deliver(&joins("m-2", &[Op::Complete])).await, Ok(Outcome::Completed { .. })));
    let late = host.deliver(&joins("m-3", &[step("b"), Op::Reject])).await.unwrap();
    assert!(matches!(&late, Outcome::DeadLettered { error } if error.contains("completed")), "{late:?}");
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), [""; 0]);
    // Closed ones are remembered for as long as records are.
    assert_ne!(world.left(&Scope::of("p").shared()).await, [""; 0]);
    world.clock.advance(world.options.record_life_ms() + 1);
    host.undo().await.unwrap();
    assert_eq!(world.left(&Scope::of("p").shared()).await, [""; 0]);
}

/// Proves G72.
#[tokio::test]
async fn a_compensation_is_tried_by_its_own_count_and_then_an_operator_decides() {
    let world = World::new();
    let host = world.host().await;
    world.books.reply("/undo/b", &[Reply::Status(503); 2]);
    world.books.reply("/undo/a", &[Reply::Status(503); 3]);
    let message = plan("m-1", &[step("a"), step("b"), Op::Reject]);
    host.deliver(&message).await.unwrap();
    for _ in 0..5 {
        world.clock.advance(60_000);
        host.undo().await.unwrap();
    }
    assert_eq!(world.books.undone(), ["b m-1"]);
    let record = world.record("p", &message).await;
    assert!(matches!(record.state, RecordState::CompensationFailed { .. }), "{:?}", record.state);
    assert_eq!(record.expires_ms, None, "it waits for an operator, however long");
    assert_eq!(world.saga(&message_key(&message)).await, SagaState::Stuck);
    assert_eq!(*world.reported.lock(), ["m-1 compensation-failed"]);
    let keys: Vec<_> =
        world.books.arrived().iter().filter(|call| call.path == "/undo/a").map(|call| call.key.clone()).collect();
    assert!(keys.len() == 3 && keys.iter().all(|key| *key == keys[0]), "one key a step: {keys:?}");
}

#[tokio::test]
async fn a_compensation_that_failed_is_not_tried_before_its_time() {
    let mut world = World::new();
    world.options.backoff_base_ms = 60_000;
    let host = world.host().await;
    world.books.reply("/undo/a", &[Reply::Status(503)]);
    let message = plan("m-1", &[step("a"), Op::Reject]);
    host.deliver(&message).await.unwrap();
    host.undo_what_is_due().await.unwrap();
    let due_ms =
        SagaLog::new(&world.store, &Scope::of("p")).read(&message_key(&message)).await.unwrap().saga.steps[0].due_ms;
    for (now_ms, tried) in [(due_ms - 1, 1), (due_ms, 2)] {
        world.clock.set(now_ms);
        host.undo_what_is_due().await.unwrap();
        assert_eq!(world.books.arrived().iter().filter(|call| call.path == "/undo/a").count(), tried);
    }
    assert_eq!(world.books.undone(), ["a m-1"]);
}

#[tokio::test]
async fn a_step_is_undone_by_the_component_that_registered_it_or_not_at_all() {
    let world = World::new();
    let message = plan("m-1", &[step("a"), Op::Reject]);
    world.host().await.deliver(&message).await.unwrap();
    let host = world.host_over(Arc::new(world.store.clone()), Planned::new("two")).await;
    host.undo().await.unwrap();
    assert_eq!(world.books.undone(), [""; 0]);
    assert_eq!(world.saga(&message_key(&message)).await, SagaState::Stuck);
    let saga = SagaLog::new(&world.store, &Scope::of("p")).read(&message_key(&message)).await.unwrap().saga;
    assert!(saga.steps[0].error.as_ref().unwrap().contains("one"), "{:?}", saga.steps[0].error);
}

/// A version that has failed and waits for its retry is overtaken by the next: it never runs again,
/// and what it did is undone.
/// Proves G71, G121.
#[tokio::test]
async fn what_a_message_did_that_was_overtaken_is_undone() {
    let mut world = World::new();
    let [entity, version] = ["subject", "version"].map(|name| Select::Attribute(name.into()));
    world.options.strategy = Strategy::Version { entity, version, order: VersionOrder::Monotonic };
    let at = |id: &str, version: &str, ops: &[Op]| {
        let mut message = plan(id, ops);
        message.subject = Some("e".into());
        message.extensions.insert("version".into(), version.into());
        message
    };
    let first = at("m-1", "1", &[step("a"), call("/a"), Op::RetryUntil(2)]);
    let second = at("m-2", "2", &[step("b"), call("/b")]);
    let host = world.host().await;
    let handling = Handling { wait_in_flight: false, retry_here: false };
    let put_off = host.consumers[0].handle(first.clone(), handling).await.unwrap();
    assert!(matches!(put_off, Outcome::Retry { .. }), "{put_off:?}");
    assert!(matches!(host.deliver(&second).await, Ok(Outcome::Completed { .. })));
    assert_eq!(host.deliver(&first).await.unwrap(), Outcome::Stale);
    host.undo().await.unwrap();
    assert_eq!(world.books.applied(), ["/a m-1", "/b m-2", "/undo/a m-1"]);
    assert_eq!(world.left(&Scope::of("p")).await, [""; 0], "answers");
    assert_eq!(host.deliver(&first).await.unwrap(), Outcome::Stale);
    host.undo().await.unwrap();
    assert_eq!(world.books.undone().len(), 1);
}

#[tokio::test]
async fn a_step_that_cannot_be_undone_is_not_registered() {
    let world = World::new();
    let outcome = world.host().await.deliver(&plan("m-1", &[step("x")])).await.unwrap();
    assert!(matches!(&outcome, Outcome::DeadLettered { error } if error.contains("`x`")), "{outcome:?}");
}

/// The whole feed, for who asks what happened.
#[tokio::test]
async fn the_feed_tells_of_it() {
    let world = World::new();
    let host = world.host().await;
    host.deliver(&failing()).await.unwrap();
    host.undo().await.unwrap();
    let FeedPage { events, .. } = world.store.events(None, Some(Cursor::default()), 100).await.unwrap();
    let mut kinds: Vec<_> = events.iter().map(|event| event.entry.kind.name()).collect();
    // This clock makes a heartbeat of every wait.
    kinds.dedup();
    assert_eq!(kinds, ["claimed", "compensation-started", "compensated"]);
}

hapax_tests::mutations! {
    mutation_undone_in_forward_order_is_found: what_fails_for_good_is_undone_the_last_step_first is red with "undo-in-forward-order";
    mutation_a_step_that_is_not_durable_is_found: a_step_is_registered_before_its_effect is red with "step-not-durable";
    mutation_an_answer_that_is_not_kept_is_found: a_re_run_is_answered_from_the_journal_under_the_same_keys is red with "answer-not-journalled";
    mutation_a_key_of_the_attempt_is_found: a_re_run_is_answered_from_the_journal_under_the_same_keys is red with "step-key-of-the-attempt";
    mutation_a_divergence_that_is_not_looked_for_is_found: a_run_that_calls_something_else_than_before_is_stopped_and_undone is red with "divergence-unchecked";
    mutation_what_was_overtaken_and_is_left_as_it_is_is_found: what_a_message_did_that_was_overtaken_is_undone is red with "stale-left-as-it-is";
    mutation_a_step_undone_and_not_noted_is_found: what_fails_for_good_is_undone_the_last_step_first is red with "undone-not-noted";
}
