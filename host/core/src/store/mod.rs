//! The seam to a store: what the pipeline asks of it, and what it promises back. Verbs of the domain, not of a database.

pub(crate) mod crash_tracker;
pub(crate) mod feed;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::run::context::{Effects, ReadSet, StateView, Version};
use crate::support::fault;
use crate::store::feed::{Feed, FeedEntry};
use crate::message::key::{Fingerprint, RecordKey, Scope};
use crate::message::Message;
use crate::run::processor::Output;
use crate::record::{Record, State};
use crate::store::crash_tracker::{NoNotes, RunningNotes};
use crate::message::strategy::Position;

/// A store failed. None of these is about one message: the host stops taking deliveries.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing failed; whether the last group is durable is not known.
    #[error("the store failed: {0}")]
    Io(Arc<str>),
    /// No room left.
    #[error("the store's disk is full: {0}. Free some space and start again; nothing acknowledged is lost")]
    Full(Arc<str>),
    /// What was read is not what was written.
    #[error("the store is damaged: {0}")]
    Damaged(Arc<str>),
    /// An earlier failure closed the store; start again to go on.
    #[error("the store was closed by an earlier failure: {0}")]
    Closed(Arc<str>),
}

/// One executed message, as it wants to be committed; or what an operator did.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Whose record, and whose state.
    pub key: RecordKey,
    /// The message's own key: ids of what it sends are derived from it. Mostly that of its record.
    pub own: RecordKey,
    /// What must be there now.
    pub expected: Expected,
    /// What shall be there.
    pub record: RecordChange,
    /// Version of every state entry that this commit writes. Unique, and greater than that of every earlier commit of
    /// this process.
    pub version: Version,
    /// What the run read; must still stand.
    pub reads: ReadSet,
    /// State writes; outgoing messages get their ids from the message's own key and their position.
    pub effects: Effects,
    /// What becomes of the message that the store keeps under the record's key, if anything.
    pub letter: Option<LetterChange>,
    /// What it reads and writes of the state that is no processor's: sagas and locks.
    pub shared: Option<Box<SharedChange>>,
    /// When it was decided, in milliseconds since the Unix epoch. The feed tells it of a commit that leaves no record; a
    /// record has its own.
    pub at_ms: u64,
}

/// A commit's part in the state that all processors of a tenant share ([`Scope::shared`]).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharedChange {
    /// Versions that must still stand, by key; 0 where there must be nothing.
    pub reads: BTreeMap<String, Version>,
    /// What is written, under the commit's version; `None` deletes.
    pub writes: BTreeMap<String, Option<Bytes>>,
}

/// The record that a commit rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// None.
    Absent,
    /// One with exactly this epoch.
    Epoch(u64),
    /// Whatever there is.
    Anything,
}

/// What a commit makes of the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordChange {
    /// Stays byte for byte as it is.
    Keep,
    /// This shall be there. Shared with whoever remembers it once it is.
    Put(Arc<Record>),
    /// Forgotten, by an operator's wish.
    Remove,
}

/// What a commit makes of a kept message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LetterChange {
    /// It is kept, instead of one with the same fingerprint.
    Put(Box<DeadLetter>),
    /// The one with this fingerprint goes, if it is there.
    Remove(Fingerprint),
}

/// A message that the store keeps: it failed for good and an operator decides, or it waits to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The message, as received.
    pub message: Message,
    /// Its fingerprint: with the record's key this names the letter, so a mismatch keeps both bodies.
    pub fingerprint: Fingerprint,
    /// Where the message stands among those of its record.
    pub position: Option<Position>,
    /// What it waits for.
    pub standing: Standing,
    /// What went wrong.
    pub error: String,
    /// Attempts made.
    pub attempts: u32,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// What a kept message waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// An operator: it failed for good.
    Dead,
    /// The host runs it again.
    Redriven,
    /// The message before it.
    Parked {
        /// The version that is awaited.
        awaits: u64,
        /// When the wait is over, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
}

