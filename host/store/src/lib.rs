//! The stores: redb (the default) and memory (for tests and embedding without a disk). The only
//! user of databases; the rules of what may be written are core's.

pub mod format;
mod journal;
mod memory;
/// Shared with the tests of the workspace, which this crate cannot depend on.
#[cfg(test)]
#[path = "../../../tests/src/mutation.rs"]
#[expect(unreachable_pub, clippy::unwrap_used, reason = "tests, public where they live")]
mod mutation;
mod redb;

pub use crate::memory::MemoryStore;
/// Looks at a store that no host has open.
pub use crate::redb::doctor;
pub use crate::redb::open::OpenError;
pub use crate::redb::{RedbStore, StateRow, StoreOptions};
