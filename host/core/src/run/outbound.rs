//! The seam for outbound calls: one HTTP call, as a processor asked for it and as it was answered.
//! The implementation decides which calls are allowed, and makes them. `outbound_call.rs` sees to
//! it that a call is answered only once.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// An outbound call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundRequest {
    /// Method: `GET`, `POST`, ...
    pub method: String,
    /// Absolute URL: scheme, authority, path and query.
    pub url: String,
    /// Headers: names in lower case, values as they are sent. Of secrets, only placeholders are in
    /// here.
    pub headers: Vec<(String, Bytes)>,
    /// The body.
    pub body: Bytes,
    /// Bound that the processor sets on the whole call, in milliseconds; the grant's bound counts
    /// if it is shorter.
    pub timeout_ms: Option<u64>,
}

/// Answer to an outbound call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutboundResponse {
    /// HTTP status.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, Bytes)>,
    /// The body.
    pub body: Bytes,
}

/// Reason why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutboundError {
    /// The processor may not make the call: nothing was sent.
    #[error("the call is not granted: {0}")]
    Denied(String),
    /// The request is not a valid call: nothing was sent.
    #[error("the call cannot be made: {0}")]
    Invalid(String),
    /// No connection: nothing was sent.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The call took too long; it is not known whether it was received.
    #[error("no answer within {0} ms")]
    Timeout(u64),
    /// The answer is too large.
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
    /// The connection broke, or the answer is not HTTP; it is not known whether the call was
    /// received.
    #[error("the call broke off: {0}")]
    Broken(String),
    /// An earlier run of the same message made another call with this index.
    #[error("{0}")]
    Diverged(String),
    /// The run ends here: it has lost its claim, or the store has lost its disk.
    #[error("the run has ended: {0}")]
    Ended(String),
}

/// Makes calls for one processor.
///
/// Contract: grants are checked before anything is sent, against the address that is connected to;
/// redirects are not followed; the call ends within its timeout, and its answer is within its
/// limit, whatever the other side does. Cancelling drops the connection.
pub trait Outbound: Send + Sync + 'static {
    /// Makes one call.
    fn call<'a>(&'a self, request: &'a OutboundRequest) -> BoxFuture<'a, Result<OutboundResponse, OutboundError>>;
}
