//! Failures of a run: the failure of a message, and the error of one call of its context.

use serde::{Deserialize, Serialize};

use crate::support::error::StoreError;

/// Failure to process a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// The failure may pass: run the message again, not before `after_ms` if given.
    #[error("{reason}")]
    Retry {
        /// Reason, for people.
        reason: String,
        /// Least delay in milliseconds; absent: the host's backoff.
        after_ms: Option<u64>,
    },
    /// The failure is for good: the processor refuses the message.
    #[error("rejected: {0}")]
    Reject(String),
    /// The failure is for good: the message is not one that this processor reads.
    #[error("invalid: {0}")]
    Invalid(String),
}

impl Failure {
    /// Returns a failure that may pass. The message is tried again after the host's backoff.
    pub fn retry(reason: impl Into<String>) -> Self {
        Self::Retry { reason: reason.into(), after_ms: None }
    }

    /// Returns the error of a message that is not run again after `attempts` attempts.
    pub(crate) fn after_last_attempt(self, attempts: u32) -> String {
        match self {
            Self::Retry { reason, .. } => format!("failed {attempts} times, the last time: {reason}"),
            for_good => for_good.to_string(),
        }
    }
}

/// Error of a read or write of the context. The run cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContextError {
    /// The store could not be read: run the message again.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key is one of the host's own, and would be again: reject the message.
    #[error("a state key must not begin with U+10FFFF: those are the host's own")]
    Reserved,
    /// The data to be appended is no event, and would be none again: reject the message.
    #[error("{0}")]
    NoEvent(&'static str),
    /// The run has lost its claim to the message: it ends here, and the present owner goes on.
    #[error("the run's claim is over, and another owner may have taken the message over")]
    Lost,
    /// The saga or the lock does not allow the call, and would not again: reject the message.
    #[error("{0}")]
    Saga(String),
    /// The run is over one of its limits, and would be again: reject the message.
    #[error("{what} is over its limit of {limit}")]
    Limit {
        /// Subject of the limit, with its unit.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// Turns the error into the failure of the message: an error that would come again is for good.
impl From<ContextError> for Failure {
    fn from(error: ContextError) -> Self {
        match error {
            ContextError::Store(_) | ContextError::Lost => Self::retry(error.to_string()),
            ContextError::Reserved | ContextError::NoEvent(_) | ContextError::Saga(_) | ContextError::Limit { .. } => {
                Self::Reject(error.to_string())
            }
        }
    }
}
