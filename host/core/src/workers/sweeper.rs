//! Has a store forget expired records, in the background. Decides only on the time.

use std::sync::Arc;

use tokio::sync::watch;

use crate::store::IdempotencyStorage;
use crate::support::clock::Clock;
use crate::support::error::StoreError;

/// Interval between two sweeps, in milliseconds; the shortest window of a store is a minute.
pub const SWEEP_EVERY_MS: u64 = 60_000;

/// Sweeps every `every_ms` until `stop` turns true; the first time at once. Must run inside a tokio
/// runtime with a pool of blocking threads: a sweep may block for as long as a transaction.
pub async fn run_sweeper(
    storage: Arc<dyn IdempotencyStorage>,
    clock: Arc<dyn Clock>,
    every_ms: u64,
    mut stop: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    loop {
        let now_ms = clock.now_ms();
        let store = storage.clone();
        let swept = tokio::task::spawn_blocking(move || futures_executor::block_on(store.sweep(now_ms)));
        let swept = swept.await.unwrap_or_else(|died| match died.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends: no sweep is needed any more.
            Err(_) => Ok(0),
        })?;
        if swept > 0 {
            tracing::info!("retention: {swept} records have expired and are gone");
        }
        tokio::select! {
            () = clock.sleep(every_ms) => {}
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}
