//! Strategies through the whole pipeline: what is a duplicate, stale, early or refused, and what
//! becomes of it.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Context, Failure, Fields, GapPolicy, Gaps, HoldReason, IdempotencyStorage as _, Inspect as _, Invocation,
    Message, MessageProcessor, NativeProcessor, Observer, Operator, Options, Outbox as _, Outcome, Output, RecordKey,
    RecordState, Report, Scope, Select, StoredOutcome, Strategy, VersionOrder, run_deferred,
};
use hapax_store::RedbStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::clock::SimulatedClock;
use hapax_tests::mutation::turns_red;
use tokio::sync::watch;

const NOW_MS: u64 = 1_700_000_000_000;

/// What a test looks at, over one disk and one clock.
pub(super) struct House {
    disk: LossyDisk,
    pub(super) store: Arc<RedbStore>,
    pub(super) bench: Bench,
    pub(super) clock: SimulatedClock,
    options: Options,
}

impl House {
    pub(super) async fn with(strategy: Strategy) -> Self {
        let options = Options { strategy, redelivery_horizon_ms: 3_600_000, retention_ms: 7_200_000, ..quick() };
        Self::on(LossyDisk::new(), SimulatedClock::at(NOW_MS), options).await
    }

    async fn on(disk: LossyDisk, clock: SimulatedClock, options: Options) -> Self {
        let store = Arc::new(disk.open().unwrap());
        let bench = Bench::timed("p", store.clone(), upsert(), options.clone(), Arc::new(clock.clone())).await;
        Self { disk, store, bench, clock, options }
    }

    /// The host dies, loses what was not synced, and starts again.
    pub(super) async fn restarted(self) -> Self {
        let Self { disk, store, bench, clock, options } = self;
        disk.kill((bench, store));
        let disk = disk.after_power_loss(7);
        Self::on(disk, clock, options).await
    }

    pub(super) async fn handle(&self, message: Message) -> Outcome {
        self.bench.handle(message).await
    }

    /// Lets the keeper do what is due now.
    pub(super) async fn keep(&self) {
        let (_stop, stopped) = watch::channel(true);
        run_deferred(self.bench.consumer.clone(), self.store.clone(), Arc::new(Nobody), stopped).await.unwrap();
    }

    /// What the entity's state says; `None` where it was deleted.
    pub(super) async fn state(&self) -> Option<String> {
        let (_, value) = self.store.view(&Scope::of("p")).get("e").await.unwrap();
        value.map(|value| String::from_utf8(value.to_vec()).unwrap())
    }

    pub(super) async fn held_messages(&self) -> Vec<(HoldReason, String)> {
        let held_messages = self.store.held_messages(Some("p"), None, 100).await.unwrap();
        held_messages.into_iter().map(|(_, held_message)| (held_message.hold_reason, held_message.error)).collect()
    }

    async fn record(&self) -> Option<hapax_core::Record> {
        self.store.record(&RecordKey::new(Scope::of("p"), "/test".into(), "e".into())).await.unwrap()
    }
}

struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

/// Writes the payload under `e`, or deletes it where the type is `deleted`; fails as the type says.
/// Sends one message.
fn upsert() -> Arc<dyn MessageProcessor> {
    fn write<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            match run.message.kind.as_str() {
                "reject" => return Err(Failure::Reject("no".into())),
                "retry" => return Err(Failure::Retry { reason: "not now".into(), after_ms: Some(1_000) }),
                "deleted" => context.delete("e").unwrap(),
                _ => context.set("e", run.message.data.clone()).unwrap(),
            }
            context.send(hapax_core::Outgoing { kind: "written".into(), ..Default::default() }).unwrap();
            Ok(Output { content_type: None, data: run.message.data.clone() })
        })
    }
    Arc::new(NativeProcessor::new(write))
}

fn monotonic() -> Strategy {
    version(VersionOrder::Monotonic)
}

