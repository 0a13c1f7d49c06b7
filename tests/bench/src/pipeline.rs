//! The whole pipeline with a processor compiled in: one state write a message, on redb, every commit synced.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use futures_util::future::BoxFuture;
use hapax_core::context::StateView;
use hapax_core::metrics::Counters;
use hapax_core::storage::{Group, IdempotencyStorage, StoreError, Verdict};
use hapax_core::{
    Committer, Context, Ending, Failure, Handling, IdempotentConsumer, Invocation, Message, NativeProcessor, Options,
    Output, Parts, Record, RecordKey, Scope, SystemClock,
};
use hapax_store::RedbStore;

use crate::{Latencies, Measured, bare};

/// The store, counting its groups.
struct Counted {
    store: RedbStore,
    groups: AtomicU64,
    commits: AtomicU64,
}

impl IdempotencyStorage for Counted {
    fn admit<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.admit(key)
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        self.groups.fetch_add(1, Ordering::Relaxed);
        self.commits.fetch_add(group.commits.len() as u64, Ordering::Relaxed);
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
}

fn write_one<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
    Box::pin(async move {
        context.set(&run.message.id[..32], &b"0123456789abcdef"[..]).map_err(|e| Failure::retry(e.to_string()))?;
        Ok(Output { content_type: None, data: bytes::Bytes::from_static(&[7; 32]) })
    })
}

async fn consumer(store: Arc<dyn IdempotencyStorage>, cache_bytes: u64) -> IdempotentConsumer {
    IdempotentConsumer::new(Parts {
        scope: Scope::of("bench"),
        processor: Arc::new(NativeProcessor::new(write_one)),
        committer: Committer::start(store.clone()).await.unwrap(),
        storage: store,
        clock: Arc::new(SystemClock),
        metrics: Arc::new(Counters::default()),
        options: Options { cache_bytes, ..Options::default() },
    })
}

/// 256 bytes of text and a key that lands anywhere.
fn message(number: usize) -> Message {
    let id = String::from_utf8(bare::key(number)[..48].to_vec()).unwrap();
    Message::new(id, "/bench", "t").with_data("text/plain", vec![b'x'; 256])
}

/// Fresh messages, `in_flight` at once.
pub(crate) fn fresh(folder: &Path, in_flight: usize, messages: usize) -> Measured {
    let folder = tempfile::tempdir_in(folder).unwrap();
    let store = RedbStore::open(&folder.path().join("store")).unwrap();
    let store = Arc::new(Counted { store, groups: AtomicU64::new(0), commits: AtomicU64::new(0) });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (latencies, elapsed) = runtime.block_on(async {
        let consumer = consumer(store.clone(), 32 << 20).await;
        let next = Arc::new(AtomicU64::new(0));
        let since = Instant::now();
        let clients: Vec<_> = (0..in_flight)
            .map(|_| {
                let (consumer, next) = (consumer.clone(), next.clone());
                tokio::spawn(async move {
                    let mut latencies = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed) as usize;
                        if number >= messages {
                            return latencies;
                        }
                        let begun = Instant::now();
                        let ending = consumer.handle(message(number), Handling::default()).await.unwrap();
                        assert!(matches!(ending, Ending::Completed { .. }));
                        latencies.push(begun.elapsed());
                    }
                })
            })
            .collect();
        let mut latencies = Latencies::default();
        for client in clients {
            latencies.0.extend(client.await.unwrap());
        }
        (latencies, since.elapsed())
    });
    let group = store.commits.load(Ordering::Relaxed) as f64 / store.groups.load(Ordering::Relaxed) as f64;
    latencies.measured(messages, elapsed, group)
}

/// Duplicates, answered from the cache and from the store, beside a bare redb read loop: one thread, no disk write.
pub(crate) fn duplicates(folder: &Path) {
    const RECORDS: usize = 50_000;
    let folder = tempfile::tempdir_in(folder).unwrap();
    let store = Arc::new(RedbStore::open(&folder.path().join("store")).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    println!("| a duplicate answered from | microseconds |");
    println!("|---|---|");
    runtime.block_on(async {
        let cached = Arc::new(consumer(store.clone(), 256 << 20).await);
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..RECORDS {
            let cached = cached.clone();
            tasks.spawn(async move { cached.handle(message(number), Handling::default()).await.unwrap() });
        }
        while tasks.join_next().await.is_some() {}
        // A cache of no bytes: every answer comes from the store.
        let uncached = consumer(store.clone(), 0).await;
        for (name, consumer) in [("the cache", &*cached), ("the store", &uncached)] {
            let times = (0..crate::ROUNDS).map(|_| async {
                let since = Instant::now();
                for number in 0..RECORDS {
                    let ending = consumer.handle(message(number), Handling::default()).await.unwrap();
                    assert!(matches!(ending, Ending::Duplicate(_)));
                }
                since.elapsed().as_secs_f64() * 1e6 / RECORDS as f64
            });
            let mut measured = Vec::new();
            for time in times {
                measured.push(time.await);
            }
            let (least, median, greatest) = crate::spread(measured.into_iter());
            println!("| {name} | {median:.2} ({least:.2} - {greatest:.2}) |");
        }
        let keys: Vec<_> =
            (0..RECORDS).map(|number| RecordKey::by_message_id(&Scope::of("bench"), &message(number))).collect();
        let since = Instant::now();
        for key in &keys {
            assert!(store.admit(key).await.unwrap().is_some());
        }
        println!(
            "| nothing: a bare read of the record | {:.2} |",
            since.elapsed().as_secs_f64() * 1e6 / RECORDS as f64
        );
    });
}
