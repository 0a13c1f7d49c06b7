//! The rules of Hapax: message, idempotency key, record state machine, pipeline, and the traits at the seams. No runtime,
//! no wasmtime, no driver, no I/O.

pub mod admission;
mod answer;
mod batch;
pub mod breaker;
pub mod clock;
pub mod committer;
mod conclude;
pub mod consumer;
pub mod context;
pub mod ending;
pub mod events;
pub mod fault;
pub mod feed;
pub mod guard;
pub mod history;
pub mod keeper;
mod kept;
pub mod key;
mod lanes;
pub mod leave;
pub mod message;
pub mod metrics;
pub mod operator;
pub mod options;
mod overlay;
pub mod processor;
pub mod record;
pub mod relay;
mod replays;
pub mod run;
pub mod running;
#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests;
pub mod storage;
pub mod strategy;
pub mod sweeper;
mod sync;
pub mod transport;

pub use admission::Stored;
pub use breaker::{BreakerPolicy, BreakerState};
pub use clock::{Clock, SystemClock};
pub use committer::Committer;
pub use consumer::{Handling, IdempotentConsumer, Parts};
pub use context::Context;
pub use ending::Ending;
pub use guard::{Breaker, BreakerParts, BreakerStatus};
pub use key::{Fingerprint, RecordKey, Scope};
pub use message::Message;
pub use options::Options;
pub use processor::{Failure, Invocation, MessageProcessor, NativeProcessor, Output};
pub use record::Record;
pub use strategy::Strategy;