/// Names a kept message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LetterKey {
    /// The record it belongs to.
    pub record: RecordKey,
    /// Digest of its fingerprint.
    pub fingerprint: [u8; 16],
}

/// Where a pending message stands in the outbox: the version of its commit, its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OutboxPosition {
    /// Version of the commit that wrote it.
    pub version: Version,
    /// Its place among the commit's messages.
    pub index: u32,
}

/// A committed message that is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// Where it stands; rows are sent in this order.
    pub position: OutboxPosition,
    /// The message with its stable id.
    pub message: Message,
}

/// What one write transaction makes durable.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// Executed messages, in the order of their versions.
    pub commits: Vec<Commit>,
    /// Outbox rows that were sent and can go.
    pub sent: Vec<OutboxPosition>,
    /// What happened beside the commits; for the feed only.
    pub notes: Vec<FeedEntry>,
}

/// What became of one commit of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Durable.
    Committed,
    /// Nothing written: the record is not the expected one. Here is what is there.
    Taken(Option<Box<Record>>),
    /// Nothing written: something it read has changed. Run it again.
    Conflict,
}

/// The store of record.
pub trait IdempotencyStorage: Send + Sync + 'static {
    /// The record under `key`, as of the last durable commit. Called by many tasks at once; may block for a read.
    fn admit<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// Writes a group in one transaction and answers a verdict a commit, in order.
    ///
    /// When it returns `Ok`, every `Committed` is durable. One commit's conflict never touches its neighbours. When it
    /// returns `Err`, nothing of the group may be acknowledged, and whether it is there is not known until the store is
    /// opened again. Called by one thread, which it may block.
    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>>;

    /// A view of the processor's state. Each read sees at least every commit that was durable when the read began;
    /// reads of one view need not be of one moment (the commit checks what was read).
    fn view(&self, scope: &Scope) -> Arc<dyn StateView>;

    /// A version that no commit has ever exceeded; 0 in an empty store. Stores may reserve versions ahead.
    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>>;

    /// Forgets terminal records last changed before `older_than_ms` (since the Unix epoch), at most `limit` of them;
    /// answers how many. The feed does not tell of them. Records that are in progress, due again, or to be compensated always stay.
    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Forgets records whose retention ended before `now_ms` (since the Unix epoch), in whatever portions the store keeps
    /// them: some may stay a while longer, none goes earlier. Never touches what is in progress, due again, unsent, or has
    /// no expiry. Costs nothing for what stays. Answers how many records went; the feed tells it too, once a portion.
    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Where it is noted, outside the transactions, which messages are being run.
    fn running_notes(&self) -> Arc<dyn RunningNotes> {
        Arc::new(NoNotes)
    }

    /// Whether the key's message has completed.
    fn is_processed<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.processed_result(key).await?.is_some()) })
    }

    /// The stored result of the key's message, if it has completed.
    fn processed_result<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Output>, StoreError>> {
        Box::pin(async move {
            Ok(self.admit(key).await?.and_then(|record| match record.state {
                State::Completed { output } => Some(output),
                _ => None,
            }))
        })
    }
}

/// Pending messages of a store. That they were sent is committed with a [`Group`].
pub trait Outbox: Send + Sync + 'static {
    /// Up to `limit` rows after `after` (`None`: from the first), in order.
    fn pending(&self, after: Option<OutboxPosition>, limit: usize)
    -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>>;
}

/// Read-only paging for people.
pub trait Inspect: Send + Sync + 'static {
    /// Up to `limit` records after `after`, in the order of their keys; of one processor if given.
    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>>;

    /// The messages that are kept under a record.
    fn dead_letters<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<DeadLetter>, StoreError>>;

    /// Up to `limit` kept messages after `after`, in the order of their records' keys; of one processor if given.
    fn letters<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a LetterKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(LetterKey, DeadLetter)>, StoreError>>;
}

/// Everything the host asks of its store of record.
pub trait Store: IdempotencyStorage + Outbox + Inspect + Feed {}

impl<T: IdempotencyStorage + Outbox + Inspect + Feed> Store for T {}

