//! The `types` import: the message that is being handled, as a borrowed resource. Only reads.

use wasmtime::component::Resource;

use super::HostState;
use crate::bindings::hapax::processor::types::{Host, HostMessage};

/// The one message of an instance. A marker: an instance handles one message, so its handle needs no table to point
/// into, and a guest cannot make up another handle.
#[allow(unreachable_pub)] // The generated bindings re-export it, in a private module.
pub struct MessageRef;

/// The handle passed to the guest; valid for the call.
pub(crate) fn borrow() -> Resource<MessageRef> {
    Resource::new_borrow(0)
}

impl Host for HostState {}

impl HostMessage for HostState {
    fn attributes(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.invocation.message.attributes())
    }

    fn data(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<Vec<u8>> {
        Ok(self.invocation.message.data.to_vec())
    }

    fn idempotency_key(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<String> {
        Ok(self.invocation.idempotency_key.to_string())
    }

    fn attempt(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<u32> {
        Ok(self.invocation.attempt)
    }

    fn now_ms(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<u64> {
        Ok(self.invocation.message.now_ms())
    }

    fn seed(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<u64> {
        Ok(self.invocation.seed)
    }

    fn drop(&mut self, _: Resource<MessageRef>) -> wasmtime::Result<()> {
        // Only borrows are handed out: there is nothing to free.
        Ok(())
    }
}