pub(super) fn strict(then: GapPolicy) -> Strategy {
    version(VersionOrder::Strict(Gaps { first: 1, timeout_ms: 60_000, then }))
}

fn version(order: VersionOrder) -> Strategy {
    let [entity, version] = ["subject", "version"].map(|name| Select::Attribute(name.into()));
    Strategy::Version { entity, version, order }
}

fn timestamp() -> Strategy {
    let [entity, time] = ["subject", "time"].map(|name| Select::Attribute(name.into()));
    Strategy::Timestamp { entity, time, max_future_skew_ms: 1_000 }
}

/// The entity's message of that version, which carries its version.
pub(super) fn at(version: u64) -> Message {
    let mut message = message(&format!("m-{version}"), &version.to_string());
    message.subject = Some("e".into());
    message.extensions.insert("version".into(), version.to_string());
    message
}

fn of_kind(kind: &str, version: u64) -> Message {
    Message { kind: kind.into(), ..at(version) }
}

fn dated(time: &str, id: &str) -> Message {
    Message { subject: Some("e".into()), time: Some(time.into()), ..message(id, &format!("\"{id}\"")) }
}

pub(super) fn is_completed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Completed { .. })
}

#[tokio::test]
async fn a_lower_version_is_stale_and_changes_nothing() {
    let house = House::with(monotonic()).await;
    assert!(is_completed(&house.handle(at(1)).await));
    assert!(is_completed(&house.handle(at(4)).await), "a gap is no matter");
    let before = house.record().await;
    assert_eq!(house.handle(at(3)).await, Outcome::Stale);
    assert_eq!(house.handle(at(1)).await, Outcome::Stale);
    assert_eq!(house.record().await, before, "the record is byte for byte as it was");
    let Outcome::Duplicate(StoredOutcome::Completed(output)) = house.handle(at(4)).await else { panic!() };
    assert_eq!((&output.data[..], house.state().await.as_deref()), (&b"4"[..], Some("4")));
    let counted = house.bench.counters.read().outcomes;
    let of = |name| counted.iter().find(|(outcome, _)| *outcome == name).unwrap().1;
    assert_eq!((of("stale"), of("duplicate")), (2, 1), "stale is counted apart from duplicate");
}

#[tokio::test]
async fn the_same_version_with_another_body_is_a_conflict() {
    let house = House::with(monotonic()).await;
    house.handle(at(2)).await;
    let other = Message { data: "9".into(), ..at(2) };
    assert_eq!(house.handle(other).await, Outcome::Mismatch);
    assert_eq!(house.state().await.as_deref(), Some("2"));
    assert_eq!(house.held_messages().await.len(), 1, "it is kept for an operator");
}

