//! The stored format, version 4: tables, keys, values. `docs/internals/storage-format.md` says the
//! same in words; change both together.

use hapax_core::{Cursor, FeedEntry, FeedEventKind, Fingerprint, HeldKey, Record, RecordKey, Scope, Version};
use redb::TableDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::format::seal::{Sealed, Seals};

/// The version of the format that this build reads and writes.
pub(crate) const FORMAT: u32 = 4;

/// Facts about the store: see the `META_` names.
pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Records that no expiry may take: hash of the record key to row.
pub(crate) const KEPT: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("kept");
/// Buckets of records that expire together: number to (end of the window in milliseconds since the
/// Unix epoch, rows, seal of both).
pub(crate) const BUCKETS: TableDefinition<'_, u64, (u64, u64, u64)> = TableDefinition::new("buckets");
/// State of one scope: the key's text, to version (8 bytes, little endian) and value. See
/// [`state_name`].
pub(crate) type StateTable<'a> = TableDefinition<'a, &'static [u8], &'static [u8]>;
/// Begins the name of every table of state.
pub(crate) const STATE_NAMES: &str = "state/";
/// Messages to send: version of the commit and index in it, to the encoded message.
pub(crate) const OUTBOX: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("outbox");
/// Held messages: encoded record key and fingerprint digest, to the encoded message.
pub(crate) const DEAD_LETTERS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("dead_letters");

/// Events of the feed in blocks: group and index of the block's first event, to the block. See
/// [`push_placed`].
pub(crate) const FEED: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("feed");

/// Sums of the tables' seals, by table.
pub(crate) const SUMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sums");

/// In [`META`]: the format's version, 4 bytes, little endian.
pub(crate) const META_FORMAT: &str = "format";
/// In [`META`]: the store's identity, 32 hex digits; the file `STORE` beside the database holds the
/// same.
pub(crate) const META_STORE_ID: &str = "store-id";
/// In [`META`]: how far the journal was applied, 32 bytes: sequence number of the last applied
/// frame, offset of the one after it, last version, next free block; each 8 bytes, little endian.
pub(crate) const META_APPLIED: &str = "applied";
/// In [`META`]: present, and empty, once the journal was found under its name.
pub(crate) const META_JOURNAL: &str = "journal";
/// In [`META`]: extent of the feed's table, 20 bytes: number of events, group and index of the last
/// dropped event; 8, 8 and 4 bytes, little endian.
pub(crate) const META_FEED: &str = "feed";

/// Rows are stored in blocks of at most this many bytes (one row may be longer): a page of 4 KiB
/// holds one, with redb's own bytes around it. Larger ones save little when written, and cost every
/// look-up a larger read.
pub(crate) const BLOCK_BYTES: usize = 4_000;
/// Shortest window of expiry, in milliseconds.
const WINDOW_MS_MIN: u64 = 60_000;
/// Bits of a location that hold the offset inside the block; the rest is the block's number.
const OFFSET_BITS: u32 = 20;
/// The index of a bucket: hash of the record key to location.
pub(crate) type IndexTable<'a> = TableDefinition<'a, u128, u64>;
/// The rows of a bucket: number of the block to the block.
pub(crate) type RowsTable<'a> = TableDefinition<'a, u64, &'static [u8]>;

/// Progress of the applier in the journal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Sequence number of the last applied frame; 0 before the first.
    pub(crate) sequence: u64,
    /// Offset in the journal of the frame after it.
    pub(crate) next_offset: u64,
    /// A version that no applied commit has exceeded.
    pub(crate) last_version: Version,
    /// Number of the next block of rows.
    pub(crate) next_block: u64,
}

impl Applied {
    pub(crate) fn encode(&self) -> [u8; 32] {
        let mut out = [0; 32];
        let fields = [self.sequence, self.next_offset, self.last_version, self.next_block];
        for (field, place) in fields.iter().zip(out.chunks_exact_mut(8)) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 32] = bytes.try_into().ok()?;
        let field = |at: usize| bytes[at * 8..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk));
        Some(Self { sequence: field(0), next_offset: field(1), last_version: field(2), next_block: field(3) })
    }
}

