//! The invoke step: runs the processor against a fresh context. No transaction is held, and nothing
//! is written but checkpoints and the renewals of the claim.

use std::sync::Arc;

use crate::commit::overlay::Overlay;
use crate::message::key::RecordKey;
use crate::pipeline::Parts;
use crate::pipeline::claim::{ClaimedRun, Claims, RunRight};
use crate::pipeline::delivery::Accepted;
use crate::pipeline::in_flight::{InFlight, Leader};
use crate::pipeline::run_result::RunResult;
use crate::run::context::Context;
use crate::run::failure::Failure;
use crate::run::processor::Invocation;
use crate::state::{EffectLimits, Effects, ReadSet, StateView};
use crate::store::crash_tracker::{CrashTracker, RunMark};
use crate::support::error::StoreError;
use crate::support::fault;

/// Runs the messages of one consumer.
pub(super) struct Invoker {
    parts: Arc<Parts>,
    /// The state as runs see it: the overlay over the store.
    view: Arc<dyn StateView>,
    effect_limits: Arc<EffectLimits>,
    pub(super) crash_tracker: Arc<dyn CrashTracker>,
    /// Held by the run of a suspect, a message during whose run the process has died. Suspects run
    /// one at a time, so that only the guilty one is running at the next death.
    suspect: tokio::sync::Mutex<()>,
    /// Runs under way that may take steps of a saga, by the message's own key.
    taking_steps: InFlight,
}

/// The end of the invoke step.
pub(super) enum Invoked {
    Run(RunResult),
    /// Another owner took the claim over. The effects of the run are void.
    ClaimLost,
}

impl Invoker {
    pub(super) fn new(parts: Arc<Parts>, overlay: &Arc<Overlay>, crash_tracker: Arc<dyn CrashTracker>) -> Self {
        let view = overlay.over(parts.storage.view(&parts.scope));
        let effect_limits = Arc::new(parts.options.effects.clone());
        Self {
            parts,
            view,
            effect_limits,
            crash_tracker,
            suspect: tokio::sync::Mutex::default(),
            taking_steps: InFlight::default(),
        }
    }

    /// Runs a message, unless the process has died over it as often as it may be tried.
    pub(super) async fn invoke(
        &self,
        claims: &Claims,
        message: &Accepted,
        right: &mut RunRight,
    ) -> Result<Invoked, StoreError> {
        if right.deaths > 0 && right.attempts >= self.parts.options.attempts_max {
            return Box::pin(self.give_up(claims, message, right)).await.map(Invoked::Run);
        }
        self.run(claims, message, right).await
    }

    /// Waits until no other suspect runs, and keeps them from running until the guard is dropped.
    pub(super) async fn suspects(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.suspect.lock().await
    }

    /// Returns a context of the message `message_key`, with nothing read or written.
    pub(super) fn context(&self, message_key: &RecordKey) -> Context {
        Context::new(self.view.clone(), self.effect_limits.clone()).of(message_key)
    }

    /// Completes when no run of the message is under way here that may take steps. A run that
    /// begins later finds its saga as it is now.
    pub(super) async fn steps_taken(&self, message_key: &RecordKey) {
        if !(fault::mutated("compensates-a-step-in-flight") || fault::mutated("sagas-ignore-runs")) {
            drop(self.taking_steps(message_key).await);
        }
    }

    async fn taking_steps(&self, message_key: &RecordKey) -> Leader {
        loop {
            match self.taking_steps.enter(message_key) {
                Ok(leader) => return leader,
                Err(follower) => follower.ended().await,
            }
        }
    }

    async fn run(&self, claims: &Claims, message: &Accepted, right: &mut RunRight) -> Result<Invoked, StoreError> {
        let message_key = &message.identity.message_key;
        let invocation = Invocation {
            message: message.message.clone(),
            idempotency_key: message_key.key.clone(),
            attempt: right.attempts + 1,
            seed: message_key.seed(),
            step_key: None,
        };
        let mark = RunMark::begin(&self.crash_tracker, message_key);
        fault::point_of("running", &message.message.id);
        let checkpoints = claims.checkpoints(message, right.lease());
        let mut context = self.context(message_key).with_lazy_checkpoints(checkpoints);
        let result = if claims.are_needed() {
            let _taking_steps = Box::pin(self.taking_steps(message_key)).await;
            let checkpoints = context.checkpoints().expect("the context has just been given them").clone();
            let running = self.parts.processor.process(&invocation, &mut context);
            // Boxed, as all rare paths are: a future is as large as its largest await, and it is
            // moved by value.
            match Box::pin(claims.keep_while(message, right, &checkpoints, running)).await? {
                ClaimedRun::Ended(result) => {
                    Box::pin(checkpoints.reopen_steps()).await?;
                    result
                }
                ClaimedRun::Lost => {
                    Box::pin(checkpoints.reopen_steps()).await?;
                    return Ok(Invoked::ClaimLost);
                }
            }
        } else {
            self.parts.processor.process(&invocation, &mut context).await
        };
        drop(mark);
        // A message that names its saga is a member of it, whether or not its run has used the
        // saga; and an earlier run may have registered steps, also with another component.
        let names_saga = message.message.extensions.contains_key("saga");
        let has_saga = names_saga || (right.ran_before && right.found.is_some());
        let checkpoints = if has_saga { context.checkpoints().cloned() } else { context.take_checkpoints() };
        let prior = match checkpoints {
            Some(checkpoints) => Some(Box::new(Box::pin(checkpoints.finish(right.ran_before)).await?)),
            None => None,
        };
        let (reads, effects) = context.finish();
        Ok(Invoked::Run(RunResult { attempts: right.attempts + 1, result, reads, effects, prior }))
    }

    /// Returns the result of a message that is not run again, since the process has died over it
    /// too often.
    async fn give_up(&self, claims: &Claims, message: &Accepted, right: &RunRight) -> Result<RunResult, StoreError> {
        let result = Err(Failure::retry(format!("the host died {} times while it ran this message", right.deaths)));
        let (reads, effects) = (ReadSet::default(), Effects::default());
        let checkpoints = claims.checkpoints(message, right.lease()).make();
        let prior = Some(Box::new(checkpoints.finish(true).await?));
        Ok(RunResult { attempts: right.attempts, result, reads, effects, prior })
    }
}
