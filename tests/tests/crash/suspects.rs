//! Messages that the process has died over run one at a time; all others run at once. The notes are
//! the test's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{
    Committer, Counters, CrashTracker, Group, Handling, IdempotencyStorage, IdempotentConsumer, Outcome, Parts, Record,
    RecordKey, Scope, StateView, StoreError, SystemClock, Verdict,
};
use hapax_store::MemoryStore;
use hapax_tests::bench::{message, quick};
use hapax_tests::processors::Counter;

/// The store in memory with notes of the test's own.
struct Noted {
    store: MemoryStore,
    notes: Arc<Notes>,
}

/// Says of every message that the process has died over it so often, and counts how many run at
/// once.
#[derive(Default)]
struct Notes {
    deaths: u32,
    running: AtomicUsize,
    most: AtomicUsize,
}

impl CrashTracker for Notes {
    fn begin(&self, _: &RecordKey) -> Option<usize> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        Some(0)
    }

    fn end(&self, _: usize) {
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    fn deaths(&self, _: &RecordKey) -> u32 {
        self.deaths
    }

    fn forget(&self, _: &RecordKey) {}
}

impl IdempotencyStorage for Noted {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.record(key)
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        self.store.commit(group)
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        self.store.view(scope)
    }

    fn last_version(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.store.last_version()
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.store.cleanup(older_than_ms, limit)
    }

    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.store.sweep(now_ms)
    }

    fn crash_tracker(&self) -> Arc<dyn CrashTracker> {
        self.notes.clone()
    }
}

/// Sixteen messages at once, each of which the process has died over `deaths` times: how many ran
/// at the same time, at most.
async fn most_at_once(deaths: u32) -> usize {
    let notes = Arc::new(Notes { deaths, ..Notes::default() });
    let storage = Arc::new(Noted { store: MemoryStore::default(), notes: notes.clone() });
    let consumer = IdempotentConsumer::new(Parts {
        scope: Scope::of("p"),
        processor: Counter::new(),
        committer: Committer::start(storage.clone()).await.unwrap(),
        storage,
        outbound: None,
        clock: Arc::new(SystemClock),
        metrics: Arc::new(Counters::default()),
        options: quick(),
    });
    let ids: Vec<String> = (0..16).map(|number| format!("m-{number}")).collect();
    let outcomes = ids.iter().map(|id| consumer.handle(message(id, "{}"), Handling::default()));
    for outcome in futures_util::future::join_all(outcomes).await {
        assert!(matches!(outcome.unwrap(), Outcome::Completed { .. }));
    }
    notes.most.load(Ordering::SeqCst)
}

/// Of several suspects only the guilty one may be there at the next death, so that the innocent are
/// not counted with it.
#[tokio::test]
async fn suspects_run_one_at_a_time() {
    assert!(most_at_once(0).await > 1, "messages that nobody suspects run at once, or this test shows nothing");
    assert_eq!(most_at_once(1).await, 1);
}