#[tokio::test]
async fn versions_send_under_ids_of_their_own() {
    let house = House::with(monotonic()).await;
    house.handle(at(1)).await;
    house.handle(at(2)).await;
    let ids: Vec<_> = house.store.pending(None, 10).await.unwrap().into_iter().map(|row| row.message.id).collect();
    assert_eq!(ids.len(), 2);
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn a_newer_version_takes_over_from_one_that_waits_for_its_retry() {
    let house = House::with(monotonic()).await;
    let put_off = hapax_core::Handling { retry_here: false, ..Default::default() };
    let outcome = house.bench.consumer.handle(of_kind("retry", 4), put_off).await.unwrap();
    assert!(matches!(outcome, Outcome::Retry { .. }), "{outcome:?}");
    assert!(is_completed(&house.handle(at(5)).await));
    let record = house.record().await.unwrap();
    assert_eq!((record.attempts, record.history.len()), (1, 0), "attempts and history are the newer one's own");
    assert_eq!(house.handle(of_kind("retry", 4)).await, Outcome::Stale);
}

/// Proves G57.
#[tokio::test]
async fn a_late_update_cannot_bring_back_what_was_deleted() {
    let house = House::with(monotonic()).await;
    house.handle(at(1)).await;
    assert!(is_completed(&house.handle(of_kind("deleted", 3)).await));
    // Up to the end of retention and one horizon more, also across sweeps.
    for by_ms in [0, 7_200_000, 3_599_999] {
        house.clock.advance(by_ms);
        house.store.flush().unwrap();
        house.store.sweep(hapax_core::Clock::now_ms(&house.clock)).await.unwrap();
        assert_eq!(house.handle(at(2)).await, Outcome::Stale);
        assert_eq!(house.state().await, None);
    }
    house.clock.advance(1);
    assert!(is_completed(&house.handle(at(2)).await), "after that nothing is known of it any more");
}

#[tokio::test]
async fn strict_versions_run_in_order_however_they_arrive() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    for version in [3, 5, 2] {
        let outcome = house.handle(at(version)).await;
        assert!(matches!(outcome, Outcome::Parked { awaits: 1, .. }), "{outcome:?}");
    }
    assert_eq!(house.record().await, None, "nothing has run");
    assert!(is_completed(&house.handle(at(1)).await));
    house.keep().await;
    assert_eq!(house.state().await.as_deref(), Some("3"), "2 and 3 ran behind it");
    let waiting = house.held_messages().await;
    assert!(matches!(waiting[..], [(HoldReason::Parked { .. }, _)]), "5 waits on: {waiting:?}");
    assert!(is_completed(&house.handle(at(4)).await));
    house.keep().await;
    assert_eq!(house.state().await.as_deref(), Some("5"));
    assert_eq!(house.held_messages().await, []);
    assert_eq!(house.handle(at(4)).await, Outcome::Stale);
    assert!(matches!(house.handle(at(5)).await, Outcome::Duplicate(StoredOutcome::Completed(_))));
}

#[tokio::test]
async fn mutation_a_gap_that_runs_is_found() {
    turns_red(module_path!(), "strict_versions_run_in_order_however_they_arrive", "gap-runs");
}

#[tokio::test]
async fn what_is_parked_survives_a_power_loss() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    assert!(matches!(house.handle(at(2)).await, Outcome::Parked { .. }));
    let house = house.restarted().await;
    assert!(is_completed(&house.handle(at(1)).await));
    house.keep().await;
    assert_eq!(house.state().await.as_deref(), Some("2"));
}

#[tokio::test]
async fn a_gap_that_stays_open_is_given_up_by_policy() {
    for (then, state, held_messages) in [(GapPolicy::Accept, Some("5"), 0), (GapPolicy::DeadLetter, Some("1"), 2)] {
        let house = House::with(strict(then)).await;
        house.handle(at(1)).await;
        house.handle(at(5)).await;
        house.clock.advance(30_000);
        house.handle(at(3)).await;
        // The first one's time is over, the second's is not: but what is earlier must not be made
        // stale by what is later.
        house.clock.advance(30_000);
        house.keep().await;
        house.clock.advance(30_000);
        house.keep().await;
        assert_eq!(house.state().await.as_deref(), state, "{then:?}");
        let left = house.held_messages().await;
        assert_eq!(left.len(), held_messages, "{then:?}: {left:?}");
        assert!(
            left.iter().all(|(hold_reason, error)| *hold_reason == HoldReason::Dead && error.contains("time was over"))
        );
        let runs = house.store.pending(None, 10).await.unwrap().len();
        assert_eq!(runs, if then == GapPolicy::Accept { 3 } else { 1 }, "{then:?}: none was made stale by a later one");
    }
}

#[tokio::test]
async fn a_parked_message_delivered_again_waits_no_longer_than_before() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    let Outcome::Parked { until_ms, .. } = house.handle(at(2)).await else { panic!() };
    house.clock.advance(10_000);
    assert_eq!(house.handle(at(2)).await, Outcome::Parked { awaits: 1, until_ms });
    assert_eq!(house.held_messages().await.len(), 1);
}

