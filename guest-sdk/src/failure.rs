//! Why a message was not processed, and whether to try again. Its writes are dropped in every case.

use std::fmt;
use std::time::Duration;

/// Failure of a processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// May pass: the host tries again, up to its attempt limit.
    Retry {
        /// For people.
        reason: String,
        /// Not before this time; `None`: the host's backoff.
        after: Option<Duration>,
    },
    /// For good: the processor understood the message and refuses it.
    Reject(String),
    /// For good: the message is not what this processor reads.
    Invalid(String),
}

impl Failure {
    /// A failure that may pass.
    pub fn retry(reason: impl Into<String>) -> Self {
        Self::Retry { reason: reason.into(), after: None }
    }

    /// A refusal, for good.
    pub fn reject(reason: impl Into<String>) -> Self {
        Self::Reject(reason.into())
    }

    /// A message that cannot be read, for good.
    pub fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }

    /// Tries again not before `delay`. Only a retry can wait; other failures stay as they are.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        match self {
            Self::Retry { reason, .. } => Self::Retry { reason, after: Some(delay) },
            other => other,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Retry { reason, .. } => write!(f, "to be tried again: {reason}"),
            Self::Reject(reason) => write!(f, "rejected: {reason}"),
            Self::Invalid(reason) => write!(f, "invalid: {reason}"),
        }
    }
}

impl std::error::Error for Failure {}

/// JSON errors are permanent: a value that cannot be read or written as JSON fails again on every
/// attempt.
impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Invalid(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_retry_waits() {
        let second = Duration::from_secs(1);
        let expected = Failure::Retry { reason: "busy".into(), after: Some(second) };
        assert_eq!(Failure::retry("busy").after(second), expected);
        assert_eq!(Failure::reject("no").after(second), Failure::Reject("no".into()));
    }
}
