//! The feed over the whole pipeline: one event a commit, whatever crashes; places that never
//! change; duplicates told without a touch of the record.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Clock as _, Commit, Cursor, Feed as _, FeedEvent, FeedEventKind, Fingerprint, Group, Handling, HeldKey,
    IdempotencyStorage as _, Inspect as _, Message, Operator, Options, Outcome, Output, Record, RecordChange,
    RecordKey, RecordState, Scope, Select, Store, StoreError, Strategy, SystemClock, VersionOrder,
};
use hapax_store::{MemoryStore, RedbStore, StoreOptions};
use hapax_tests::backend::{LossyDisk, Part};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::clock::SimulatedClock;
use hapax_tests::mutation::turns_red;
use hapax_tests::processors::{Counter, obedient};
use hapax_tests::random::Random;

const START_MS: u64 = 1_700_000_000_000;
const RETENTION_MS: u64 = 600_000;

fn key(id: &str) -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), &message(id, ""))
}

async fn feed(store: &impl Store) -> Vec<FeedEvent> {
    let page = store.events(None, None, 10_000).await.unwrap();
    assert!(!page.truncated);
    page.events
}

/// Kinds and how often, of one record.
async fn told(store: &impl Store, id: &str) -> Vec<(&'static str, u64)> {
    let page = store.events(Some(key(id).digest()), None, 10_000).await.unwrap();
    page.events.iter().map(|event| (event.entry.kind.name(), event.entry.times)).collect()
}

#[tokio::test]
async fn what_becomes_of_a_message_is_told() {
    let store = Arc::new(LossyDisk::new().open().unwrap());
    let bench = Bench::new("p", store.clone(), obedient(), quick()).await;
    let of = |id: &str, kind: &str| Message { kind: kind.into(), ..message(id, "{}") };
    bench.handle(of("passes", "retry-until-3")).await;
    bench.handle(of("fails", "reject")).await;
    bench.handle(message("other", "{}")).await;
    assert_eq!(bench.handle(message("other", "[]")).await, Outcome::Mismatch);
    let operator =
        Operator::new(store.clone(), bench.committer.clone(), Arc::new(SystemClock), [bench.consumer.clone()]);
    let by = Actor { actor: "a".into(), reason: "r".into() };
    let held_message = async |id: &str| -> HeldKey {
        let held_messages = store.held_under(&key(id)).await.unwrap();
        held_messages[0].key(&key(id))
    };
    operator.redrive(&held_message("fails").await, &by).await.unwrap();
    operator.discard(&held_message("other").await, &by).await.unwrap();
    operator.evict(&key("passes"), &by).await.unwrap();
    assert_eq!(told(&*store, "passes").await, [("failed", 1), ("failed", 1), ("completed", 1), ("evicted", 1)]);
    assert_eq!(told(&*store, "fails").await, [("dead-lettered", 1), ("redriven", 1)]);
    assert_eq!(told(&*store, "other").await, [("completed", 1), ("dead-lettered", 1), ("discarded", 1)]);
    let now_ms = SystemClock.now_ms();
    for event in feed(&*store).await {
        assert!(event.entry.at_ms.abs_diff(now_ms) < 3_600_000, "{event:?}");
    }
}

/// Duplicates on a store with and without a restart in between, told when the committer closes.
async fn duplicates_are_told_and_the_record_stays(open: impl Fn() -> Arc<RedbStore>) {
    let completed = {
        let bench = Bench::new("p", open(), Counter::new(), quick()).await;
        assert!(matches!(bench.handle(message("m", "{}")).await, Outcome::Completed { .. }));
        assert!(matches!(bench.handle(message("n", "{}")).await, Outcome::Completed { .. }));
        drop(bench);
        open().record(&key("m")).await.unwrap()
    };
    for cache_bytes in [0, 1 << 20] {
        let bench = Bench::new("p", open(), Counter::new(), Options { cache_bytes, ..quick() }).await;
        for _ in 0..3 {
            assert!(matches!(bench.handle(message("m", "{}")).await, Outcome::Duplicate(_)));
        }
        drop(bench);
    }
    let store = open();
    assert_eq!(told(&*store, "m").await, [("completed", 1), ("replayed", 3), ("replayed", 3)]);
    assert_eq!(told(&*store, "n").await, [("completed", 1)]);
    assert_eq!(store.record(&key("m")).await.unwrap(), completed, "the record is what it was");
}

