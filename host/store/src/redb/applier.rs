//! The applier: brings the tables up to date behind the journal, one memtable a transaction, on a
//! thread of its own. Holds nothing that an append or a reader waits for; what it applied and how
//! far the journal is applied commit together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use hapax_core::{FeedEntry, FeedEventKind, Record, StoreError, fault};
use parking_lot::Mutex;
use redb::{Durability, Table, WriteTransaction};

use crate::format::frame::Builder;
use crate::format::layout::{self, Applied, BLOCK_BYTES};
use crate::format::seal::{SEAL_BYTES, Sealed, seal_of};
use crate::journal::Journal;
use crate::redb::buckets::{Bucket, Catalogue};
use crate::redb::core::{Core, Published};
use crate::redb::memtable::Memtable;
use crate::redb::open::running_error;
use crate::redb::sums::{Changes, write_fact};
use crate::redb::view::{BucketTables, Snapshot};
use crate::redb::{commit, feed, scrub};

/// Longest time that journalled entries wait in a memtable that is not full before they are
/// applied.
const IDLE: Duration = Duration::from_millis(100);

/// Applies memtables until the store closes, then applies the rest and returns. A failure closes
/// the store: the journal keeps what was not applied.
pub(crate) fn run(core: &Core) {
    while let Some(memtable) = next(core) {
        let applied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| apply(core, &memtable)));
        // redb panics on some damage, as if it were a bug of its own. Commits wait for this thread,
        // so the panic is caught and closes the store.
        let contradicts = || Err(StoreError::Damaged("the pages of the database contradict each other".into()));
        if let Err(error) = applied.unwrap_or_else(|_| contradicts()) {
            return core.fail(error);
        }
    }
}

/// The threads of an open store: the applier, the one that builds filters, the scrub. Dropping it
/// applies what is left.
pub(crate) struct Applying {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl Applying {
    pub(crate) fn start(core: Arc<Core>) -> std::io::Result<Self> {
        let spawn = |name: &str, work: fn(&Core)| {
            let core = core.clone();
            std::thread::Builder::new().name(name.into()).spawn(move || work(&core))
        };
        let threads = vec![
            spawn("hapax-applier", run)?,
            spawn("hapax-filters", build_filters)?,
            spawn("hapax-scrub", scrub::run)?,
        ];
        Ok(Self { core, threads })
    }
}

impl Drop for Applying {
    fn drop(&mut self) {
        self.core.progress.lock().closing = true;
        self.core.wake();
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed already; the journal holds the frames that were not
            // applied.
            let _ = thread.join();
        }
    }
}

/// Builds the filters of the buckets that were found at the start and take no more records, newest
/// first.
fn build_filters(core: &Core) {
    let snapshot = core.view.read().snapshot.clone();
    for tables in snapshot.buckets.iter().rev().filter(|tables| core.options.filters && !tables.bucket.has_filter()) {
        if core.progress.lock().closing {
            return;
        }
        if let Err(error) = tables.bucket.build_filter(&tables.index, 0, &|| core.progress.lock().closing) {
            // Without its filter the bucket is read: slower, not wrong.
            tracing::warn!("store: no filter for bucket {}: {error}", tables.bucket.id);
        }
    }
}

/// Waits for a memtable to apply; `None` when the store closes and all is applied.
fn next(core: &Core) -> Option<Arc<Memtable>> {
    let mut progress = core.progress.lock();
    loop {
        let (front, active_is_empty) = {
            let view = core.view.read();
            (view.frozen.front().cloned(), view.active.is_empty())
        };
        if front.is_some() || progress.failed.is_some() {
            return front.filter(|_| progress.failed.is_none());
        }
        match (active_is_empty, progress.closing) {
            (true, true) => return None,
            (true, false) => core.work.wait(&mut progress),
            (false, true) => core.view.write().freeze(),
            (false, false) => {
                if core.work.wait_for(&mut progress, IDLE).timed_out() {
                    core.view.write().freeze();
                }
            }
        }
    }
}

