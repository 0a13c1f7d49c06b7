//! What a host says of itself: metrics.

pub(crate) mod metrics;
pub(crate) mod status;
