//! Runs a processor that is a WASM component: compile, cache, link, limit, convert. The only user
//! of wasmtime; knows nothing of stores, transports or records.
//!
//! [`Engine::load`] finds out everything that can be wrong with a component, so that
//! [`WasmProcessor`] is left with what only a run can show: a trap, a deadline, a limit.

mod batch;
mod bindings;
mod cache;
mod compensation;
mod component;
mod contract;
mod engine;
mod error;
mod explain;
mod host;
mod idle_instances;
mod instance;
mod limits;
mod load;
mod signature;
mod ticker;
mod wasi;

pub use component::WasmProcessor;
pub use engine::{Engine, EngineConfig};
pub use error::{EngineError, LoadError};
pub use limits::{Batching, InstanceMode, ProcessorLimits, ReuseLimits};
pub use load::LoadOptions;
