//! The `types` import: the message that is being handled, as a borrowed resource. Only reads.
//! Linked by hand and not through the generated trait: that one takes vectors, and a payload would
//! be copied on its way to the guest's memory.

use hapax_core::Invocation;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime::{StoreContextMut, format_err};

use super::HostState;

/// A message of the call. A marker: its handle holds the message's place in the call, so it needs
/// no table to point into, and a guest cannot make up another handle.
#[allow(unreachable_pub)] // The generated bindings re-export it, in a private module.
pub struct MessageRef;

/// The handle of the one message of a call, to be lent to the guest.
pub(crate) fn borrow() -> Resource<MessageRef> {
    Resource::new_borrow(0)
}

/// The handles of a batch's messages, to be given to the guest, which drops them.
pub(crate) fn give(state: &mut HostState, count: u32) -> Vec<Resource<MessageRef>> {
    state.handles_given = count;
    (0..count).map(Resource::new_own).collect()
}

type Store<'a> = StoreContextMut<'a, HostState>;
/// The handle, as each method gets it.
type Handle = (Resource<MessageRef>,);

pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut types = linker.instance("hapax:processor/types@0.1.0")?;
    // There is nothing to free; but a guest that keeps a message of one call has it in the next.
    types.resource("message", ResourceType::host::<MessageRef>(), |mut store, _| {
        store.data_mut().handles_given = store.data_mut().handles_given.saturating_sub(1);
        Ok(())
    })?;
    types.func_wrap("[method]message.attributes", |store: Store<'_>, handle: Handle| {
        Ok((of(&store, &handle)?.message.attributes(),))
    })?;
    types.func_wrap("[method]message.data", |store: Store<'_>, handle: Handle| {
        Ok((of(&store, &handle)?.message.data.clone(),))
    })?;
    types.func_wrap("[method]message.idempotency-key", |store: Store<'_>, handle: Handle| {
        Ok((of(&store, &handle)?.idempotency_key.clone(),))
    })?;
    types
        .func_wrap("[method]message.attempt", |store: Store<'_>, handle: Handle| Ok((of(&store, &handle)?.attempt,)))?;
    types.func_wrap("[method]message.now-ms", |store: Store<'_>, handle: Handle| {
        Ok((of(&store, &handle)?.message.now_ms(),))
    })?;
    types.func_wrap("[method]message.seed", |store: Store<'_>, handle: Handle| Ok((of(&store, &handle)?.seed,)))?;
    types.func_wrap("[method]message.step-key", |store: Store<'_>, handle: Handle| {
        Ok((of(&store, &handle)?.step_key.clone(),))
    })
}

/// Returns the message behind the handle.
fn of<'a>(store: &'a Store<'_>, (handle,): &Handle) -> wasmtime::Result<&'a Invocation> {
    match store.data().items.at(handle.rep()) {
        Some(item) => Ok(&item.invocation),
        None => Err(format_err!("it used a message of an earlier call")),
    }
}
