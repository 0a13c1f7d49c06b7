//! Steps outside the transaction: registered before they are taken, compensated if the message, or
//! its saga, fails for good. Holds nothing itself: each goes straight to the host.

use serde::Serialize;

use crate::Failure;
use crate::host::{Backend, Host as _};

/// The message's saga. What the host cannot allow (a step that has no compensation, one behind the
/// pivot, a saga that has failed) ends the run there and then: the message is rejected, with the
/// reason.
pub struct Saga<'a> {
    pub(crate) backend: &'a Backend,
    pub(crate) step_key: Option<&'a str>,
}

impl<'a> Saga<'a> {
    /// Returns, in a compensation, the idempotency key of the outbound call that took the step: the
    /// first call after the step was registered. The service knows the call by it, also if its
    /// answer never came. `None` in a run of the message, and for steps that were registered by a
    /// host that did not note it.
    pub fn step_key(&self) -> Option<&'a str> {
        self.step_key
    }

    /// Registers a step before its effect; its compensation is given `payload`. Durable when it
    /// returns. A re-run of the message that registers the same step with the same payload
    /// registers nothing.
    pub fn step<T: Serialize + ?Sized>(&self, name: &str, payload: &T) -> Result<(), Failure> {
        self.step_bytes(name, &serde_json::to_vec(payload)?);
        Ok(())
    }

    /// Registers a step before its effect, with `payload` as bytes; otherwise like [`Saga::step`].
    pub fn step_bytes(&self, name: &str, payload: &[u8]) {
        self.backend.step(name, payload);
    }

    /// Marks the saga's pivot: from here on, none of its steps is compensated. Durable when it
    /// returns.
    pub fn pivot(&self) {
        self.backend.pivot();
    }

    /// Makes the message part of the saga `id`, unless its attribute `saga` has already. Only
    /// before its first step.
    pub fn join(&self, id: &str) {
        self.backend.join(id);
    }

    /// The saga that the message has joined is complete once the message has committed.
    pub fn complete(&self) {
        self.backend.complete();
    }
}