/// Extent of the feed's table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FeedFacts {
    /// Events in all blocks.
    pub(crate) events: u64,
    /// The last event that was dropped; before the first one, if none was.
    pub(crate) dropped: Cursor,
}

impl FeedFacts {
    pub(crate) fn encode(&self) -> [u8; 20] {
        let mut out = [0; 20];
        out[..8].copy_from_slice(&self.events.to_le_bytes());
        out[8..16].copy_from_slice(&self.dropped.sequence.to_le_bytes());
        out[16..].copy_from_slice(&self.dropped.index.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (events, rest) = bytes.split_first_chunk()?;
        let (sequence, index) = rest.split_first_chunk()?;
        let dropped =
            Cursor { sequence: u64::from_le_bytes(*sequence), index: u32::from_le_bytes(index.try_into().ok()?) };
        Some(Self { events: u64::from_le_bytes(*events), dropped })
    }
}

/// Name of a bucket's index table.
pub(crate) fn index_name(bucket: u64) -> String {
    format!("index/{bucket}")
}

/// Name of a bucket's table of rows.
pub(crate) fn rows_name(bucket: u64) -> String {
    format!("rows/{bucket}")
}

/// Returns a row's location, from its block and the offset in the block.
pub(crate) fn location(block: u64, offset: usize) -> u64 {
    block << OFFSET_BITS | offset as u64
}

/// Returns the block and the offset of a location.
pub(crate) fn split_location(location: u64) -> (u64, usize) {
    (location >> OFFSET_BITS, (location & ((1 << OFFSET_BITS) - 1)) as usize)
}

/// Returns the seal of an index's entry, which only its table's sum holds.
pub(crate) fn entry_seal(seals: &Seals, hash: u128, location: u64) -> u64 {
    seals.of(Sealed::Index, &[&hash.to_le_bytes()], &location.to_le_bytes())
}

/// Returns the seal of a bucket's facts.
pub(crate) fn bucket_seal(seals: &Seals, id: u64, end_ms: u64, rows: u64) -> u64 {
    let mut facts = [0; 16];
    facts[..8].copy_from_slice(&end_ms.to_le_bytes());
    facts[8..].copy_from_slice(&rows.to_le_bytes());
    seals.of(Sealed::Buckets, &[&id.to_le_bytes()], &facts)
}

/// Returns the bytes of an event block's key or an outbox message's, for its seal.
pub(crate) fn pair_key(key: (u64, u32)) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&key.0.to_le_bytes());
    out[8..].copy_from_slice(&key.1.to_le_bytes());
    out
}

/// Appends the row of a record: length of the rest, length of the key, key, record. Lengths are 4
/// bytes, little endian.
pub(crate) fn push_row(out: &mut Vec<u8>, key: &RecordKey, record: &Record) {
    let start = out.len();
    out.extend([0; 8]);
    push_record_key(out, key);
    let key_length = out.len() - start - 8;
    postcard::to_io(record, &mut *out).expect("a vector takes every byte");
    let length = out.len() - start - 4;
    out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&(key_length as u32).to_le_bytes());
}

/// Returns the whole row that begins at `at` in a block, and its seal.
pub(crate) fn sealed_row_at(block: &[u8], at: usize) -> Option<(&[u8], u64)> {
    let row = row_at(block, at)?;
    let seal = block.get(at + row.len()..)?.first_chunk()?;
    Some((row, u64::from_le_bytes(*seal)))
}

/// Returns the whole row that begins at `at`.
pub(crate) fn row_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let length = u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize;
    bytes.get(at..at.checked_add(4 + length)?)
}

/// Returns the encoded record key and the record of a row.
pub(crate) fn split_row(row: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_le_bytes(*row.get(4..)?.first_chunk()?) as usize;
    row.get(8..)?.split_at_checked(length)
}

/// Ends a part of a key. Sorts before every byte of a part, escaped as `00 FF`, so that keys sort
/// as their parts do.
const PART_END: [u8; 2] = [0, 1];