/// Proves G11.
#[tokio::test]
async fn duplicates_are_told_when_the_host_ends() {
    let disk = LossyDisk::new();
    duplicates_are_told_and_the_record_stays(|| Arc::new(disk.open().unwrap())).await;
}

/// Nothing else happens, and nobody closes anything: the note is written all the same.
#[tokio::test]
async fn a_duplicate_is_told_though_nothing_else_happens() {
    let store = MemoryStore::default();
    let bench = Bench::new("p", Arc::new(store.clone()), Counter::new(), quick()).await;
    for _ in 0..3 {
        bench.handle(message("m", "{}")).await;
    }
    while told(&store, "m").await.len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // Both, or the second in a note of its own: the first may have been written between the two.
    bench.handle(message("m", "{}")).await;
    drop(bench);
    let told = told(&store, "m").await;
    assert_eq!(told[0], ("completed", 1));
    assert!(told[1..].iter().all(|(kind, _)| *kind == "replayed"), "{told:?}");
    assert_eq!(told[1..].iter().map(|(_, times)| times).sum::<u64>(), 3);
}

#[tokio::test]
async fn stale_messages_are_told() {
    let store = MemoryStore::default();
    let strategy = Strategy::Version {
        entity: Select::Attribute("subject".into()),
        version: Select::Pointer("/version".into()),
        order: VersionOrder::Monotonic,
    };
    let bench = Bench::new("p", Arc::new(store.clone()), Counter::new(), Options { strategy, ..quick() }).await;
    let at = |version: u64| {
        let data = format!(r#"{{"version":{version}}}"#);
        Message { subject: Some("entity".into()), ..message(&format!("m-{version}"), &data) }
    };
    for (version, stale) in [(5, false), (3, true), (4, true), (6, false)] {
        assert_eq!(bench.handle(at(version)).await == Outcome::Stale, stale, "version {version}");
    }
    drop(bench);
    let told: Vec<_> = feed(&store).await.iter().map(|event| (event.entry.kind.name(), event.entry.times)).collect();
    assert_eq!(told, [("completed", 1), ("completed", 1), ("stale", 2)]);
    let digests: Vec<_> = feed(&store).await.iter().map(|event| event.entry.digest).collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]), "all of one entity");
}

/// As small as it gets: transactions come between appends, the journal goes round, and buckets are
/// many.
fn tiny() -> StoreOptions {
    StoreOptions {
        memtable_bytes: 1,
        unapplied_bytes_max: 4 << 10,
        bucket_rows_max: 3,
        journal_bytes: (4 << 10) + 2_600,
        ..StoreOptions::default()
    }
}

/// What a life of the host left behind: what a follower of the feed has seen until the power went.
#[derive(Default)]
struct Followed {
    seen: Vec<FeedEvent>,
    acknowledged: Vec<String>,
}

/// Handles messages, sweeps now and then, and follows the feed, until something fails.
async fn live(disk: &LossyDisk, options: &StoreOptions, from: usize, followed: &mut Followed) {
    let Ok(store) = disk.open_with(options.clone()) else { return };
    let store = Arc::new(store);
    let clock = SimulatedClock::at(START_MS + from as u64 * RETENTION_MS);
    let options = Options { retention_ms: RETENTION_MS, ..quick() };
    let bench = Bench::timed("p", store.clone(), Counter::new(), options, Arc::new(clock.clone())).await;
    for number in from..from + MESSAGES {
        let id = format!("m-{number}");
        if bench.consumer.handle(message(&id, "{}"), Handling::default()).await.is_err() {
            return;
        }
        followed.acknowledged.push(id);
        clock.advance(RETENTION_MS / 2);
        // What was written is brought to where a sweep finds it.
        let swept = number % 2 == 0 || store.flush().is_ok() && store.sweep(clock.now_ms()).await.is_ok();
        let after = followed.seen.last().map(|event| event.cursor);
        let Ok(page) = store.events(None, after, 1_000).await else { return };
        assert!(!page.truncated);
        followed.seen.extend(page.events);
        if !swept {
            return;
        }
    }
}

const MESSAGES: usize = 5;

