//! Several owners over one store, on a clock that only the test turns, and an outside that keeps
//! books: where claims and locks are tested.

use std::sync::Arc;

use hapax_core::{
    Committer, Counters, IdempotencyStorage as _, IdempotentConsumer, Message, Options, Parts, Record, RecordKey, Scope,
};
use hapax_store::MemoryStore;

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

    /// A message's record at the processor `p`.
    pub async fn record(&self, message: &Message) -> Option<Record> {
        self.store.record(&RecordKey::by_message_id(&Scope::of("p"), message)).await.unwrap()
    }
}
