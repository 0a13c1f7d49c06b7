//! Writes of the redb store: a group in one transaction, synced before it returns. Decides nothing but whether what a
//! commit expects is still so.

use std::sync::atomic::{AtomicU64, Ordering};

use hapax_core::context::{ReadSet, Version};
use hapax_core::fault;
use hapax_core::record::Record;
use hapax_core::storage::{Commit, Group, StoreError, Verdict};
use redb::{Database, Durability, ReadableTable as _, Table, WriteTransaction};

use crate::open::running_error;
use crate::{layout, read};

/// Versions reserved at a time: so many commits between two writes of [`layout::META_LAST_VERSION`].
const VERSIONS_RESERVED: Version = 1 << 20;

/// Writes a group. `reserved` is the greatest version that the store may come to without saying so.
pub(crate) fn commit(database: &Database, reserved: &AtomicU64, group: &Group) -> Result<Vec<Verdict>, StoreError> {
    if fault::mutated("split-commit") {
        return commit_in_two(database, group);
    }
    let txn = begin(database)?;
    let reserve = reserve_versions(&txn, reserved, group)?;
    let verdicts = write_group(&txn, group, Part::All)?;
    fault::point("group-written");
    txn.commit().map_err(running_error)?;
    reserved.store(reserve, Ordering::Relaxed);
    Ok(verdicts)
}

/// Reserves further versions when the group passes the last one reserved: a page of its own in every commit would cost
/// more than the numbers that a restart skips.
fn reserve_versions(txn: &WriteTransaction, reserved: &AtomicU64, group: &Group) -> Result<Version, StoreError> {
    let reserved = reserved.load(Ordering::Relaxed);
    let Some(last) = group.commits.last().filter(|last| last.version > reserved) else { return Ok(reserved) };
    let reserve = last.version + VERSIONS_RESERVED;
    let mut meta = txn.open_table(layout::META).map_err(running_error)?;
    meta.insert(layout::META_LAST_VERSION, &reserve.to_le_bytes()[..]).map_err(running_error)?;
    Ok(reserve)
}

/// The mutation "the commit is split in two transactions": records first, what they stand for afterwards.
fn commit_in_two(database: &Database, group: &Group) -> Result<Vec<Verdict>, StoreError> {
    let txn = begin(database)?;
    let verdicts = write_group(&txn, group, Part::Records)?;
    txn.commit().map_err(running_error)?;
    fault::point("group-written");
    let txn = begin(database)?;
    write_group(&txn, group, Part::Effects)?;
    txn.commit().map_err(running_error)?;
    Ok(verdicts)
}

fn begin(database: &Database) -> Result<WriteTransaction, StoreError> {
    let mut txn = database.begin_write().map_err(running_error)?;
    txn.set_durability(Durability::Immediate).map_err(running_error)?;
    Ok(txn)
}

/// Which half of a commit to write; the halves exist for the mutation above.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Records,
    Effects,
}

type ByteTable<'t> = Table<'t, &'static [u8], &'static [u8]>;

struct Tables<'t> {
    records: ByteTable<'t>,
    state: ByteTable<'t>,
    outbox: Table<'t, (u64, u32), &'static [u8]>,
    dead_letters: ByteTable<'t>,
}

fn write_group(txn: &WriteTransaction, group: &Group, part: Part) -> Result<Vec<Verdict>, StoreError> {
    let mut tables = Tables {
        records: txn.open_table(layout::RECORDS).map_err(running_error)?,
        state: txn.open_table(layout::STATE).map_err(running_error)?,
        outbox: txn.open_table(layout::OUTBOX).map_err(running_error)?,
        dead_letters: txn.open_table(layout::DEAD_LETTERS).map_err(running_error)?,
    };
    for sent in &group.sent {
        tables.outbox.remove((sent.version, sent.index)).map_err(running_error)?;
    }
    let verdicts = group.commits.iter().map(|commit| tables.write(commit, part)).collect::<Result<_, _>>()?;
    Ok(verdicts)
}

