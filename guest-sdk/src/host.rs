//! The seam between `Context` and its implementation: the host's imports in a component, the test
//! kit elsewhere. Only one of the two is ever compiled in.

use crate::http::{HttpError, Request, Response};
use crate::{Event, NewEvent, Outgoing};

#[cfg(target_arch = "wasm32")]
pub(crate) use crate::wasm::Imports as Backend;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use crate::world::World as Backend;

/// Severity of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// For whoever follows every step.
    Trace,
    /// For whoever looks for a fault.
    Debug,
    /// Worth knowing.
    Info,
    /// May need a look.
    Warn,
    /// Needs a look.
    Error,
}

/// An entry of the state.
pub(crate) type Entry = (String, Vec<u8>);

/// Functions that the contract offers to a processor; the contract defines their semantics.
pub(crate) trait Host {
    fn get(&self, key: &str) -> Option<Vec<u8>>;
    fn set(&self, key: &str, value: &[u8]);
    fn delete(&self, key: &str);
    fn compare_and_set(&self, key: &str, expected: Option<&[u8]>, value: Option<&[u8]>) -> bool;
    fn scan(&self, start: &str, end: Option<&str>, limit: u32) -> Vec<Entry>;
    /// The new version, or the actual one where that is not the expected one.
    fn append(&self, stream: &str, expected: Option<u64>, events: &[NewEvent]) -> Result<u64, u64>;
    fn events(&self, stream: &str, after: u64, limit: u32) -> Vec<Event>;
    fn version(&self, stream: &str) -> u64;
    fn send(&self, message: Outgoing);
    fn step(&self, name: &str, payload: &[u8]);
    fn pivot(&self);
    fn join(&self, saga: &str);
    fn complete(&self);
    /// The fence, or in how many milliseconds to ask again.
    fn acquire(&self, name: &str, ttl_ms: u64) -> Result<u64, u64>;
    /// Returns true if the lock is still held.
    fn extend(&self, name: &str, fence: u64, ttl_ms: u64) -> bool;
    fn release(&self, name: &str, fence: u64);
    fn call(&self, request: &Request) -> Result<Response, HttpError>;
    fn log(&self, level: Level, text: &str);
    fn config(&self, key: &str) -> Option<String>;
}
