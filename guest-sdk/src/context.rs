//! Context of a processor while it handles one message. Holds no effect itself: each goes straight
//! to the host.

use std::time::Duration;

use crate::host::{Backend, Host as _};
use crate::http::Http;
use crate::lock::{Busy, Lock, millis};
use crate::saga::Saga;
use crate::{Events, Level, Message, Outgoing, Rng, State};

/// The one door to state, event streams, outbox, log and configuration, for the time of one
/// message.
pub struct Context {
    backend: Backend,
    now_ms: u64,
    rng: Rng,
    step_key: Option<String>,
}

impl Context {
    pub(crate) fn new(backend: Backend, message: &Message) -> Self {
        Self { backend, now_ms: message.now_ms, rng: Rng::new(message.seed), step_key: message.step_key.clone() }
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn into_backend(self) -> Backend {
        self.backend
    }

    /// The processor's own state. Reads see this message's writes.
    pub fn state(&self) -> State<'_> {
        State { backend: &self.backend }
    }

    /// The processor's own event streams. Reads see this message's appends.
    pub fn events(&self) -> Events<'_> {
        Events { backend: &self.backend }
    }

    /// Steps outside the transaction, and their compensation.
    pub fn saga(&self) -> Saga<'_> {
        Saga { backend: &self.backend, step_key: self.step_key.as_deref() }
    }

    /// Outbound calls, where the processor is granted any.
    pub fn http(&self) -> Http<'_> {
        Http { backend: &self.backend }
    }

    /// Acquires the lock `name` for `ttl`, if no other owner holds it.
    pub fn lock(&self, name: &str, ttl: Duration) -> Result<Lock<'_>, Busy> {
        match self.backend.acquire(name, millis(ttl)) {
            Ok(fence) => Ok(Lock { backend: &self.backend, name: name.to_owned(), fence }),
            Err(after_ms) => Err(Busy { name: name.to_owned(), retry_after: Duration::from_millis(after_ms) }),
        }
    }

    /// Sends `message` once this one has committed, under an id that is the same however often it
    /// is sent.
    pub fn send(&self, message: Outgoing) {
        self.backend.send(message);
    }

    /// Returns the configuration's value under `key`.
    pub fn config(&self, key: &str) -> Option<String> {
        self.backend.config(key)
    }

    /// The message's own time, in milliseconds since the Unix epoch, or 0 if it has none: the same
    /// on every run.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Numbers that look random, and are the same on every run of this message.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// A line in the host's log. It stays there even if the message fails.
    pub fn log(&self, level: Level, text: impl AsRef<str>) {
        self.backend.log(level, text.as_ref());
    }

    /// For whoever follows every step.
    pub fn trace(&self, text: impl AsRef<str>) {
        self.log(Level::Trace, text);
    }

    /// For whoever looks for a fault.
    pub fn debug(&self, text: impl AsRef<str>) {
        self.log(Level::Debug, text);
    }

    /// Worth knowing.
    pub fn info(&self, text: impl AsRef<str>) {
        self.log(Level::Info, text);
    }

    /// May need a look.
    pub fn warn(&self, text: impl AsRef<str>) {
        self.log(Level::Warn, text);
    }

    /// Needs a look.
    pub fn error(&self, text: impl AsRef<str>) {
        self.log(Level::Error, text);
    }
}
