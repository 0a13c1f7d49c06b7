//! Reads: the memtables first, newest to oldest, then the tables. Each answer is of one moment, and
//! holds every commit that was durable when the read began.

use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use hapax_core::{
    Entry, HeldKey, HeldMessage, Message, OutboxPosition, OutboxRow, Record, RecordKey, Scope, StateView, StoreError,
    Version,
};
use redb::{ReadableTable as _, ReadableTableMetadata as _};

use crate::format::layout;
use crate::format::seal::Sealed;
use crate::redb::core::Core;
use crate::redb::listings::Pace;
use crate::redb::open::running_error;
use crate::redb::view::{BucketTables, Snapshot, View};

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("{what} cannot be decoded").into())
}

/// Result of a look-up in the memtables: no entry, or the entry, which may be a deletion.
fn newest<T>(view: &View, look: impl Fn(&crate::redb::memtable::Memtable) -> Option<T>) -> Option<T> {
    view.memtables().find_map(look)
}

pub(crate) fn record(core: &Core, key: &RecordKey) -> Result<Option<Record>, StoreError> {
    let hash = key.digest();
    let (above, snapshot) = {
        let view = core.view.read();
        (newest(&view, |memtable| memtable.records.get(&hash).map(|slot| slot.row.clone())), view.snapshot.clone())
    };
    match above {
        Some(row) => row.map(|row| decode_row(&row, key)).transpose(),
        None => stored(&snapshot, key, hash),
    }
}

/// Returns the record in the tables.
fn stored(snapshot: &Snapshot, key: &RecordKey, hash: u128) -> Result<Option<Record>, StoreError> {
    stored_row(snapshot, hash, |row| decode_row(row, key))
}

/// Returns the result of `read` for the row with that hash in the tables.
fn stored_row<T>(
    snapshot: &Snapshot,
    hash: u128,
    read: impl FnOnce(&[u8]) -> Result<T, StoreError>,
) -> Result<Option<T>, StoreError> {
    if !snapshot.kept_is_empty
        && let Some(row) = snapshot.kept.get(hash).map_err(running_error)?
    {
        return read(snapshot.seals.open(Sealed::Kept, &[&hash.to_le_bytes()], row.value())?).map(Some);
    }
    // Newest bucket first: most duplicates arrive soon after the first delivery.
    for tables in snapshot.buckets.iter().rev().filter(|tables| tables.bucket.may_hold(hash)) {
        if let Some(location) = tables.index.get(hash).map_err(running_error)? {
            return with_row(snapshot, tables, (hash, location.value()), read).map(Some);
        }
    }
    Ok(None)
}

/// Returns the key of the record with that hash, if there is one.
pub(crate) fn key_of(core: &Core, hash: u128) -> Result<Option<RecordKey>, StoreError> {
    let (above, snapshot) = {
        let view = core.view.read();
        (newest(&view, |memtable| memtable.records.get(&hash).map(|slot| slot.row.clone())), view.snapshot.clone())
    };
    let key = |row: &[u8]| {
        let key = layout::split_row(row).and_then(|(key, _)| layout::parse_record_key(key));
        key.ok_or_else(|| damaged("a record's key"))
    };
    match above {
        Some(row) => row.map(|row| key(&row)).transpose(),
        None => stored_row(&snapshot, hash, key),
    }
}

/// Returns the result of `read` for the row to which an entry of the bucket's index points.
pub(crate) fn with_row<T>(
    snapshot: &Snapshot,
    tables: &BucketTables,
    (hash, location): (u128, u64),
    read: impl FnOnce(&[u8]) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let (block, offset) = layout::split_location(location);
    let block = tables.rows.get(block).map_err(running_error)?.ok_or_else(|| damaged("the place of a record"))?;
    let (row, seal) = layout::sealed_row_at(block.value(), offset).ok_or_else(|| damaged("a block of records"))?;
    snapshot.seals.check(Sealed::Rows, &[&hash.to_le_bytes()], row, seal)?;
    read(row)
}

/// Returns the record of a row, which must be the row of `key`: two keys with the same hash are
/// reported as an error, and never confused.
fn decode_row(row: &[u8], key: &RecordKey) -> Result<Record, StoreError> {
    let (stored, record) = layout::split_row(row).ok_or_else(|| damaged("a record"))?;
    if stored != layout::record_key(key) {
        return Err(StoreError::Damaged(format!("the hash of {key} is taken by another record").into()));
    }
    layout::decode(record).ok_or_else(|| damaged("a record"))
}

