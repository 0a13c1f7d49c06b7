//! Held messages: a message that does not run now is held in the store, as a dead letter or parked,
//! and is removed from there when it ends.

use std::sync::Arc;

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::{HeldKey, Identity};
use crate::pipeline::admission::{Admission, Decision};
use crate::pipeline::commit_builder::CommitBuilder;
use crate::pipeline::deferred::{Deferred, DeferredMessage};
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::options::MismatchPolicy;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::{IdempotentConsumer, Parts};
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::support::error::StoreError;
use crate::support::fault;

/// Holds and releases the messages of one consumer.
pub(super) struct Hold {
    parts: Arc<Parts>,
    /// Digest of the component.
    component: Arc<str>,
    /// Held messages that this consumer is to run.
    pub(super) deferred: Deferred,
}

/// The end of an attempt to park a message.
pub(super) enum Parked {
    /// The message is parked, or put off because too many are.
    Ended(Outcome),
    /// The message that it waited for has ended meanwhile: admit it again.
    MayRun,
}

impl Hold {
    pub(super) fn new(parts: Arc<Parts>, component: Arc<str>) -> Self {
        let park_ms = parts.options.strategy.gaps().map_or(u64::MAX, |gaps| gaps.timeout_ms);
        let deferred = Deferred::new(parts.options.held_max, parts.options.longest_delay_ms(), park_ms);
        Self { parts, component, deferred }
    }

    /// Ends a message whose key was used with another body. The record stays byte for byte as it
    /// is.
    pub(super) async fn mismatch(&self, message: &Accepted) -> Result<Outcome, StoreError> {
        let error = "the idempotency key was used before with another body; give the message a key of its own";
        tracing::error!(key = %message.identity.message_key, "mismatch: {error}");
        if self.parts.options.mismatch == MismatchPolicy::DeadLetter || message.is_held {
            self.hold(message, HoldReason::Dead, error.to_owned()).await?;
        }
        Ok(Outcome::Mismatch)
    }

    /// Ends a message that the strategy cannot identify. It is held and never runs.
    pub(super) async fn refuse(&self, message: &Accepted, reason: String) -> Result<Outcome, StoreError> {
        let error = format!("invalid: {reason}");
        self.hold(message, HoldReason::Dead, error.clone()).await?;
        Ok(Outcome::DeadLettered { error })
    }

