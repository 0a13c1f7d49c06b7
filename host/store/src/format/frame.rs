//! A frame: what one group of commits makes durable, encoded once. The same bytes go to the
//! journal, are read by everyone until they are applied, and are what the tables store. Knows no
//! file and no table.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use hapax_core::{Commit, Expected, FeedEntry, HeldChange, OutboxPosition, RecordChange, Scope, Version, fault};

use crate::format::layout;

/// Begins every frame.
const MAGIC: u32 = u32::from_le_bytes(*b"HPXF");
/// Magic, payload length, sequence number, last version, checksum of the frame, checksum of the
/// header.
pub(crate) const HEADER_BYTES: usize = CHECKED_BYTES + 8;
/// Bytes of the header that its own checksum covers.
const CHECKED_BYTES: usize = SUMMED_BYTES + 16;
/// Bytes of the header that the frame's checksum covers.
const SUMMED_BYTES: usize = 4 + 4 + 8 + 8;
/// Frames begin at multiples of this.
pub(crate) const ALIGNMENT: usize = 8;

/// One change. Slices share the frame's buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A record: hash of its key, end of its window (`None`: it may not expire), whether there was
    /// one before, its row.
    Record { hash: u128, end_ms: Option<u64>, replaces: bool, row: Bytes },
    /// A record that an operator removed.
    RecordGone { hash: u128 },
    /// A state entry: encoded key; version and value, or `None` where it is deleted.
    State { key: Bytes, value: Option<Bytes> },
    /// A message to send.
    Outgoing { position: OutboxPosition, message: Bytes },
    /// A message was sent.
    Sent(OutboxPosition),
    /// A held message by its encoded key, or `None` if it is no longer held.
    HeldMessage { key: Bytes, held_message: Option<Bytes> },
    /// An event of the feed, as encoded in the frame; its index counts the frame's events.
    Event(Range<usize>),
    /// A bucket whose records have all expired is to be dropped.
    BucketGone { id: u64 },
}

const RECORD: u8 = 1;
const RECORD_AGAIN: u8 = 2;
const STATE: u8 = 3;
const STATE_DELETED: u8 = 4;
const OUTGOING: u8 = 5;
const SENT: u8 = 6;
const DEAD_LETTER: u8 = 7;
const RECORD_GONE: u8 = 8;
const DEAD_LETTER_GONE: u8 = 9;
const EVENT: u8 = 10;
const BUCKET_GONE: u8 = 11;

/// No end: the record may not expire.
const NEVER: u64 = u64::MAX;

/// A frame that is being filled.
#[derive(Debug)]
pub(crate) struct Builder {
    bytes: Vec<u8>,
    last_version: Version,
}

/// A frame whose bytes are final.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) sequence: u64,
    /// A version that no commit up to this frame has exceeded.
    pub(crate) last_version: Version,
    /// Header, payload, and zeros to the alignment.
    pub(crate) bytes: Bytes,
    payload_end: usize,
}

/// Key of a frame's checksum: frames of another store fail the check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChecksumKey([u8; 32]);

impl ChecksumKey {
    pub(crate) fn new(store_id: &str) -> Self {
        Self(blake3::derive_key("hapax journal frame", store_id.as_bytes()))
    }

    /// Returns the checksum of a header by itself. Bytes of a payload that look like a header fail
    /// it, since nobody outside knows the store's identity.
    fn header_checksum(&self, header: &[u8]) -> [u8; 8] {
        let hash = blake3::keyed_hash(&self.0, header);
        *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
    }

    /// Returns the checksum of the header without its checksums, and of the payload.
    fn checksum(&self, header: &[u8], payload: &[u8]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        let hash = hasher.update(header).update(payload).finalize();
        *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
    }
}

