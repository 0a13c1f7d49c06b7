//! The seam to message processors: a WASM component or a native closure. Neither writes anything
//! itself.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::sync::Arc;

use crate::message::Message;
use crate::record::Output;
use crate::run::context::Context;
use crate::run::failure::Failure;

/// One run of one message.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// The message.
    pub message: Arc<Message>,
    /// The idempotency key, without its scope.
    pub idempotency_key: Arc<str>,
    /// 1 for the first attempt.
    pub attempt: u32,
    /// Randomness, derived from the record's key: the same on every re-run.
    pub seed: u64,
    /// Key of the outbound call that took the step, in a compensation: the service knows the call
    /// by it. `None` in a run of the message, and where a step was registered by an earlier version
    /// of the host.
    pub step_key: Option<String>,
}

/// Processes messages.
///
/// Contract: everything the processor reads and writes goes through `context`. Nothing else of the
/// run survives. So the processor may be called again for the same message, at any time, also while
/// its effects are already durable elsewhere. Dropping the future abandons the run. Implementations
/// must not panic: catch panics and return a `Failure`.
pub trait MessageProcessor: Send + Sync + 'static {
    /// Runs one message against `context`.
    fn process<'a>(
        &'a self,
        invocation: &'a Invocation,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<Output, Failure>>;

    /// Returns the digest of the component, which is stored in each record that it makes.
    fn digest(&self) -> &str;

    /// Returns the compensation of the processor's steps outside the transaction, or `None` if it
    /// takes no such steps.
    fn compensation(&self) -> Option<&dyn Compensation> {
        None
    }
}

/// A step that is to be compensated.
#[derive(Debug, Clone)]
pub struct StepToCompensate {
    /// The message that registered it; seed and attempt are the compensation's own.
    pub invocation: Invocation,
    /// The step's name.
    pub name: String,
    /// Payload that was registered with the step.
    pub payload: Bytes,
}

/// Compensates the outbound effects of a processor.
///
/// Contract, as of [`MessageProcessor`]: effects go through `context`, and the same step may be
/// compensated again, also after it was compensated. A step that was registered and never taken is
/// compensated by doing nothing.
pub trait Compensation: Send + Sync {
    /// Returns the names of the steps that it can compensate.
    fn steps(&self) -> &[String];

    /// Compensates one step.
    fn compensate<'a>(
        &'a self,
        step: &'a StepToCompensate,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<(), Failure>>;
}

/// A processor compiled into the host.
pub struct NativeProcessor<F> {
    function: F,
}

impl<F> NativeProcessor<F>
where
    F: for<'a> Fn(&'a Invocation, &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> + Send + Sync + 'static,
{
    /// Wraps an async function of invocation and context.
    pub fn new(function: F) -> Self {
        Self { function }
    }
}

impl<F> MessageProcessor for NativeProcessor<F>
where
    F: for<'a> Fn(&'a Invocation, &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> + Send + Sync + 'static,
{
    fn process<'a>(
        &'a self,
        invocation: &'a Invocation,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<Output, Failure>> {
        (self.function)(invocation, context)
    }

    fn digest(&self) -> &str {
        "native"
    }
}
