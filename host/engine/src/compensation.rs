//! The way back of a component: which steps it registers and which it undoes, asked once when it is
//! loaded; and the undoing, under the same limits as the way forward.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use hapax_core::{Compensation, Context, Failure, Invocation, Message, StepToCompensate};

use crate::component::{WasmProcessor, refusal};
use crate::error::LoadError;
use crate::explain;
use crate::instance::{Run, one};

/// Bytes of a step's name, at most.
const STEP_NAME_BYTES: usize = 256;
/// Steps that a component may know, at most.
const STEPS_MAX: usize = 1_000;

impl WasmProcessor {
    /// Asks the component which steps it registers and undoes; refuses one that would leave a step
    /// without a way back.
    ///
    /// Blocks until it has answered, at most for its deadline. Loading is not for a thread that
    /// serves messages.
    pub(crate) fn with_steps_asked(mut self) -> Result<Self, LoadError> {
        let asked = futures_executor::block_on(self.ask());
        let (registers, steps) = asked.map_err(|failure| LoadError::Steps(failure.to_string()))?;
        let wrong = |name: &&String| name.is_empty() || name.len() > STEP_NAME_BYTES;
        if let Some(name) = steps.iter().find(wrong) {
            return Err(LoadError::Steps(format!(
                "the name of a step has {} bytes, not 1 to {STEP_NAME_BYTES}",
                name.len()
            )));
        }
        if steps.len() > STEPS_MAX {
            return Err(LoadError::Steps(format!("it knows {} steps; {STEPS_MAX} is the limit", steps.len())));
        }
        if let Some(step) = registers.into_iter().find(|registered| !steps.contains(registered)) {
            let known = if steps.is_empty() { "none".to_owned() } else { format!("`{}`", steps.join("`, `")) };
            return Err(LoadError::NotUndone { step, known });
        }
        self.steps = steps;
        Ok(self)
    }

    async fn ask(&self) -> Result<(Vec<String>, Vec<String>), Failure> {
        let mut nothing = crate::host::empty_context();
        let message = Message::new("", "", "");
        let (message, idempotency_key) = (message.into(), "".into());
        let invocation = Invocation { message, idempotency_key, attempt: 1, seed: 0, step_key: None };
        let mut run = Run::new(self.instance(one(&invocation)), &mut nothing);
        let instance = run.instance();
        let answer = instance.declared(self).await;
        self.unless_it_failed(Some(answer), instance.state())
    }

    async fn undo(&self, step: &StepToCompensate, context: &mut Context) -> Result<(), Failure> {
        let _slots = self.slots().await;
        let mut run = Run::new(self.instance(one(&step.invocation)), context);
        let instance = run.instance();
        let undone = instance.compensate(self, &step.name, &step.payload);
        let answer = match tokio::time::timeout(self.shared.limits.deadline, undone).await {
            Ok(answer) => self.unless_it_failed(Some(answer), instance.state())?,
            Err(_) => return Err(explain::deadline(&self.shared.limits)),
        };
        answer.map_err(refusal)
    }
}

impl Compensation for WasmProcessor {
    fn steps(&self) -> &[String] {
        &self.steps
    }

    fn compensate<'a>(
        &'a self,
        step: &'a StepToCompensate,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            match AssertUnwindSafe(self.undo(step, context)).catch_unwind().await {
                Ok(result) => result,
                Err(_) => Err(Failure::retry("the host failed while it ran the component (see its log)")),
            }
        })
    }
}
