//! Entries that are journalled and not yet in the tables, for readers and for the applier. Filled
//! by frames only, so that a restart makes the same of the journal as the running host did.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasherDefault;

use bytes::Bytes;
use hapax_core::{Cursor, DigestHasher, OutboxPosition, Version};

use crate::format::frame::{Entry, Frame};
use crate::redb::feed::Blocks;

/// Bytes of memory that an entry takes beside its frame, roughly.
const ENTRY_BYTES: usize = 128;

/// Changes of consecutive frames, the last of each key.
#[derive(Debug, Default)]
pub(crate) struct Memtable {
    pub(crate) records: HashMap<u128, RecordSlot, BuildHasherDefault<DigestHasher>>,
    /// Version and value by encoded key; `None` where it was deleted.
    pub(crate) state: BTreeMap<Bytes, Option<Bytes>>,
    pub(crate) outbox: BTreeMap<OutboxPosition, Bytes>,
    /// Positions of sent messages whose rows are in older layers.
    pub(crate) sent: BTreeSet<OutboxPosition>,
    /// Held messages by encoded key; `None` if the message is no longer held.
    pub(crate) held_under: BTreeMap<Bytes, Option<Bytes>>,
    /// Events of the feed, in order.
    pub(crate) events: Blocks,
    /// Buckets that are to be dropped.
    pub(crate) buckets_gone: Vec<u64>,
    /// Sequence number of its first frame.
    pub(crate) first: u64,
    pub(crate) end: End,
    bytes: usize,
}

/// End of a memtable's frames.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct End {
    pub(crate) sequence: u64,
    /// Offset of the next frame in the journal.
    pub(crate) next_offset: u64,
    pub(crate) last_version: Version,
}

/// A record as its frame has it.
#[derive(Debug, Clone)]
pub(crate) struct RecordSlot {
    pub(crate) end_ms: Option<u64>,
    /// True if older layers may have an older version of the record.
    pub(crate) replaces: bool,
    /// `None`: it was forgotten.
    pub(crate) row: Option<Bytes>,
}

/// A frame has an entry that this build cannot read, though its checksum holds.
#[derive(Debug)]
pub(crate) struct Unreadable;

impl Memtable {
    /// Takes in a frame that is durable; `next_offset` is where the journal goes on after it.
    pub(crate) fn insert(&mut self, frame: &Frame, next_offset: u64) -> Result<(), Unreadable> {
        let (mut entries, mut index, mut event_bytes) = (0, 0, 0);
        for entry in frame.entries() {
            match entry.ok_or(Unreadable)? {
                Entry::Event(event) => {
                    event_bytes += self.events.push(Cursor { sequence: frame.sequence, index }, &frame.bytes[event]);
                    index += 1;
                }
                other => {
                    self.take(other);
                    entries += 1;
                }
            }
        }
        if self.is_empty() {
            self.first = frame.sequence;
        }
        self.bytes += frame.bytes.len() + entries * ENTRY_BYTES + event_bytes;
        self.end = End { sequence: frame.sequence, next_offset, last_version: frame.last_version };
        Ok(())
    }

    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Record { hash, end_ms, replaces, row } => match self.records.entry(hash) {
                Slot::Occupied(mut slot) => {
                    let replaces = slot.get().replaces;
                    slot.insert(RecordSlot { end_ms, replaces, row: Some(row) });
                }
                Slot::Vacant(slot) => drop(slot.insert(RecordSlot { end_ms, replaces, row: Some(row) })),
            },
            Entry::RecordGone { hash } => {
                self.records.insert(hash, RecordSlot { end_ms: None, replaces: true, row: None });
            }
            Entry::State { key, value } => drop(self.state.insert(key, value)),
            Entry::Outgoing { position, message } => drop(self.outbox.insert(position, message)),
            Entry::Sent(position) => {
                if self.outbox.remove(&position).is_none() {
                    self.sent.insert(position);
                }
            }
            Entry::HeldMessage { key, held_message } => drop(self.held_under.insert(key, held_message)),
            Entry::BucketGone { id } => self.buckets_gone.push(id),
            Entry::Event(_) => unreachable!("it is taken with its place"),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes of memory, roughly.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}
