//! The result of one run: what the processor said, what it read, what it wants to become true.

use crate::circuit_breaker::state_machine::CallResult;
use crate::pipeline::RunRight;
use crate::record::Output;
use crate::run::checkpoint::PriorEffects;
use crate::run::failure::Failure;
use crate::state::{Effects, ReadSet};
use crate::support::fault;

/// A run that ended, as it left its context.
pub(crate) struct RunResult {
    /// Attempts made, with this one.
    pub(crate) attempts: u32,
    pub(crate) result: Result<Output, Failure>,
    pub(crate) reads: ReadSet,
    pub(crate) effects: Effects,
    /// What it has made durable before.
    pub(crate) taken: Option<Box<PriorEffects>>,
}

impl RunResult {
    /// How it went, for the circuit breaker. What a processor refuses is an answer; `None`: it was not called at all.
    pub(crate) fn went(&self, claim: &RunRight) -> Option<CallResult> {
        let failed = match &self.result {
            Ok(_) => false,
            Err(Failure::Retry { .. }) => true,
            Err(Failure::Reject(_) | Failure::Invalid(_)) => fault::mutated("breaker-counts-what-is-refused"),
        };
        (self.attempts > claim.attempts).then_some(if failed { CallResult::Badly } else { CallResult::Well })
    }
}
