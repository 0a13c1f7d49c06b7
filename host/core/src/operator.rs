//! What an operator may do to records and kept messages. Each deed is one commit with its own line in the audit trail, so that
//! none is done and not told. Where a consumer is at work on the processor, it is kept off the record meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::committer::Committer;
use crate::consumer::{Held, IdempotentConsumer};
use crate::context::{Effects, RESERVED};
use crate::history::{self, Received};
use crate::key::{RecordKey, Scope};
use crate::record::{self, Event, Moment, Record, State};
use crate::storage::{
    Commit, DeadLetter, Expected, LetterChange, LetterKey, RecordChange, Standing, Store, StoreError, Verdict,
};

/// Longest text of who and why, in bytes.
const TEXT_BYTES: usize = 1_024;

/// Who does something, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By {
    /// Who.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// One line of the audit trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audited {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Who.
    pub actor: String,
    /// What was done: `redrive`, `discard`, `evict`.
    pub action: String,
    /// The record's key.
    pub key: String,
    /// Why.
    pub reason: String,
}

/// Why something was not done. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OperatorError {
    /// There is nothing under that key.
    #[error("there is no {what} {key}")]
    NotFound {
        /// What was looked for.
        what: &'static str,
        /// Its key.
        key: String,
    },
    /// It may not be done.
    #[error("{0}")]
    Refused(String),
    /// Somebody else changed the record at the same time.
    #[error("{0} was changed meanwhile; look at it again")]
    Changed(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Does what an operator asks for.
pub struct Operator {
    store: Arc<dyn Store>,
    committer: Arc<Committer>,
    clock: Arc<dyn Clock>,
    /// The consumers that are at work, by processor.
    consumers: BTreeMap<Arc<str>, IdempotentConsumer>,
}

impl Operator {
    /// Joins the parts. Every consumer that works on the store must be among `consumers`.
    pub fn new(
        store: Arc<dyn Store>,
        committer: Arc<Committer>,
        clock: Arc<dyn Clock>,
        consumers: impl IntoIterator<Item = IdempotentConsumer>,
    ) -> Self {
        let by_name = |consumer: IdempotentConsumer| (consumer.scope().processor.clone(), consumer);
        Self { store, committer, clock, consumers: consumers.into_iter().map(by_name).collect() }
    }

    /// Has a dead letter run again, with all its attempts before it. It runs as soon as its processor does.
    pub async fn redrive(&self, key: &LetterKey, by: &By) -> Result<(), OperatorError> {
        let held = self.hold(&key.record).await;
        let letter = self.letter(key).await?;
        match letter.standing {
            Standing::Redriven => return Err(refused(key, "is on its way already")),
            Standing::Parked { .. } => return Err(refused(key, "is parked: it runs by itself")),
            Standing::Dead => {}
        }
        let found = self.store.admit(&key.record).await?;
        // Past its retention a record says nothing any more, whether or not it was swept already.
        let live = found.as_ref().filter(|record| !record.has_expired(self.clock.now_ms()));
        let record = match live {
            Some(record) if record.fingerprint == letter.fingerprint => match &record.state {
                State::DeadLettered { .. } => RecordChange::Put(self.redriven(record, &letter)),
                state => {
                    let state = state.name();
                    return Err(refused(key, &format!("cannot run again: its record is {state}; discard it")));
                }
            },
            Some(_) if letter.position.is_none() => {
                return Err(refused(
                    key,
                    "has another body than the message that had its key first; send it under a key of its own, and discard it",
                ));
            }
            // Its record is gone, or is of another message of its entity: the pipeline decides.
            Some(_) | None => RecordChange::Keep,
        };
        let commit = Commit {
            expected: Expected::of(found.as_ref().map(|record| record.epoch)),
            record,
            letter: Some(LetterChange::Put(Box::new(DeadLetter { standing: Standing::Redriven, ..letter }))),
            ..self.audited("redrive", &key.record, by)
        };
        self.commit(commit).await?;
        drop(held);
        if let Some(consumer) = self.consumers.get(&key.record.scope.processor) {
            consumer.redriven();
        }
        Ok(())
    }

    /// Forgets a dead letter or a parked message. Its record stays: a duplicate still gets the stored error.
    pub async fn discard(&self, key: &LetterKey, by: &By) -> Result<(), OperatorError> {
        let _held = self.hold(&key.record).await;
        let letter = self.letter(key).await?;
        let commit = Commit {
            letter: Some(LetterChange::Remove(letter.fingerprint)),
            ..self.audited("discard", &key.record, by)
        };
        self.commit(commit).await
    }

    /// Forgets a record before its time: a message under its key counts as new. Refused while its message may still run.
    pub async fn evict(&self, key: &RecordKey, by: &By) -> Result<(), OperatorError> {
        let _held = self.hold(key).await;
        let record = self.store.admit(key).await?;
        let record = record.ok_or_else(|| OperatorError::NotFound { what: "record", key: key.to_string() })?;
        if !record.state.is_terminal() {
            return Err(OperatorError::Refused(format!("{key} is {}: it has not ended", record.state.name())));
        }
        let commit = Commit {
            expected: Expected::Epoch(record.epoch),
            record: RecordChange::Remove,
            ..self.audited("evict", key, by)
        };
        self.commit(commit).await
    }

    /// Up to `limit` lines of a processor's audit trail, oldest first.
    pub async fn trail(&self, processor: &str, limit: usize) -> Result<Vec<Audited>, StoreError> {
        let view = self.store.view(&Scope::of(processor));
        let (start, end) = (format!("{RESERVED}audit/"), format!("{RESERVED}audit0"));
        let entries = view.scan(&start, Some(&end), limit).await?;
        let read = |(_, _, line): &(String, u64, Bytes)| {
            serde_json::from_slice(line)
                .map_err(|error| StoreError::Damaged(format!("an audited deed: {error}").into()))
        };
        entries.iter().map(read).collect()
    }

    async fn hold(&self, key: &RecordKey) -> Option<Held> {
        match self.consumers.get(&key.scope.processor) {
            Some(consumer) => Some(consumer.hold(key).await),
            None => None,
        }
    }

    async fn letter(&self, key: &LetterKey) -> Result<DeadLetter, OperatorError> {
        let letters = self.store.dead_letters(&key.record).await?;
        let found = letters.into_iter().find(|letter| letter.fingerprint.digest == key.fingerprint);
        found.ok_or_else(|| OperatorError::NotFound { what: "dead letter", key: key.to_string() })
    }

    /// The record of a dead letter that is to run again.
    fn redriven(&self, found: &Record, letter: &DeadLetter) -> Record {
        let now_ms = self.clock.now_ms();
        let event = Event::Redriven { at_ms: now_ms };
        let state = record::next(Some(&found.state), event.clone()).expect("a dead letter may be redriven");
        let moment = Moment {
            event,
            at_ms: now_ms,
            epoch: found.epoch + 1,
            attempts: 0,
            component: letter.component.clone(),
            expires_ms: None,
        };
        let (received, history): (Received, _) = history::of(found);
        history::after(&received, history, state, &moment)
    }

    /// A commit that changes nothing yet but the audit trail.
    fn audited(&self, action: &str, key: &RecordKey, by: &By) -> Commit {
        let at_ms = self.clock.now_ms();
        let cut = |text: &str| text.chars().take(TEXT_BYTES / 4).collect();
        let line = Audited {
            at_ms,
            actor: cut(&by.actor),
            action: action.to_owned(),
            key: key.to_string(),
            reason: cut(&by.reason),
        };
        let line = serde_json::to_vec(&line).expect("a line of texts and a number");
        let name = format!("{RESERVED}audit/{at_ms:013}/{action}/{:032x}", key.digest());
        let effects = Effects { writes: BTreeMap::from([(name, Some(line.into()))]), ..Effects::default() };
        Commit { effects, ..Commit::of(key) }
    }

    async fn commit(&self, commit: Commit) -> Result<(), OperatorError> {
        let key = commit.key.to_string();
        match self.committer.submit(commit).durable().await? {
            Verdict::Committed => Ok(()),
            Verdict::Taken(_) | Verdict::Conflict => Err(OperatorError::Changed(key)),
        }
    }
}

fn refused(key: &LetterKey, why: &str) -> OperatorError {
    OperatorError::Refused(format!("{key} {why}"))
}
