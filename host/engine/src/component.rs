//! A component as a `MessageProcessor`: a fresh instance a message, or a kept one where that is granted. Whatever the
//! guest does ends as an output or a failure.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::context::EffectLimits;
use hapax_core::{Context, Failure, Invocation, MessageProcessor, Output};

use crate::bindings::ProcessorPre;
use crate::bindings::hapax::processor::types;
use crate::engine::Inner;
use crate::explain;
use crate::host::log::cut;
use crate::host::{HostState, Shared};
use crate::instance::{Instance, Run};
use crate::limits::InstanceMode;

/// Texts in a guest's failure are cut here.
const REASON_BYTES: usize = 4 << 10;

/// A loaded component. Made by [`crate::Engine::load`].
pub struct WasmProcessor {
    pub(crate) engine: Arc<Inner>,
    pub(crate) pre: ProcessorPre<HostState>,
    pub(crate) digest: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) effect_limits: Arc<EffectLimits>,
    pub(crate) wasi: bool,
    pub(crate) mode: InstanceMode,
    /// Tells its kept instances from those of others.
    pub(crate) id: u64,
    /// Slots of the pool an instance takes.
    pub(crate) permits: u32,
    pub(crate) from_cache: bool,
}

impl std::fmt::Debug for WasmProcessor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmProcessor")
            .field("name", &self.shared.name)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

impl WasmProcessor {
    /// The name it was loaded under.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether its compiled code came from the cache.
    pub fn from_cache(&self) -> bool {
        self.from_cache
    }

    /// The limits to make its contexts with.
    pub fn effect_limits(&self) -> &Arc<EffectLimits> {
        &self.effect_limits
    }

    async fn run(&self, invocation: &Invocation, context: &mut Context) -> Result<Output, Failure> {
        // Held until the instance is gone or kept; waiting here is the back-pressure.
        let _slots = self.engine.permits.acquire_many(self.permits).await.expect("the engine never closes its permits");
        let mut run = Run::new(self.instance(invocation), context);
        let instance = run.instance();
        let answer = if self.wasi {
            // The epoch stops code; a guest that sleeps in WASI's poll runs none.
            tokio::time::timeout(self.shared.limits.deadline, instance.call(self)).await
        } else {
            Ok(instance.call(self).await)
        };
        let (result, in_order) = match answer {
            Ok(Ok(Ok(outcome))) => self.output(outcome).map_or_else(|over| (Err(over), false), |out| (Ok(out), true)),
            // What has not passed yet may be the instance's own fault.
            Ok(Ok(Err(failure))) => {
                let failure = refusal(failure);
                let in_order = !matches!(failure, Failure::Retry { .. });
                (Err(failure), in_order)
            }
            Ok(Err(error)) => (Err(explain::failure(&error, instance.state())), false),
            Err(_elapsed) => (Err(explain::deadline(&self.shared.limits)), false),
        };
        let instance = run.end();
        if in_order {
            self.keep(instance);
        }
        result
    }

    /// One that was kept, else a new one.
    fn instance(&self, invocation: &Invocation) -> Box<Instance> {
        let kept = match self.mode {
            InstanceMode::Fresh => None,
            InstanceMode::Reuse(_) => self.engine.kept.take(self.id),
        };
        match kept {
            Some(mut instance) => {
                instance.begin(invocation);
                instance
            }
            None => Box::new(Instance::new(self, invocation)),
        }
    }

    /// Keeps an instance that may live on, while the permit for its slots is still held.
    fn keep(&self, mut instance: Box<Instance>) {
        if let InstanceMode::Reuse(limits) = self.mode
            && instance.end(&limits)
        {
            self.engine.kept.put(self.id, self.permits, instance);
        }
    }

    fn output(&self, outcome: types::Outcome) -> Result<Output, Failure> {
        let limit = self.shared.limits.result_bytes;
        let bytes = outcome.data.len() + outcome.content_type.as_ref().map_or(0, String::len);
        if bytes > limit {
            return Err(Failure::Reject(format!("bytes of the result ({bytes}) are over their limit of {limit}")));
        }
        Ok(Output { content_type: outcome.content_type, data: outcome.data.into() })
    }
}

impl MessageProcessor for WasmProcessor {
    fn process<'a>(
        &'a self,
        invocation: &'a Invocation,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            // What a panic of an import leaves behind is the store, which is dropped on the way.
            match AssertUnwindSafe(self.run(invocation, context)).catch_unwind().await {
                Ok(result) => result,
                Err(_) => Err(Failure::retry("the host failed while it ran the component (see its log)")),
            }
        })
    }

    fn digest(&self) -> &str {
        &self.digest
    }
}

impl Drop for WasmProcessor {
    fn drop(&mut self) {
        self.engine.kept.forget(self.id);
    }
}

/// A failure as the guest put it.
fn refusal(failure: types::Failure) -> Failure {
    let short = |text: String| cut(&text, REASON_BYTES).to_owned();
    match failure {
        types::Failure::Retry(later) => Failure::Retry { reason: short(later.reason), after_ms: later.after_ms },
        types::Failure::Reject(reason) => Failure::Reject(short(reason)),
        types::Failure::Invalid(reason) => Failure::Invalid(short(reason)),
    }
}
