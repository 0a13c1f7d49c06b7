//! The whole pipeline with a processor compiled in, on the real store: what every scenario of the
//! host measures. Owns the load generator, which runs on the same cores as what it measures.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures_util::future::BoxFuture;
use hapax_core::{
    Commit, Committer, Context, Counters, Effects, Expected, Failure, Fingerprint, Group, Handling, IdempotencyStorage,
    IdempotentConsumer, Invocation, Message, MessageProcessor, NativeProcessor, Options, Outcome, Output, Parts,
    Record, RecordChange, RecordKey, RecordState, Scope, StateView, StoreError, SystemClock, Verdict,
};
use hapax_store::RedbStore;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::measure::{Run, Sample};
use crate::work::{ANSWER, Ids, Item, VALUE};

/// The processor's name, in every scenario.
pub(crate) const PROCESSOR: &str = "bench";
/// Commits on their way at once while filling.
const FILL_IN_FLIGHT: usize = 8_192;

/// The store, counting its groups. It must pass on every method of the trait: a default would
/// measure something else.
struct Counted {
    store: Arc<RedbStore>,
    groups: AtomicU64,
    commits: AtomicU64,
}

impl IdempotencyStorage for Counted {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.record(key)
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        self.groups.fetch_add(1, Relaxed);
        self.commits.fetch_add(group.commits.len() as u64, Relaxed);
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

/// Store, committer and runtime, with records in the store. Nothing of it outlives the scenario but
/// a folder that was given.
pub(crate) struct Host {
    pub(crate) store: Arc<RedbStore>,
    pub(crate) runtime: Runtime,
    counted: Arc<Counted>,
    committer: Arc<Committer>,
    ids: Ids,
    /// Records that are there.
    pub(crate) records: u64,
    path: PathBuf,
    _folder: Option<TempDir>,
}

impl Host {
    /// Opens the store in `path`, which holds `records` items already.
    pub(crate) fn open(path: &Path, ids: Ids, records: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = Arc::new(RedbStore::open(path).unwrap());
        let counted = Arc::new(Counted { store: store.clone(), groups: AtomicU64::new(0), commits: AtomicU64::new(0) });
        let committer = runtime.block_on(Committer::start(counted.clone())).unwrap();
        Self { store, runtime, counted, committer, ids, records, path: path.to_owned(), _folder: None }
    }

    /// An own store with the first `records` items.
    pub(crate) fn filled(folder: &Path, ids: Ids, records: u64) -> Self {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let mut host = Self::open(&folder.path().join("store"), ids, 0);
        host._folder = Some(folder);
        host.fill(records);
        host
    }

    /// The store's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the next items into the store, until it has `records`.
    pub(crate) fn fill(&mut self, records: u64) {
        self.fill_changed(records, now_ms());
    }

    /// Puts the next items into the store, until it has `records`, as if they had been processed at
    /// `changed_ms`: through the committer and without the pipeline.
    pub(crate) fn fill_changed(&mut self, records: u64, changed_ms: u64) {
        self.runtime.block_on(async {
            let mut waiting = std::collections::VecDeque::with_capacity(FILL_IN_FLIGHT);
            for number in self.records..records {
                if waiting.len() == FILL_IN_FLIGHT {
                    durable(waiting.pop_front()).await;
                }
                let item = Item::new(self.ids, number);
                waiting.push_back(self.committer.submit(completed(&item, 0, changed_ms)));
            }
            while !waiting.is_empty() {
                durable(waiting.pop_front()).await;
            }
        });
        self.records = records;
    }

    /// A consumer of the native processor with the cache given.
    pub(crate) fn consumer(&self, cache_bytes: u64) -> IdempotentConsumer {
        self.consumer_of(Arc::new(NativeProcessor::new(write_one)), cache_bytes)
    }

    /// A consumer of a processor.
    pub(crate) fn consumer_of(&self, processor: Arc<dyn MessageProcessor>, cache_bytes: u64) -> IdempotentConsumer {
        IdempotentConsumer::new(Parts {
            scope: Scope::of(PROCESSOR),
            processor,
            committer: self.committer.clone(),
            storage: self.counted.clone(),
            outbound: None,
            clock: Arc::new(SystemClock),
            metrics: Arc::new(Counters::default()),
            options: Options { cache_bytes, ..Options::default() },
        })
    }

