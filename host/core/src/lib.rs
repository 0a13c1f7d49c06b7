//! The rules of Hapax: message, idempotency key, record state machine, pipeline, and the traits at the seams. No runtime,
//! no wasmtime, no driver, no I/O.

pub mod context;
pub mod key;
pub mod message;
pub mod processor;
pub mod record;
pub mod storage;
pub mod transport;

pub use context::Context;
pub use key::{Fingerprint, RecordKey, Scope};
pub use message::Message;
pub use processor::{Failure, Invocation, MessageProcessor, NativeProcessor, Output};
pub use record::Record;
