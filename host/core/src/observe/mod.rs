//! Metrics and status that a host reports.

pub(crate) mod metrics;
pub(crate) mod status;