fn any_row(row: &[u8]) -> Result<(RecordKey, Record), StoreError> {
    let (key, record) = layout::split_row(row).ok_or_else(|| damaged("a record"))?;
    let key = layout::parse_record_key(key).ok_or_else(|| damaged("a record's key"))?;
    Ok((key, layout::decode(record).ok_or_else(|| damaged("a record"))?))
}

/// Returns the hashes of records without expiry whose row passes the filter.
pub(crate) fn kept_where(
    snapshot: &Snapshot,
    limit: usize,
    wanted: &dyn Fn(&[u8]) -> bool,
) -> Result<Vec<u128>, StoreError> {
    let rows = snapshot.kept.iter().map_err(running_error)?;
    let hashes = rows.filter_map(|row| match row {
        Ok((hash, row)) => {
            let row = snapshot.seals.open(Sealed::Kept, &[&hash.value().to_le_bytes()], row.value());
            row.map(|row| wanted(row).then(|| hash.value())).transpose()
        }
        Err(error) => Some(Err(running_error(error))),
    });
    hashes.take(limit).collect()
}

/// Returns the hashes of a bucket's records whose row passes the filter.
pub(crate) fn bucket_where(
    snapshot: &Snapshot,
    tables: &BucketTables,
    limit: usize,
    wanted: &dyn Fn(&[u8]) -> bool,
) -> Result<Vec<u128>, StoreError> {
    let mut found = Vec::new();
    for row in tables.index.iter().map_err(running_error)? {
        if found.len() == limit {
            break;
        }
        let (hash, location) = row.map_err(running_error)?;
        if with_row(snapshot, tables, (hash.value(), location.value()), |row| Ok(wanted(row)))? {
            found.push(hash.value());
        }
    }
    Ok(found)
}

/// Returns up to `limit` records after `after`, in key order. Records are stored by hash, so each
/// page scans all of them, in little memory: meant for operators, not for the pipeline.
pub(crate) fn records(
    core: &Core,
    processor: Option<&str>,
    after: Option<&RecordKey>,
    limit: usize,
) -> Result<Vec<(RecordKey, Record)>, StoreError> {
    core.flush()?;
    let snapshot = core.view.read().snapshot.clone();
    let after = after.map(layout::record_key);
    let prefix = processor.map(|processor| layout::scope_prefix(&Scope::of(processor)));
    let mut pace = Pace::new(core);
    // The least encoded keys so far, the greatest of them on top.
    let mut least: BinaryHeap<(Vec<u8>, Vec<u8>)> = BinaryHeap::new();
    let mut offer = |row: &[u8]| -> Result<(), StoreError> {
        pace.row();
        let (key, _) = layout::split_row(row).ok_or_else(|| damaged("a record"))?;
        let wanted = after.as_deref().is_none_or(|after| key > after)
            && prefix.as_deref().is_none_or(|prefix| key.starts_with(prefix))
            && (least.len() < limit || least.peek().is_some_and(|(greatest, _)| key < greatest.as_slice()));
        if wanted {
            least.push((key.to_vec(), row.to_vec()));
            if least.len() > limit {
                least.pop();
            }
        }
        Ok(())
    };
    for row in snapshot.kept.iter().map_err(running_error)? {
        let (hash, row) = row.map_err(running_error)?;
        offer(snapshot.seals.open(Sealed::Kept, &[&hash.value().to_le_bytes()], row.value())?)?;
    }
    for tables in &snapshot.buckets {
        for row in tables.index.iter().map_err(running_error)? {
            let (hash, location) = row.map_err(running_error)?;
            with_row(&snapshot, tables, (hash.value(), location.value()), &mut offer)?;
        }
    }
    least.into_sorted_vec().iter().map(|(_, row)| any_row(row)).collect()
}

