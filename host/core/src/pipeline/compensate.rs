//! Compensates one step of a saga, with the component that registered it. The step's effects are
//! returned as a commit, to which the compensator adds the event of the saga's log.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::message::key::RecordKey;
use crate::pipeline::options::Options;
use crate::pipeline::{POLL_INTERVAL_MS, Pipeline};
use crate::run::checkpoint::{Checkpoints, Fence, RunIdentity};
use crate::run::failure::Failure;
use crate::run::processor::{Invocation, MessageProcessor, StepToCompensate};
use crate::saga::log::ReadSaga;
use crate::saga::{Member, SagaEvent, Step};
use crate::store::commit::{Commit, SharedChange};
use crate::store::crash_tracker::RunMark;
use crate::support::error::StoreError;
use crate::support::fault;

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
    /// Attempts made so far, this one and those in which the host died included.
    attempts: u32,
}

impl NextStep<'_> {
    /// Returns the key from which everything that the compensation does is derived. A step that was
    /// opened again has another one each time: services know the first compensation by its key.
    fn key(&self) -> RecordKey {
        let key = self.member.message_key.compensation(self.read.id.as_str(), self.index);
        if self.step.reopened == 0 { key } else { key.compensation("reopened", self.step.reopened) }
    }

    fn to_compensate(&self, key: &RecordKey, attempt: u32) -> StepToCompensate {
        let message_key = &self.member.message_key;
        let invocation = Invocation {
            message: Arc::new(self.member.message.clone()),
            idempotency_key: message_key.key.clone(),
            attempt,
            seed: key.seed(),
            step_key: self.step.call.map(|call| message_key.call_id(call)),
        };
        StepToCompensate { invocation, name: self.step.name.clone(), payload: self.step.payload.clone() }
    }
}

impl Pipeline {
    /// Waits until no run is under way that may still take the step: not here, and not under a live
    /// claim of another owner.
    pub(crate) async fn step_is_at_rest(&self, member: &Member) -> Result<(), StoreError> {
        self.invoker.steps_taken(&member.message_key).await;
        while let Some(after_ms) = self.claimed_elsewhere_ms(member).await? {
            self.parts.clock.sleep(after_ms.clamp(1, POLL_INTERVAL_MS)).await;
        }
        Ok(())
    }

    /// Returns the time for which another owner's claim to the member's message lasts, in
    /// milliseconds, or `None` if there is no such claim.
    async fn claimed_elsewhere_ms(&self, member: &Member) -> Result<Option<u64>, StoreError> {
        let found = self.parts.storage.record(&member.record).await?;
        let own = found.filter(|record| record.is_of(&member.record, &member.message_key));
        let Options { owner, lease_ms, .. } = &self.parts.options;
        Ok(own.and_then(|record| record.claimed_by_another_ms(owner, self.parts.clock.now_ms(), *lease_ms)))
    }

    /// Runs the compensation of a step, unless the process has died over it as often as it may be
    /// tried.
    pub(crate) async fn compensate(
        &self,
        next: &NextStep<'_>,
        versions: &dyn ComponentVersions,
    ) -> Result<Compensated, StoreError> {
        let key = next.key();
        let deaths = if fault::mutated("deaths-of-compensations-uncounted") { 0 } else { self.deaths(&key) };
        let before = next.step.attempts + deaths;
        if deaths > 0 && before >= self.parts.options.compensation_attempts_max {
            let failure = Failure::Reject(format!("the host died {deaths} times while it ran this compensation"));
            let commit = Commit { at_ms: self.parts.clock.now_ms(), ..Commit::of(&key) };
            return Ok(Compensated { result: Err(failure), commit, attempts: before });
        }
        let _mark = RunMark::begin(&self.invoker.crash_tracker, &key);
        fault::point_of("compensating", &next.member.message.id);
        self.run_compensation(next, &key, before + 1, versions).await
    }

    /// Returns the number of times that the process died over a compensation since that was last
    /// settled.
    fn deaths(&self, key: &RecordKey) -> u32 {
        self.invoker.crash_tracker.deaths(key)
    }

    /// Forgets the deaths over a compensation that has been settled.
    pub(crate) fn forget_deaths(&self, next: &NextStep<'_>) {
        let key = next.key();
        if self.deaths(&key) > 0 {
            self.invoker.crash_tracker.forget(&key);
        }
    }

    async fn run_compensation(
        &self,
        next: &NextStep<'_>,
        key: &RecordKey,
        attempts: u32,
        versions: &dyn ComponentVersions,
    ) -> Result<Compensated, StoreError> {
        let step = next.to_compensate(key, attempts);
        let identity = RunIdentity {
            record: key.clone(),
            message_key: key.clone(),
            message: step.invocation.message.clone(),
            trace: next.member.message_key.digest(),
        };
        let fence = Fence::Saga(Box::new(next.read.clone()));
        let checkpoints = Arc::new(Checkpoints::new(self.claims.checkpoints.clone(), identity, fence));
        let mut context = self.invoker.context(key).with_checkpoints(checkpoints.clone());
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
            ..Commit::of(key)
        };
        let forgotten = if result.is_ok() { prior.journal } else { prior.refused };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
        Ok(Compensated { result, commit, attempts })
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
        let (step, attempts) = (next.index, compensated.attempts);
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
