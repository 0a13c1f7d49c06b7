//! Properties that hold whatever arrives, each with a fault in the code that turns its test red.
//! Those that other tests show already stand in `docs/concepts/outcomes.md`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Clock, Commit, Context, Expected, Failure, GapPolicy, Gaps, Group, Handling, Invocation, Message,
    MessageProcessor, NativeProcessor, Observer, Operator, Options, Ordering, Outcome, Output, Record, RecordChange,
    RecordEvent, RecordKey, RecordState, Report, Scope, Select, Store, Strategy, SystemClock, Verdict, VersionOrder,
    next_state, run_deferred,
};
use hapax_store::MemoryStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::clock::StillClock;
use hapax_tests::processors::obedient;
use proptest::prelude::*;
use proptest::strategy::Strategy as _;
use tokio::sync::watch;

const NOW_MS: u64 = 1_700_000_000_000;

fn redb() -> Arc<dyn Store> {
    Arc::new(LossyDisk::new().open().unwrap())
}

fn of(kind: &str) -> Message {
    Message { kind: kind.into(), ..message("m", "{}") }
}

fn key() -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), &message("m", ""))
}

async fn found(store: &dyn Store) -> Option<Record> {
    store.record(&key()).await.unwrap()
}

/// Proves G35, G101.
#[tokio::test]
async fn a_handler_failure_is_followed_by_a_run_when_it_is_delivered_again() {
    let (store, clock) = (Arc::new(LossyDisk::new().open().unwrap()), StillClock::at(NOW_MS));
    let bench = Bench::timed("p", store.clone(), obedient(), quick(), Arc::new(clock.clone())).await;
    let put_off = Handling { retry_here: false, ..Handling::default() };
    let first = bench.consumer.handle(of("retry-until-2"), put_off).await.unwrap();
    assert!(matches!(first, Outcome::Retry { .. }), "{first:?}");
    clock.set(NOW_MS + 1_000);
    let second = bench.consumer.handle(of("retry-until-2"), put_off).await.unwrap();
    assert!(matches!(&second, Outcome::Completed { output } if output.data == "attempt 2"), "{second:?}");
}

/// Proves G96.
#[tokio::test]
async fn epochs_strictly_increase() {
    let (store, clock) = (Arc::new(LossyDisk::new().open().unwrap()), StillClock::at(NOW_MS));
    let bench = Bench::timed("p", store.clone(), obedient(), quick(), Arc::new(clock.clone())).await;
    let put_off = Handling { retry_here: false, ..Handling::default() };
    let mut last = 0;
    for passage in 1..=3 {
        bench.consumer.handle(of("retry-until-3"), put_off).await.unwrap();
        let record = found(&*store).await.unwrap();
        assert_eq!(record.attempts, passage);
        assert!(record.epoch > last, "epoch {} after {last}", record.epoch);
        last = record.epoch;
        clock.set(NOW_MS + u64::from(passage) * 1_000);
    }
    // What its retention has ended is followed by a record of a greater epoch, if it was not swept.
    clock.set(NOW_MS + 10 * quick().retention_ms);
    bench.consumer.handle(of("ok"), put_off).await.unwrap();
    assert!(found(&*store).await.unwrap().epoch > last);
}

/// A record in the state and epoch given, whatever led there.
fn record(state: RecordState, epoch: u64) -> Record {
    Record {
        state,
        epoch,
        attempts: 1,
        fingerprint: hapax_core::Fingerprint::of(&of("ok")),
        position: None,
        component: "native".into(),
        saga: None,
        received_ms: NOW_MS,
        changed_ms: NOW_MS,
        expires_ms: None,
        history: Vec::new(),
    }
}

async fn verdict(store: &dyn Store, version: u64, expected: Expected, record: RecordChange) -> Verdict {
    let commit = Commit { version, expected, record, ..Commit::of(&key()) };
    store.commit(&Group { commits: vec![commit], ..Group::default() }).await.unwrap().remove(0)
}

