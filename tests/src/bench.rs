//! A consumer joined from parts, the way every test wants it.

use std::sync::Arc;

use hapax_core::{
    Clock, Committer, Counters, Handling, IdempotentConsumer, Message, MessageProcessor, Options, Parts, Scope, Store,
    SystemClock,
};

/// A consumer over a store, with what a test looks at.
pub struct Bench {
    /// The consumer.
    pub consumer: IdempotentConsumer,
    /// Its counts.
    pub counters: Arc<Counters>,
    /// Its store's committer.
    pub committer: Arc<Committer>,
}

/// Options with a backoff that tests can wait for.
pub fn quick() -> Options {
    Options { backoff_base_ms: 1, backoff_max_ms: 2, ..Options::default() }
}

impl Bench {
    /// Joins a consumer named `name`.
    pub async fn new(
        name: &str,
        store: Arc<impl Store>,
        processor: Arc<dyn MessageProcessor>,
        options: Options,
    ) -> Self {
        let committer = Committer::start(store.clone()).await.unwrap();
        Self::sharing(name, store, committer, processor, options)
    }

    /// Joins a consumer named `name` whose time is `clock`'s.
    pub async fn timed(
        name: &str,
        store: Arc<impl Store>,
        processor: Arc<dyn MessageProcessor>,
        options: Options,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let committer = Committer::start(store.clone()).await.unwrap();
        Self::joined(name, store, committer, processor, options, clock)
    }

    /// Joins a consumer to a committer that is there already.
    pub fn sharing(
        name: &str,
        store: Arc<impl Store>,
        committer: Arc<Committer>,
        processor: Arc<dyn MessageProcessor>,
        options: Options,
    ) -> Self {
        Self::joined(name, store, committer, processor, options, Arc::new(SystemClock))
    }

    /// Joins a consumer named `name` to a committer that is there already; its time is `clock`'s.
    pub fn joined(
        name: &str,
        store: Arc<impl Store>,
        committer: Arc<Committer>,
        processor: Arc<dyn MessageProcessor>,
        options: Options,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let counters = Arc::new(Counters::default());
        let consumer = IdempotentConsumer::new(Parts {
            scope: Scope::of(name),
            processor,
            storage: store,
            committer: committer.clone(),
            outbound: None,
            clock,
            metrics: counters.clone(),
            options,
        });
        Self { consumer, counters, committer }
    }

    /// Handles one message to its end.
    pub async fn handle(&self, message: Message) -> hapax_core::Outcome {
        self.consumer.handle(message, Handling::default()).await.unwrap()
    }
}

/// A JSON message with an id, from source `/test`.
pub fn message(id: &str, data: &str) -> Message {
    Message::new(id, "/test", "test").with_data("application/json", data.to_owned())
}