impl RecordChange {
    /// The record that shall be there.
    pub fn put(&self) -> Option<&Arc<Record>> {
        match self {
            Self::Put(record) => Some(record),
            Self::Keep | Self::Remove => None,
        }
    }
}

/// Stays as it is where there is none to put.
impl From<Option<Record>> for RecordChange {
    fn from(record: Option<Record>) -> Self {
        record.map_or(Self::Keep, |record| Self::Put(record.into()))
    }
}

impl Expected {
    /// A record of this epoch, or none.
    pub fn of(epoch: Option<u64>) -> Self {
        epoch.map_or(Self::Absent, Self::Epoch)
    }

    /// Whether a record of the epoch given (`None`: there is none) is as expected.
    pub fn stands(self, epoch: Option<u64>) -> bool {
        match self {
            Self::Anything => true,
            Self::Absent => epoch.is_none(),
            Self::Epoch(expected) => epoch == Some(expected) || fault::mutated("epoch-unchecked"),
        }
    }
}

/// `tenant/processor/source/key#fingerprint`.
impl std::fmt::Display for LetterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}#{:032x}", self.record, u128::from_be_bytes(self.fingerprint))
    }
}

/// A text that is not the key of a kept message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not the key of a dead letter: take one from `hapax dlq list`, tenant/processor/source/key#fingerprint"
)]
pub struct NotALetterKey(String);

impl std::str::FromStr for LetterKey {
    type Err = NotALetterKey;

    fn from_str(text: &str) -> Result<Self, NotALetterKey> {
        let parse = || {
            let (record, fingerprint) = text.rsplit_once('#').filter(|(_, hex)| hex.len() == 32)?;
            let fingerprint = u128::from_str_radix(fingerprint, 16).ok()?.to_be_bytes();
            Some(Self { record: record.parse().ok()?, fingerprint })
        };
        parse().ok_or_else(|| NotALetterKey(text.to_owned()))
    }
}

impl DeadLetter {
    /// What the store knows it by, under `record`.
    pub fn key(&self, record: &RecordKey) -> LetterKey {
        LetterKey { record: record.clone(), fingerprint: self.fingerprint.digest }
    }
}

impl Commit {
    /// A commit that touches nothing yet, whatever record there is.
    pub fn of(key: &RecordKey) -> Self {
        Self {
            key: key.clone(),
            own: key.clone(),
            expected: Expected::Anything,
            record: RecordChange::Keep,
            version: 0,
            reads: ReadSet::default(),
            effects: Effects::default(),
            letter: None,
            shared: None,
            at_ms: 0,
        }
    }

    /// Bytes that it will take in the store, roughly.
    pub(crate) fn bytes(&self) -> usize {
        let record = self.record.put().map_or(0, |record| match &record.state {
            State::Completed { output } => output.data.len(),
            other => other.error().map_or(0, str::len),
        });
        let writes = self.effects.writes.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
        let outgoing = self.effects.outgoing.iter().map(|outgoing| outgoing.data.len());
        let letter = match &self.letter {
            Some(LetterChange::Put(letter)) => letter.message.data.len(),
            Some(LetterChange::Remove(_)) | None => 0,
        };
        let shared = self.shared.iter().flat_map(|shared| &shared.writes);
        let writes = writes.chain(shared.map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len)));
        256 + record + writes.sum::<usize>() + outgoing.sum::<usize>() + letter
    }

    /// The outbox rows of this commit, each under its stable id.
    pub fn outbox_rows(&self) -> impl Iterator<Item = OutboxRow> + '_ {
        self.effects.outgoing.iter().enumerate().map(|(index, outgoing)| OutboxRow {
            position: OutboxPosition { version: self.version, index: index as u32 },
            message: Message {
                subject: outgoing.subject.clone(),
                content_type: outgoing.content_type.clone(),
                extensions: outgoing.extensions.clone(),
                data: outgoing.data.clone(),
                ..Message::new(
                    self.own.outgoing_id(index),
                    format!("/processors/{}", self.key.scope.processor),
                    outgoing.kind.as_str(),
                )
            },
        })
    }
}
