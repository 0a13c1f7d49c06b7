//! The seam to metrics: outcomes and latencies, never a key in a label. Exporting them is the binary's.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::message::key::Scope;
use crate::observe::status::BreakerState;

/// Takes what the pipeline counts. Called on the hot path: must not block.
pub trait IdempotencyMetrics: Send + Sync + 'static {
    /// A message ended as `outcome` (one of [`OUTCOMES`]), `elapsed_us` microseconds
    /// after it was accepted.
    fn ended(&self, scope: &Scope, outcome: &'static str, elapsed_us: u64);
    /// A run was thrown away because something it read had changed.
    fn conflict(&self, scope: &Scope);
    /// A terminal record was looked for in the cache.
    fn cache(&self, scope: &Scope, hit: bool);
    /// The circuit breaker `name` stands so from now on.
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

/// Every outcome there is, in the order they are printed.
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
    /// Runs thrown away.
    pub conflicts: u64,
    /// Terminal records found in the cache.
    pub cache_hits: u64,
    /// Records looked for in the store.
    pub cache_misses: u64,
    /// How often circuit breakers have opened.
    pub breaker_opened: u64,
}

impl Counters {
    /// The counts so far.
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
