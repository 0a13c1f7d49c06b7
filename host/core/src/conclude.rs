//! What becomes of a message by what its run did: record, effects, dead letter, ending. Pure functions; they write nothing.

use std::sync::Arc;

use crate::consumer::{Accepted, Claim, Ending, Run};
use crate::context::Effects;
use crate::fault;
use crate::options::Options;
use crate::processor::{Failure, Output};
use crate::record::{self, Event, Record};
use crate::storage::{Commit, DeadLetter};

/// Everything that decides, but the run itself.
pub(crate) struct Conclusion<'a> {
    pub(crate) options: &'a Options,
    /// Digest of the processor.
    pub(crate) component: &'a Arc<str>,
    pub(crate) message: &'a Accepted,
    /// Now, in milliseconds since the Unix epoch.
    pub(crate) now_ms: u64,
}

impl Conclusion<'_> {
    /// What a run makes of its message, to be committed; and how the message ends then.
    pub(crate) fn of(&self, claim: &Claim, run: Run) -> (Commit, Ending) {
        let (event, ending) = self.judge(run.attempts, run.result);
        let completed = matches!(ending, Ending::Completed { .. });
        let dead_letter = match &ending {
            Ending::DeadLettered { error } => Some(self.dead_letter(error.clone(), run.attempts)),
            _ => None,
        };
        let expected_epoch = match claim.epoch {
            None if fault::mutated("mark-before-run") => Some(1),
            found => found,
        };
        let commit = Commit {
            key: self.message.key.clone(),
            expected_epoch,
            record: Some(self.record(claim, run.attempts, event)),
            version: 0,
            reads: run.reads,
            effects: if completed { run.effects } else { Effects::default() },
            dead_letter,
        };
        (commit, ending)
    }

    /// What a run's result means: completed, once more, or failed for good.
    fn judge(&self, attempts: u32, result: Result<Output, Failure>) -> (Event, Ending) {
        match result {
            Ok(output) => (Event::Completed(output.clone()), Ending::Completed { output }),
            Err(Failure::Retry { reason, after_ms }) if attempts < self.options.attempts_max => {
                let after_ms = after_ms.unwrap_or_else(|| self.options.backoff_ms(&self.message.key, attempts));
                let event = Event::Failed { error: reason.clone(), retry_at_ms: self.now_ms + after_ms };
                (event, Ending::Retry { error: reason, after_ms })
            }
            Err(failure) => {
                let error = match failure {
                    Failure::Retry { reason, .. } => format!("failed {attempts} times, the last time: {reason}"),
                    for_good => for_good.to_string(),
                };
                (Event::GivenUp { error: error.clone() }, Ending::DeadLettered { error })
            }
        }
    }

    /// The record after `event`.
    pub(crate) fn record(&self, claim: &Claim, attempts: u32, event: Event) -> Record {
        let found = claim.found.as_deref();
        let state =
            record::next(found.map(|record| &record.state), event).expect("a claim is only given where a run may end");
        Record {
            expires_ms: state.is_terminal().then(|| self.now_ms.saturating_add(self.options.retention_ms)),
            state,
            epoch: claim.epoch.unwrap_or(0) + 1,
            attempts,
            fingerprint: self.message.fingerprint,
            component: self.component.clone(),
            saga: None,
            received_ms: found.map_or(claim.now_ms, |record| record.received_ms),
            changed_ms: self.now_ms,
        }
    }

    /// The message, to be kept with its error.
    pub(crate) fn dead_letter(&self, error: String, attempts: u32) -> DeadLetter {
        DeadLetter {
            message: (*self.message.message).clone(),
            fingerprint: self.message.fingerprint,
            error,
            attempts,
            component: self.component.clone(),
            at_ms: self.now_ms,
        }
    }
}