async fn a_stale_owner_changes_nothing(store: &dyn Store) {
    let claimed = |owner: &str, lease_end_ms| RecordState::InProgress { owner: owner.into(), lease_end_ms };
    let put = |state, epoch| RecordChange::Put(record(state, epoch).into());
    let first = verdict(store, 1, Expected::Absent, put(claimed("one", 10), 1)).await;
    let taken_over = verdict(store, 2, Expected::Epoch(1), put(claimed("two", 20), 2)).await;
    assert_eq!([first, taken_over], [Verdict::Committed, Verdict::Committed]);
    let before = found(store).await;
    let done = RecordState::Completed { output: Output::default() };
    let due = RecordState::RetryDue { error: "late".into(), at_ms: 30 };
    let late = [
        ("complete", put(done.clone(), 2)),
        ("fail", put(due, 2)),
        ("extend its lease", put(claimed("one", 40), 2)),
        ("delete", RecordChange::Remove),
    ];
    for (version, (deed, change)) in (3..).zip(late) {
        let verdict = verdict(store, version, Expected::Epoch(1), change).await;
        assert!(matches!(verdict, Verdict::EpochMismatch(Some(_))), "the first owner can still {deed}: {verdict:?}");
        assert_eq!(found(store).await, before, "the record after an attempt to {deed}");
    }
    let owner = verdict(store, 9, Expected::Epoch(2), put(done, 3)).await;
    assert_eq!(owner, Verdict::Committed, "the owner of the current epoch may");
}

/// Proves G97.
#[tokio::test]
async fn a_stale_owner_can_neither_complete_fail_extend_nor_delete() {
    a_stale_owner_changes_nothing(&MemoryStore::default()).await;
    a_stale_owner_changes_nothing(&*redb()).await;
}

#[test]
fn nobody_claims_what_another_holds_before_its_lease_is_over() {
    let held = RecordState::InProgress { owner: "one".into(), lease_end_ms: 100 };
    let claim = |owner: &str, now_ms| {
        next_state(Some(&held), RecordEvent::Claimed { owner: owner.into(), now_ms, lease_end_ms: 200 }).is_ok()
    };
    assert!(claim("one", 50) && claim("two", 100) && claim("two", 150));
    assert!(!claim("two", 99));
}

/// Appends what it is told to `log`, and makes it the `last`. Fails for good while it is broken, if
/// told so.
fn appender(broken: Arc<AtomicBool>) -> Arc<dyn MessageProcessor> {
    Arc::new(NativeProcessor::new(move |run: &Invocation, context: &mut Context| {
        append(run.clone(), context, broken.load(SeqCst) && run.message.kind == "fragile")
    }))
}

fn append(run: Invocation, context: &mut Context, fails: bool) -> BoxFuture<'_, Result<Output, Failure>> {
    Box::pin(async move {
        if fails {
            return Err(Failure::Reject("broken".into()));
        }
        let failed = |error: hapax_core::ContextError| Failure::retry(error.to_string());
        let entity = run.message.subject.clone().unwrap_or_default();
        let before = context.get(&format!("log/{entity}")).await.map_err(failed)?.unwrap_or_default();
        let log = format!("{}{},", std::str::from_utf8(&before).unwrap(), run.message.extensions["v"]);
        context.set(&format!("log/{entity}"), log).map_err(failed)?;
        context.set(&format!("last/{entity}"), run.message.extensions["v"].clone()).map_err(failed)?;
        Ok(Output::default())
    })
}

/// The message of an entity at a version, which is its time too.
fn at(entity: u8, version: u64) -> Message {
    let mut message = message(&format!("{entity}-{version}"), "{}");
    message.subject = Some(format!("e{entity}"));
    message.time = Some(format!("{}", 1_600_000_000_000 + version));
    message.extensions.insert("v".into(), version.to_string());
    message
}

fn strict() -> Strategy {
    // Nobody's time is over before the next millennium.
    let gaps = Gaps { first: 1, timeout_ms: 1 << 45, then: GapPolicy::DeadLetter };
    by_version(VersionOrder::Strict(gaps))
}

fn by_version(order: VersionOrder) -> Strategy {
    Strategy::Version { entity: Select::Attribute("subject".into()), version: Select::Attribute("v".into()), order }
}

fn by_time() -> Strategy {
    let (entity, time) = (Select::Attribute("subject".into()), Select::Attribute("time".into()));
    Strategy::Timestamp { entity, time, max_future_skew_ms: 0 }
}

fn options(strategy: Strategy) -> Options {
    Options { strategy, ordering: Ordering::Subject, ..quick() }
}

struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

/// Runs what the store keeps and may run now.
async fn keep(bench: &Bench, store: Arc<dyn Store>) {
    let (_stop, stopping) = watch::channel(true);
    run_deferred(bench.consumer.clone(), store, Arc::new(Nobody), stopping).await.unwrap();
}

async fn text(store: &dyn Store, key: &str) -> String {
    let (_, value) = store.view(&Scope::of("p")).get(key).await.unwrap();
    String::from_utf8(value.unwrap_or_default().to_vec()).unwrap()
}

