//! What becomes of a message that does not run: answered by its record, refused, or kept for later. The straight line of those
//! that run is `consumer.rs`.

use crate::admission::{Admission, decide};
use crate::consumer::{Accepted, Admitted, Inner};
use crate::ending::Ending;
use crate::fault;
use crate::key::RecordKey;
use crate::options::MismatchPolicy;
use crate::record::Record;
use crate::storage::{Commit, DeadLetter, LetterChange, RecordChange, Standing, StoreError};
use crate::strategy::Identity;

impl Inner {
    /// What a message gets that must not run, by the record that says so (`None`: there is none); `None` if it may.
    pub(crate) async fn answer(
        &self,
        message: &Accepted,
        record: Option<&Record>,
    ) -> Result<Option<Admitted>, StoreError> {
        let gaps = self.parts.options.strategy.gaps().filter(|_| !message.past_gap);
        let ending = match decide(record, &message.identity, gaps, self.parts.clock.now_ms()) {
            Admission::Fresh => return Ok(None),
            Admission::Gap { awaits } => return Ok(Some(Admitted::Park { awaits })),
            Admission::Replay(stored) => Ending::Duplicate(stored),
            Admission::InFlight { after_ms } => Ending::InFlight { after_ms },
            Admission::Stale => Ending::Stale,
            Admission::Mismatch => self.mismatch(message).await?,
        };
        Ok(Some(Admitted::Ended(ending)))
    }

    /// The key was used with another body. The record stays byte for byte as it is.
    async fn mismatch(&self, message: &Accepted) -> Result<Ending, StoreError> {
        let error = "the idempotency key was used before with another body; give the message a key of its own";
        tracing::error!(key = %message.identity.own, "mismatch: {error}");
        if self.parts.options.mismatch == MismatchPolicy::DeadLetter || message.kept {
            self.keep(message, Standing::Dead, error.to_owned()).await?;
        }
        Ok(Ending::Mismatch)
    }

    /// The strategy finds nothing to know the message by: it is kept, and never runs.
    pub(crate) async fn refuse(&self, message: &Accepted, reason: String) -> Result<Ending, StoreError> {
        let error = format!("invalid: {reason}");
        self.keep(message, Standing::Dead, error.clone()).await?;
        Ok(Ending::DeadLettered { error })
    }

    /// Keeps a message that does not run. Its record, if there is one, stays byte for byte as it is.
    pub(crate) async fn keep(&self, message: &Accepted, standing: Standing, error: String) -> Result<(), StoreError> {
        let conclusion = self.conclusion(message);
        let letter = conclusion.keep(standing, error, 0);
        let record =
            if fault::mutated("record-goes-with-what-is-kept") { RecordChange::Remove } else { RecordChange::Keep };
        let commit = Commit { record, letter: Some(LetterChange::Put(Box::new(letter))), ..conclusion.commit() };
        self.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Parks a message until the version `awaits` has ended; `None` if what it waits for may have ended meanwhile.
    pub(crate) async fn park(&self, message: &Accepted, awaits: u64) -> Result<Option<Ending>, StoreError> {
        let Some(gaps) = self.parts.options.strategy.gaps() else { return Ok(None) };
        let key = &message.identity.record;
        let until_ms = self.parts.clock.now_ms().saturating_add(gaps.timeout_ms);
        let error = format!("waits for version {awaits}");
        let letter = self.conclusion(message).keep(Standing::Parked { awaits, until_ms }, error.clone(), 0);
        // As before, if it is parked already.
        let until_ms = match self.kept.park(key, &letter) {
            Ok(until_ms) => until_ms,
            Err(full) => return Ok(Some(full)),
        };
        self.keep(message, Standing::Parked { awaits, until_ms }, error).await?;
        // What it waits for may have ended while it was written down: whoever ended it has found it then, or is found here.
        let found = self.parts.storage.admit(key).await?;
        let now_ms = self.parts.clock.now_ms();
        Ok(match decide(found.as_ref(), &message.identity, Some(gaps), now_ms) {
            Admission::Gap { .. } => Some(Ending::Parked { awaits, until_ms }),
            _ => {
                // Another owner may have written it: what is remembered here would answer the same again.
                self.cache.remove(key);
                None
            }
        })
    }

    /// Whether a parked message still waits for another one of its entity.
    pub(crate) async fn waits(&self, record: &RecordKey, letter: &DeadLetter) -> Result<bool, StoreError> {
        let gaps = self.parts.options.strategy.gaps().filter(|_| matches!(letter.standing, Standing::Parked { .. }));
        let Some(gaps) = gaps else { return Ok(false) };
        let found = self.parts.storage.admit(record).await?;
        let identity = Identity {
            record: record.clone(),
            own: record.clone(),
            fingerprint: letter.fingerprint,
            position: letter.position.clone(),
        };
        let now_ms = self.parts.clock.now_ms();
        Ok(matches!(decide(found.as_ref(), &identity, Some(gaps), now_ms), Admission::Gap { .. }))
    }

    /// A message that the store kept and that ended without a run is kept no longer.
    pub(crate) async fn keep_no_longer(&self, message: &Accepted, ending: &Ending) -> Result<(), StoreError> {
        let over = matches!(ending, Ending::Duplicate(_) | Ending::Stale);
        if over && (message.kept || self.kept.holds(&message.identity)) {
            let commit = Commit {
                letter: Some(LetterChange::Remove(message.identity.fingerprint)),
                ..self.conclusion(message).commit()
            };
            self.parts.committer.submit(commit).durable().await?;
        }
        Ok(())
    }
}
