//! Claims: where effects can leave the transaction, one owner at a time has a message, for as long
//! as it says that it is alive; and who has lost it writes nothing any more. Two owners over one
//! store, on a clock that the test turns.

use std::sync::Arc;
use std::time::Duration;

use hapax_core::{
    Counters, Handling, IdempotencyStorage as _, IdempotentConsumer, Message, Options, Outcome, Parts, RecordKey,
    RecordState, SagaId, SagaLog, Scope, StoreError, StoredOutcome,
};
use hapax_tests::owners::{BEGINS_MS, Owners};
use hapax_tests::plans::{Op, Reply, call, plan, step};
use hapax_tests::stepped::eventually;
use tokio::task::JoinHandle;

/// How long a claim holds here.
const LEASE_MS: u64 = 30_000;

/// One of those who have the processor `p`.
fn owner(world: &Owners, name: &str) -> IdempotentConsumer {
    world.consumer("p", Options { owner: name.into(), lease_ms: LEASE_MS, ..Options::default() })
}

/// Who has claimed the message, until when, and in which epoch.
async fn claim(world: &Owners, message: &Message) -> (String, u64, u64) {
    let record = world.record(message).await.expect("a record");
    match record.state {
        RecordState::InProgress { owner, lease_end_ms } => (owner, lease_end_ms, record.epoch),
        other => panic!("it is {other:?}"),
    }
}

/// Keys of the processor's that are the host's own: what is kept of calls.
async fn kept_answers(world: &Owners) -> Vec<String> {
    let rows = world.store.view(&Scope::of("p")).scan("\u{10ffff}", None, 100).await.unwrap();
    rows.into_iter().map(|(key, ..)| key).collect()
}

async fn steps(world: &Owners, message: &Message) -> usize {
    let id = SagaId::of_message(&RecordKey::by_message_id(&Scope::of("p"), message));
    SagaLog::new(&world.store, &Scope::of("p")).read(&id).await.unwrap().saga.steps.len()
}

fn begin(owner: &IdempotentConsumer, message: &Message) -> JoinHandle<Result<Outcome, StoreError>> {
    let (owner, message) = (owner.clone(), message.clone());
    // Whoever must wait is told so.
    let handling = Handling { wait_in_flight: false, retry_here: false };
    tokio::spawn(async move { owner.handle(message, handling).await })
}

