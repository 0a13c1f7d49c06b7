//! The keeper: brings messages that the store keeps to their ends. Those that were redriven run at once; those that are parked
//! run when the one before them has ended, and by policy when their time is over. Which may go is `kept.rs`; how is the pipeline's.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::HeldKey;
use crate::message::strategy::GapPolicy;
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::deferred::{COME_AGAIN_MS, Deferred, DeferredMessage, Due};
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::outcome::Outcome;
use crate::store::Inspect;
use crate::store::commit::{Commit, HeldChange};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::support::error::StoreError;
use crate::workers::source::{Observer, Report};

/// Kept messages on their way at one time.
const AT_ONCE: usize = 64;
/// Kept messages read from the store at one time.
const PAGE: usize = 256;

/// Runs what the store keeps for `consumer`, until `stop` turns true; then brings what may run at once to its end.
/// `observer` is told of every ending.
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
        let (due, later) = consumer.kept().due(now_ms, AT_ONCE - under_way.len());
        for due in due {
            under_way.spawn(bring_to_its_end(consumer.clone(), store.clone(), observer.clone(), due));
        }
        if stopping && under_way.is_empty() {
            return Ok(());
        }
        let next_ms = later.map_or(u64::MAX, |due_ms| due_ms.saturating_sub(now_ms).max(1));
        let may_sleep = !stopping && next_ms < u64::MAX && under_way.len() < AT_ONCE;
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop), if !stopping => stopping = true,
            () = consumer.kept().changed.notified() => {}
            Some(ended) = under_way.join_next() => joined(ended)?,
            // Asked for when it is waited for only: a clock that a test turns has slept at once.
            () = async { consumer.clock().sleep(next_ms).await }, if may_sleep => {}
        }
    }
}

fn joined(ended: Result<Result<(), StoreError>, tokio::task::JoinError>) -> Result<(), StoreError> {
    ended.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => Ok(()),
    })
}

/// Reads which messages the store keeps for the consumer.
async fn load(consumer: &IdempotentConsumer, store: &dyn Inspect) -> Result<(), StoreError> {
    let processor = consumer.scope().processor.clone();
    let mut after = None;
    loop {
        let page = store.held_messages(Some(&processor), after.as_ref(), PAGE).await?;
        consumer.found(&page).await?;
        match page.into_iter().last() {
            Some((key, _)) => after = Some(key),
            None => return Ok(()),
        }
    }
}

async fn bring_to_its_end(
    consumer: IdempotentConsumer,
    store: Arc<dyn Inspect>,
    observer: Arc<dyn Observer>,
    due: Due,
) -> Result<(), StoreError> {
    let held_messages = store.held_under(&due.key.record).await?;
    let held_message =
        held_messages.into_iter().find(|held_message| held_message.fingerprint.digest == due.key.fingerprint);
    // It may have been delivered again meanwhile and have ended, or an operator has discarded it.
    let Some(held_message) = held_message.filter(|held_message| held_message.hold_reason != HoldReason::Dead) else {
        consumer.kept().ended(&due.key, None);
        return Ok(());
    };
    let message = held_message.message.clone();
    match run_again(&consumer, &due, held_message).await? {
        Outcome::Retry { after_ms, .. } | Outcome::InFlight { after_ms } | Outcome::Paused { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(COME_AGAIN_MS));
            consumer.kept().ended(&due.key, Some(again_ms));
        }
        Outcome::Parked { .. } => consumer.kept().waits(&due.key),
        ended => {
            observer.ended(Report::Ended { message: &message, outcome: &ended });
            consumer.kept().ended(&due.key, None);
        }
    }
    Ok(())
}

/// Runs a kept message, or gives it up. One that the strategy knows by another name now than when it was kept is kept under the
/// old one no longer.
async fn run_again(consumer: &IdempotentConsumer, due: &Due, held_message: HeldMessage) -> Result<Outcome, StoreError> {
    let policy = consumer.options().strategy.gaps().map(|gaps| gaps.then);
    if due.timed_out && policy == Some(GapPolicy::HeldMessage) {
        return consumer.give_up_parked(held_message).await;
    }
    let fingerprint = held_message.fingerprint;
    let accepted = consumer.accept_kept(held_message, due.timed_out);
    let renamed = accepted.identity.held_key() != due.key;
    let outcome = consumer.process(accepted).await?;
    let again = matches!(outcome, Outcome::Retry { .. } | Outcome::InFlight { .. } | Outcome::Paused { .. });
    if renamed && !again {
        consumer.kept_no_longer(&due.key, fingerprint).await?;
        consumer.kept().ended(&due.key, None);
    }
    Ok(outcome)
}

impl IdempotentConsumer {
    /// Takes a message that the store keeps, as [`Self::accept`] one that was delivered.
    pub(crate) fn accept_kept(&self, held_message: HeldMessage, past_gap: bool) -> Accepted {
        let mut accepted = self.accept(held_message.message, Handling::default());
        (accepted.kept, accepted.past_gap) = (true, past_gap);
        accepted
    }

    /// A parked message's time is over: it becomes a dead letter, unless it may run after all.
    pub(crate) async fn give_up_parked(&self, held_message: HeldMessage) -> Result<Outcome, StoreError> {
        let error = format!("{} and its time was over", held_message.error);
        let accepted = self.accept_kept(held_message, false);
        let held = self.hold(&accepted.identity.record).await;
        if self.inner.is_early(&accepted.identity).await? {
            self.inner.keep(&accepted, HoldReason::Dead, error.clone()).await?;
            return Ok(Outcome::DeadLettered { error });
        }
        drop(held);
        self.process(accepted).await
    }

    /// A message that was kept under this key has ended, under this or another one: it is kept here no longer. Its identity
    /// changes with the processor's strategy.
    pub(crate) async fn kept_no_longer(&self, key: &HeldKey, fingerprint: Fingerprint) -> Result<(), StoreError> {
        let held_message = Some(HeldChange::Remove(fingerprint));
        let commit = Commit { held_message, at_ms: self.clock().now_ms(), ..Commit::of(&key.record) };
        self.inner.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Has messages run that an operator has redriven.
    pub(crate) fn redriven<'a>(&self, held_messages: impl IntoIterator<Item = &'a (HeldKey, HeldMessage)>) {
        self.inner
            .kept
            .redriven(held_messages.into_iter().map(|(key, held_message)| self.one_found(key, held_message, false)));
    }

    /// Has messages run that were found in the store: redriven ones at once, parked ones when their time has come.
    pub(crate) async fn found(&self, held_messages: &[(HeldKey, HeldMessage)]) -> Result<(), StoreError> {
        let mut found = Vec::with_capacity(held_messages.len());
        for (key, held_message) in held_messages {
            let early = match held_message.hold_reason {
                HoldReason::Parked { .. } => self.inner.is_early(&held_message.identity(key)).await?,
                HoldReason::Redriven | HoldReason::Dead => false,
            };
            found.push(self.one_found(key, held_message, early));
        }
        self.inner.kept.found(found);
        Ok(())
    }

    fn one_found<'a>(&self, key: &HeldKey, held_message: &'a HeldMessage, early: bool) -> DeferredMessage<'a> {
        let lane = self.options().ordering.key(&held_message.message).map(str::to_owned);
        DeferredMessage { key: key.clone(), held_message, lane, early }
    }

    /// What the store keeps for this consumer to run.
    pub(crate) fn kept(&self) -> &Deferred {
        &self.inner.kept
    }
}
