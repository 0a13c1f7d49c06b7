//! What is measured, a file each, in the order of the report. A scenario measures and judges; printing is the report's.

mod duplicates;
mod growth;
mod memory;
mod restart;
mod sustained;
mod throughput;

use crate::Scenario;

/// Every scenario.
pub(crate) const ALL: &[Scenario] = &[
    throughput::SCENARIO,
    sustained::SCENARIO,
    duplicates::SCENARIO,
    growth::SCENARIO,
    memory::SCENARIO,
    restart::SCENARIO,
];
