//! The engine's heartbeat: a thread of its own that moves wasmtime's epoch, so that a guest in a loop is stopped even
//! when every other thread is busy running guests. Keeps no business time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Runs until it is dropped.
pub(crate) struct Ticker {
    /// Ticks since the start, measured and not counted: a late thread does not lengthen a deadline.
    ticks: Arc<AtomicU64>,
    tick: Duration,
    /// Dropped to stop the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    pub(crate) fn start(engine: wasmtime::Engine, tick: Duration) -> std::io::Result<Self> {
        let ticks = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = channel();
        let count = Arc::clone(&ticks);
        let thread = std::thread::Builder::new()
            .name("hapax-epoch".into())
            .spawn(move || beat(&engine, &count, tick, &stopped))?;
        Ok(Self { ticks, tick, stop: Some(stop), thread: Some(thread) })
    }

    /// A clock that says whether `deadline` from now has passed; never early, late by a tick or two.
    pub(crate) fn deadline(&self, deadline: Duration) -> impl Fn() -> bool + Send + Sync + 'static {
        let ticks = Arc::clone(&self.ticks);
        let allowed = deadline.as_nanos().div_ceil(self.tick.as_nanos());
        let end = ticks.load(Ordering::Relaxed).saturating_add(u64::try_from(allowed).unwrap_or(u64::MAX));
        move || ticks.load(Ordering::Relaxed) > end
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
