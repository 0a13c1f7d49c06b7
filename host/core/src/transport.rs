//! The seams to the outside: where messages come from, where they are sent. No wire format here.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::message::Message;

/// A source or a publisher failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// It may work again later: try again.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// It will not work without somebody's help.
    #[error("{0}")]
    Broken(Arc<str>),
}

/// What a source hands out.
pub enum Received {
    /// A message, to be settled.
    Delivery(Box<dyn Delivery>),
    /// Input that is no message; the source keeps it where it was.
    Invalid {
        /// Where it stands in the source, such as `line 7`.
        position: String,
        /// What is wrong and what to do; names the field.
        reason: String,
    },
}

/// Where messages come from.
pub trait Source: Send {
    /// The next message; `None` at the end of the input. Dropping the future loses nothing.
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Received>, TransportError>>;
}

/// One delivery of a message. Settling consumes it: twice does not compile. Dropped unsettled, it counts as `nack`.
pub trait Delivery: Send {
    /// The message.
    fn message(&self) -> &Message;
    /// Done: never deliver it again. Only after its commit is durable.
    fn ack(self: Box<Self>) -> BoxFuture<'static, Result<(), TransportError>>;
    /// Not done: deliver it again, not before `delay_ms`.
    fn nack(self: Box<Self>, delay_ms: u64) -> BoxFuture<'static, Result<(), TransportError>>;
    /// Will never be done: the store keeps it as a dead letter.
    fn dead_letter(self: Box<Self>, error: &str) -> BoxFuture<'static, Result<(), TransportError>>;
}

/// Sends outbox messages.
///
/// Contract: when `publish` returns `Ok`, every message of the batch is durable at the other side. It may be called
/// again with messages that were already sent; they carry the same ids, and where it can, the publisher drops them.
pub trait Publisher: Send {
    /// Sends a batch, in order.
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>>;
}