    /// Drops the records whose retention is over; answers how many.
    pub(crate) fn expire(&self) -> u64 {
        self.runtime.block_on(self.store.sweep(now_ms())).unwrap()
    }

    /// Messages that are not there yet, made before anything is timed.
    pub(crate) fn fresh(&mut self, messages: u64) -> Vec<Message> {
        let first = self.records;
        self.records += messages;
        (first..self.records).map(|number| Item::new(self.ids, number).message()).collect()
    }

    /// Brings messages to their ends, `in_flight` at once.
    pub(crate) fn run<M>(&self, consumer: &IdempotentConsumer, in_flight: usize, messages: M) -> Run
    where
        M: IntoIterator<Item = Message>,
        M::IntoIter: Send + 'static,
    {
        let counts = || (self.counted.commits.load(Relaxed) as f64, self.counted.groups.load(Relaxed) as f64);
        let before = counts();
        let since = Instant::now();
        let samples = self.runtime.block_on(drive(consumer, in_flight, messages.into_iter(), since));
        let elapsed = since.elapsed();
        let after = counts();
        let count = samples.len() as u64;
        Run::new(samples, count, elapsed, (after.0 - before.0) / (after.1 - before.1))
    }

    /// Fresh messages, `in_flight` at once, through a consumer of their own.
    pub(crate) fn run_fresh(&mut self, in_flight: usize, messages: u64) -> Run {
        let messages = self.fresh(messages);
        let consumer = self.consumer(Options::default().cache_bytes);
        self.run(&consumer, in_flight, messages)
    }
}

async fn durable(pending: Option<hapax_core::Pending>) {
    if let Some(pending) = pending {
        assert_eq!(pending.durable().await.unwrap(), Verdict::Committed);
    }
}

/// Clients that take the next message when theirs has ended.
async fn drive(
    consumer: &IdempotentConsumer,
    in_flight: usize,
    messages: impl Iterator<Item = Message> + Send + 'static,
    since: Instant,
) -> Vec<Sample> {
    let each = messages.size_hint().0 / in_flight * 2;
    let messages = Arc::new(Mutex::new(messages));
    let client = |_| {
        let (consumer, messages) = (consumer.clone(), messages.clone());
        tokio::spawn(async move {
            let mut samples = Vec::with_capacity(each);
            loop {
                let Some(message) = messages.lock().unwrap().next() else { return samples };
                let began = Instant::now();
                let outcome = consumer.handle(message, Handling::default()).await.unwrap();
                assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
                samples.push(Sample::of(since, began));
            }
        })
    };
    let clients: Vec<_> = (0..in_flight).map(client).collect();
    let mut samples = Vec::new();
    for client in clients {
        samples.extend(client.await.unwrap());
    }
    samples
}

/// The work: the state key that the payload begins with gets 16 bytes, the answer has 32.
fn write_one<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
    Box::pin(async move {
        let key = std::str::from_utf8(&run.message.data[..32]).map_err(|error| Failure::Invalid(error.to_string()))?;
        context.set(key, &VALUE[..]).map_err(|error| Failure::retry(error.to_string()))?;
        Ok(answer())
    })
}

fn answer() -> Output {
    Output { content_type: None, data: bytes::Bytes::from_static(ANSWER) }
}

/// Returns the pipeline's commit for an item.
fn completed(item: &Item, version: u64, changed_ms: u64) -> Commit {
    let message = item.message();
    let mut effects = Effects::default();
    effects.writes.insert(item.state(), Some(bytes::Bytes::from_static(VALUE)));
    Commit {
        expected: Expected::Absent,
        record: RecordChange::Put(Arc::new(Record {
            state: RecordState::Completed { output: answer() },
            epoch: 1,
            attempts: 1,
            fingerprint: Fingerprint::of(&message),
            position: None,
            component: "native".into(),
            saga: None,
            received_ms: changed_ms,
            changed_ms,
            expires_ms: Some(changed_ms + Options::default().retention_ms),
            history: Vec::new(),
        })),
        version,
        effects,
        ..Commit::of(&RecordKey::by_message_id(&Scope::of(PROCESSOR), &message))
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    use hapax_core::Clock as _;
    SystemClock.now_ms()
}
