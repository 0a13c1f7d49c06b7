//! An instance of a component with the store it lives in: made for a message, lent the message's context, and, where
//! reuse is granted, made ready for the next. Decides whether an instance may live on; never what becomes of a message.

use hapax_core::{Context, Invocation};
use wasmtime::{Store, UpdateDeadline};

use crate::bindings::Processor;
use crate::bindings::hapax::processor::types;
use crate::component::WasmProcessor;
use crate::host::{HostState, message};
use crate::limits::ReuseLimits;

/// One instance. Whoever holds it holds it alone: no two messages meet in one.
pub(crate) struct Instance {
    store: Store<HostState>,
    /// `None` until the first call.
    processor: Option<Processor>,
    /// Messages it has answered.
    messages: u32,
    /// Bytes of memory it had when it was made.
    born_bytes: usize,
}

impl Instance {
    /// A store without an instance in it yet: that is made within the first message's deadline.
    pub(crate) fn new(of: &WasmProcessor, invocation: &Invocation) -> Self {
        let mut store = Store::new(&of.engine.wasmtime, HostState::new(&of.shared, of.wasi, invocation));
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(of.shared.limits.hostcall_bytes);
        // At each tick a guest that still computes lets others have the thread, until its time is over.
        store.epoch_deadline_callback(|store| {
            Ok(if store.data().is_over() { UpdateDeadline::Interrupt } else { UpdateDeadline::Yield(1) })
        });
        store.set_epoch_deadline(1);
        Self { store, processor: None, messages: 0, born_bytes: 0 }
    }

    /// Makes a kept instance's host side that of another message. What the guest keeps in its memory stays.
    pub(crate) fn begin(&mut self, invocation: &Invocation) {
        self.store.data_mut().begin(invocation);
        self.store.set_epoch_deadline(1);
    }

    pub(crate) async fn call(
        &mut self,
        of: &WasmProcessor,
    ) -> wasmtime::Result<Result<types::Outcome, types::Failure>> {
        let processor = match &self.processor {
            Some(processor) => processor,
            None => {
                let made = of.pre.instantiate_async(&mut self.store).await?;
                self.born_bytes = self.store.data().memory.used_bytes();
                self.processor.insert(made)
            }
        };
        processor.hapax_processor_handler().call_handle(&mut self.store, message::borrow()).await
    }

    pub(crate) fn state(&self) -> &HostState {
        self.store.data()
    }

    /// Ends a message that was answered. Whether the instance may answer another.
    pub(crate) fn end(&mut self, limits: &ReuseLimits) -> bool {
        self.messages = self.messages.saturating_add(1);
        let state = self.store.data_mut();
        let grown = state.memory.used_bytes().saturating_sub(self.born_bytes);
        self.messages < limits.messages && grown <= limits.growth_bytes && state.end()
    }
}

/// An instance with the context it was lent. The context goes back however the run ends, also when it is dropped
/// half-way: the caller's `&mut` never sees the stand-in.
pub(crate) struct Run<'a> {
    /// Taken out to be kept; dropped with the run otherwise.
    instance: Option<Box<Instance>>,
    context: &'a mut Context,
}

impl<'a> Run<'a> {
    pub(crate) fn new(mut instance: Box<Instance>, context: &'a mut Context) -> Self {
        std::mem::swap(&mut instance.store.data_mut().context, context);
        Self { instance: Some(instance), context }
    }

    pub(crate) fn instance(&mut self) -> &mut Instance {
        self.instance.as_mut().expect("an instance leaves its run only at the end")
    }

    /// Gives the context back, and the instance to the caller.
    pub(crate) fn end(mut self) -> Box<Instance> {
        self.give_back();
        self.instance.take().expect("an instance leaves its run only here")
    }

    fn give_back(&mut self) {
        if let Some(instance) = &mut self.instance {
            std::mem::swap(&mut instance.store.data_mut().context, self.context);
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}
