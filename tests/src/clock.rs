//! A clock that a test turns. Nothing waits on it: who sleeps has slept at once, and the clock
//! shows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::{BoxFuture, pending, ready};
use hapax_core::Clock;

/// Simulated time; cloning shares it. For tests that run one message at a time.
#[derive(Debug, Clone)]
pub struct SimulatedClock(Arc<AtomicU64>);

impl SimulatedClock {
    /// A clock that shows `now_ms`.
    pub fn at(now_ms: u64) -> Self {
        Self(Arc::new(AtomicU64::new(now_ms)))
    }

    /// Turns it forward.
    pub fn advance(&self, by_ms: u64) {
        self.0.fetch_add(by_ms, Ordering::SeqCst);
    }

    /// Sets it, also back.
    pub fn set(&self, now_ms: u64) {
        self.0.store(now_ms, Ordering::SeqCst);
    }
}

impl Clock for SimulatedClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn sleep(&self, delay_ms: u64) -> BoxFuture<'static, ()> {
        self.advance(delay_ms);
        Box::pin(ready(()))
    }
}

/// Time that advances only when a test turns it: until then, sleepers sleep for ever.
#[derive(Debug, Clone)]
pub struct StillClock(Arc<AtomicU64>);

impl StillClock {
    /// A clock that shows `now_ms`.
    pub fn at(now_ms: u64) -> Self {
        Self(Arc::new(AtomicU64::new(now_ms)))
    }

    /// Sets it.
    pub fn set(&self, now_ms: u64) {
        self.0.store(now_ms, Ordering::SeqCst);
    }
}

impl Clock for StillClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn sleep(&self, _: u64) -> BoxFuture<'static, ()> {
        Box::pin(pending())
    }
}