fn push_part(out: &mut Vec<u8>, part: &str) {
    // A part has no zeros, nearly always: that is seen faster than it is split.
    if part.as_bytes().contains(&0) {
        for run in part.as_bytes().split_inclusive(|byte| *byte == 0) {
            out.extend_from_slice(run);
            if run.ends_with(&[0]) {
                out.push(0xff);
            }
        }
    } else {
        out.extend_from_slice(part.as_bytes());
    }
    out.extend_from_slice(&PART_END);
}

fn split_part(bytes: &[u8]) -> Option<(String, &[u8])> {
    let mut part = Vec::new();
    let mut at = 0;
    loop {
        match (*bytes.get(at)?, bytes.get(at + 1)) {
            (0, Some(0xff)) => {
                part.push(0);
                at += 2;
            }
            (0, Some(1)) => return Some((String::from_utf8(part).ok()?, &bytes[at + 2..])),
            (0, _) => return None,
            (byte, _) => {
                part.push(byte);
                at += 1;
            }
        }
    }
}

/// The common beginning of everything of one scope.
pub(crate) fn scope_prefix(scope: &Scope) -> Vec<u8> {
    let mut out = Vec::with_capacity(scope.tenant.len() + scope.processor.len() + 4);
    push_scope(&mut out, scope);
    out
}

pub(crate) fn push_scope(out: &mut Vec<u8>, scope: &Scope) {
    push_part(out, &scope.tenant);
    push_part(out, &scope.processor);
}

pub(crate) fn record_key(key: &RecordKey) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    push_record_key(&mut out, key);
    out
}

pub(crate) fn push_record_key(out: &mut Vec<u8>, key: &RecordKey) {
    push_scope(out, &key.scope);
    push_part(out, &key.source);
    push_part(out, &key.key);
}

pub(crate) fn parse_record_key(bytes: &[u8]) -> Option<RecordKey> {
    let (tenant, rest) = split_part(bytes)?;
    let (processor, rest) = split_part(rest)?;
    let (source, rest) = split_part(rest)?;
    let (key, _) = split_part(rest)?;
    let scope = Scope { tenant: tenant.into(), processor: processor.into() };
    Some(RecordKey::new(scope, source.into(), key.into()))
}

/// Name of the table of a scope's state: a table each keeps its keys short, and so its pages few.
pub(crate) fn state_name(scope: &Scope) -> String {
    let part = |part: &str| part.replace('%', "%25").replace('/', "%2F");
    format!("{STATE_NAMES}{}/{}", part(&scope.tenant), part(&scope.processor))
}

/// Returns the scope whose state is in the table of that name.
pub(crate) fn parse_state_name(name: &str) -> Option<Scope> {
    let (tenant, processor) = name.strip_prefix(STATE_NAMES)?.split_once('/')?;
    let part = |part: &str| part.replace("%2F", "/").replace("%25", "%").into();
    Some(Scope { tenant: part(tenant), processor: part(processor) })
}

/// The scope that an encoded key begins with, and its length.
pub(crate) fn parse_scope(bytes: &[u8]) -> Option<(Scope, usize)> {
    let (tenant, rest) = split_part(bytes)?;
    let (processor, rest) = split_part(rest)?;
    let scope = Scope { tenant: tenant.into(), processor: processor.into() };
    Some((scope, bytes.len() - rest.len()))
}

pub(crate) fn state_key(prefix: &[u8], key: &str) -> Vec<u8> {
    [prefix, key.as_bytes()].concat()
}

pub(crate) fn dead_letter_key(record_key: &[u8], fingerprint: &Fingerprint) -> Vec<u8> {
    held_key(record_key, &fingerprint.digest)
}

pub(crate) fn held_key(record_key: &[u8], fingerprint: &[u8; 16]) -> Vec<u8> {
    [record_key, &fingerprint[..]].concat()
}

pub(crate) fn parse_letter_key(bytes: &[u8]) -> Option<HeldKey> {
    let (record, fingerprint) = bytes.split_last_chunk::<16>()?;
    Some(HeldKey { record: parse_record_key(record)?, fingerprint: *fingerprint })
}

pub(crate) fn parse_state_value(bytes: &[u8]) -> Option<(Version, &[u8])> {
    let (version, value) = bytes.split_first_chunk::<8>()?;
    Some((Version::from_le_bytes(*version), value))
}

