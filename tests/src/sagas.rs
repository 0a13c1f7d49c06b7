//! Two processors over one store that outlives its hosts, which die when a test says so: where
//! sagas are tested.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{
    Clock, Committer, CompensatorParts, Counters, Group, Handling, IdempotencyStorage, IdempotentConsumer, Message,
    MessageProcessor, Observer, Options, Outcome, Parts, Record, RecordKey, Report, SagaId, SagaLog, SagaState, Scope,
    StateView, StoreError, Verdict, Version, run_compensator,
};
use hapax_store::MemoryStore;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::clock::{SimulatedClock, StillClock};
use crate::plans::{Books, Planned};

/// A store that takes so many groups and then fails: the host dies there. What it took stays.
#[derive(Clone)]
pub struct Mortal {
    store: MemoryStore,
    left: Arc<AtomicU64>,
    /// True if the last group is written before the death.
    writes_the_last: bool,
}

impl IdempotencyStorage for Mortal {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.record(key)
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        let left = self.left.load(Ordering::SeqCst);
        self.left.store(left.saturating_sub(1), Ordering::SeqCst);
        match left {
            0 if !self.writes_the_last => Box::pin(std::future::ready(Err(StoreError::Io("dead".into())))),
            0 => Box::pin(async move {
                self.store.commit(group).await?;
                Err(StoreError::Io("dead".into()))
            }),
            _ => self.store.commit(group),
        }
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        self.store.view(scope)
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        self.store.last_version()
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.store.cleanup(older_than_ms, limit)
    }

    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.store.sweep(now_ms)
    }
}

/// State that outlives a host.
#[derive(Clone)]
pub struct World {
    /// The store.
    pub store: MemoryStore,
    /// The service that gets the outbound calls.
    pub books: Arc<Books>,
    /// Time, of which every wait takes none.
    pub clock: SimulatedClock,
    /// Settings of both processors.
    pub options: Options,
    /// Reports of messages whose sagas ended: id and outcome.
    pub reported: Arc<Mutex<Vec<String>>>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// A host over the world: two processors, `p` and `q`.
pub struct Host {
    world: World,
    storage: Arc<dyn IdempotencyStorage>,
    committer: Arc<Committer>,
    /// The consumers of `p` and `q`.
    pub consumers: Vec<IdempotentConsumer>,
}

struct Reports(Arc<Mutex<Vec<String>>>);

impl Observer for Reports {
    fn ended(&self, report: Report<'_>) {
        if let Report::Ended { message, outcome } = report {
            self.0.lock().push(format!("{} {}", message.id, outcome.name()));
        }
    }
}

impl World {
    /// An empty one.
    pub fn new() -> Self {
        let options =
            Options { backoff_base_ms: 10, attempts_max: 3, compensation_attempts_max: 3, ..Options::default() };
        let clock = SimulatedClock::at(1_000_000);
        Self { store: MemoryStore::default(), books: Arc::default(), clock, options, reported: Arc::default() }
    }

    /// One that dies in the end if it writes and writes.
    pub async fn host(&self) -> Host {
        self.mortal(1_000, false).await
    }

    /// A host whose store dies after `left` groups.
    pub async fn mortal(&self, left: u64, writes_the_last: bool) -> Host {
        let left = Arc::new(AtomicU64::new(left));
        self.host_over(Arc::new(Mortal { store: self.store.clone(), left, writes_the_last }), Planned::new("one")).await
    }

    /// A host with this processor over this store.
    pub async fn host_over(&self, storage: Arc<dyn IdempotencyStorage>, processor: Arc<Planned>) -> Host {
        let committer = Committer::start(storage.clone()).await.unwrap();
        let consumer = |name: &str| {
            IdempotentConsumer::new(Parts {
                scope: Scope::of(name),
                processor: processor.clone(),
                storage: storage.clone(),
                committer: committer.clone(),
                outbound: Some(self.books.clone()),
                clock: Arc::new(self.clock.clone()),
                metrics: Arc::new(Counters::default()),
                options: self.options.clone(),
            })
        };
        Host { world: self.clone(), consumers: vec![consumer("p"), consumer("q")], storage, committer }
    }

