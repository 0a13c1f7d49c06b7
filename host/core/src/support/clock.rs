//! The only source of time. Nothing else in the host asks the operating system what time it is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;

/// Time, in milliseconds since the Unix epoch.
pub trait Clock: Send + Sync + 'static {
    /// Returns the current time.
    fn now_ms(&self) -> u64;
    /// Completes `delay_ms` from now.
    fn sleep(&self, delay_ms: u64) -> BoxFuture<'static, ()>;
}

/// The machine's clock. `sleep` must be awaited inside a tokio runtime.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        // Before 1970 the clock is wrong; 0 is as good an answer as any.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }

    fn sleep(&self, delay_ms: u64) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(Duration::from_millis(delay_ms)))
    }
}