/// Writes one memtable in one transaction; then readers see the tables as they are now, and the
/// memtable goes.
fn apply(core: &Core, memtable: &Memtable) -> Result<(), StoreError> {
    let mut catalogue = core.catalogue.lock();
    let before = core.view.read().snapshot.clone();
    let txn = begin(core)?;
    let mut writer = Writer {
        txn: &txn,
        core,
        catalogue: &mut catalogue,
        made: Vec::new(),
        applied: before.applied,
        sums: Changes::default(),
    };
    // Drops buckets first, so that new records of their windows go into other buckets.
    writer.buckets_gone(memtable)?;
    writer.replace(memtable, &before)?;
    writer.records(memtable)?;
    writer.effects(memtable)?;
    feed::write(&txn, before.feed_facts, &memtable.events, core, &mut writer.sums)?;
    if !fault::mutated("apply-without-sequence") {
        writer.applied.sequence = memtable.end.sequence;
        writer.applied.next_offset = memtable.end.next_offset;
    }
    writer.applied.last_version = memtable.end.last_version;
    let (made, applied) = (std::mem::take(&mut writer.made), writer.applied);
    std::mem::take(&mut writer.sums).write(&txn, &core.seals)?;
    write_fact(&txn, &core.seals, layout::META_APPLIED, &applied.encode())?;
    fault::point("applied");
    txn.commit().map_err(running_error)?;
    fault::point("apply-durable");
    let stays = |bucket: &Arc<Bucket>| !memtable.buckets_gone.contains(&bucket.id);
    let buckets = before.buckets.iter().map(|tables| tables.bucket.clone()).filter(stays).chain(made);
    core.publish(Snapshot::open(&core.database, core.seals, buckets)?, Published::Applied);
    Ok(())
}

/// A transaction that is durable when committed, and whose database opens at once after a crash.
pub(crate) fn begin(core: &Core) -> Result<WriteTransaction, StoreError> {
    let mut txn = core.database.begin_write().map_err(running_error)?;
    txn.set_durability(Durability::Immediate).map_err(running_error)?;
    txn.set_quick_repair(true);
    Ok(txn)
}

struct Writer<'a> {
    txn: &'a WriteTransaction,
    core: &'a Core,
    catalogue: &'a mut Catalogue,
    /// Buckets made in this transaction.
    made: Vec<Arc<Bucket>>,
    applied: Applied,
    sums: Changes,
}

