//! How a message ended, as its pipeline says it. What a transport or a person is told is theirs to say.

use crate::record::Output;

/// How a delivery of a message ended. Everything but `Retry`, `InFlight` and `Paused` is durable and may be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and its effects are durable.
    Completed {
        /// Its result.
        output: Output,
    },
    /// It had ended before: nothing ran.
    Duplicate(StoredOutcome),
    /// Its key was used with another body: nothing ran.
    Mismatch,
    /// A later message of its entity was seen before: nothing ran.
    Stale,
    /// The store keeps it until the message before it has ended, or its time is over. The host runs it then.
    Parked {
        /// The version that is awaited.
        awaits: u64,
        /// When the wait is over, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
    /// It failed for good; the record keeps the message and the error.
    DeadLettered {
        /// What went wrong.
        error: String,
    },
    /// It failed for good, and what it has done outside is being undone; the host brings that to its end.
    Compensating {
        /// What went wrong.
        error: String,
    },
    /// It failed for good, and what it had done outside is undone.
    Compensated {
        /// What went wrong.
        error: String,
    },
    /// It failed for good, and what it had done outside could not be undone: an operator decides.
    CompensationFailed {
        /// What went wrong with the message.
        error: String,
    },
    /// It is due again later.
    Retry {
        /// What went wrong.
        error: String,
        /// Due after this many milliseconds.
        after_ms: u64,
    },
    /// It is being run by somebody else.
    InFlight {
        /// Ask again after this many milliseconds.
        after_ms: u64,
    },
    /// Its processor's circuit breaker is open: nothing ran, nothing was written, no attempt was counted.
    Paused {
        /// Deliver it again after this many milliseconds.
        after_ms: u64,
    },
}

impl Outcome {
    /// Whether the delivery is done with: if not, it is to come again.
    pub fn is_settled(&self) -> bool {
        match self {
            Self::Completed { .. } | Self::Duplicate(_) | Self::Mismatch | Self::Stale => true,
            Self::Parked { .. } | Self::DeadLettered { .. } => true,
            Self::Compensating { .. } | Self::Compensated { .. } | Self::CompensationFailed { .. } => true,
            Self::Retry { .. } | Self::InFlight { .. } | Self::Paused { .. } => false,
        }
    }

    /// The outcome's name, as the command line, the API and the metrics print it.
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

/// The stored outcome of a message whose life has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredOutcome {
    /// It completed with this result.
    Completed(Output),
    /// It failed for good with this error.
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::key::Scope;
    use crate::observe::metrics::{Counters, IdempotencyMetrics as _};

    /// The outcome after this one, so that none is left out here: a new one does not compile.
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