    /// A message's record.
    pub async fn record(&self, processor: &str, message: &Message) -> Record {
        self.store.record(&RecordKey::by_message_id(&Scope::of(processor), message)).await.unwrap().unwrap()
    }

    /// Returns the state of a saga.
    pub async fn saga(&self, id: &SagaId) -> SagaState {
        SagaLog::new(&self.store, &Scope::of("p")).read(id).await.unwrap().saga.state
    }

    /// Keys that are the host's own and no lock's, of a scope.
    pub async fn left(&self, scope: &Scope) -> Vec<String> {
        let start = if *scope == scope.shared() { "saga/" } else { "\u{10ffff}" };
        self.store.view(scope).scan(start, None, 1_000).await.unwrap().into_iter().map(|(key, ..)| key).collect()
    }
}

impl Host {
    /// A third processor, `r`, whose effects stay inside: it takes no steps and makes no outbound
    /// calls.
    pub fn inner(&self, processor: Arc<dyn MessageProcessor>) -> IdempotentConsumer {
        self.inner_as("r", processor)
    }

    /// A processor of this name whose effects stay inside.
    pub fn inner_as(&self, name: &str, processor: Arc<dyn MessageProcessor>) -> IdempotentConsumer {
        IdempotentConsumer::new(Parts {
            scope: Scope::of(name),
            processor,
            storage: self.storage.clone(),
            committer: self.committer.clone(),
            outbound: None,
            clock: Arc::new(self.world.clock.clone()),
            metrics: Arc::new(Counters::default()),
            options: self.world.options.clone(),
        })
    }

    /// The committer of the store.
    pub fn committer(&self) -> &Arc<Committer> {
        &self.committer
    }

    /// Delivers to `p`.
    pub async fn deliver(&self, message: &Message) -> Result<Outcome, StoreError> {
        self.deliver_to(0, message).await
    }

    /// Delivers to one of the processors.
    pub async fn deliver_to(&self, consumer: usize, message: &Message) -> Result<Outcome, StoreError> {
        // A duplicate of what is being undone waits: nobody undoes it here meanwhile.
        let handling = Handling { wait_in_flight: false, ..Handling::default() };
        self.consumers[consumer].handle(message.clone(), handling).await
    }

    /// Undoes all that there is to undo and need not wait for anybody.
    pub async fn undo(&self) -> Result<(), StoreError> {
        self.undo_by(Arc::new(Patient(self.world.clock.clone()))).await
    }

    /// The same, but no wait is ever over.
    pub async fn undo_what_is_due(&self) -> Result<(), StoreError> {
        self.undo_by(Arc::new(StillClock::at(self.world.clock.now_ms()))).await
    }

    async fn undo_by(&self, clock: Arc<dyn Clock>) -> Result<(), StoreError> {
        let parts = CompensatorParts {
            scope: Scope::of("p"),
            storage: self.storage.clone(),
            committer: self.committer.clone(),
            clock,
            consumers: self.consumers.clone(),
            versions: Arc::new(NoEarlierVersions),
            observer: Arc::new(Reports(self.world.reported.clone())),
        };
        let (_stop, stopped) = watch::channel(true);
        run_compensator(parts, stopped).await
    }
}

/// A clock on which every wait is over at once, also when the host stops.
struct Patient(SimulatedClock);

impl Clock for Patient {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }

    fn sleep(&self, delay_ms: u64) -> BoxFuture<'static, ()> {
        self.0.sleep(delay_ms)
    }
}

/// Has no components but those that run.
struct NoEarlierVersions;

impl hapax_core::ComponentVersions for NoEarlierVersions {
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> futures_util::future::BoxFuture<'a, Result<Arc<dyn hapax_core::MessageProcessor>, String>> {
        let text = format!("the component {digest} of `{processor}`, which registered the step, is not here");
        Box::pin(std::future::ready(Err(text)))
    }
}