/// Returns up to `limit` messages to send after `after`, in order: as many as have `bytes_max`
/// bytes together, and at least one.
pub(crate) fn pending(
    core: &Core,
    after: Option<OutboxPosition>,
    limit: usize,
    bytes_max: usize,
) -> Result<Vec<OutboxRow>, StoreError> {
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    let (above, sent, snapshot) = {
        let view = core.view.read();
        // Collect the sent marks first: a row and its sent mark may be in different memtables.
        let sent: std::collections::BTreeSet<_> = view.memtables().flat_map(|m| m.sent.iter().copied()).collect();
        let mut above: BTreeMap<OutboxPosition, Bytes> = BTreeMap::new();
        for memtable in view.memtables() {
            let rows =
                memtable.outbox.range((start, Bound::Unbounded)).filter(|(position, _)| !sent.contains(position));
            above.extend(rows.take(limit).map(|(position, message)| (*position, message.clone())));
        }
        (above, sent, view.snapshot.clone())
    };
    let start = after.map_or(Bound::Unbounded, |after| Bound::Excluded((after.version, after.index)));
    let (mut rows, mut bytes) = (Vec::new(), 0_usize);
    for row in snapshot.outbox.range::<(u64, u32)>((start, Bound::Unbounded)).map_err(running_error)? {
        let (position, message) = row.map_err(running_error)?;
        let (version, index) = position.value();
        let position = OutboxPosition { version, index };
        if rows.len() == limit || bytes > bytes_max {
            break;
        }
        if !sent.contains(&position) {
            let key = layout::pair_key((version, index));
            let message = snapshot.seals.open(Sealed::Outbox, &[&key], message.value())?;
            bytes = bytes.saturating_add(message.len());
            rows.push((position, Bytes::copy_from_slice(message)));
        }
    }
    // Versions only grow: what the tables hold comes before what is not applied.
    rows.extend(above);
    rows.sort_by_key(|(position, _)| *position);
    let mut bytes = 0_usize;
    let fit = rows.into_iter().take(limit).enumerate().take_while(|(index, (_, message))| {
        bytes = bytes.saturating_add(message.len());
        *index == 0 || bytes <= bytes_max
    });
    let decoded = fit.map(|(_, (position, message))| {
        let message: Message = layout::decode(&message).ok_or_else(|| damaged("an outbox message"))?;
        Ok(OutboxRow { position, message })
    });
    decoded.collect()
}

pub(crate) fn outbox_len(core: &Core) -> Result<u64, StoreError> {
    let view = core.view.read();
    let above: usize = view.memtables().map(|memtable| memtable.outbox.len()).sum();
    let sent: usize = view.memtables().map(|memtable| memtable.sent.len()).sum();
    let stored = view.snapshot.outbox.len().map_err(running_error)?;
    Ok((stored + above as u64).saturating_sub(sent as u64))
}

/// Returns the messages that are held under a record.
pub(crate) fn held_under(core: &Core, key: &RecordKey) -> Result<Vec<HeldMessage>, StoreError> {
    let start = layout::record_key(key);
    let end = layout::after_prefix(&start);
    let held_messages = kept_messages(core, (Bound::Included(&start[..]), Bound::Excluded(&end[..])), usize::MAX)?;
    Ok(held_messages.into_iter().map(|(_, held_message)| held_message).collect())
}

/// Returns up to `limit` held messages after `after`, of one processor if given.
pub(crate) fn held_messages(
    core: &Core,
    processor: Option<&str>,
    after: Option<&HeldKey>,
    limit: usize,
) -> Result<Vec<(HeldKey, HeldMessage)>, StoreError> {
    let after = after.map(|after| layout::held_key(&layout::record_key(&after.record), &after.fingerprint));
    let prefix = processor.map(|processor| layout::scope_prefix(&Scope::of(processor)));
    let end = prefix.as_deref().map(layout::after_prefix);
    let start = match (&after, &prefix) {
        (Some(after), _) => Bound::Excluded(&after[..]),
        (None, Some(prefix)) => Bound::Included(&prefix[..]),
        (None, None) => Bound::Unbounded,
    };
    kept_messages(core, (start, end.as_deref().map_or(Bound::Unbounded, Bound::Excluded)), limit)
}

/// Returns the first held messages of a range of encoded keys.
fn kept_messages(
    core: &Core,
    range: (Bound<&[u8]>, Bound<&[u8]>),
    limit: usize,
) -> Result<Vec<(HeldKey, HeldMessage)>, StoreError> {
    let (mut held_messages, snapshot) = {
        let view = core.view.read();
        let mut held_messages: BTreeMap<Bytes, Option<Bytes>> = BTreeMap::new();
        for memtable in view.memtables() {
            for (key, held_message) in memtable.held_under.range::<[u8], _>(range) {
                held_messages.entry(key.clone()).or_insert_with(|| held_message.clone());
            }
        }
        (held_messages, view.snapshot.clone())
    };
    // Entries removed above hide rows below: read that many more.
    let hidden = held_messages.values().filter(|held_message| held_message.is_none()).count();
    for row in snapshot.held_under.range::<&[u8]>(range).map_err(running_error)?.take(limit.saturating_add(hidden)) {
        let (key, held_message) = row.map_err(running_error)?;
        let held_message = snapshot.seals.open(Sealed::Held, &[key.value()], held_message.value())?;
        let held_message = || Some(Bytes::copy_from_slice(held_message));
        held_messages.entry(Bytes::copy_from_slice(key.value())).or_insert_with(held_message);
    }
    let present = held_messages.into_iter().filter_map(|(key, held_message)| Some((key, held_message?)));
    let decoded = present.take(limit).map(|(key, held_message)| {
        let key = layout::parse_letter_key(&key).ok_or_else(|| damaged("a kept message's key"))?;
        Ok((key, layout::decode(&held_message).ok_or_else(|| damaged("a kept message"))?))
    });
    decoded.collect()
}