impl Writer<'_> {
    /// Drops the tables of buckets that have expired.
    fn buckets_gone(&mut self, memtable: &Memtable) -> Result<(), StoreError> {
        for id in &memtable.buckets_gone {
            let (index_name, rows) = (layout::index_name(*id), layout::rows_name(*id));
            self.txn.delete_table(layout::IndexTable::new(&index_name)).map_err(running_error)?;
            self.txn.delete_table(layout::RowsTable::new(&rows)).map_err(running_error)?;
            let mut buckets = self.txn.open_table(layout::BUCKETS).map_err(running_error)?;
            if let Some(old) = buckets.remove(id).map_err(running_error)? {
                self.sums.note("buckets", old.value().2);
            }
            self.sums.drop_table(index_name);
            self.catalogue.close(*id);
        }
        Ok(())
    }

    /// Removes older versions of records: a record has one row only. Few records have an older
    /// version.
    fn replace(&mut self, memtable: &Memtable, before: &Snapshot) -> Result<(), StoreError> {
        let replaced: Vec<u128> =
            memtable.records.iter().filter(|(_, slot)| slot.replaces).map(|(hash, _)| *hash).collect();
        if replaced.is_empty() {
            return Ok(());
        }
        let mut kept = self.txn.open_table(layout::KEPT).map_err(running_error)?;
        for hash in &replaced {
            let old = kept.remove(hash).map_err(running_error)?;
            self.sums.note_old("kept", old.as_ref().map(|old| old.value()));
        }
        let stays = |tables: &&BucketTables| !memtable.buckets_gone.contains(&tables.bucket.id);
        for tables in before.buckets.iter().filter(stays) {
            let mut here = replaced.iter().filter(|hash| tables.bucket.may_hold(**hash)).peekable();
            if here.peek().is_some() {
                let name = layout::index_name(tables.bucket.id);
                let mut index = self.txn.open_table(layout::IndexTable::new(&name)).map_err(running_error)?;
                for hash in here {
                    if let Some(location) = index.remove(hash).map_err(running_error)? {
                        self.sums.note(&name, layout::entry_seal(&self.core.seals, *hash, location.value()));
                    }
                }
            }
        }
        Ok(())
    }

    fn records(&mut self, memtable: &Memtable) -> Result<(), StoreError> {
        let mut windows: BTreeMap<Option<u64>, Vec<(u128, &Bytes)>> = BTreeMap::new();
        for (hash, slot) in &memtable.records {
            if let Some(row) = &slot.row {
                windows.entry(slot.end_ms).or_default().push((*hash, row));
            }
        }
        for (end_ms, mut records) in windows {
            // Follows the order of the index, because neighbours share its pages.
            records.sort_unstable_by_key(|(hash, _)| *hash);
            match end_ms {
                Some(end_ms) => self.window(end_ms, &records)?,
                None => {
                    let mut kept = self.txn.open_table(layout::KEPT).map_err(running_error)?;
                    let mut sealed = Vec::new();
                    for (hash, row) in records {
                        let sealed = self.core.seals.seal(Sealed::Kept, &[&hash.to_le_bytes()], row, &mut sealed);
                        let old = kept.insert(hash, sealed).map_err(running_error)?;
                        self.sums.note_old("kept", old.as_ref().map(|old| old.value()));
                        self.sums.note("kept", seal_of(sealed));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the records of one window into its open bucket, and into as many new buckets as they
    /// need.
    fn window(&mut self, end_ms: u64, mut records: &[(u128, &Bytes)]) -> Result<(), StoreError> {
        let rows_max = self.core.options.bucket_rows_max;
        while !records.is_empty() {
            let bucket = match self.catalogue.open_for(end_ms, rows_max) {
                Some(bucket) => bucket.clone(),
                None => {
                    let bucket = self.catalogue.next_for(end_ms, rows_max);
                    self.made.push(bucket.clone());
                    bucket
                }
            };
            let room = rows_max - bucket.rows.load(std::sync::atomic::Ordering::Relaxed);
            let (now, later) = records.split_at(records.len().min(room as usize));
            self.fill(&bucket, now)?;
            records = later;
        }
        Ok(())
    }

    fn fill(&mut self, bucket: &Bucket, records: &[(u128, &Bytes)]) -> Result<(), StoreError> {
        let (name, rows) = (layout::index_name(bucket.id), layout::rows_name(bucket.id));
        let mut index = self.txn.open_table(layout::IndexTable::new(&name)).map_err(running_error)?;
        let mut rows = self.txn.open_table(layout::RowsTable::new(&rows)).map_err(running_error)?;
        let mut block = Vec::with_capacity(2 * BLOCK_BYTES);
        for (hash, row) in records {
            if !block.is_empty() && block.len() + row.len() + SEAL_BYTES > BLOCK_BYTES {
                self.close_block(&mut block, &mut rows)?;
            }
            let location = layout::location(self.applied.next_block, block.len());
            let seals = self.core.seals;
            if let Some(old) = index.insert(hash, location).map_err(running_error)? {
                self.sums.note(&name, layout::entry_seal(&seals, *hash, old.value()));
            }
            self.sums.note(&name, layout::entry_seal(&seals, *hash, location));
            bucket.note(*hash);
            block.extend_from_slice(row);
            block.extend(seals.of(Sealed::Rows, &[&hash.to_le_bytes()], row).to_le_bytes());
        }
        self.close_block(&mut block, &mut rows)?;
        let mut buckets = self.txn.open_table(layout::BUCKETS).map_err(running_error)?;
        let count = bucket.rows.load(std::sync::atomic::Ordering::Relaxed);
        let seal = layout::bucket_seal(&self.core.seals, bucket.id, bucket.end_ms, count);
        self.sums.note("buckets", seal);
        if let Some(old) = buckets.insert(bucket.id, (bucket.end_ms, count, seal)).map_err(running_error)? {
            self.sums.note("buckets", old.value().2);
        }
        Ok(())
    }

    fn close_block(&mut self, block: &mut Vec<u8>, rows: &mut Table<'_, u64, &'static [u8]>) -> Result<(), StoreError> {
        rows.insert(self.applied.next_block, block.as_slice()).map_err(running_error)?;
        self.applied.next_block += 1;
        block.clear();
        Ok(())
    }

    /// Writes the state, one table per scope. Keys are sorted, so the keys of one scope are
    /// adjacent.
    fn state(&mut self, memtable: &Memtable) -> Result<(), StoreError> {
        let mut entries = memtable.state.iter().peekable();
        let mut sealed = Vec::new();
        while let Some((first, _)) = entries.peek() {
            let (scope, length) = layout::parse_scope(first)
                .ok_or_else(|| StoreError::Damaged("the scope of a state key cannot be decoded".into()))?;
            let (prefix, name) = (first.slice(..length), layout::state_name(&scope));
            let mut table = self.txn.open_table(layout::StateTable::new(&name)).map_err(running_error)?;
            while let Some((key, value)) = entries.next_if(|(key, _)| key.starts_with(&prefix)) {
                let key = &key[length..];
                let old = match value {
                    Some(value) => {
                        let sealed = self.core.seals.seal(Sealed::State, &[&prefix, key], value, &mut sealed);
                        self.sums.note(&name, seal_of(sealed));
                        table.insert(key, sealed).map_err(running_error)?
                    }
                    None => table.remove(key).map_err(running_error)?,
                };
                self.sums.note_old(&name, old.as_ref().map(|old| old.value()));
            }
        }
        Ok(())
    }

    fn effects(&mut self, memtable: &Memtable) -> Result<(), StoreError> {
        self.state(memtable)?;
        let (seals, mut sealed) = (self.core.seals, Vec::new());
        if !(memtable.outbox.is_empty() && memtable.sent.is_empty()) {
            let mut outbox = self.txn.open_table(layout::OUTBOX).map_err(running_error)?;
            for sent in &memtable.sent {
                let old = outbox.remove((sent.version, sent.index)).map_err(running_error)?;
                self.sums.note_old("outbox", old.as_ref().map(|old| old.value()));
            }
            for (position, message) in &memtable.outbox {
                let key = (position.version, position.index);
                let sealed = seals.seal(Sealed::Outbox, &[&layout::pair_key(key)], message, &mut sealed);
                self.sums.note("outbox", seal_of(sealed));
                let old = outbox.insert(key, sealed).map_err(running_error)?;
                self.sums.note_old("outbox", old.as_ref().map(|old| old.value()));
            }
        }
        if !memtable.held_under.is_empty() {
            let mut held_messages = self.txn.open_table(layout::DEAD_LETTERS).map_err(running_error)?;
            for (key, held_message) in &memtable.held_under {
                let old = match held_message {
                    Some(held_message) => {
                        let sealed = seals.seal(Sealed::Held, &[key], held_message, &mut sealed);
                        self.sums.note("dead_letters", seal_of(sealed));
                        held_messages.insert(&key[..], sealed).map_err(running_error)?
                    }
                    None => held_messages.remove(&key[..]).map_err(running_error)?,
                };
                self.sums.note_old("dead_letters", old.as_ref().map(|old| old.value()));
            }
        }
        Ok(())
    }
}

/// Drops the buckets whose records have all expired; returns the number of records that they held.
/// A bucket's drop is journalled with its feed event, and then applied like any other entry. Each
/// bucket has a frame of its own, so that a live commit waits for one drop at most.
pub(crate) fn sweep(core: &Core, journal: &Mutex<Journal>, now_ms: u64) -> Result<u64, StoreError> {
    let mut dropped = 0;
    while let Some(bucket) = next_due(core, now_ms) {
        let records = bucket.rows.load(std::sync::atomic::Ordering::Relaxed);
        let mut frame = Builder::new(1);
        frame.push_bucket_gone(bucket.id);
        let event = FeedEntry::of_many(FeedEventKind::Swept, records, now_ms);
        if fault::mutated("sweep-told-later") {
            write(core, journal, std::mem::replace(&mut frame, Builder::new(1)))?;
            core.flush()?;
        }
        frame.push_event(&event);
        write(core, journal, frame)?;
        core.flush()?;
        dropped += records;
    }
    Ok(dropped)
}

/// Makes a frame durable, as a group of commits is.
fn write(core: &Core, journal: &Mutex<Journal>, frame: Builder) -> Result<(), StoreError> {
    let mut journal = journal.lock();
    core.failure()?;
    commit::write(core, &mut journal, frame)
}

/// Marks and returns a bucket whose records have all expired and that is not marked yet. A marked
/// bucket takes no more records.
fn next_due(core: &Core, now_ms: u64) -> Option<Arc<Bucket>> {
    let early_ms = if fault::mutated("bucket-dropped-early") { 60_000 } else { 0 };
    // No transaction is under way while this is held.
    let mut catalogue = core.catalogue.lock();
    let snapshot = core.view.read().snapshot.clone();
    let due = |bucket: &Bucket| bucket.end_ms.saturating_sub(early_ms) <= now_ms && bucket.goes();
    let bucket = snapshot.buckets.iter().map(|tables| &tables.bucket).find(|bucket| due(bucket))?;
    catalogue.close(bucket.id);
    Some(bucket.clone())
}

/// Forgets terminal records last changed before `older_than_ms`, at most `limit`; looks at every
/// row.
pub(crate) fn cleanup(core: &Core, older_than_ms: u64, limit: usize) -> Result<usize, StoreError> {
    core.flush()?;
    let _catalogue = core.catalogue.lock();
    let before = core.view.read().snapshot.clone();
    let old = |row: &[u8]| {
        let record = layout::split_row(row).and_then(|(_, record)| layout::decode::<Record>(record));
        record.is_some_and(|record| record.state.is_terminal() && record.changed_ms < older_than_ms)
    };
    let txn = begin(core)?;
    let mut sums = Changes::default();
    let mut removed = 0;
    {
        let mut kept = txn.open_table(layout::KEPT).map_err(running_error)?;
        for hash in crate::redb::read::kept_where(&before, limit, &old)? {
            let old = kept.remove(hash).map_err(running_error)?;
            sums.note_old("kept", old.as_ref().map(|old| old.value()));
            removed += 1;
        }
    }
    for tables in &before.buckets {
        let found = crate::redb::read::bucket_where(&before, tables, limit - removed, &old)?;
        let name = layout::index_name(tables.bucket.id);
        let mut index = txn.open_table(layout::IndexTable::new(&name)).map_err(running_error)?;
        for hash in found {
            if let Some(location) = index.remove(hash).map_err(running_error)? {
                sums.note(&name, layout::entry_seal(&core.seals, hash, location.value()));
            }
            removed += 1;
        }
    }
    sums.write(&txn, &core.seals)?;
    txn.commit().map_err(running_error)?;
    let buckets = before.buckets.iter().map(|tables| tables.bucket.clone());
    core.publish(Snapshot::open(&core.database, core.seals, buckets)?, Published::Other);
    Ok(removed)
}
