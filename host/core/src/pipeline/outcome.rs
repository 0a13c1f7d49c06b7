//! Outcomes of messages, as the pipeline names them. Transports and the command line choose their
//! own words for their users.

use crate::record::Output;

/// Outcome of a delivery of a message. Every outcome but `Retry`, `InFlight` and `Paused` is
/// durable and may be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The message ran, and its effects are durable.
    Completed {
        /// Result of the message.
        output: Output,
    },
    /// The message had an outcome before: nothing ran.
    Duplicate(StoredOutcome),
    /// The message's key was used with another body: nothing ran.
    Mismatch,
    /// A later message of its entity was seen before: nothing ran.
    Stale,
    /// The store holds the message until the message before it has ended, or its time is over. Then
    /// the host runs it.
    Parked {
        /// Version that the message awaits.
        awaits: u64,
        /// End of the wait, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
    /// The message failed for good; the record has the message and the error.
    DeadLettered {
        /// Error of the message.
        error: String,
    },
    /// The message failed for good, and its outbound effects are being compensated; the host
    /// completes that.
    Compensating {
        /// Error of the message.
        error: String,
    },
    /// The message failed for good, and its outbound effects are compensated.
    Compensated {
        /// Error of the message.
        error: String,
    },
    /// The message failed for good, and its outbound effects could not be compensated: an operator
    /// decides.
    CompensationFailed {
        /// Error of the message.
        error: String,
    },
    /// The message is due again later.
    Retry {
        /// Error of the attempt.
        error: String,
        /// Retry delay, in milliseconds.
        after_ms: u64,
    },
    /// Another run of the message is under way.
    InFlight {
        /// Delay before the next request, in milliseconds.
        after_ms: u64,
    },
    /// The processor's circuit breaker is open: nothing ran, nothing was written, no attempt was
    /// counted.
    Paused {
        /// Delay before the next delivery, in milliseconds.
        after_ms: u64,
    },
}

impl Outcome {
    /// Returns whether the delivery is settled. If `false`, the message is to be delivered again.
    pub fn is_settled(&self) -> bool {
        match self {
            Self::Completed { .. } | Self::Duplicate(_) | Self::Mismatch | Self::Stale => true,
            Self::Parked { .. } | Self::DeadLettered { .. } => true,
            Self::Compensating { .. } | Self::Compensated { .. } | Self::CompensationFailed { .. } => true,
            Self::Retry { .. } | Self::InFlight { .. } | Self::Paused { .. } => false,
        }
    }

    /// Returns the outcome's name, as the command line, the API and the metrics print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Completed { .. } => "completed",
            Self::Duplicate(_) => "duplicate",
            Self::Mismatch => "mismatch",
            Self::Stale => "stale",
            Self::Parked { .. } => "parked",
            Self::DeadLettered { .. } => "dead-lettered",
            Self::Compensating { .. } => "compensating",
            Self::Compensated { .. } => "compensated",
            Self::CompensationFailed { .. } => "compensation-failed",
            Self::Retry { .. } => "retry",
            Self::InFlight { .. } => "in-flight",
            Self::Paused { .. } => "paused",
        }
    }
}

/// Stored outcome of a message that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredOutcome {
    /// The message completed with this result.
    Completed(Output),
    /// The message failed for good with this error.
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::key::Scope;
    use crate::observe::metrics::{Counters, IdempotencyMetrics as _};

    /// Returns the outcome after this one, so that the test covers all: without an arm for a new
    /// outcome, this does not compile.
    fn next(outcome: &Outcome) -> Option<Outcome> {
        let error = String::new;
        Some(match outcome {
            Outcome::Completed { .. } => Outcome::Duplicate(StoredOutcome::Failed(error())),
            Outcome::Duplicate(_) => Outcome::Mismatch,
            Outcome::Mismatch => Outcome::Stale,
            Outcome::Stale => Outcome::Parked { awaits: 1, until_ms: 1 },
            Outcome::Parked { .. } => Outcome::DeadLettered { error: error() },
            Outcome::DeadLettered { .. } => Outcome::Compensating { error: error() },
            Outcome::Compensating { .. } => Outcome::Compensated { error: error() },
            Outcome::Compensated { .. } => Outcome::CompensationFailed { error: error() },
            Outcome::CompensationFailed { .. } => Outcome::Retry { error: error(), after_ms: 1 },
            Outcome::Retry { .. } => Outcome::InFlight { after_ms: 1 },
            Outcome::InFlight { .. } => Outcome::Paused { after_ms: 1 },
            Outcome::Paused { .. } => return None,
        })
    }

    #[test]
    fn every_outcome_is_counted_under_its_name() {
        let counters = Counters::default();
        let first = Outcome::Completed { output: Output::default() };
        let outcomes: Vec<Outcome> = std::iter::successors(Some(first), next).collect();
        for outcome in &outcomes {
            counters.ended(&Scope::of("p"), outcome.name(), 0);
        }
        assert_eq!(counters.read().outcomes, outcomes.iter().map(|outcome| (outcome.name(), 1)).collect::<Vec<_>>());
    }
}
