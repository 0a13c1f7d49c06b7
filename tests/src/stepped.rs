//! A clock that only a test turns: who sleeps sleeps until it was turned far enough. For tests in
//! which many messages wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::Clock;
use tokio::sync::watch;

/// Simulated time that stands still; cloning shares it.
#[derive(Debug, Clone)]
pub struct SteppedClock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    now_ms: AtomicU64,
    turned: watch::Sender<u64>,
    /// Tasks that sleep now.
    asleep: AtomicUsize,
}

/// Somebody who sleeps; dropping it wakes.
struct Asleep(Arc<Inner>);

impl Drop for Asleep {
    fn drop(&mut self) {
        self.0.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SteppedClock {
    /// A clock that shows `now_ms`.
    pub fn at(now_ms: u64) -> Self {
        let turned = watch::Sender::new(now_ms);
        Self(Arc::new(Inner { now_ms: now_ms.into(), turned, asleep: AtomicUsize::new(0) }))
    }

    /// Turns it forward; who has slept long enough wakes.
    pub fn advance(&self, by_ms: u64) {
        let now_ms = self.0.now_ms.fetch_add(by_ms, Ordering::SeqCst) + by_ms;
        self.0.turned.send_replace(now_ms);
    }

    /// Has it show `now_ms`, and wakes nobody: whoever sleeps stands still, as a process does that
    /// was paused.
    pub fn leap(&self, now_ms: u64) {
        self.0.now_ms.store(now_ms, Ordering::SeqCst);
    }

    /// Returns the number of tasks that sleep now.
    pub fn asleep(&self) -> usize {
        self.0.asleep.load(Ordering::SeqCst)
    }
}

impl Clock for SteppedClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms.load(Ordering::SeqCst)
    }

    fn sleep(&self, delay_ms: u64) -> BoxFuture<'static, ()> {
        let until_ms = self.now_ms().saturating_add(delay_ms);
        let (inner, mut turned) = (self.0.clone(), self.0.turned.subscribe());
        Box::pin(async move {
            inner.asleep.fetch_add(1, Ordering::SeqCst);
            let _asleep = Asleep(inner);
            let _ = turned.wait_for(|now_ms| *now_ms >= until_ms).await;
        })
    }
}

/// Lets every task of this thread that can go on do so: what has not happened then waits for
/// something.
pub async fn let_others_run() {
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
}

/// Waits until something that is under way has come about. Panics if it has not in half a minute.
pub async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = std::time::Instant::now();
    while !is_so() {
        assert!(since.elapsed().as_secs() < 30, "waited in vain: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}
