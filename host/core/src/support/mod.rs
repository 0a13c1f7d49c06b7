//! Basis of all other folders: time, injected faults, and the locks and threads that shuttle can
//! replace.

pub(crate) mod clock;
pub(crate) mod error;
pub mod fault;
pub(crate) mod sync;
