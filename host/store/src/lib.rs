//! The stores: redb (the default) and memory (for tests and embedding without a disk). The only user of databases; the
//! rules of what may be written are core's.

pub mod layout;
pub mod memory;
pub mod open;
mod read;
pub mod redb_store;
mod write;

pub use memory::MemoryStore;
pub use open::OpenError;
pub use redb_store::{RedbStore, StateRow};
