//! The seam to a store: what the pipeline asks of it, and what it promises back. Verbs of the domain, not of a database.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::context::{Effects, ReadSet, StateView, Version};
use crate::key::{Fingerprint, RecordKey, Scope};
use crate::message::Message;
use crate::processor::Output;
use crate::record::{Record, State};
use crate::running::{NoNotes, RunningNotes};

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

/// One executed message, as it wants to be committed.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Whose record.
    pub key: RecordKey,
    /// What must be there now: `None` no record, `Some` one with exactly this epoch.
    pub expected_epoch: Option<u64>,
    /// What shall be there: `None` leaves the record byte for byte as it is.
    pub record: Option<Record>,
    /// Version of every state entry that this commit writes. Unique, and greater than that of every earlier commit of
    /// this process.
    pub version: Version,
    /// What the run read; must still stand.
    pub reads: ReadSet,
    /// State writes; outgoing messages get their ids from the record's key and their position.
    pub effects: Effects,
    /// The message to keep with its error, when it failed for good.
    pub dead_letter: Option<DeadLetter>,
}

/// A message that failed for good, kept until an operator decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The message, as received.
    pub message: Message,
    /// Its fingerprint: with the record's key this names the dead letter, so a mismatch keeps both bodies.
    pub fingerprint: Fingerprint,
    /// What went wrong.
    pub error: String,
    /// Attempts made.
    pub attempts: u32,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
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
    /// answers how many. Records that are in progress, due again, or to be compensated always stay.
    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Forgets records whose retention ended before `now_ms` (since the Unix epoch), in whatever portions the store keeps
    /// them: some may stay a while longer, none goes earlier. Never touches what is in progress, due again, unsent, or has
    /// no expiry. Costs nothing for what stays. Answers how many records went.
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

    /// The dead letters of a record.
    fn dead_letters<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<DeadLetter>, StoreError>>;
}

/// Everything the host asks of its store of record.
pub trait Store: IdempotencyStorage + Outbox + Inspect {}

impl<T: IdempotencyStorage + Outbox + Inspect> Store for T {}

impl Commit {
    /// Bytes that it will take in the store, roughly.
    pub(crate) fn bytes(&self) -> usize {
        let record = self.record.as_ref().map_or(0, |record| match &record.state {
            State::Completed { output } => output.data.len(),
            other => other.error().map_or(0, str::len),
        });
        let writes = self.effects.writes.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
        let outgoing = self.effects.outgoing.iter().map(|outgoing| outgoing.data.len());
        let letter = self.dead_letter.as_ref().map_or(0, |letter| letter.message.data.len());
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
                    self.key.outgoing_id(index),
                    format!("/processors/{}", self.key.scope.processor),
                    outgoing.kind.as_str(),
                )
            },
        })
    }
}
