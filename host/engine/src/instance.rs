//! An instance of a component with the store it lives in: made for a message, lent the message's
//! context, and, where reuse is granted, made ready for the next. Decides whether an instance may
//! live on; never what becomes of a message.

use hapax_core::{Context, Invocation};
use wasmtime::{Store, UpdateDeadline};

use crate::bindings::batches::{BatchProcessor, BatchProcessorPre};
use crate::bindings::compensating::{CompensatingProcessor, CompensatingProcessorPre};
use crate::bindings::hapax::processor::types;
use crate::bindings::{Processor, ProcessorPre};
use crate::component::WasmProcessor;
use crate::host::items::{Item, Items};
use crate::host::{HostState, empty_context, message};
use crate::limits::ReuseLimits;

/// Answer of a guest to one message.
pub(crate) type Answer = Result<types::Outcome, types::Failure>;

/// A component that is linked, by what it exports.
pub(crate) enum Pre {
    /// It handles one message a call.
    One(ProcessorPre<HostState>),
    /// A processor of one message a call that can also compensate its steps.
    Compensating(CompensatingProcessorPre<HostState>),
    /// It handles many.
    Batch(BatchProcessorPre<HostState>),
}

/// An instance's exports.
enum Guest {
    One(Processor),
    Compensating(CompensatingProcessor),
    Batch(BatchProcessor),
}

/// One instance. Whoever holds it holds it alone: no two messages meet in one.
pub(crate) struct Instance {
    store: Store<HostState>,
    /// `None` until the first call.
    guest: Option<Guest>,
    /// Calls it has answered.
    calls: u32,
    /// Bytes of memory it had when it was made.
    born_bytes: usize,
}

impl Instance {
    /// A store without an instance in it yet: that is made within the first call's deadline.
    pub(crate) fn new(of: &WasmProcessor, items: Items) -> Self {
        let mut store = Store::new(&of.engine.wasmtime, HostState::new(&of.shared, of.wasi, items));
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(of.shared.limits.hostcall_bytes);
        // At each tick a guest that still computes lets others have the thread, until its time is
        // over.
        store.epoch_deadline_callback(|store| {
            Ok(if store.data().is_over() { UpdateDeadline::Interrupt } else { UpdateDeadline::Yield(1) })
        });
        store.set_epoch_deadline(1);
        Self { store, guest: None, calls: 0, born_bytes: 0 }
    }

    /// Gives an idle instance the host side of another call. The guest's memory stays as it is.
    pub(crate) fn begin(&mut self, items: Items) {
        self.store.data_mut().begin(items);
        self.store.set_epoch_deadline(1);
    }

    /// Has the guest handle its one message.
    pub(crate) async fn call(&mut self, of: &WasmProcessor) -> wasmtime::Result<Answer> {
        self.instantiate(of).await?;
        match &self.guest {
            Some(Guest::One(guest)) => {
                guest.hapax_processor_handler().call_handle(&mut self.store, message::borrow()).await
            }
            Some(Guest::Compensating(guest)) => {
                guest.hapax_processor_handler().call_handle(&mut self.store, message::borrow()).await
            }
            Some(Guest::Batch(_)) | None => Err(wasmtime::format_err!("it takes batches only")),
        }
    }

    /// Lets the guest compensate a step of its one message.
    pub(crate) async fn compensate(
        &mut self,
        of: &WasmProcessor,
        step: &str,
        payload: &[u8],
    ) -> wasmtime::Result<Result<(), types::Failure>> {
        self.instantiate(of).await?;
        let Some(Guest::Compensating(guest)) = &self.guest else {
            return Err(wasmtime::format_err!("it undoes nothing"));
        };
        let compensation = guest.hapax_processor_compensation();
        compensation.call_compensate(&mut self.store, step, payload, message::borrow()).await
    }

    /// The steps that the guest registers, and those that it undoes.
    pub(crate) async fn declared(&mut self, of: &WasmProcessor) -> wasmtime::Result<(Vec<String>, Vec<String>)> {
        self.instantiate(of).await?;
        let Some(Guest::Compensating(guest)) = &self.guest else {
            return Err(wasmtime::format_err!("it undoes nothing"));
        };
        let compensation = guest.hapax_processor_compensation();
        let registers = compensation.call_registers(&mut self.store).await?;
        let steps = compensation.call_steps(&mut self.store).await?;
        Ok((registers, steps))
    }

    /// Has the guest handle its `count` messages.
    pub(crate) async fn call_batch(&mut self, of: &WasmProcessor, count: usize) -> wasmtime::Result<Vec<Answer>> {
        self.instantiate(of).await?;
        let Some(Guest::Batch(guest)) = &self.guest else { return Err(wasmtime::format_err!("it takes no batches")) };
        let messages = message::give(self.store.data_mut(), count as u32);
        guest.hapax_processor_batch_handler().call_handle_batch(&mut self.store, &messages).await
    }

    async fn instantiate(&mut self, of: &WasmProcessor) -> wasmtime::Result<()> {
        if self.guest.is_none() {
            self.guest = Some(match &of.pre {
                Pre::One(pre) => Guest::One(pre.instantiate_async(&mut self.store).await?),
                Pre::Compensating(pre) => Guest::Compensating(pre.instantiate_async(&mut self.store).await?),
                Pre::Batch(pre) => Guest::Batch(pre.instantiate_async(&mut self.store).await?),
            });
            self.born_bytes = self.store.data().memory.used_bytes();
        }
        Ok(())
    }

    /// The messages of a call that is over.
    pub(crate) fn take_items(&mut self) -> Vec<Item> {
        self.store.data_mut().take_items()
    }

    fn swap_context(&mut self, context: &mut Context) {
        // A context is lent only to an instance that has one message.
        if let Items::One(item) = &mut self.store.data_mut().items {
            std::mem::swap(&mut item.context, context);
        }
    }

    pub(crate) fn state(&self) -> &HostState {
        self.store.data()
    }

    /// Ends a call that was answered. Whether the instance may answer another.
    pub(crate) fn end(&mut self, limits: &ReuseLimits) -> bool {
        self.calls = self.calls.saturating_add(1);
        let state = self.store.data_mut();
        let grown = state.memory.used_bytes().saturating_sub(self.born_bytes);
        self.calls < limits.messages && grown <= limits.growth_bytes && state.end()
    }
}

/// An instance with the context it was lent. The context goes back however the run ends, also when
/// it is dropped half-way: the caller's `&mut` never sees the stand-in.
pub(crate) struct Run<'a> {
    /// Taken out to become idle; dropped with the run otherwise.
    instance: Option<Box<Instance>>,
    context: &'a mut Context,
}

/// A message for an instance, whose context is lent once the instance is there.
pub(crate) fn one(invocation: &Invocation) -> Items {
    Items::One(Item { invocation: invocation.clone(), context: empty_context() })
}

impl<'a> Run<'a> {
    pub(crate) fn new(mut instance: Box<Instance>, context: &'a mut Context) -> Self {
        instance.swap_context(context);
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
            instance.swap_context(self.context);
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}
