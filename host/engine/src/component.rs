//! A component as a `MessageProcessor`: a fresh instance per message, or an idle one where that is
//! granted. Whatever the guest does ends as an output or a failure.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::{Compensation, Context, EffectLimits, Failure, Invocation, MessageProcessor, Output};
use tokio::sync::SemaphorePermit;

use crate::batch::Gathering;
use crate::bindings::hapax::processor::types;
use crate::engine::Inner;
use crate::explain;
use crate::host::items::Items;
use crate::host::log::cut;
use crate::host::{HostState, Shared};
use crate::instance::{Answer, Instance, Pre, Run, one};
use crate::limits::InstanceMode;

/// Texts in a guest's failure are cut here.
const REASON_BYTES: usize = 4 << 10;

/// A loaded component. Made by [`crate::Engine::load`].
pub struct WasmProcessor {
    pub(crate) engine: Arc<Inner>,
    pub(crate) pre: Pre,
    pub(crate) digest: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) effect_limits: Arc<EffectLimits>,
    pub(crate) wasi: bool,
    pub(crate) mode: InstanceMode,
    /// Where its messages meet, if it takes many in one call.
    pub(crate) gathering: Option<Gathering>,
    /// Identifies the component's idle instances.
    pub(crate) id: u64,
    /// Slots of the pool an instance takes.
    pub(crate) permits: u32,
    pub(crate) from_cache: bool,
    /// True if the component may wait for the host longer than a read takes.
    pub(crate) waits: bool,
    pub(crate) imports_http: bool,
    /// Steps that the component can compensate; none if it exports no compensation.
    pub(crate) steps: Vec<String>,
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

    /// Returns true if the component's compiled code came from the cache.
    pub fn from_cache(&self) -> bool {
        self.from_cache
    }

    /// Returns true if the component takes many messages in one call.
    pub fn takes_batches(&self) -> bool {
        self.gathering.is_some()
    }

    /// Returns true if the component makes outbound calls, where they are granted.
    pub fn imports_http(&self) -> bool {
        self.imports_http
    }

    /// The limits to make its contexts with.
    pub fn effect_limits(&self) -> &Arc<EffectLimits> {
        &self.effect_limits
    }

    async fn run(&self, invocation: &Invocation, context: &mut Context) -> Result<Output, Failure> {
        if let Some(gathering) = &self.gathering {
            return self.run_in_batch(gathering, invocation, context).await;
        }
        let _slots = self.slots().await;
        let mut run = Run::new(self.instance(one(invocation)), context);
        let instance = run.instance();
        let answer = self.within_deadline(instance.call(self)).await;
        let (result, in_order) = match self.unless_it_failed(answer, instance.state()) {
            Ok(answer) => self.judged(answer),
            Err(failure) => (Err(failure), false),
        };
        let instance = run.end();
        if in_order {
            self.keep(instance);
        }
        result
    }

    /// Permit for an instance, held until the instance is dropped or idle; waiting here is the
    /// back-pressure.
    pub(crate) async fn slots(&self) -> SemaphorePermit<'_> {
        self.engine.permits.acquire_many(self.permits).await.expect("the engine never closes its permits")
    }

    /// Returns the answer of a call; `None` if its time was over first.
    pub(crate) async fn within_deadline<T>(
        &self,
        call: impl Future<Output = wasmtime::Result<T>>,
    ) -> Option<wasmtime::Result<T>> {
        if self.waits {
            // The epoch stops code; a guest that sleeps in WASI's poll, or waits for an answer,
            // runs none.
            tokio::time::timeout(self.shared.limits.deadline, call).await.ok()
        } else {
            Some(call.await)
        }
    }

    /// Returns the answer of a call, or the failure.
    pub(crate) fn unless_it_failed<T>(
        &self,
        answer: Option<wasmtime::Result<T>>,
        state: &HostState,
    ) -> Result<T, Failure> {
        match answer {
            Some(answer) => answer.map_err(|error| explain::failure(&error, state)),
            None => Err(explain::deadline(&self.shared.limits)),
        }
    }

    /// Returns the meaning of an answer for its message, and true if the instance that gave it may
    /// live on.
    pub(crate) fn judged(&self, answer: Answer) -> (Result<Output, Failure>, bool) {
        match answer {
            Ok(outcome) => self.output(outcome).map_or_else(|over| (Err(over), false), |output| (Ok(output), true)),
            Err(failure) => {
                let failure = refusal(failure);
                // What has not passed yet may be the instance's own fault.
                let in_order = !matches!(failure, Failure::Retry { .. });
                (Err(failure), in_order)
            }
        }
    }

    /// Returns an idle instance, or else a new one.
    pub(crate) fn instance(&self, items: Items) -> Box<Instance> {
        let kept = match self.mode {
            InstanceMode::Fresh => None,
            InstanceMode::Reuse(_) => self.engine.kept.take(self.id),
        };
        match kept {
            Some(mut instance) => {
                instance.begin(items);
                instance
            }
            None => Box::new(Instance::new(self, items)),
        }
    }

    /// Keeps an instance that may live on, while the permit for its slots is still held.
    pub(crate) fn keep(&self, mut instance: Box<Instance>) {
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

    fn compensation(&self) -> Option<&dyn Compensation> {
        matches!(self.pre, Pre::Compensating(_)).then_some(self as &dyn Compensation)
    }
}

impl Drop for WasmProcessor {
    fn drop(&mut self) {
        self.engine.kept.forget(self.id);
    }
}

/// A failure as the guest put it.
pub(crate) fn refusal(failure: types::Failure) -> Failure {
    let short = |text: String| cut(&text, REASON_BYTES).to_owned();
    match failure {
        types::Failure::Retry(later) => Failure::Retry { reason: short(later.reason), after_ms: later.after_ms },
        types::Failure::Reject(reason) => Failure::Reject(short(reason)),
        types::Failure::Invalid(reason) => Failure::Invalid(short(reason)),
    }
}
