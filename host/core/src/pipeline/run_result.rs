//! The result of one run: the processor's answer, the reads of the run, and the effects that it
//! wants to become true.

use crate::circuit_breaker::state_machine::CallResult;
use crate::pipeline::claim::RunRight;
use crate::record::Output;
use crate::run::checkpoint::PriorEffects;
use crate::run::failure::Failure;
use crate::state::{Effects, ReadSet};
use crate::support::fault;

/// The result of one run, as it left its context.
pub(super) struct RunResult {
    /// Attempts made, this one included.
    pub(super) attempts: u32,
    pub(super) result: Result<Output, Failure>,
    pub(super) reads: ReadSet,
    pub(super) effects: Effects,
    /// Effects that this run and earlier ones made durable before the commit.
    pub(super) prior: Option<Box<PriorEffects>>,
}

impl RunResult {
    /// Returns the result for the circuit breaker, or `None` if the processor was not called. A
    /// message that the processor refuses is a success: the processor has answered.
    pub(super) fn call_result(&self, right: &RunRight) -> Option<CallResult> {
        let failed = match &self.result {
            Ok(_) => false,
            Err(Failure::Retry { .. }) => true,
            Err(Failure::Reject(_) | Failure::Invalid(_)) => fault::mutated("breaker-counts-what-is-refused"),
        };
        (self.attempts > right.attempts).then_some(if failed { CallResult::Failed } else { CallResult::Succeeded })
    }
}
