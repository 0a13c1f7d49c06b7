//! The status of a consumer and of its circuit breaker, as people and metrics see them. Plain data.

use serde::{Deserialize, Serialize};

/// A consumer as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsumerStatus {
    /// Messages that run, or whose commit is on its way.
    pub runs_under_way: usize,
    /// At most.
    pub runs_max: usize,
    /// Messages that are parked or redriven.
    pub waiting: usize,
    /// The circuit breaker, where there is one.
    pub breaker: Option<BreakerStatus>,
}

/// A breaker as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BreakerStatus {
    /// Where it stands.
    #[serde(flatten)]
    pub state: BreakerState,
    /// Calls in its window; none where it is not closed.
    pub calls: u32,
    /// How many of them failed.
    pub failed: u32,
    /// How many of them were slow.
    pub slow: u32,
    /// How often it has opened since the host was started.
    pub opened: u64,
}

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum BreakerState {
    /// Everything is called.
    Closed,
    /// Nothing is called.
    Open {
        /// Until then, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
    /// A few calls are let through, to see how they go.
    HalfOpen,
}

impl BreakerState {
    /// Its name, as status and metrics print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen => "half-open",
        }
    }
}
