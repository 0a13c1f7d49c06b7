//! The engine's heartbeat: a thread of its own that moves wasmtime's epoch, so that a guest in a
//! loop is stopped even when every other thread is busy running guests. Keeps no business time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Ticks since the start, measured and not counted: a late thread does not lengthen a deadline.
#[derive(Clone)]
pub(crate) struct Ticks {
    passed: Arc<AtomicU64>,
    tick: Duration,
}

/// A moment in ticks.
pub(crate) struct Deadline(u64);

impl Ticks {
    /// The moment `after` from now; never early, late by a tick or two.
    pub(crate) fn deadline(&self, after: Duration) -> Deadline {
        let allowed = u64::try_from(after.as_nanos().div_ceil(self.tick.as_nanos())).unwrap_or(u64::MAX);
        Deadline(self.passed.load(Ordering::Relaxed).saturating_add(allowed))
    }
}

impl Deadline {
    pub(crate) fn is_over(&self, ticks: &Ticks) -> bool {
        ticks.passed.load(Ordering::Relaxed) > self.0
    }
}

/// Runs until it is dropped.
pub(crate) struct Ticker {
    ticks: Ticks,
    /// Dropped to stop the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    pub(crate) fn start(engine: wasmtime::Engine, tick: Duration) -> std::io::Result<Self> {
        let passed = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = channel();
        let count = Arc::clone(&passed);
        let thread = std::thread::Builder::new()
            .name("hapax-epoch".into())
            .spawn(move || beat(&engine, &count, tick, &stopped))?;
        Ok(Self { ticks: Ticks { passed, tick }, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the counter of the deadlines' ticks, which stops once the ticker is dropped.
    pub(crate) fn ticks(&self) -> Ticks {
        self.ticks.clone()
    }
}

fn beat(engine: &wasmtime::Engine, ticks: &AtomicU64, tick: Duration, stopped: &Receiver<()>) {
    let start = Instant::now();
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(tick) {
        let passed = start.elapsed().as_nanos() / tick.as_nanos();
        ticks.store(u64::try_from(passed).unwrap_or(u64::MAX), Ordering::Relaxed);
        engine.increment_epoch();
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread holds nothing that can fail; a panic there has nowhere to go from here.
            let _ = thread.join();
        }
    }
}