impl Tables<'_> {
    fn write(&mut self, commit: &Commit, part: Part) -> Result<Verdict, StoreError> {
        let key = layout::record_key(&commit.key);
        if part != Part::Effects {
            let found = self.record(&key)?;
            if found.as_ref().map(|record| record.epoch) != commit.expected_epoch {
                return Ok(Verdict::Taken(found.map(Box::new)));
            }
            if !self.stands(commit)? {
                return Ok(Verdict::Conflict);
            }
            if let Some(record) = &commit.record {
                self.records.insert(key.as_slice(), layout::encode(record).as_slice()).map_err(running_error)?;
            }
        }
        if part != Part::Records {
            self.write_effects(commit, &key)?;
        }
        Ok(Verdict::Committed)
    }

    fn write_effects(&mut self, commit: &Commit, record_key: &[u8]) -> Result<(), StoreError> {
        if !commit.effects.writes.is_empty() {
            let prefix = layout::scope_prefix(&commit.key.scope);
            for (key, value) in &commit.effects.writes {
                let key = layout::state_key(&prefix, key);
                match value {
                    Some(value) => {
                        let value = layout::state_value(commit.version, value);
                        self.state.insert(key.as_slice(), value.as_slice()).map_err(running_error)?;
                    }
                    None => drop(self.state.remove(key.as_slice()).map_err(running_error)?),
                }
            }
        }
        for row in commit.outbox_rows() {
            let position = (row.position.version, row.position.index);
            self.outbox.insert(position, layout::encode(&row.message).as_slice()).map_err(running_error)?;
        }
        if let Some(letter) = &commit.dead_letter {
            let key = layout::dead_letter_key(record_key, &letter.fingerprint);
            self.dead_letters.insert(key.as_slice(), layout::encode(letter).as_slice()).map_err(running_error)?;
        }
        Ok(())
    }

    fn record(&self, key: &[u8]) -> Result<Option<Record>, StoreError> {
        match self.records.get(key).map_err(running_error)? {
            None => Ok(None),
            Some(value) => layout::decode(value.value())
                .map(Some)
                .ok_or_else(|| StoreError::Damaged("a record cannot be decoded".into())),
        }
    }

    /// Whether everything the run read is still so.
    fn stands(&self, commit: &Commit) -> Result<bool, StoreError> {
        let ReadSet { keys, ranges } = &commit.reads;
        if keys.is_empty() && ranges.is_empty() {
            return Ok(true);
        }
        let prefix = layout::scope_prefix(&commit.key.scope);
        for (key, version) in keys {
            let entry = self.state.get(layout::state_key(&prefix, key).as_slice()).map_err(running_error)?;
            let now = entry.and_then(|entry| layout::parse_state_value(entry.value()).map(|(version, _)| version));
            if now.unwrap_or(0) != *version {
                return Ok(false);
            }
        }
        for range in ranges {
            let now = read::scan_table(&self.state, &prefix, &range.start, range.end.as_deref(), range.limit)?;
            if !now.iter().map(|(key, version, _)| (key, version)).eq(range.seen.iter().map(|(k, v)| (k, v))) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

pub(crate) fn cleanup(database: &Database, older_than_ms: u64, limit: usize) -> Result<usize, StoreError> {
    let txn = begin(database)?;
    let mut removed = 0;
    {
        let mut records = txn.open_table(layout::RECORDS).map_err(running_error)?;
        let old = |value: &[u8]| {
            layout::decode::<Record>(value)
                .is_some_and(|record| record.state.is_terminal() && record.changed_ms < older_than_ms)
        };
        let mut keys = Vec::new();
        for row in records.iter().map_err(running_error)? {
            let (key, value) = row.map_err(running_error)?;
            if old(value.value()) {
                keys.push(key.value().to_vec());
                if keys.len() == limit {
                    break;
                }
            }
        }
        for key in keys {
            records.remove(key.as_slice()).map_err(running_error)?;
            removed += 1;
        }
    }
    txn.commit().map_err(running_error)?;
    Ok(removed)
}

pub(crate) fn set_format(database: &Database, format: u32) -> Result<(), StoreError> {
    let txn = begin(database)?;
    {
        let mut meta = txn.open_table(layout::META).map_err(running_error)?;
        meta.insert(layout::META_FORMAT, &format.to_le_bytes()[..]).map_err(running_error)?;
    }
    txn.commit().map_err(running_error)
}