/// What is told is what is there: one completion a message, those whose records are there and those
/// that were swept; and what a follower has seen stands where it stood.
async fn check(disk: &LossyDisk, options: &StoreOptions, followed: &Followed, context: &str) -> u64 {
    let Ok(store) = disk.open_with(options.clone()) else {
        assert!(followed.acknowledged.is_empty(), "{context}: the store does not open");
        return 0;
    };
    let told = feed(&store).await;
    let places = |events: &[FeedEvent]| events.iter().map(|event| (event.cursor, event.entry)).collect::<Vec<_>>();
    let (told_places, seen) = (places(&told), places(&followed.seen));
    assert_eq!(told_places[..seen.len().min(told.len())], seen[..], "{context}: what was seen is not there as it was");
    assert!(told.is_sorted_by(|one, next| one.cursor < next.cursor), "{context}: places only grow");
    let mut completed: BTreeMap<u128, u32> = BTreeMap::new();
    let of_kind = |kind| told.iter().filter(move |event| event.entry.kind == kind);
    of_kind(FeedEventKind::Completed).for_each(|event| *completed.entry(event.entry.digest).or_default() += 1);
    assert!(completed.values().all(|times| *times == 1), "{context}: told twice");
    for id in &followed.acknowledged {
        assert!(completed.contains_key(&key(id).digest()), "{context}: {id} was acknowledged and is not told");
    }
    let records = store.records(None, None, 1_000).await.unwrap();
    for (key, _) in &records {
        assert!(completed.contains_key(&key.digest()), "{context}: {key} is there and is not told");
    }
    let swept: u64 = of_kind(FeedEventKind::Swept).map(|event| event.entry.times).sum();
    assert_eq!(records.len() as u64 + swept, completed.len() as u64, "{context}: records there and swept");
    swept
}

/// The power goes at every `every`-th operation of a life, and at any of the one after it.
async fn the_feed_tells_exactly_what_is_there(options: StoreOptions, every: usize) {
    let total = {
        let disk = LossyDisk::new();
        live(&disk, &options, 0, &mut Followed::default()).await;
        disk.operations()
    };
    assert!(total > 60, "transactions and sweeps must come between appends, there were {total} operations");
    let mut swept = 0;
    for operation in (0..total).step_by(every) {
        let disk = LossyDisk::new();
        disk.fail_after(operation);
        let mut followed = Followed::default();
        live(&disk, &options, 0, &mut followed).await;
        let mut random = Random::of(operation);
        let after = disk.after_power_loss(random.below(u64::MAX));
        swept += check(&after.copy(), &options, &followed, &format!("operation {operation}")).await;
        after.fail_after(random.below(2 * total));
        live(&after, &options, MESSAGES, &mut followed).await;
        let last = after.after_power_loss(random.below(u64::MAX));
        swept += check(&last, &options, &followed, &format!("operation {operation}, second loss")).await;
    }
    assert!(swept > 0, "nothing was ever swept: it tests less than it says");
}

/// Proves G10, G113.
#[tokio::test]
async fn after_a_crash_the_feed_tells_exactly_what_is_there() {
    the_feed_tells_exactly_what_is_there(tiny(), 3).await;
}

/// The same where much is journalled and little is in the tables.
#[tokio::test]
async fn after_a_crash_the_journal_tells_exactly_what_is_there() {
    let options = StoreOptions { memtable_bytes: 1 << 20, journal_bytes: 1 << 20, ..tiny() };
    let options = StoreOptions { unapplied_bytes_max: 1 << 20, ..options };
    the_feed_tells_exactly_what_is_there(options, 5).await;
}

/// The answer of a store, waited for on a thread without a runtime.
fn at_once<T: Send>(answer: BoxFuture<'_, Result<T, StoreError>>) -> T {
    let wait = || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(answer);
    std::thread::scope(|scope| scope.spawn(wait).join().unwrap()).unwrap()
}

/// A completed record that has expired long ago.
fn expired() -> Record {
    Record {
        state: RecordState::Completed { output: Output::default() },
        epoch: 1,
        attempts: 1,
        fingerprint: Fingerprint { version: 1, digest: [7; 16] },
        position: None,
        component: "c".into(),
        saga: None,
        received_ms: 1,
        changed_ms: 1,
        expires_ms: Some(START_MS),
        history: Vec::new(),
    }
}