/// Delivers it all, many at once; answers the last of each entity and, in the order in which they
/// ran, the versions.
async fn delivered(strategy: Strategy, order: &[(u8, u64)], at_once: usize) -> [(String, String); 2] {
    let store = Arc::new(MemoryStore::default());
    let bench = Bench::new("p", store.clone(), appender(Arc::default()), options(strategy)).await;
    for some in order.chunks(at_once) {
        let all = some.iter().map(|(entity, version)| bench.handle(at(*entity, *version)));
        futures_util::future::join_all(all).await;
    }
    keep(&bench, store.clone()).await;
    let entity = async |entity| {
        (text(&*store, &format!("last/e{entity}")).await, text(&*store, &format!("log/e{entity}")).await)
    };
    [entity(0).await, entity(1).await]
}

const VERSIONS: u64 = 5;

/// Every message of two entities, some of them twice, in any order.
fn shuffled() -> impl proptest::strategy::Strategy<Value = Vec<(u8, u64)>> {
    let all = (0..2).flat_map(|entity| (1..=VERSIONS).map(move |version| (entity, version)));
    let all: Vec<_> = all.collect();
    let again = prop::sample::subsequence(all.clone(), 0..4);
    again.prop_flat_map(move |again| Just([all.clone(), again].concat()).prop_shuffle())
}

fn in_one_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("HAPAX_CASES").map_or(64, |cases| cases.parse().unwrap()),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Proves G38, G39, G104.
    #[test]
    fn in_any_order_the_last_version_or_time_stands_in_the_end(order in shuffled(), at_once in 1..6usize) {
        for strategy in [by_version(VersionOrder::Monotonic), by_time()] {
            for (last, log) in in_one_runtime(delivered(strategy, &order, at_once)) {
                prop_assert_eq!(last, VERSIONS.to_string());
                let ran: Vec<u64> = log.split_terminator(',').map(|version| version.parse().unwrap()).collect();
                prop_assert!(ran.is_sorted_by(|one, other| one < other), "ran as {:?}", ran);
            }
        }
    }

    /// Proves G40, G106.
    #[test]
    fn in_any_order_strict_versions_all_run_in_turn(order in shuffled(), at_once in 1..6usize) {
        for (_, log) in in_one_runtime(delivered(strict(), &order, at_once)) {
            prop_assert_eq!(log, "1,2,3,4,5,");
        }
    }
}

/// Proves G43, G107.
#[tokio::test]
async fn order_of_a_key_holds_through_parking_and_redrive() {
    let (store, broken) = (Arc::new(LossyDisk::new().open().unwrap()), Arc::new(AtomicBool::new(true)));
    let bench = Bench::new("p", store.clone(), appender(broken.clone()), options(strict())).await;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let operator = Operator::new(store.clone(), bench.committer.clone(), clock, [bench.consumer.clone()]);
    let fragile = Message { kind: "fragile".into(), ..at(0, 1) };
    assert!(matches!(bench.handle(fragile).await, Outcome::DeadLettered { .. }));
    broken.store(false, SeqCst);
    let (dead, _) = hapax_core::Inspect::held_messages(&*store, None, None, 1).await.unwrap().remove(0);
    operator.redrive(&dead, &Actor { actor: "somebody".into(), reason: "mended".into() }).await.unwrap();
    // It is to run again: what comes behind it waits.
    for version in [3, 2] {
        let outcome = bench.handle(at(0, version)).await;
        assert!(matches!(outcome, Outcome::Parked { .. }), "{version}: {outcome:?}");
    }
    keep(&bench, store.clone()).await;
    assert_eq!(text(&*store, "log/e0").await, "1,2,3,");
    assert_eq!(hapax_core::Inspect::held_messages(&*store, None, None, 9).await.unwrap(), []);
}

hapax_tests::mutations! {
    mutation_failure_is_final_is_found:
        a_handler_failure_is_followed_by_a_run_when_it_is_delivered_again is red with "failure-is-final";
    mutation_attempts_forgotten_is_found:
        a_handler_failure_is_followed_by_a_run_when_it_is_delivered_again is red with "attempts-forgotten";
    mutation_epoch_stands_still_is_found: epochs_strictly_increase is red with "epoch-stands-still";
    mutation_epoch_unchecked_is_found:
        a_stale_owner_can_neither_complete_fail_extend_nor_delete is red with "epoch-unchecked";
    mutation_older_position_runs_is_found:
        in_any_order_the_last_version_or_time_stands_in_the_end is red with "older-position-runs";
    mutation_gap_runs_is_found: in_any_order_strict_versions_all_run_in_turn is red with "gap-runs";
    mutation_gap_runs_is_found_behind_a_redriven_one:
        order_of_a_key_holds_through_parking_and_redrive is red with "gap-runs";
    mutation_nobody_is_woken_is_found: order_of_a_key_holds_through_parking_and_redrive is red with "nobody-is-woken";
}