/// Returns version and value of a state key of the scope whose encoding is `prefix`; `(0, None)` if
/// the key is absent.
pub(crate) fn state(core: &Core, prefix: &[u8], key: &str) -> Result<(Version, Option<Bytes>), StoreError> {
    let whole = layout::state_key(prefix, key);
    let (above, snapshot) = {
        let view = core.view.read();
        (newest(&view, |memtable| memtable.state.get(&whole[..]).cloned()), view.snapshot.clone())
    };
    let entry = match above {
        Some(entry) => entry,
        None => {
            match snapshot.state(prefix).map(|table| table.get(key.as_bytes())).transpose().map_err(running_error)? {
                Some(Some(entry)) => {
                    let entry = snapshot.seals.open(Sealed::State, &[prefix, key.as_bytes()], entry.value())?;
                    Some(Bytes::copy_from_slice(entry))
                }
                None | Some(None) => None,
            }
        }
    };
    let Some(entry) = entry else { return Ok((0, None)) };
    let (version, _) = layout::parse_state_value(&entry).ok_or_else(|| damaged("a state entry"))?;
    Ok((version, Some(entry.slice(8..))))
}

/// Returns up to `limit` entries of a range of one scope's state, in key order.
pub(crate) fn scan(
    core: &Core,
    prefix: &[u8],
    start: &str,
    end: Option<&str>,
    limit: usize,
) -> Result<Vec<Entry>, StoreError> {
    if end.is_some_and(|end| end <= start) {
        return Ok(Vec::new());
    }
    let (above, snapshot) = {
        let first = layout::state_key(prefix, start);
        let past = end.map_or_else(|| layout::after_prefix(prefix), |end| layout::state_key(prefix, end));
        let view = core.view.read();
        let mut above: BTreeMap<Bytes, Option<Bytes>> = BTreeMap::new();
        for memtable in view.memtables() {
            let range = memtable.state.range::<[u8], _>((Bound::Included(&first[..]), Bound::Excluded(&past[..])));
            for (key, entry) in range {
                above.entry(key.slice(prefix.len()..)).or_insert_with(|| entry.clone());
            }
        }
        (above, view.snapshot.clone())
    };
    // Entries deleted above hide rows below: read that many more.
    let hidden = above.values().filter(|entry| entry.is_none()).count();
    let mut merged = below(&snapshot, prefix, start, end, limit.saturating_add(hidden))?;
    merged.extend(above);
    let present = merged.into_iter().filter_map(|(key, entry)| Some((key, entry?)));
    let entries = present.take(limit).map(|(key, entry)| {
        let key = std::str::from_utf8(&key).map_err(|_| damaged("a state key"))?;
        let (version, _) = layout::parse_state_value(&entry).ok_or_else(|| damaged("a state entry"))?;
        Ok((key.to_owned(), version, entry.slice(8..)))
    });
    entries.collect()
}

/// Returns the first entries of a range in the tables, by key.
fn below(
    snapshot: &Snapshot,
    prefix: &[u8],
    start: &str,
    end: Option<&str>,
    limit: usize,
) -> Result<BTreeMap<Bytes, Option<Bytes>>, StoreError> {
    let Some(table) = snapshot.state(prefix) else { return Ok(BTreeMap::new()) };
    let range =
        (Bound::Included(start.as_bytes()), end.map_or(Bound::Unbounded, |end| Bound::Excluded(end.as_bytes())));
    let rows = table.range::<&[u8]>(range).map_err(running_error)?.take(limit).map(|row| {
        let (key, entry) = row.map_err(running_error)?;
        let entry = snapshot.seals.open(Sealed::State, &[prefix, key.value()], entry.value())?;
        Ok((Bytes::copy_from_slice(key.value()), Some(Bytes::copy_from_slice(entry))))
    });
    rows.collect()
}

/// A view of one processor's state.
pub(crate) struct ScopeView {
    core: Arc<Core>,
    prefix: Vec<u8>,
}

impl ScopeView {
    pub(crate) fn new(core: Arc<Core>, scope: &Scope) -> Self {
        Self { core, prefix: layout::scope_prefix(scope) }
    }
}

impl StateView for ScopeView {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        Box::pin(ready(self.core.checked(|| state(&self.core, &self.prefix, key))))
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(ready(self.core.checked(|| scan(&self.core, &self.prefix, start, end, limit))))
    }
}