#[tokio::test]
async fn what_is_too_much_to_park_is_put_off() {
    let options = Options { strategy: strict(GapPolicy::DeadLetter), held_max: 2, ..quick() };
    let house = House::on(LossyDisk::new(), SimulatedClock::at(NOW_MS), options).await;
    for version in [2, 3] {
        assert!(matches!(house.handle(at(version)).await, Outcome::Parked { .. }));
    }
    let outcome = house.handle(at(4)).await;
    assert!(matches!(&outcome, Outcome::Retry { error, .. } if error.contains("2 messages")), "{outcome:?}");
    assert_eq!(house.held_messages().await.len(), 2);
}

#[tokio::test]
async fn a_version_that_failed_for_good_does_not_block_the_next() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    assert!(matches!(house.handle(of_kind("reject", 1)).await, Outcome::DeadLettered { .. }));
    assert!(is_completed(&house.handle(at(2)).await));
}

#[tokio::test]
async fn the_next_version_waits_for_one_that_is_due_again() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    let put_off = hapax_core::Handling { retry_here: false, ..Default::default() };
    house.bench.consumer.handle(of_kind("retry", 1), put_off).await.unwrap();
    assert!(matches!(house.handle(at(2)).await, Outcome::Parked { awaits: 1, .. }));
    // Tried as often as may be, it becomes a dead letter; then the next may go.
    assert!(matches!(house.handle(of_kind("retry", 1)).await, Outcome::DeadLettered { .. }));
    house.keep().await;
    assert_eq!(house.state().await.as_deref(), Some("2"));
}

#[tokio::test]
async fn an_earlier_time_is_stale_and_ids_break_ties() {
    let house = House::with(timestamp()).await;
    assert!(is_completed(&house.handle(dated("2023-11-14T22:00:00Z", "b")).await));
    assert_eq!(house.handle(dated("2023-11-14T21:59:59.999Z", "z")).await, Outcome::Stale);
    assert_eq!(house.handle(dated("2023-11-14T22:00:00Z", "a")).await, Outcome::Stale);
    assert!(is_completed(&house.handle(dated("2023-11-14T22:00:00Z", "c")).await));
    assert_eq!(house.state().await.as_deref(), Some("\"c\""));
}

#[tokio::test]
async fn a_time_from_the_future_cannot_make_everything_stale() {
    let house = House::with(timestamp()).await;
    house.handle(dated("2023-11-14T22:00:00Z", "a")).await;
    let before = house.record().await;
    let outcome = house.handle(dated("2033-01-01T00:00:00Z", "b")).await;
    assert!(matches!(&outcome, Outcome::DeadLettered { error } if error.contains("max_future_skew_ms")), "{outcome:?}");
    assert_eq!(house.record().await, before);
    assert!(is_completed(&house.handle(dated("2023-11-14T22:00:01Z", "c")).await));
    assert_eq!(house.held_messages().await.len(), 1, "it is kept for an operator");
}

/// Proves G59.
#[tokio::test]
async fn what_cannot_be_identified_becomes_a_dead_letter_once() {
    let house = House::with(monotonic()).await;
    for _ in 0..2 {
        let outcome = house.handle(Message { subject: Some("e".into()), ..message("m", "{}") }).await;
        assert!(matches!(&outcome, Outcome::DeadLettered { error } if error.contains("`version`")), "{outcome:?}");
    }
    assert_eq!(house.held_messages().await.len(), 1);
    assert_eq!(house.record().await, None);
}

/// Proves G59.
#[tokio::test]
async fn what_could_not_be_identified_runs_once_the_strategy_is_mended() {
    let House { disk, store, bench, clock, options } = House::with(monotonic()).await;
    let nameless = Message { subject: Some("e".into()), ..message("m", "{}") };
    assert!(matches!(bench.handle(nameless.clone()).await, Outcome::DeadLettered { .. }));
    let (key, _) = store.held_messages(Some("p"), None, 1).await.unwrap().remove(0);
    let operator = Operator::new(store.clone(), bench.committer.clone(), Arc::new(clock.clone()), []);
    operator.redrive(&key, &Actor { actor: "me".into(), reason: "mended".into() }).await.unwrap();
    drop((operator, store, bench));
    let by_subject = Strategy::MessageId { key: Select::Attribute("subject".into()) };
    let house = House::on(disk, clock, Options { strategy: by_subject, ..options }).await;
    house.keep().await;
    assert_eq!(house.state().await.as_deref(), Some("{}"));
    assert_eq!(house.held_messages().await, [], "under its old key it is gone as well");
    assert!(matches!(house.handle(nameless).await, Outcome::Duplicate(_)));
}

