//! What becomes of a message that does not run: answered by its record, refused, or kept for later. The straight line of those
//! that run is `consumer.rs`.

use crate::message::identity::Identity;
use crate::pipeline::admission::{Admission, decide};
use crate::pipeline::delivery::Accepted;
use crate::pipeline::options::MismatchPolicy;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::{Admitted, Inner};
use crate::record::Record;
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange};
use crate::store::feed::FeedEventKind;
use crate::store::held_message::HoldReason;
use crate::support::error::StoreError;
use crate::support::fault;

impl Inner {
    /// What a message gets that must not run, by the record that says so (`None`: there is none); `None` if it may.
    pub(crate) fn answer(&self, message: &Accepted, record: Option<&Record>) -> Option<Admitted> {
        let gaps = self.parts.options.strategy.gaps().filter(|_| !message.past_gap);
        let now_ms = self.parts.clock.now_ms();
        let outcome = match decide(record, &message.identity, gaps, self.owner(), now_ms) {
            Admission::Fresh => return None,
            Admission::Gap { awaits } => return Some(Admitted::Park { awaits }),
            Admission::Mismatch => return Some(Admitted::Mismatch),
            Admission::Replay(stored) => {
                self.note(message, FeedEventKind::Replayed, now_ms);
                Outcome::Duplicate(stored)
            }
            Admission::InFlight { after_ms } => Outcome::InFlight { after_ms },
            Admission::Stale => {
                self.note(message, FeedEventKind::Stale, now_ms);
                Outcome::Stale
            }
        };
        Some(Admitted::Ended(outcome))
    }

    fn owner(&self) -> &str {
        &self.parts.options.owner
    }

    /// Has the feed tell of a message that leaves nothing behind. Nobody waits for it, and no record is touched.
    fn note(&self, message: &Accepted, kind: FeedEventKind, now_ms: u64) {
        if !fault::mutated("replay-not-noted") {
            self.parts.committer.note(kind, &message.identity.record, now_ms);
        }
    }

    /// The key was used with another body. The record stays byte for byte as it is.
    pub(crate) async fn mismatch(&self, message: &Accepted) -> Result<Outcome, StoreError> {
        let error = "the idempotency key was used before with another body; give the message a key of its own";
        tracing::error!(key = %message.identity.message_key, "mismatch: {error}");
        if self.parts.options.mismatch == MismatchPolicy::HeldMessage || message.kept {
            self.keep(message, HoldReason::Dead, error.to_owned()).await?;
        }
        Ok(Outcome::Mismatch)
    }

    /// The strategy finds nothing to know the message by: it is kept, and never runs.
    pub(crate) async fn refuse(&self, message: &Accepted, reason: String) -> Result<Outcome, StoreError> {
        let error = format!("invalid: {reason}");
        self.keep(message, HoldReason::Dead, error.clone()).await?;
        Ok(Outcome::DeadLettered { error })
    }

    /// Keeps a message that does not run. Its record, if there is one, stays byte for byte as it is.
    pub(crate) async fn keep(
        &self,
        message: &Accepted,
        hold_reason: HoldReason,
        error: String,
    ) -> Result<(), StoreError> {
        let builder = self.builder(message);
        let held_message = builder.keep(hold_reason, error, 0);
        let record =
            if fault::mutated("record-goes-with-what-is-kept") { RecordChange::Remove } else { RecordChange::Keep };
        let mut commit =
            Commit { record, held_message: Some(HeldChange::Put(Box::new(held_message))), ..builder.commit() };
        self.stamp(&mut commit);
        self.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Parks a message until the version `awaits` has ended; `None` if what it waits for may have ended meanwhile.
    pub(crate) async fn park(&self, message: &Accepted, awaits: u64) -> Result<Option<Outcome>, StoreError> {
        let Some(gaps) = self.parts.options.strategy.gaps() else { return Ok(None) };
        let identity = &message.identity;
        let now_ms = self.parts.clock.now_ms();
        // As before, if it is parked already.
        let until_ms = match self.kept.park(identity, now_ms, now_ms.saturating_add(gaps.timeout_ms)) {
            Ok(until_ms) => until_ms,
            Err(full) => return Ok(Some(full)),
        };
        let error = format!("waits for version {awaits}");
        self.keep(message, HoldReason::Parked { awaits, until_ms }, error).await?;
        // What it waits for may have ended while it was written down: whoever ended it has found it then, or is found here.
        if self.is_early(identity).await? {
            return Ok(Some(Outcome::Parked { awaits, until_ms }));
        }
        // Another owner may have written it: what is remembered here would answer the same again.
        self.cache.remove(&identity.record);
        Ok(None)
    }

    /// Whether a message must wait for another one, by the record as it is now.
    pub(crate) async fn is_early(&self, identity: &Identity) -> Result<bool, StoreError> {
        let found = self.parts.storage.admit(&identity.record).await?;
        let admission = decide(
            found.as_ref(),
            identity,
            self.parts.options.strategy.gaps(),
            self.owner(),
            self.parts.clock.now_ms(),
        );
        Ok(matches!(admission, Admission::Gap { .. }))
    }

    /// Whether the store may still keep a message that has ended without a run.
    pub(crate) fn may_be_kept(&self, message: &Accepted, outcome: &Outcome) -> bool {
        let over = matches!(outcome, Outcome::Duplicate(_) | Outcome::Stale);
        over && (message.kept || self.kept.holds(&message.identity))
    }

    /// A message that the store kept and that ended without a run is kept no longer.
    pub(crate) async fn keep_no_longer(&self, message: &Accepted) -> Result<(), StoreError> {
        // Who was answered by the cache may be late: an operator may have had the message redriven meanwhile.
        let found = self.parts.storage.admit(&message.identity.record).await?;
        let answer = decide(found.as_ref(), &message.identity, None, self.owner(), self.parts.clock.now_ms());
        if !matches!(answer, Admission::Replay(_) | Admission::Stale) {
            return Ok(());
        }
        let commit = Commit {
            expected: Expected::of(found.map(|record| record.epoch)),
            held_message: Some(HeldChange::Remove(message.identity.fingerprint)),
            ..self.builder(message).commit()
        };
        self.parts.committer.submit(commit).durable().await.map(drop)
    }
}
