//! The scenarios, a file each, in the order of the report. A scenario measures and judges; printing
//! is the report's.

mod builds;
mod duplicates;
#[cfg_attr(not(feature = "engine"), path = "engine/absent.rs")]
mod engine;
mod filters;
mod growth;
mod http;
mod jetstream;
mod memory;
mod postgres;
mod python;
mod restart;
mod retention;
mod start;
mod sustained;
mod throughput;
mod wasm;

use crate::Scenario;

/// Every scenario.
pub(crate) const ALL: &[Scenario] = &[
    throughput::SCENARIO,
    sustained::SCENARIO,
    engine::SCENARIO,
    wasm::SCENARIO,
    duplicates::SCENARIO,
    filters::SCENARIO,
    growth::SCENARIO,
    memory::SCENARIO,
    retention::SCENARIO,
    restart::SCENARIO,
    start::SCENARIO,
    http::SCENARIO,
    postgres::SCENARIO,
    jetstream::SCENARIO,
    python::SCENARIO,
    builds::SCENARIO,
];
