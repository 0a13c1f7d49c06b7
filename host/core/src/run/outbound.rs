//! The seam to the outside: one HTTP call, as a processor asked for it and as it was answered. Who may call what, and how, is
//! the implementation's; that a call is answered once only is `early.rs`'.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// A call to the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundRequest {
    /// `GET`, `POST`, ...
    pub method: String,
    /// Absolute: scheme, authority, path and query.
    pub url: String,
    /// Names in lower case; values as they are sent, but for secrets, whose places only are in here.
    pub headers: Vec<(String, Bytes)>,
    /// The body.
    pub body: Bytes,
    /// The processor's own bound on the whole call, in milliseconds; the grant's counts if it is shorter.
    pub timeout_ms: Option<u64>,
}

/// What the outside answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutboundResponse {
    /// HTTP status.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, Bytes)>,
    /// The body.
    pub body: Bytes,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutboundError {
    /// The processor may not: nothing was sent.
    #[error("the call is not granted: {0}")]
    Denied(String),
    /// It is no call: nothing was sent.
    #[error("the call cannot be made: {0}")]
    Invalid(String),
    /// No connection: nothing was sent.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// It took too long; whether it was received is not known.
    #[error("no answer within {0} ms")]
    Timeout(u64),
    /// The answer is too large.
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
    /// The connection broke, or the answer is not HTTP; whether the call was received is not known.
    #[error("the call broke off: {0}")]
    Broken(String),
    /// A run of the same message called something else before at this place.
    #[error("{0}")]
    Diverged(String),
    /// The run has lost its claim, or the store its disk: it ends here.
    #[error("the run has ended: {0}")]
    Ended(String),
}

/// Makes calls for one processor.
///
/// Contract: grants are checked before anything is sent, against the address that is connected to; redirects are not
/// followed; the call ends within its timeout, and its answer is within its limit, whatever the other side does. Cancelling
/// drops the connection.
pub trait Outbound: Send + Sync + 'static {
    /// Makes one call.
    fn call<'a>(&'a self, request: &'a OutboundRequest) -> BoxFuture<'a, Result<OutboundResponse, OutboundError>>;
}