/// A store on `disk` whose tables have ten records that have expired, in five buckets.
fn expired_store(disk: &LossyDisk) -> RedbStore {
    let store = disk.open_with(StoreOptions { bucket_rows_max: 2, ..StoreOptions::default() }).unwrap();
    let commit = |number: u64| {
        let record = RecordChange::Put(expired().into());
        Commit { record, version: number, ..Commit::of(&key(&number.to_string())) }
    };
    at_once(store.commit(&Group { commits: (1..=10).map(commit).collect(), ..Group::default() }));
    store.flush().unwrap();
    store
}

/// How many records each sweep that is told took.
fn swept(store: &RedbStore) -> Vec<u64> {
    let told = at_once(store.events(None, None, 1_000)).events;
    let told = told.iter().filter(|event| event.entry.kind == FeedEventKind::Swept);
    told.map(|event| event.entry.times).collect()
}

/// Several sweeps at once: each bucket goes once, and is told once.
#[test]
fn sweeps_at_the_same_time_are_told_once_a_bucket() {
    for _ in 0..10 {
        let store = expired_store(&LossyDisk::new());
        let barrier = std::sync::Barrier::new(3);
        let sweep = || {
            barrier.wait();
            at_once(store.sweep(2 * START_MS))
        };
        let gone: u64 = std::thread::scope(|scope| {
            let sweeps: Vec<_> = (0..3).map(|_| scope.spawn(sweep)).collect();
            sweeps.into_iter().map(|sweep| sweep.join().unwrap()).sum()
        });
        assert_eq!((gone, swept(&store)), (10, vec![2; 5]));
    }
}

/// The process dies when it is journalled that buckets go, and nothing is dropped yet. The next one
/// sweeps at once.
#[test]
fn a_sweep_after_a_death_is_told_once_a_bucket() {
    let disk = LossyDisk::new();
    let store = expired_store(&disk);
    let tables = disk.bytes(Part::Database);
    assert_eq!(at_once(store.sweep(2 * START_MS)), 10);
    disk.kill(store);
    disk.set(Part::Database, tables);
    for _ in 0..10 {
        let store = disk.copy().open().unwrap();
        at_once(store.sweep(2 * START_MS));
        assert_eq!(swept(&store), [2; 5]);
        assert_eq!(at_once(store.records(None, None, 100)), []);
    }
}

#[test]
fn mutation_swept_twice_is_found() {
    turns_red(module_path!(), "sweeps_at_the_same_time_are_told_once_a_bucket", "swept-twice");
    turns_red(module_path!(), "a_sweep_after_a_death_is_told_once_a_bucket", "swept-twice");
}

/// A follower that stops and goes on by its last place sees everything once, also over restarts.
/// Proves G53.
#[tokio::test]
async fn a_follower_goes_on_where_it_was_after_a_restart() {
    let disk = LossyDisk::new();
    let (mut seen, mut after): (Vec<u128>, Option<Cursor>) = (Vec::new(), None);
    for round in 0..4 {
        let store = Arc::new(disk.open_with(tiny()).unwrap());
        let bench = Bench::new("p", store.clone(), Counter::new(), quick()).await;
        for number in 0..5 {
            bench.handle(message(&format!("m-{round}-{number}"), "{}")).await;
            if number % 2 == 0 {
                let text = after.map(|after| after.to_string());
                let page = store.events(None, text.map(|text| text.parse().unwrap()), 2).await.unwrap();
                assert!(!page.truncated);
                after = page.next(after);
                seen.extend(page.events.iter().map(|event| event.entry.digest));
            }
        }
        drop(bench);
        if round % 2 == 0 { disk.kill(store) } else { drop(store) }
    }
    let rest = disk.open_with(tiny()).unwrap().events(None, after, 1_000).await.unwrap();
    seen.extend(rest.events.iter().map(|event| event.entry.digest));
    let all = (0..4).flat_map(|round| (0..5).map(move |number| key(&format!("m-{round}-{number}")).digest()));
    assert_eq!(seen, all.collect::<Vec<_>>());
}

#[test]
fn mutation_feed_not_applied_is_found_after_a_crash() {
    turns_red(module_path!(), "after_a_crash_the_feed_tells_exactly_what_is_there", "feed-not-applied");
}

#[test]
fn mutation_sweep_not_told_with_its_drop_is_found() {
    turns_red(module_path!(), "after_a_crash_the_feed_tells_exactly_what_is_there", "sweep-told-later");
}

#[test]
fn mutation_replay_not_noted_is_found() {
    turns_red(module_path!(), "duplicates_are_told_when_the_host_ends", "replay-not-noted");
}