#[tokio::test]
async fn the_same_content_runs_once_whatever_its_id() {
    let house = House::with(Strategy::ContentHash { fields: Fields::Without(vec!["/sent".into()]) }).await;
    assert!(is_completed(&house.handle(message("a", r#"{"v":1.0,"sent":1}"#)).await));
    let outcome = house.handle(message("b", r#"{"sent":2,"v":1}"#)).await;
    assert!(matches!(outcome, Outcome::Duplicate(StoredOutcome::Completed(_))), "{outcome:?}");
    assert!(is_completed(&house.handle(message("b", r#"{"sent":2,"v":2}"#)).await), "other content is another message");
    let states: Vec<_> =
        house.store.records(None, None, 9).await.unwrap().into_iter().map(|(_, record)| record.state).collect();
    assert!(states.len() == 2 && states.iter().all(|state| matches!(state, RecordState::Completed { .. })));
}

/// An entity is quiet for longer than its record is retained: its next version runs, an earlier one
/// is stale, and one too far ahead waits for the one that is missing.
/// Proves G150.
#[tokio::test]
async fn a_strict_version_finds_its_predecessor_after_a_quiet_time() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    assert!(is_completed(&house.handle(at(1)).await) && is_completed(&house.handle(at(2)).await));
    for swept in [false, true] {
        house.clock.advance(100 * 3_600_000);
        if swept {
            house.store.records(None, None, 10).await.unwrap();
            house.store.sweep(hapax_core::Clock::now_ms(&house.clock)).await.unwrap();
        }
        let next = if swept { 4 } else { 3 };
        assert_eq!(house.handle(at(next - 1)).await, Outcome::Stale, "swept: {swept}");
        let early = house.handle(at(next + 1)).await;
        assert!(matches!(early, Outcome::Parked { awaits, .. } if awaits == next), "swept: {swept}: {early:?}");
        house.store.held_messages(Some("p"), None, 9).await.unwrap();
        let outcome = house.handle(at(next)).await;
        assert!(is_completed(&outcome), "swept: {swept}: {outcome:?}");
        let discarded = Operator::new(
            house.store.clone(),
            house.bench.committer.clone(),
            Arc::new(house.clock.clone()),
            [house.bench.consumer.clone()],
        );
        for (key, _) in house.store.held_messages(Some("p"), None, 9).await.unwrap() {
            discarded.discard(&key, &Actor { actor: "test".into(), reason: String::new() }).await.unwrap();
        }
    }
}

/// Evicted, the entity begins anew.
#[tokio::test]
async fn an_evicted_strict_entity_begins_with_its_first_version() {
    let house = House::with(strict(GapPolicy::DeadLetter)).await;
    assert!(is_completed(&house.handle(at(1)).await));
    let (clock, committer) = (Arc::new(house.clock.clone()), house.bench.committer.clone());
    let operator = Operator::new(house.store.clone(), committer, clock, [house.bench.consumer.clone()]);
    let key = RecordKey::new(Scope::of("p"), "/test".into(), "e".into());
    operator.evict(&key, &Actor { actor: "test".into(), reason: String::new() }).await.unwrap();
    assert!(is_completed(&house.handle(at(1)).await));
}

hapax_tests::mutations! {
    mutation_a_version_that_goes_with_its_record_is_found: a_strict_version_finds_its_predecessor_after_a_quiet_time is red with "version-goes-with-its-record";
}
