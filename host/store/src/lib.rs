//! The stores: redb (the default) and memory (for tests and embedding without a disk). The only user of databases; the
//! rules of what may be written are core's.

mod apply;
mod buckets;
mod commit;
mod core;
pub mod doctor;
pub mod facts;
mod feed;
mod frame;
#[cfg(test)]
mod golden_tests;
mod journal;
#[cfg(test)]
mod journal_tests;
#[cfg(test)]
mod layers_tests;
pub mod layout;
pub mod memory;
mod memtable;
pub mod open;
mod read;
pub mod redb_store;
mod running;
mod view;

pub use facts::StoreFacts;
pub use memory::MemoryStore;
pub use open::OpenError;
pub use redb_store::{RedbStore, StateRow, StoreOptions};
