//! Compensates one step of a saga, with the component that registered it. The step's effects are
//! returned as a commit, to which the compensator adds the event of the saga's log.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::message::key::RecordKey;
use crate::pipeline::Pipeline;
use crate::run::checkpoint::{Checkpoints, Fence, RunIdentity};
use crate::run::failure::Failure;
use crate::run::processor::{Invocation, MessageProcessor, StepToCompensate};
use crate::saga::log::ReadSaga;
use crate::saga::{Member, SagaEvent, Step};
use crate::store::commit::{Commit, SharedChange};
use crate::support::error::StoreError;

/// Finds the components that registered steps, when they are no longer at work.
pub trait ComponentVersions: Send + Sync + 'static {
    /// Returns the processor's component with that digest, or an error text if it cannot be had.
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>>;
}

/// The step of a saga that is to be compensated now.
pub(crate) struct NextStep<'a> {
    pub(crate) read: &'a ReadSaga,
    /// The member that registered it.
    pub(crate) member: &'a Member,
    pub(crate) index: u32,
    pub(crate) step: &'a Step,
}

/// A compensation that has run.
pub(crate) struct Compensated {
    pub(crate) result: Result<(), Failure>,
    /// Effects of the compensation, to be committed with the saga's event.
    pub(crate) commit: Commit,
}

impl NextStep<'_> {
    /// Returns the key from which everything that the compensation does is derived.
    fn key(&self) -> RecordKey {
        self.member.message_key.compensation(self.read.id.as_str(), self.index)
    }

    fn to_compensate(&self, key: &RecordKey) -> StepToCompensate {
        let invocation = Invocation {
            message: Arc::new(self.member.message.clone()),
            idempotency_key: self.member.message_key.key.clone(),
            attempt: self.step.attempts + 1,
            seed: key.seed(),
        };
        StepToCompensate { invocation, name: self.step.name.clone(), payload: self.step.payload.clone() }
    }
}

impl Pipeline {
    /// Runs the compensation of a step.
    pub(crate) async fn compensate(
        &self,
        next: &NextStep<'_>,
        versions: &dyn ComponentVersions,
    ) -> Result<Compensated, StoreError> {
        let key = next.key();
        let step = next.to_compensate(&key);
        let identity = RunIdentity {
            record: key.clone(),
            message_key: key.clone(),
            message: step.invocation.message.clone(),
            trace: next.member.message_key.digest(),
        };
        let fence = Fence::Saga(Box::new(next.read.clone()));
        let checkpoints = Arc::new(Checkpoints::new(self.claims.checkpoints.clone(), identity, fence));
        let mut context = self.invoker.context(&key).with_checkpoints(checkpoints.clone());
        let result = match self.version(next.member, versions).await {
            Ok(version) => match version.compensation() {
                Some(compensation) => compensation.compensate(&step, &mut context).await,
                None => Err(Failure::Reject("the component has no compensations".into())),
            },
            Err(missing) => Err(Failure::Reject(missing)),
        };
        let (reads, effects) = context.finish();
        let prior = checkpoints.finish(true).await?;
        let result = prior.failure().map_or(result, Err);
        let mut shared = SharedChange::default();
        for lock in &prior.held_locks {
            lock.release_in(&mut shared);
        }
        let mut commit = Commit {
            reads,
            effects: if result.is_ok() { effects } else { Default::default() },
            shared: Some(Box::new(shared)),
            at_ms: self.parts.clock.now_ms(),
            ..Commit::of(&key)
        };
        let forgotten = if result.is_ok() { prior.journal } else { prior.refused };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
        Ok(Compensated { result, commit })
    }

    /// Returns the version of the component that registered the member's steps.
    async fn version(
        &self,
        member: &Member,
        versions: &dyn ComponentVersions,
    ) -> Result<Arc<dyn MessageProcessor>, String> {
        if member.component == *self.component() {
            return Ok(self.parts.processor.clone());
        }
        versions.load(&member.message_key.scope.processor, &member.component).await
    }

    /// Returns what a compensation has made of the saga: compensated, due again, or stuck.
    pub(crate) fn compensation_event(&self, next: &NextStep<'_>, compensated: &Compensated) -> SagaEvent {
        let options = &self.parts.options;
        let (step, attempts) = (next.index, next.step.attempts + 1);
        match compensated.result.clone() {
            Ok(()) => SagaEvent::Compensated { step },
            Err(Failure::Retry { reason, after_ms }) if attempts < options.compensation_attempts_max => {
                let after_ms = options.retry_delay_ms(&compensated.commit.message_key, attempts, after_ms);
                let retry_at_ms = self.parts.clock.now_ms().saturating_add(after_ms);
                SagaEvent::CompensationFailed { step, error: reason, retry_at_ms }
            }
            Err(failure) => SagaEvent::Stuck { step, error: failure.after_last_attempt(attempts) },
        }
    }
}
