//! The status of a consumer and of its circuit breaker, as people and metrics see them. Plain data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Status of a consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsumerStatus {
    /// Messages that run, or whose commit is under way.
    pub runs_under_way: usize,
    /// Maximum of `runs_under_way`.
    pub runs_max: usize,
    /// Messages that are parked or redriven.
    pub waiting: usize,
    /// Status of the circuit breaker, where there is one.
    pub breaker: Option<BreakerStatus>,
}

/// Reason why the outbox is not sent at present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OutboxTrouble {
    /// Last error, for people; names the destination and the message.
    pub reason: Arc<str>,
    /// Set if time alone does not help: the address or the rights to it are wrong.
    pub is_misconfigured: bool,
    /// Time of the first failure since something was sent, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Number of failures since then.
    pub failures: u64,
}

/// Status of a circuit breaker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BreakerStatus {
    /// State of the breaker.
    #[serde(flatten)]
    pub state: BreakerState,
    /// Calls in the breaker's window; none where it is not closed.
    pub calls: u32,
    /// Number of those calls that failed.
    pub failed: u32,
    /// Number of those calls that were slow.
    pub slow: u32,
    /// Number of times that the breaker has opened since the host was started.
    pub opened: u64,
}

/// State of a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum BreakerState {
    /// All calls pass.
    Closed,
    /// No call passes.
    Open {
        /// End of this state, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
    /// A few calls pass, to test the other side.
    HalfOpen,
}

impl BreakerState {
    /// Returns the state's name, as status and metrics print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen => "half-open",
        }
    }
}