    /// Holds a message that does not run. Its record, if there is one, stays byte for byte as it
    /// is.
    pub(super) async fn hold(&self, message: &Accepted, reason: HoldReason, error: String) -> Result<(), StoreError> {
        let builder = self.builder(message);
        let held = builder.held_message(reason, error, 0);
        let record =
            if fault::mutated("record-goes-with-what-is-kept") { RecordChange::Remove } else { RecordChange::Keep };
        let mut commit =
            Commit { record, held_message: Some(HeldChange::Put(Box::new(held))), ..builder.empty_commit() };
        self.stamp(&mut commit);
        self.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Parks a message until the version `awaits` has ended.
    pub(super) async fn park(
        &self,
        admission: &Admission,
        message: &Accepted,
        awaits: u64,
    ) -> Result<Parked, StoreError> {
        let Some(gaps) = self.parts.options.strategy.gaps() else { return Ok(Parked::MayRun) };
        let identity = &message.identity;
        let now_ms = self.parts.clock.now_ms();
        // The same time as before, if the message is parked already.
        let until_ms = match self.deferred.park(identity, now_ms, now_ms.saturating_add(gaps.timeout_ms)) {
            Ok(until_ms) => until_ms,
            Err(full) => return Ok(Parked::Ended(full)),
        };
        let error = format!("waits for version {awaits}");
        self.hold(message, HoldReason::Parked { awaits, until_ms }, error).await?;
        // The awaited message may have ended during that commit. If it ended before the commit, it
        // is seen here; if after, it finds this message among the deferred ones.
        if admission.awaits_another(identity).await? {
            return Ok(Parked::Ended(Outcome::Parked { awaits, until_ms }));
        }
        // Another owner may have written the record: the cached one would give the same answer
        // again.
        admission.forget(&identity.record);
        Ok(Parked::MayRun)
    }

    /// Returns whether the store may still hold a message that has ended without a run.
    pub(super) fn may_hold(&self, message: &Accepted, outcome: &Outcome) -> bool {
        let over = matches!(outcome, Outcome::Duplicate(_) | Outcome::Stale);
        over && (message.is_held || self.deferred.holds(&message.identity))
    }

    /// Releases a held message that has ended without a run.
    pub(super) async fn release(&self, admission: &Admission, message: &Accepted) -> Result<(), StoreError> {
        let Identity { record, fingerprint, .. } = &message.identity;
        // The answer may have come from the cache and be late: an operator may have had the message
        // redriven since.
        let found = self.parts.storage.record(record).await?;
        let identity = admission.identity_as_of(found.as_ref(), message);
        let decision = admission.decision(found.as_ref(), &identity, None).await?;
        if !matches!(decision, Decision::Replay(_) | Decision::Stale) {
            return Ok(());
        }
        let commit = Commit {
            expected: Expected::of(found.map(|record| record.epoch)),
            held_message: Some(HeldChange::Remove(*fingerprint)),
            ..self.builder(message).empty_commit()
        };
        self.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Gives a message that `commit` holds its time, which orders held messages.
    pub(super) fn stamp(&self, commit: &mut Commit) {
        if let Some(HeldChange::Put(held)) = &mut commit.held_message {
            held.at_ms = self.deferred.time(held.at_ms);
        }
    }

    fn builder<'a>(&'a self, message: &'a Accepted) -> CommitBuilder<'a> {
        CommitBuilder::new(&self.parts, &self.component, message)
    }
}

impl IdempotentConsumer {
    /// Accepts a held message, as [`accept`](Self::accept) accepts one that was delivered. It waits
    /// for nothing here, neither for its retry nor for another owner: it has one of few places.
    pub(crate) fn accept_held(&self, held: HeldMessage, past_gap: bool) -> Accepted {
        let waits = fault::mutated("held-message-waits-in-its-place");
        let mut accepted = self.accept(held.message, Handling { wait_in_flight: waits, retry_here: waits });
        (accepted.is_held, accepted.past_gap) = (true, past_gap);
        accepted
    }

    /// Ends a parked message whose wait is over: it becomes a dead letter, unless it may run after
    /// all.
    pub(crate) async fn give_up_parked(&self, accepted: Accepted, error: &str) -> Result<Outcome, StoreError> {
        let error = format!("{error} and its time was over");
        let record_hold = self.hold_record(&accepted.identity.record).await;
        if self.pipeline.admission.awaits_another(&accepted.identity).await? {
            self.pipeline.hold.hold(&accepted, HoldReason::Dead, error.clone()).await?;
            return Ok(Outcome::DeadLettered { error });
        }
        drop(record_hold);
        self.process(accepted).await
    }

    /// Releases the message that is held under `key`: it has ended under another key.
    pub(crate) async fn release_key(&self, key: &HeldKey, fingerprint: Fingerprint) -> Result<(), StoreError> {
        let parts = &self.pipeline.parts;
        let held_message = Some(HeldChange::Remove(fingerprint));
        let commit = Commit { held_message, at_ms: parts.clock.now_ms(), ..Commit::of(&key.record) };
        parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Runs messages that an operator has redriven.
    pub(crate) fn run_redriven<'a>(&self, held: impl IntoIterator<Item = &'a (HeldKey, HeldMessage)>) {
        self.deferred().redriven(held.into_iter().map(|(key, held)| self.deferred_message(key, held, false)));
    }

    /// Defers messages that were found in the store: redriven ones run at once, parked ones when
    /// their time has come.
    pub(crate) async fn defer(&self, found: &[(HeldKey, HeldMessage)]) -> Result<(), StoreError> {
        let mut deferred = Vec::with_capacity(found.len());
        for (key, held) in found {
            let awaits_another = match held.hold_reason {
                HoldReason::Parked { .. } => self.pipeline.admission.awaits_another(&held.identity(key)).await?,
                HoldReason::Redriven | HoldReason::Dead => false,
            };
            deferred.push(self.deferred_message(key, held, awaits_another));
        }
        self.deferred().found(deferred);
        Ok(())
    }

    fn deferred_message<'a>(
        &self,
        key: &HeldKey,
        held_message: &'a HeldMessage,
        awaits_another: bool,
    ) -> DeferredMessage<'a> {
        let lane = self.options().ordering.key(&held_message.message).map(str::to_owned);
        DeferredMessage { key: key.clone(), held_message, lane, awaits_another }
    }
}
