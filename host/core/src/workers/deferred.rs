//! The keeper: brings messages that the store keeps to their ends. Those that were redriven run at once; those that are parked
//! run when the one before them has ended, and by policy when their time is over. Which may go is `kept.rs`; how is the pipeline's.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::pipeline::{Accepted, Handling, IdempotentConsumer};
use crate::pipeline::outcome::Ending;
use crate::pipeline::deferred::{COME_AGAIN_MS, Due, Found, Kept};
use crate::message::key::Fingerprint;
use crate::workers::source::{Observer, Report};
use crate::store::{Commit, DeadLetter, Inspect, LetterChange, LetterKey, Standing, StoreError};
use crate::message::strategy::{GapPolicy, Identity};

/// Kept messages on their way at one time.
const AT_ONCE: usize = 64;
/// Kept messages read from the store at one time.
const PAGE: usize = 256;

/// Runs what the store keeps for `consumer`, until `stop` turns true; then brings what may run at once to its end.
/// `observer` is told of every ending.
pub async fn run(
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
        let page = store.letters(Some(&processor), after.as_ref(), PAGE).await?;
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
    let letters = store.dead_letters(&due.key.record).await?;
    let letter = letters.into_iter().find(|letter| letter.fingerprint.digest == due.key.fingerprint);
    // It may have been delivered again meanwhile and have ended, or an operator has discarded it.
    let Some(letter) = letter.filter(|letter| letter.standing != Standing::Dead) else {
        consumer.kept().ended(&due.key, None);
        return Ok(());
    };
    let message = letter.message.clone();
    match run_again(&consumer, &due, letter).await? {
        Ending::Retry { after_ms, .. } | Ending::InFlight { after_ms } | Ending::Paused { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(COME_AGAIN_MS));
            consumer.kept().ended(&due.key, Some(again_ms));
        }
        Ending::Parked { .. } => consumer.kept().waits(&due.key),
        ended => {
            observer.ended(Report::Ended { message: &message, ending: &ended });
            consumer.kept().ended(&due.key, None);
        }
    }
    Ok(())
}

/// Runs a kept message, or gives it up. One that the strategy knows by another name now than when it was kept is kept under the
/// old one no longer.
async fn run_again(consumer: &IdempotentConsumer, due: &Due, letter: DeadLetter) -> Result<Ending, StoreError> {
    let policy = consumer.options().strategy.gaps().map(|gaps| gaps.then);
    if due.timed_out && policy == Some(GapPolicy::DeadLetter) {
        return consumer.give_up_parked(letter).await;
    }
    let fingerprint = letter.fingerprint;
    let accepted = consumer.accept_kept(letter, due.timed_out);
    let renamed = accepted.identity.letter_key() != due.key;
    let ending = consumer.process(accepted).await?;
    let again = matches!(ending, Ending::Retry { .. } | Ending::InFlight { .. } | Ending::Paused { .. });
    if renamed && !again {
        consumer.kept_no_longer(&due.key, fingerprint).await?;
        consumer.kept().ended(&due.key, None);
    }
    Ok(ending)
}

impl IdempotentConsumer {
    /// Takes a message that the store keeps, as [`Self::accept`] one that was delivered.
    pub(crate) fn accept_kept(&self, letter: DeadLetter, past_gap: bool) -> Accepted {
        let mut accepted = self.accept(letter.message, Handling::default());
        (accepted.kept, accepted.past_gap) = (true, past_gap);
        accepted
    }

    /// A parked message's time is over: it becomes a dead letter, unless it may run after all.
    pub(crate) async fn give_up_parked(&self, letter: DeadLetter) -> Result<Ending, StoreError> {
        let error = format!("{} and its time was over", letter.error);
        let accepted = self.accept_kept(letter, false);
        let held = self.hold(&accepted.identity.record).await;
        if self.inner.is_early(&accepted.identity).await? {
            self.inner.keep(&accepted, Standing::Dead, error.clone()).await?;
            return Ok(Ending::DeadLettered { error });
        }
        drop(held);
        self.process(accepted).await
    }

    /// A message that was kept under this key has ended, under this or another one: it is kept here no longer. Its identity
    /// changes with the processor's strategy.
    pub(crate) async fn kept_no_longer(&self, key: &LetterKey, fingerprint: Fingerprint) -> Result<(), StoreError> {
        let letter = Some(LetterChange::Remove(fingerprint));
        let commit = Commit { letter, at_ms: self.clock().now_ms(), ..Commit::of(&key.record) };
        self.inner.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Has messages run that an operator has redriven.
    pub(crate) fn redriven<'a>(&self, letters: impl IntoIterator<Item = &'a (LetterKey, DeadLetter)>) {
        self.inner.kept.redriven(letters.into_iter().map(|(key, letter)| self.one_found(key, letter, false)));
    }

    /// Has messages run that were found in the store: redriven ones at once, parked ones when their time has come.
    pub(crate) async fn found(&self, letters: &[(LetterKey, DeadLetter)]) -> Result<(), StoreError> {
        let mut found = Vec::with_capacity(letters.len());
        for (key, letter) in letters {
            let early = match letter.standing {
                Standing::Parked { .. } => self.inner.is_early(&Identity::kept(key, letter)).await?,
                Standing::Redriven | Standing::Dead => false,
            };
            found.push(self.one_found(key, letter, early));
        }
        self.inner.kept.found(found);
        Ok(())
    }

    fn one_found<'a>(&self, key: &LetterKey, letter: &'a DeadLetter, early: bool) -> Found<'a> {
        let lane = self.options().ordering.key(&letter.message).map(str::to_owned);
        Found { key: key.clone(), letter, lane, early }
    }

    /// What the store keeps for this consumer to run.
    pub(crate) fn kept(&self) -> &Kept {
        &self.inner.kept
    }
}
