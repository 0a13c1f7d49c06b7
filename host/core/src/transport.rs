//! The seams to sources and publishers: one delivers messages, the other sends them. No wire format
//! here.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::message::Message;

/// Failure of a source or a publisher.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// Temporary failure: try again later.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// Permanent failure: it does not work until somebody repairs it.
    #[error("{0}")]
    Broken(Arc<str>),
}

/// Item that a source delivers.
pub enum Received {
    /// A message, to be settled.
    Delivery(Box<dyn Delivery>),
    /// Input that is no message; the source leaves it where it was.
    Invalid {
        /// Position in the source, such as `line 7`.
        position: String,
        /// Error and remedy; names the field.
        reason: String,
    },
}

/// Source of messages.
pub trait Source: Send {
    /// Returns the next message; `None` at the end of the input. Dropping the future loses nothing.
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Received>, TransportError>>;
}

/// One delivery of a message. Settling consumes it: settling twice does not compile. If it is
/// dropped unsettled, it counts as `nack`.
pub trait Delivery: Send {
    /// Returns the message.
    fn message(&self) -> &Message;
    /// Acknowledges the message: the source never delivers it again. Called only after its commit
    /// is durable.
    fn ack(self: Box<Self>) -> BoxFuture<'static, Result<(), TransportError>>;
    /// Rejects the message for now: the source delivers it again, not before `delay_ms`.
    fn nack(self: Box<Self>, delay_ms: u64) -> BoxFuture<'static, Result<(), TransportError>>;
    /// Gives the message up: it never runs, and the store holds it as a dead letter.
    fn dead_letter(self: Box<Self>, error: &str) -> BoxFuture<'static, Result<(), TransportError>>;
}

/// Sends outbox messages.
///
/// Contract: when `publish` returns `Ok`, every message of the batch is durable at the receiver.
/// The host may call it again with messages that were already sent; they carry the same ids, and
/// the publisher drops them where it can.
pub trait Publisher: Send {
    /// Sends a batch, in order.
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>>;
}
