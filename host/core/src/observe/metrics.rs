//! The seam to metrics: outcomes and latencies, never a key in a label. The binary exports them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::message::key::Scope;
use crate::observe::status::BreakerState;

/// Receives the pipeline's counts. Called on the hot path: must not block.
pub trait IdempotencyMetrics: Send + Sync + 'static {
    /// Counts a message that ended as `outcome` (one of [`OUTCOMES`]), `elapsed_us` microseconds
    /// after it was accepted.
    fn ended(&self, scope: &Scope, outcome: &'static str, elapsed_us: u64);
    /// Counts a run that was discarded because an entry that it read had changed.
    fn conflict(&self, scope: &Scope);
    /// Counts a lookup of a terminal record in the cache.
    fn cache(&self, scope: &Scope, hit: bool);
    /// Sets the state of the circuit breaker `name` from now on.
    fn breaker(&self, name: &str, state: BreakerState);
}

/// Plain counters, for summaries and tests.
#[derive(Debug, Default)]
pub struct Counters {
    outcomes: [AtomicU64; OUTCOMES.len()],
    conflicts: AtomicU64,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
    breaker_opened: AtomicU64,
}

/// All outcomes, in the order in which they are printed.
pub const OUTCOMES: [&str; 12] = [
    "completed",
    "duplicate",
    "mismatch",
    "stale",
    "parked",
    "dead-lettered",
    "compensating",
    "compensated",
    "compensation-failed",
    "retry",
    "in-flight",
    "paused",
];

/// A reading of [`Counters`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// Messages by outcome, in the order of [`OUTCOMES`].
    pub outcomes: Vec<(&'static str, u64)>,
    /// Runs that were discarded.
    pub conflicts: u64,
    /// Terminal records found in the cache.
    pub cache_hits: u64,
    /// Records looked for in the store.
    pub cache_misses: u64,
    /// Number of times that circuit breakers have opened.
    pub breaker_opened: u64,
}

impl Counters {
    /// Returns the counts so far.
    pub fn read(&self) -> Counted {
        Counted {
            outcomes: OUTCOMES.iter().zip(&self.outcomes).map(|(name, count)| (*name, count.load(Relaxed))).collect(),
            conflicts: self.conflicts.load(Relaxed),
            cache_hits: self.cache_hits.load(Relaxed),
            cache_misses: self.cache_misses.load(Relaxed),
            breaker_opened: self.breaker_opened.load(Relaxed),
        }
    }
}

impl IdempotencyMetrics for Counters {
    fn ended(&self, _: &Scope, outcome: &'static str, _: u64) {
        if let Some(at) = OUTCOMES.iter().position(|name| *name == outcome) {
            self.outcomes[at].fetch_add(1, Relaxed);
        }
    }

    fn conflict(&self, _: &Scope) {
        self.conflicts.fetch_add(1, Relaxed);
    }

    fn cache(&self, _: &Scope, hit: bool) {
        let counter = if hit { &self.cache_hits } else { &self.cache_misses };
        counter.fetch_add(1, Relaxed);
    }

    fn breaker(&self, _: &str, state: BreakerState) {
        if let BreakerState::Open { .. } = state {
            self.breaker_opened.fetch_add(1, Relaxed);
        }
    }
}