impl Builder {
    pub(crate) fn new(commits: usize) -> Self {
        // An estimate that avoids most reallocations.
        let mut bytes = Vec::with_capacity(256 + commits * 384);
        bytes.resize(HEADER_BYTES, 0);
        Self { bytes, last_version: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.len() == HEADER_BYTES
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len().next_multiple_of(ALIGNMENT)
    }

    /// Adds everything that one commit makes durable.
    pub(crate) fn push(&mut self, commit: &Commit) {
        self.last_version = self.last_version.max(commit.version);
        match &commit.record {
            RecordChange::Keep => {}
            RecordChange::Put(record) => {
                self.bytes.push(if commit.expected == Expected::Absent { RECORD } else { RECORD_AGAIN });
                self.bytes.extend(commit.key.digest().to_le_bytes());
                self.bytes.extend(layout::window_end_ms(record).unwrap_or(NEVER).to_le_bytes());
                layout::push_row(&mut self.bytes, &commit.key, record);
            }
            RecordChange::Remove => {
                self.bytes.push(RECORD_GONE);
                self.bytes.extend(commit.key.digest().to_le_bytes());
            }
        }
        self.push_state(&commit.key.scope, &commit.effects.writes, commit.version);
        if let Some(shared) = &commit.shared {
            self.push_state(&commit.key.scope.shared(), &shared.writes, commit.version);
        }
        for row in commit.outbox_rows() {
            self.bytes.push(OUTGOING);
            self.push_position(row.position);
            self.push_bytes(&[&layout::encode(&row.message)]);
        }
        let key = |fingerprint| layout::dead_letter_key(&layout::record_key(&commit.key), fingerprint);
        match &commit.held_message {
            None => {}
            Some(HeldChange::Put(held_message)) => {
                self.bytes.push(DEAD_LETTER);
                self.push_bytes(&[&key(&held_message.fingerprint)]);
                self.push_bytes(&[&layout::encode(&**held_message)]);
            }
            Some(HeldChange::Remove(fingerprint)) => {
                self.bytes.push(DEAD_LETTER_GONE);
                self.push_bytes(&[&key(fingerprint)]);
            }
        }
        if let Some(told) = commit.told() {
            self.push_event(&told);
        }
    }

    fn push_state(&mut self, scope: &Scope, writes: &BTreeMap<String, Option<Bytes>>, version: Version) {
        for (key, value) in writes {
            self.bytes.push(if value.is_some() { STATE } else { STATE_DELETED });
            let start = self.bytes.len();
            self.bytes.extend([0; 4]);
            layout::push_scope(&mut self.bytes, scope);
            self.bytes.extend_from_slice(key.as_bytes());
            let length = self.bytes.len() - start - 4;
            self.bytes[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
            if let Some(value) = value {
                self.push_bytes(&[&version.to_le_bytes(), value]);
            }
        }
    }

    pub(crate) fn push_event(&mut self, event: &FeedEntry) {
        self.bytes.push(EVENT);
        layout::push_feed_entry(&mut self.bytes, event);
    }

    pub(crate) fn push_bucket_gone(&mut self, id: u64) {
        self.bytes.push(BUCKET_GONE);
        self.bytes.extend(id.to_le_bytes());
    }

    pub(crate) fn push_sent(&mut self, position: OutboxPosition) {
        self.bytes.push(SENT);
        self.push_position(position);
    }

    fn push_position(&mut self, position: OutboxPosition) {
        self.bytes.extend(position.version.to_le_bytes());
        self.bytes.extend(position.index.to_le_bytes());
    }

    fn push_bytes(&mut self, pieces: &[&[u8]]) {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        self.bytes.extend((length as u32).to_le_bytes());
        for piece in pieces {
            self.bytes.extend_from_slice(piece);
        }
    }

    /// Closes the frame under its sequence number; `last_version` is that of the frame before it.
    pub(crate) fn finish(mut self, sequence: u64, last_version: Version, key: &ChecksumKey) -> Frame {
        let last_version = self.last_version.max(last_version);
        let payload_end = self.bytes.len();
        self.bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        self.bytes[4..8].copy_from_slice(&((payload_end - HEADER_BYTES) as u32).to_le_bytes());
        self.bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&last_version.to_le_bytes());
        let checksum = key.checksum(&self.bytes[..SUMMED_BYTES], &self.bytes[HEADER_BYTES..]);
        self.bytes[SUMMED_BYTES..CHECKED_BYTES].copy_from_slice(&checksum);
        let checksum = key.header_checksum(&self.bytes[..CHECKED_BYTES]);
        self.bytes[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&checksum);
        self.bytes.resize(payload_end.next_multiple_of(ALIGNMENT), 0);
        Frame { sequence, last_version, bytes: self.bytes.into(), payload_end }
    }
}

/// A frame's header, which this store wrote; the payload is unchecked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    /// Bytes of the whole frame, to the next one.
    pub(crate) length: usize,
    payload_end: usize,
    last_version: Version,
}

