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

/// Answer of a destination to one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendAnswer {
    /// The receiver has the message, durably. It may have had it before, or have no use for it.
    Delivered,
    /// The receiver does not take the message, however often it is sent.
    Refused(Refusal),
    /// No answer: the message was not sent, or it is not known whether it arrived.
    NotSent,
}

/// Refusal of one message by its destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Destination, as the configuration names it.
    pub destination: Arc<str>,
    /// Status code of the answer, if the destination has status codes.
    pub status: Option<u16>,
    /// Text of the answer, for people.
    pub text: Arc<str>,
}

/// Reason why messages of a batch were not sent. They are to be sent later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    /// Reason, for people.
    pub reason: Arc<str>,
    /// Time before which the destination asked not to be called again, in milliseconds from now.
    pub retry_after_ms: Option<u64>,
    /// Set if time alone does not help: the address or the rights to it are wrong.
    pub is_misconfigured: bool,
}

/// Result of sending one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// One answer for each message of the batch, in order.
    pub answers: Vec<SendAnswer>,
    /// Set if the destination is not available. Without it, messages that were not sent can be sent
    /// at once.
    pub unavailable: Option<Unavailable>,
}

impl Published {
    /// Returns the result of a batch of `count` messages that were all delivered.
    pub fn all(count: usize) -> Self {
        Self { answers: vec![SendAnswer::Delivered; count], unavailable: None }
    }

    /// Returns the result of a batch of `count` messages of which none was sent.
    pub fn none(count: usize, unavailable: Unavailable) -> Self {
        Self { answers: vec![SendAnswer::NotSent; count], unavailable: Some(unavailable) }
    }
}

impl Unavailable {
    /// Returns a reason that may pass by itself.
    pub fn for_now(reason: impl Into<Arc<str>>) -> Self {
        Self { reason: reason.into(), retry_after_ms: None, is_misconfigured: false }
    }
}

/// Sends outbox messages.
///
/// Contract:
///
/// - A message that is answered as delivered is durable at the receiver.
/// - Messages of one ordering key (`partitionkey`) are sent in the order of the batch. Behind one
///   that was not delivered, no other of its key is sent in the same batch: the caller decides
///   whether they pass.
/// - A batch of which the publisher can take only a part is answered `NotSent` behind that part.
///   The first message is always taken.
/// - The host may call it again with messages that were already sent; they carry the same ids, and
///   the publisher drops them where it can.
/// - An error means that somebody must repair something before the host can go on; nothing of the
///   batch counts as sent.
pub trait Publisher: Send {
    /// Sends a batch, in order.
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<Published, TransportError>>;
}