/// The window in which a terminal record expires: buckets end on multiples of a sixteenth of its
/// retention, so that a record outlives its retention by a sixteenth at most (and a minute), and
/// few buckets exist at a time.
pub(crate) fn window_end_ms(record: &Record) -> Option<u64> {
    let expires_ms = record.expires_ms.filter(|_| record.state.is_terminal())?;
    let window_ms = (expires_ms.saturating_sub(record.changed_ms) / 16).max(WINDOW_MS_MIN);
    Some((expires_ms / window_ms).saturating_add(1).saturating_mul(window_ms))
}

/// Appends an event of the feed: its kind, the digest (16 bytes, little endian), and in postcard's
/// encoding the time, the attempts, the epoch, and the count.
pub(crate) fn push_feed_entry(out: &mut Vec<u8>, entry: &FeedEntry) {
    out.push(entry.kind as u8);
    out.extend(entry.digest.to_le_bytes());
    for fact in [entry.at_ms, entry.attempts.into(), entry.epoch, entry.times] {
        push_varint(out, fact);
    }
}

/// Appends a number as postcard does: seven bits a byte, the lowest first, the eighth where more
/// follow.
fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Bytes of the event that `bytes` begin with, which [`take_feed_entry`] reads.
pub(crate) fn feed_entry_len(bytes: &[u8]) -> Option<usize> {
    let mut at = 1 + size_of::<u128>();
    FeedEventKind::of_number(*bytes.first()?)?;
    for _ in 0..4 {
        at += bytes.get(at..)?.iter().position(|byte| byte & 0x80 == 0)? + 1;
    }
    Some(at)
}

/// Reads the event that `bytes` begin with; returns it and the rest.
pub(crate) fn take_feed_entry(bytes: &[u8]) -> Option<(FeedEntry, &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (digest, rest) = rest.split_first_chunk()?;
    let ((at_ms, attempts, epoch, times), rest) = postcard::take_from_bytes(rest).ok()?;
    let (kind, digest) = (FeedEventKind::of_number(*kind)?, u128::from_le_bytes(*digest));
    Some((FeedEntry { kind, digest, at_ms, attempts, epoch, times }, rest))
}

/// Appends an event to a block whose first one is of the group `first`: in postcard's encoding the
/// number of groups after `first` and its index in its group; then the event, as
/// [`push_feed_entry`] wrote it.
pub(crate) fn push_placed(out: &mut Vec<u8>, first: u64, cursor: Cursor, event: &[u8]) {
    push_varint(out, cursor.sequence - first);
    push_varint(out, cursor.index.into());
    out.extend_from_slice(event);
}

/// The events of a block whose first one is of the group `first`.
pub(crate) fn parse_block(first: u64, mut bytes: &[u8]) -> Option<Vec<(Cursor, FeedEntry)>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let ((later, index), rest) = postcard::take_from_bytes::<(u64, u32)>(bytes).ok()?;
        let (entry, rest) = take_feed_entry(rest)?;
        events.push((Cursor { sequence: first.checked_add(later)?, index }, entry));
        bytes = rest;
    }
    Some(events)
}

/// A value in postcard's encoding, which is specified and stable since its version 1.0.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("what is stored has no map of unknown length and no custom serializer")
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}

/// The first key after everything that begins with `prefix`; prefixes end in [`PART_END`], so it is
/// always there.
pub(crate) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_keys_come_back_and_sort_as_their_parts() {
        let key = |source: &str, key: &str| RecordKey::new(Scope::of("p"), source.into(), key.into());
        let keys = [key("a", "z"), key("a\0", "b"), key("a\0b", "a"), key("ab", "a"), key("b", "")];
        let encoded: Vec<_> = keys.iter().map(record_key).collect();
        assert!(encoded.is_sorted(), "{encoded:?}");
        for (key, bytes) in keys.iter().zip(&encoded) {
            assert_eq!(parse_record_key(bytes).as_ref(), Some(key));
        }
        assert_eq!(parse_record_key(&encoded[0][..5]), None);
    }
}