/// Completes once `reached` does; what never comes is told by a failure.
async fn until<T>(what: &str, mut reached: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..10_000 {
        if let Some(value) = reached().await {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it never came to this: {what}");
}

/// Proves G122.
#[tokio::test]
async fn a_message_is_claimed_durably_before_it_calls() {
    let world = Owners::new().await;
    world.books.reply("/a", &[Reply::Held]);
    let message = plan("m-1", &[call("/a")]);
    let (one, two) = (owner(&world, "one"), owner(&world, "two"));
    let running = begin(&one, &message);
    world.books.arrival("/a").await;
    assert_eq!(claim(&world, &message).await, ("one".to_owned(), BEGINS_MS + LEASE_MS, 1));
    let other = begin(&two, &message).await.unwrap().unwrap();
    assert!(matches!(other, Outcome::InFlight { after_ms } if after_ms > 0), "{other:?}");
    world.books.let_go();
    assert!(matches!(running.await.unwrap(), Ok(Outcome::Completed { .. })));
    assert_eq!(world.books.arrived().len(), 1);
    assert_eq!(world.record(&message).await.unwrap().epoch, 2);
}

/// Proves G85, G122.
#[tokio::test]
async fn a_run_that_takes_long_renews_its_claim_and_keeps_it() {
    let world = Owners::new().await;
    world.books.reply("/a", &[Reply::Held]);
    let message = plan("m-1", &[call("/a")]);
    let (one, two) = (owner(&world, "one"), owner(&world, "two"));
    let running = begin(&one, &message);
    world.books.arrival("/a").await;
    let mut before = claim(&world, &message).await;
    for _ in 0..6 {
        // Who is not asleep yet would sleep from the new time on.
        eventually("its heartbeat waits", || world.clock.asleep() == 1).await;
        world.clock.advance(LEASE_MS / 3);
        let renewed = until("the claim is renewed", async || {
            let now = claim(&world, &message).await;
            (now.1 > before.1).then_some(now)
        });
        let renewed = renewed.await;
        assert!(renewed.2 > before.2, "each renewal has an epoch of its own: {renewed:?}");
        before = renewed;
    }
    let other = begin(&two, &message).await.unwrap().unwrap();
    assert!(matches!(other, Outcome::InFlight { .. }), "{other:?}");
    world.books.let_go();
    assert!(matches!(running.await.unwrap(), Ok(Outcome::Completed { .. })));
    assert_eq!(world.books.arrived().len(), 1, "it ran once");
}

/// The first owner's answer comes when another one has long taken the message over.
/// Proves G16, G123.
#[tokio::test]
async fn who_was_taken_over_can_write_nothing() {
    let world = Owners::new().await;
    world.books.reply("/a", &[Reply::Held]);
    let message = plan("m-1", &[step("a"), call("/a"), step("b"), Op::Set("done".into(), "yes".into())]);
    let (one, two) = (owner(&world, "one"), owner(&world, "two"));
    let zombie = tokio::spawn({
        let (one, message) = (one.clone(), message.clone());
        async move { one.handle(message, Handling { wait_in_flight: false, retry_here: true }).await }
    });
    world.books.arrival("/a").await;
    let claimed = claim(&world, &message).await;
    // Its heartbeat does not come through: as if it stood still.
    two_takes_over(&world, &two, &message, claimed.1).await;
    world.books.let_go();
    let outcome = zombie.await.unwrap().unwrap();
    assert!(
        matches!(&outcome, Outcome::Duplicate(StoredOutcome::Completed(_))),
        "it answers what the other has made: {outcome:?}"
    );
    assert_eq!(kept_answers(&world).await, [""; 0], "of the zombie");
    assert_eq!(steps(&world, &message).await, 0, "of the zombie");
    let history = world.record(&message).await.unwrap();
    assert_eq!(history.state.name(), "completed");
}

/// Another owner takes over at the very end of the claim, and completes. The clock is set for it
/// alone: the first one sleeps.
async fn two_takes_over(world: &Owners, two: &IdempotentConsumer, message: &Message, lease_end_ms: u64) {
    world.clock.leap(lease_end_ms);
    let outcome = begin(two, message).await.unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
}

/// Proves G16, G123.
#[tokio::test]
async fn who_is_too_late_calls_nobody_any_more() {
    let world = Owners::new().await;
    world.books.reply("/a", &[Reply::Held]);
    let message = plan("m-1", &[call("/a"), step("a"), call("/b")]);
    let one = owner(&world, "one");
    let running = begin(&one, &message);
    world.books.arrival("/a").await;
    let claimed = claim(&world, &message).await;
    // Nobody has taken it over; it is too late all the same: somebody may, at any time.
    world.clock.leap(claimed.1);
    world.books.let_go();
    let outcome = running.await.unwrap().unwrap();
    assert!(matches!(&outcome, Outcome::Retry { error, .. } if error.contains("too slow")), "{outcome:?}");
    let paths: Vec<_> = world.books.arrived().into_iter().map(|call| call.path).collect();
    assert_eq!(paths, ["/a"]);
    assert_eq!(steps(&world, &message).await, 0);
}

/// Proves G86.
#[tokio::test]
async fn who_starts_again_under_its_name_takes_up_its_own_claim_at_once() {
    let world = Owners::new().await;
    world.books.reply("/a", &[Reply::Silence]);
    let message = plan("m-1", &[call("/a"), call("/b")]);
    let running = begin(&owner(&world, "one"), &message);
    world.books.arrival("/a").await;
    running.abort();
    let outcome = begin(&owner(&world, "one"), &message).await.unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
    let arrived = world.books.arrived();
    assert_eq!(arrived.iter().map(|call| call.path.as_str()).collect::<Vec<_>>(), ["/a", "/a", "/b"]);
    assert_eq!(arrived[0].key, arrived[1].key, "the call that was never answered is made again under its key");
}

#[tokio::test]
async fn a_message_without_outside_needs_no_claim() {
    let world = Owners::new().await;
    let transactional = IdempotentConsumer::new(Parts {
        scope: Scope::of("p"),
        processor: Arc::new(hapax_core::NativeProcessor::new(|_, context| {
            Box::pin(async move {
                context.set("done", "yes")?;
                Ok(hapax_core::Output::default())
            })
        })),
        storage: Arc::new(world.store.clone()),
        committer: world.committer.clone(),
        outbound: None,
        clock: Arc::new(world.clock.clone()),
        metrics: Arc::new(Counters::default()),
        options: Options::default(),
    });
    let message = plan("m-1", &[]);
    transactional.handle(message.clone(), Handling::default()).await.unwrap();
    assert_eq!(world.record(&message).await.unwrap().epoch, 1, "one commit");
}

hapax_tests::mutations! {
    mutation_a_run_without_a_claim_is_found: a_message_is_claimed_durably_before_it_calls is red with "runs-without-a-claim";
    mutation_a_lease_without_epoch_is_found: a_run_that_takes_long_renews_its_claim_and_keeps_it is red with "epoch-stands-still";
    mutation_early_writes_that_rest_on_no_claim_are_found: who_was_taken_over_can_write_nothing is red with "early-writes-unfenced";
    mutation_a_zombie_that_goes_on_is_found: who_is_too_late_calls_nobody_any_more is red with "zombie-goes-on";
}
