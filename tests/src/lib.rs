//! Support for the tests: native processors, a bench of parts, the conformance suite every store
//! must pass, a backend that loses unsynced writes. Asserts; nothing depends on it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

pub mod backend;
pub mod bench;
pub mod clock;
pub mod conformance;
pub mod model;
pub mod mutation;
pub mod owners;
pub mod payments;
pub mod plans;
pub mod process;
pub mod processors;
pub mod random;
pub mod raw;
pub mod sagas;
pub mod server;
pub mod source;
pub mod stepped;
pub mod transport_conformance;
