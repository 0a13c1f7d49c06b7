//! Several owners over one store, on a clock that only the test turns, and an outside that keeps
//! books: where claims and locks are tested.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Clock as _, Committer, CompensatorParts, ComponentVersions, Counters, IdempotencyStorage as _, IdempotentConsumer,
    Message, MessageProcessor, Observer, Options, Parts, Record, RecordKey, Report, Scope, StoreError, run_compensator,
};
use hapax_store::MemoryStore;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::plans::{Books, Planned};
use crate::stepped::SteppedClock;

/// Start of the clock, in milliseconds.
pub const BEGINS_MS: u64 = 1_000_000;

/// State that the owners share.
pub struct Owners {
    /// The store.
    pub store: MemoryStore,
    /// Its committer.
    pub committer: Arc<Committer>,
    /// The service that gets the outbound calls.
    pub books: Arc<Books>,
    /// Time.
    pub clock: SteppedClock,
}

impl Owners {
    /// None yet.
    pub async fn new() -> Self {
        let store = MemoryStore::default();
        let committer = Committer::start(Arc::new(store.clone())).await.unwrap();
        Self { store, committer, books: Arc::default(), clock: SteppedClock::at(BEGINS_MS) }
    }

    /// A consumer that does what its messages say.
    pub fn consumer(&self, processor: &str, options: Options) -> IdempotentConsumer {
        IdempotentConsumer::new(Parts {
            scope: Scope::of(processor),
            processor: Planned::new("one"),
            storage: Arc::new(self.store.clone()),
            committer: self.committer.clone(),
            outbound: Some(self.books.clone()),
            clock: Arc::new(self.clock.clone()),
            metrics: Arc::new(Counters::default()),
            options,
        })
    }

    /// Starts a compensator over the store, with one owner's consumer.
    pub fn compensating(&self, consumer: &IdempotentConsumer) -> Compensating {
        let parts = CompensatorParts {
            scope: Scope::of("p"),
            storage: Arc::new(self.store.clone()),
            committer: self.committer.clone(),
            clock: Arc::new(self.clock.clone()),
            consumers: vec![consumer.clone()],
            versions: Arc::new(Nobody),
            observer: Arc::new(Nobody),
        };
        let (stop, stopped) = watch::channel(false);
        Compensating { _stop: stop, task: tokio::spawn(run_compensator(parts, stopped)) }
    }

    /// Returns the time, in milliseconds.
    pub fn clock_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// A message's record at the processor `p`.
    pub async fn record(&self, message: &Message) -> Option<Record> {
        self.store.record(&RecordKey::by_message_id(&Scope::of("p"), message)).await.unwrap()
    }
}

/// A compensator at work, until it is dropped.
pub struct Compensating {
    _stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), StoreError>>,
}

impl Drop for Compensating {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

impl ComponentVersions for Nobody {
    fn load<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>> {
        Box::pin(async { Err("no earlier component is here".into()) })
    }
}
