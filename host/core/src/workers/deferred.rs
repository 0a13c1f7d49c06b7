//! The worker of deferred messages: brings messages that the store holds to their outcomes.
//! Redriven messages run at once; parked ones run when the message before them has ended, and by
//! policy when their wait is over. `pipeline/deferred.rs` says which of them may run.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::message::identity::HeldKey;
use crate::message::strategy::GapPolicy;
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::deferred::{Due, RETRY_AFTER_MS};
use crate::pipeline::outcome::Outcome;
use crate::store::Inspect;
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::support::error::StoreError;
use crate::workers::source::{Observer, Report, joined};

/// Deferred messages that run at one time.
const AT_ONCE: usize = 64;
/// Held messages read from the store at one time.
const PAGE: usize = 256;

/// Runs the messages that the store holds for `consumer`, until `stop` turns true; then finishes
/// those that may run at once. `observer` is notified of every outcome.
pub async fn run_deferred(
    consumer: IdempotentConsumer,
    store: Arc<dyn Inspect>,
    observer: Arc<dyn Observer>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    load(&consumer, &*store).await?;
    let mut under_way: JoinSet<Result<(), StoreError>> = JoinSet::new();
    let mut stopping = false;
    loop {
        let now_ms = consumer.clock().now_ms();
        let (due, later) = consumer.deferred().due(now_ms, AT_ONCE - under_way.len());
        for due in due {
            under_way.spawn(run_due(consumer.clone(), store.clone(), observer.clone(), due));
        }
        if stopping && under_way.is_empty() {
            return Ok(());
        }
        let next_ms = later.map_or(u64::MAX, |due_ms| due_ms.saturating_sub(now_ms).max(1));
        let may_sleep = !stopping && next_ms < u64::MAX && under_way.len() < AT_ONCE;
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop), if !stopping => stopping = true,
            () = consumer.deferred().changed.notified() => {}
            Some(ended) = under_way.join_next() => joined(ended)?,
            // Evaluated only when it is waited for: with a clock that a test turns, a sleep ends at
            // once.
            () = async { consumer.clock().sleep(next_ms).await }, if may_sleep => {}
        }
    }
}

/// Reads the messages that the store holds for the consumer.
async fn load(consumer: &IdempotentConsumer, store: &dyn Inspect) -> Result<(), StoreError> {
    let processor = consumer.scope().processor.clone();
    let mut after: Option<HeldKey> = None;
    loop {
        let page = store.held_messages(Some(&processor), after.as_ref(), PAGE).await?;
        consumer.defer(&page).await?;
        match page.into_iter().last() {
            Some((key, _)) => after = Some(key),
            None => return Ok(()),
        }
    }
}

/// Runs one message that is due.
async fn run_due(
    consumer: IdempotentConsumer,
    store: Arc<dyn Inspect>,
    observer: Arc<dyn Observer>,
    due: Due,
) -> Result<(), StoreError> {
    let held = store.held_under(&due.key.record).await?;
    let held = held.into_iter().find(|held| held.fingerprint.digest == due.key.fingerprint);
    // It may have been delivered again and have ended meanwhile, or an operator has discarded it.
    let Some(held) = held.filter(|held| held.hold_reason != HoldReason::Dead) else {
        consumer.deferred().ended(&due.key, None);
        return Ok(());
    };
    let message = held.message.clone();
    match run_held(&consumer, &due, held).await? {
        Outcome::Retry { after_ms, .. } | Outcome::InFlight { after_ms } | Outcome::Paused { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(RETRY_AFTER_MS));
            consumer.deferred().ended(&due.key, Some(again_ms));
        }
        Outcome::Parked { .. } => consumer.deferred().waits(&due.key),
        outcome => {
            observer.ended(Report::Ended { message: &message, outcome: &outcome });
            consumer.deferred().ended(&due.key, None);
        }
    }
    Ok(())
}

/// Runs a held message, or gives it up if its wait is over and the policy says so.
async fn run_held(consumer: &IdempotentConsumer, due: &Due, held: HeldMessage) -> Result<Outcome, StoreError> {
    let policy = consumer.options().strategy.gaps().map(|gaps| gaps.then);
    let is_given_up = due.timed_out && policy == Some(GapPolicy::DeadLetter);
    let (fingerprint, error) = (held.fingerprint, held.error.clone());
    let accepted = consumer.accept_held(held, due.timed_out && !is_given_up);
    // The strategy, or the rule of fingerprints, may have been changed since the message was held,
    // and give it another key now.
    let has_another_key = accepted.identity.held_key() != due.key;
    let outcome =
        if is_given_up { consumer.give_up_parked(accepted, &error).await? } else { consumer.process(accepted).await? };
    if has_another_key && outcome.is_settled() {
        consumer.release_key(&due.key, fingerprint).await?;
        consumer.deferred().ended(&due.key, None);
    }
    Ok(outcome)
}
