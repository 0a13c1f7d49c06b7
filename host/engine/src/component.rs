//! A component as a `MessageProcessor`: a fresh instance a message, thrown away with it. Whatever the guest does ends
//! as an output or a failure.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::context::EffectLimits;
use hapax_core::{Context, Failure, Invocation, MessageProcessor, Output};
use wasmtime::{Store, UpdateDeadline};

use crate::bindings::ProcessorPre;
use crate::bindings::hapax::processor::types;
use crate::engine::Inner;
use crate::explain;
use crate::host::log::{GuestLog, cut};
use crate::host::{HostState, Shared, empty_context, message};
use crate::limits::MemoryGuard;
use crate::wasi::Wasi;

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
        // Held until the instance is gone; waiting here is the back-pressure.
        let _slots = self.engine.permits.acquire_many(self.permits).await.expect("the engine never closes its permits");
        let mut run = Run { store: self.store(invocation), context };
        std::mem::swap(&mut run.store.data_mut().context, run.context);
        let answer = if self.wasi {
            // The epoch stops code; a guest that sleeps in WASI's poll runs none.
            tokio::time::timeout(self.shared.limits.deadline, self.call(&mut run.store)).await
        } else {
            Ok(self.call(&mut run.store).await)
        };
        match answer {
            Ok(Ok(Ok(outcome))) => self.output(outcome),
            Ok(Ok(Err(failure))) => Err(refusal(failure)),
            Ok(Err(error)) => Err(explain::failure(&error, run.store.data())),
            Err(_elapsed) => Err(explain::deadline(&self.shared.limits)),
        }
    }

    fn store(&self, invocation: &Invocation) -> Store<HostState> {
        let limits = &self.shared.limits;
        let state = HostState {
            shared: Arc::clone(&self.shared),
            invocation: invocation.clone(),
            context: empty_context(),
            memory: MemoryGuard::new(limits),
            log: GuestLog::new(limits.log_bytes),
            wasi: self.wasi.then(|| Box::new(Wasi::new(&self.shared, invocation))),
        };
        let mut store = Store::new(&self.engine.wasmtime, state);
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.hostcall_bytes);
        // At each tick a guest that still computes lets others have the thread, until its time is over.
        let over = self.engine.ticker.deadline(limits.deadline);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            Ok(if over() { UpdateDeadline::Interrupt } else { UpdateDeadline::Yield(1) })
        });
        store
    }

    async fn call(&self, store: &mut Store<HostState>) -> wasmtime::Result<Result<types::Outcome, types::Failure>> {
        let instance = self.pre.instantiate_async(&mut *store).await?;
        instance.hapax_processor_handler().call_handle(&mut *store, message::borrow()).await
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

/// An instance with the context it was lent. The context goes back however the run ends, also when it is dropped
/// half-way: the caller's `&mut` never sees the stand-in.
struct Run<'a> {
    store: Store<HostState>,
    context: &'a mut Context,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        std::mem::swap(&mut self.store.data_mut().context, self.context);
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
