//! A commit and its group: the content that one transaction of a store makes durable.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::fingerprint::Fingerprint;
use crate::message::key::RecordKey;
use crate::record::{Record, RecordState};
use crate::state::{Effects, ReadSet, Version};
use crate::store::feed::FeedEntry;
use crate::store::held_message::HeldMessage;
use crate::support::fault;

/// Commit of one executed message, or of one operator action.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Key of the record; the scope of the key owns the state.
    pub key: RecordKey,
    /// The message's own key: ids of the messages it sends are derived from it. Mostly the key of
    /// its record.
    pub message_key: RecordKey,
    /// Condition on the stored record.
    pub expected: Expected,
    /// Change of the record.
    pub record: RecordChange,
    /// Version of every state entry that this commit writes. Unique, and greater than the version
    /// of every earlier commit of this process.
    pub version: Version,
    /// Versions that the run read; each must still hold.
    pub reads: ReadSet,
    /// State writes; outgoing messages get their ids from the message's own key and their position.
    pub effects: Effects,
    /// Change of the held message under the record's key.
    pub held_message: Option<HeldChange>,
    /// Reads and writes of the state that no processor owns: sagas and locks.
    pub shared: Option<Box<SharedChange>>,
    /// Outgoing message that goes back into the outbox, at its end and under the id that it has: an
    /// operator redrives it.
    pub requeued: Option<Box<Message>>,
    /// Time of the decision, in milliseconds since the Unix epoch. The feed shows it for a commit
    /// that leaves no record; a record has its own time.
    pub at_ms: u64,
}

/// A commit's part in the state that all processors of a tenant share
/// ([`Scope::shared`](crate::Scope::shared)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharedChange {
    /// Versions that must still hold, by key; 0 where the key must be absent.
    pub reads: BTreeMap<String, Version>,
    /// Values to write under the commit's version; `None` deletes.
    pub writes: BTreeMap<String, Option<Bytes>>,
}

/// Condition of a commit on the stored record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// There is no record.
    Absent,
    /// There is a record with exactly this epoch.
    Epoch(u64),
    /// There is a record with exactly this epoch, which may expire: or it is gone by now.
    EpochOrAbsent(u64),
    /// There is any record, or none.
    Anything,
}

/// Change that a commit makes to its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordChange {
    /// The record stays byte for byte as it is.
    Keep,
    /// The record is replaced by this one. Shared with the cache that holds it once it is durable.
    Put(Arc<Record>),
    /// The record is removed, by an operator action.
    Remove,
}

/// Change that a commit makes to a held message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeldChange {
    /// The message is held, and replaces one with the same fingerprint.
    Put(Box<HeldMessage>),
    /// The held message with this fingerprint is removed, if there is one.
    Remove(Fingerprint),
}

/// Position of a pending message in the outbox: the version of its commit, and its index in the
/// commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OutboxPosition {
    /// Version of the commit that wrote it.
    pub version: Version,
    /// Index among the commit's messages.
    pub index: u32,
}

/// A committed message that is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// Position of the message; rows are sent in this order.
    pub position: OutboxPosition,
    /// The message with its stable id.
    pub message: Message,
}

/// Content of one write transaction.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// Executed messages, in the order of their versions.
    pub commits: Vec<Commit>,
    /// Outbox rows that were sent and can be removed.
    pub sent: Vec<OutboxPosition>,
    /// Feed entries of events that have no commit.
    pub feed_entries: Vec<FeedEntry>,
}

/// Result of one commit of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The commit is durable.
    Committed,
    /// Nothing was written: the record is not the expected one. Holds the record that is there.
    EpochMismatch(Option<Box<Record>>),
    /// Nothing was written: an entry that the run read has changed. Run the message again.
    Conflict,
}

impl RecordChange {
    /// Returns the record to be stored.
    pub fn put(&self) -> Option<&Arc<Record>> {
        match self {
            Self::Put(record) => Some(record),
            Self::Keep | Self::Remove => None,
        }
    }
}

/// Leaves the record as it is where there is none to put.
impl From<Option<Record>> for RecordChange {
    fn from(record: Option<Record>) -> Self {
        record.map_or(Self::Keep, |record| Self::Put(record.into()))
    }
}

impl Expected {
    /// Returns the condition for a record of this epoch, or for none.
    pub fn of(epoch: Option<u64>) -> Self {
        epoch.map_or(Self::Absent, Self::Epoch)
    }

    /// Returns `true` if a record of `epoch` is as expected. `None` stands for no record.
    pub fn holds(self, epoch: Option<u64>) -> bool {
        match self {
            Self::Anything => true,
            Self::Absent => epoch.is_none(),
            Self::Epoch(expected) => epoch == Some(expected) || fault::mutated("epoch-unchecked"),
            Self::EpochOrAbsent(expected) => epoch.is_none_or(|epoch| epoch == expected),
        }
    }
}

impl Commit {
    /// Returns a commit that changes nothing yet, with no condition on the record.
    pub fn of(key: &RecordKey) -> Self {
        Self {
            key: key.clone(),
            message_key: key.clone(),
            expected: Expected::Anything,
            record: RecordChange::Keep,
            version: 0,
            reads: ReadSet::default(),
            effects: Effects::default(),
            held_message: None,
            shared: None,
            requeued: None,
            at_ms: 0,
        }
    }

    /// Returns whether the store may refuse the commit although its reads held in the overlay: it
    /// rests on entries that commits of other processors write too.
    pub(crate) fn may_be_refused(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| !shared.reads.is_empty())
    }

    /// Returns the approximate number of bytes that the commit takes in the store.
    pub(crate) fn bytes(&self) -> usize {
        let record = self.record.put().map_or(0, |record| match &record.state {
            RecordState::Completed { output } => output.data.len(),
            other => other.error().map_or(0, str::len),
        });
        let writes = self.effects.writes.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
        let outgoing = self.effects.outgoing.iter().map(|outgoing| outgoing.data.len());
        let held_message = match &self.held_message {
            Some(HeldChange::Put(held_message)) => held_message.message.data.len(),
            Some(HeldChange::Remove(_)) | None => 0,
        };
        let shared = self.shared.iter().flat_map(|shared| &shared.writes);
        let writes = writes.chain(shared.map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len)));
        let requeued = self.requeued.as_ref().map_or(0, |message| message.data.len());
        256 + record + writes.sum::<usize>() + outgoing.sum::<usize>() + held_message + requeued
    }

    /// Returns true if the commit puts messages into the outbox.
    pub fn fills_outbox(&self) -> bool {
        !self.effects.outgoing.is_empty() || self.requeued.is_some()
    }

    /// Returns the outbox rows of this commit, each under its stable id.
    pub fn outbox_rows(&self) -> impl Iterator<Item = OutboxRow> + '_ {
        let position = |index: usize| OutboxPosition { version: self.version, index: index as u32 };
        let requeued = self.requeued.iter().map(move |message| OutboxRow {
            position: position(self.effects.outgoing.len()),
            message: (**message).clone(),
        });
        let outgoing = self.effects.outgoing.iter().enumerate().map(move |(index, outgoing)| OutboxRow {
            position: position(index),
            message: Message {
                subject: outgoing.subject.clone(),
                content_type: outgoing.content_type.clone(),
                extensions: outgoing.extensions.clone(),
                data: outgoing.data.clone(),
                ..Message::new(
                    self.message_key.outgoing_id(index),
                    format!("/processors/{}", self.key.scope.processor),
                    outgoing.kind.as_str(),
                )
            },
        });
        outgoing.chain(requeued)
    }
}
