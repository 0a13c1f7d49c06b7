//! The `types` import: the message that is being handled, as a borrowed resource. Only reads. Linked by hand and not
//! through the generated trait: that one takes vectors, and a payload would be copied on its way to the guest's memory.

use hapax_core::Message;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};

use super::HostState;

/// The one message of an instance. A marker: an instance handles one message at a time, so its handle needs no table to
/// point into, and a guest cannot make up another handle.
#[allow(unreachable_pub)] // The generated bindings re-export it, in a private module.
pub struct MessageRef;

/// The handle passed to the guest; valid for the call.
pub(crate) fn borrow() -> Resource<MessageRef> {
    Resource::new_borrow(0)
}

type Store<'a> = StoreContextMut<'a, HostState>;
/// The handle, as each method gets it.
type Handle = (Resource<MessageRef>,);

pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut types = linker.instance("hapax:processor/types@0.1.0")?;
    // Only borrows are handed out: there is nothing to free.
    types.resource("message", ResourceType::host::<MessageRef>(), |_, _| Ok(()))?;
    types.func_wrap("[method]message.attributes", |store: Store<'_>, _: Handle| Ok((message(&store).attributes(),)))?;
    types.func_wrap("[method]message.data", |store: Store<'_>, _: Handle| Ok((message(&store).data.clone(),)))?;
    types.func_wrap("[method]message.idempotency-key", |store: Store<'_>, _: Handle| {
        Ok((store.data().invocation.idempotency_key.clone(),))
    })?;
    types.func_wrap("[method]message.attempt", |store: Store<'_>, _: Handle| Ok((store.data().invocation.attempt,)))?;
    types.func_wrap("[method]message.now-ms", |store: Store<'_>, _: Handle| Ok((message(&store).now_ms(),)))?;
    types.func_wrap("[method]message.seed", |store: Store<'_>, _: Handle| Ok((store.data().invocation.seed,)))
}

fn message<'a>(store: &'a Store<'_>) -> &'a Message {
    &store.data().invocation.message
}