impl Header {
    /// Reads a header; `None` if there is none, or not one of this store. Its length is that of a
    /// frame which was really written here, so whoever reads the frame does no work in vain.
    pub(crate) fn read(bytes: &[u8], key: &ChecksumKey) -> Option<Self> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let number = |at: usize| bytes[at..].first_chunk().map(|chunk| u64::from_le_bytes(*chunk));
        let half = |at: usize| bytes[at..].first_chunk().map(|chunk| u32::from_le_bytes(*chunk));
        if half(0)? != MAGIC {
            return None;
        }
        let checked = fault::mutated("frame-header-unchecked")
            || key.header_checksum(&bytes[..CHECKED_BYTES]) == bytes[CHECKED_BYTES..];
        if !checked {
            return None;
        }
        let payload_end = HEADER_BYTES + half(4)? as usize;
        let length = payload_end.next_multiple_of(ALIGNMENT);
        Some(Self { sequence: number(8)?, last_version: number(16)?, payload_end, length })
    }
}

impl Frame {
    /// Checks a frame that was read; `None` if it is not whole or another store's.
    pub(crate) fn check(header: &Header, bytes: Bytes, key: &ChecksumKey) -> Option<Self> {
        let checksum = bytes.get(SUMMED_BYTES..CHECKED_BYTES)?;
        let payload = bytes.get(HEADER_BYTES..header.payload_end)?;
        if bytes.len() != header.length || key.checksum(&bytes[..SUMMED_BYTES], payload) != checksum {
            return None;
        }
        let Header { sequence, last_version, payload_end, .. } = *header;
        Some(Self { sequence, last_version, bytes, payload_end })
    }

    /// The changes in the order they were made.
    pub(crate) fn entries(&self) -> Entries {
        Entries { frame: self.bytes.clone(), at: HEADER_BYTES, end: self.payload_end }
    }
}

/// Reads a frame's entries. `Some(None)` never comes from a frame whose checksum holds.
pub(crate) struct Entries {
    frame: Bytes,
    at: usize,
    end: usize,
}

impl Entries {
    fn take(&mut self, length: usize) -> Option<Bytes> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.end)?;
        let slice = self.frame.slice(self.at..end);
        self.at = end;
        Some(slice)
    }

    fn number<const N: usize>(&mut self) -> Option<[u8; N]> {
        let chunk = *self.frame.get(self.at..self.end)?.first_chunk()?;
        self.at += N;
        Some(chunk)
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let length = u32::from_le_bytes(self.number()?);
        self.take(length as usize)
    }

    fn position(&mut self) -> Option<OutboxPosition> {
        let version = u64::from_le_bytes(self.number()?);
        Some(OutboxPosition { version, index: u32::from_le_bytes(self.number()?) })
    }

    fn event(&mut self) -> Option<Range<usize>> {
        let event = self.at..self.at + layout::feed_entry_len(self.frame.get(self.at..self.end)?)?;
        self.at = event.end;
        Some(event)
    }

    fn entry(&mut self) -> Option<Entry> {
        let [kind] = self.number()?;
        Some(match kind {
            RECORD | RECORD_AGAIN => {
                let hash = u128::from_le_bytes(self.number()?);
                let end_ms = Some(u64::from_le_bytes(self.number()?)).filter(|end| *end != NEVER);
                let length = layout::row_at(self.frame.get(..self.end)?, self.at)?.len();
                Entry::Record { hash, end_ms, replaces: kind == RECORD_AGAIN, row: self.take(length)? }
            }
            STATE => Entry::State { key: self.bytes()?, value: Some(self.bytes()?) },
            STATE_DELETED => Entry::State { key: self.bytes()?, value: None },
            OUTGOING => Entry::Outgoing { position: self.position()?, message: self.bytes()? },
            SENT => Entry::Sent(self.position()?),
            DEAD_LETTER => Entry::HeldMessage { key: self.bytes()?, held_message: Some(self.bytes()?) },
            RECORD_GONE => Entry::RecordGone { hash: u128::from_le_bytes(self.number()?) },
            DEAD_LETTER_GONE => Entry::HeldMessage { key: self.bytes()?, held_message: None },
            EVENT => Entry::Event(self.event()?),
            BUCKET_GONE => Entry::BucketGone { id: u64::from_le_bytes(self.number()?) },
            _ => return None,
        })
    }
}

impl Iterator for Entries {
    type Item = Option<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.at < self.end).then(|| {
            self.entry().or_else(|| {
                // An entry that cannot be read is reported once, and ends the iteration.
                self.at = self.end;
                None
            })
        })
    }
}
