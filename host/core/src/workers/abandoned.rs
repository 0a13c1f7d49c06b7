//! The worker of abandoned messages: gives up those that have begun and were never delivered again,
//! when no delivery of them is to be expected any more. `pipeline/give_up.rs` says what becomes of
//! them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::message::key::Scope;
use crate::pipeline::IdempotentConsumer;
use crate::store::Store;
use crate::store::unfinished::{UnfinishedEntry, unfinished_between};
use crate::support::clock::Clock;
use crate::support::error::StoreError;

/// Interval between two searches, in milliseconds.
const SEARCH_EVERY_MS: u64 = 60_000;
/// Messages read from the index at one time.
const PAGE: usize = 1_000;

/// The parts of the worker.
pub struct AbandonedParts {
    /// Any scope of the tenant whose messages these are.
    pub scope: Scope,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The source of time.
    pub clock: Arc<dyn Clock>,
    /// The processors that are at work here; messages of others stay.
    pub consumers: Vec<IdempotentConsumer>,
}

/// Gives up abandoned messages until `stop` turns true; the first time at once.
pub async fn run_abandoned(parts: AbandonedParts, mut stop: watch::Receiver<bool>) -> Result<(), StoreError> {
    let by_name = |consumer: &IdempotentConsumer| (consumer.scope().processor.clone(), consumer.clone());
    let consumers: BTreeMap<_, _> = parts.consumers.iter().map(by_name).collect();
    loop {
        let given_up = search(&parts, &consumers).await?;
        if given_up > 0 {
            tracing::warn!("{given_up} messages were given up: they had begun, and no delivery of them came any more");
        }
        tokio::select! {
            () = parts.clock.sleep(SEARCH_EVERY_MS) => {}
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

/// Gives up the messages that are abandoned now. Returns their number.
async fn search(
    parts: &AbandonedParts,
    consumers: &BTreeMap<Arc<str>, IdempotentConsumer>,
) -> Result<usize, StoreError> {
    let now_ms = parts.clock.now_ms();
    let shortest_ms = consumers.values().map(|consumer| consumer.options().redelivery_horizon_ms).min();
    let before_ms = now_ms.saturating_sub(shortest_ms.unwrap_or(u64::MAX));
    let over = search_between(parts, consumers, 0, before_ms).await?;
    // Times that a clock wrote which was ahead.
    let latest_ms = consumers.values().map(IdempotentConsumer::latest_ms).min().unwrap_or(u64::MAX);
    Ok(over + search_between(parts, consumers, latest_ms, u64::MAX).await?)
}

/// Gives up the messages of a range of the index that are abandoned now.
async fn search_between(
    parts: &AbandonedParts,
    consumers: &BTreeMap<Arc<str>, IdempotentConsumer>,
    from_ms: u64,
    before_ms: u64,
) -> Result<usize, StoreError> {
    let now_ms = parts.clock.now_ms();
    let (mut given_up, mut last) = (0, None);
    loop {
        let page = unfinished_between(&*parts.store, &parts.scope, (from_ms, before_ms), last.as_ref(), PAGE).await?;
        for entry in &page {
            let UnfinishedEntry { message, when_ms } = entry;
            let Some(consumer) = consumers.get(&message.record.scope.processor) else { continue };
            let is_over = when_ms.saturating_add(consumer.options().redelivery_horizon_ms) < now_ms;
            if is_over || *when_ms > consumer.latest_ms() {
                given_up += usize::from(consumer.give_up(entry, &*parts.store).await?);
            }
        }
        if page.len() < PAGE {
            return Ok(given_up);
        }
        last = page.into_iter().last();
    }
}
