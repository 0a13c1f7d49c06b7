//! One consistent view of the store: the journalled entries over a snapshot of the tables. Readers
//! find everything they see here.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use hapax_core::StoreError;
use redb::{
    Database, ReadOnlyTable, ReadTransaction, ReadableDatabase as _, ReadableTableMetadata as _, TableHandle as _,
};

use crate::format::layout::{self, Applied, FeedFacts};
use crate::format::seal::{Sealed, Seals};
use crate::redb::buckets::Bucket;
use crate::redb::memtable::Memtable;
use crate::redb::open::running_error;

/// Tables of state by encoded scope.
type StateTables = HashMap<Vec<u8>, ReadOnlyTable<&'static [u8], &'static [u8]>>;

/// The bucket and its two tables at the moment of a snapshot.
pub(crate) struct BucketTables {
    pub(crate) bucket: Arc<Bucket>,
    pub(crate) index: ReadOnlyTable<u128, u64>,
    pub(crate) rows: ReadOnlyTable<u64, &'static [u8]>,
}

/// The tables after one transaction; opened once, read by everyone until the next.
pub(crate) struct Snapshot {
    pub(crate) kept: ReadOnlyTable<u128, &'static [u8]>,
    /// Usually no message is held, and then the table need not be read.
    pub(crate) kept_is_empty: bool,
    /// By encoded scope; absent where the scope has never had any.
    state: StateTables,
    pub(crate) outbox: ReadOnlyTable<(u64, u32), &'static [u8]>,
    pub(crate) held_under: ReadOnlyTable<&'static [u8], &'static [u8]>,
    pub(crate) feed: ReadOnlyTable<(u64, u32), &'static [u8]>,
    pub(crate) feed_facts: FeedFacts,
    /// Newest last.
    pub(crate) buckets: Vec<BucketTables>,
    pub(crate) applied: Applied,
    pub(crate) sums: ReadOnlyTable<&'static str, &'static [u8]>,
    pub(crate) seals: Seals,
}

/// Newest first: the active memtable, the frozen ones from the back, the snapshot.
pub(crate) struct View {
    /// The active memtable: takes the journalled frames.
    pub(crate) active: Memtable,
    /// Wait for the applier, oldest first.
    pub(crate) frozen: VecDeque<Arc<Memtable>>,
    pub(crate) snapshot: Arc<Snapshot>,
}

impl Snapshot {
    /// The state of the scope whose encoding is `prefix`.
    pub(crate) fn state(&self, prefix: &[u8]) -> Option<&ReadOnlyTable<&'static [u8], &'static [u8]>> {
        self.state.get(prefix)
    }

    /// Returns the tables of a bucket, if it was not dropped.
    pub(crate) fn bucket(&self, id: u64) -> Option<&BucketTables> {
        self.buckets.iter().find(|tables| tables.bucket.id == id)
    }

    /// Returns the encoded scopes that have state.
    pub(crate) fn scopes(&self) -> impl Iterator<Item = &[u8]> {
        self.state.keys().map(|scope| &scope[..])
    }

    /// Opens the tables as they are now, with the buckets given.
    pub(crate) fn open(
        database: &Database,
        seals: Seals,
        buckets: impl Iterator<Item = Arc<Bucket>>,
    ) -> Result<Self, StoreError> {
        let txn = database.begin_read().map_err(running_error)?;
        let kept = txn.open_table(layout::KEPT).map_err(running_error)?;
        let meta = txn.open_table(layout::META).map_err(running_error)?;
        let applied = fact(&meta, &seals, layout::META_APPLIED, Applied::decode)?;
        let feed_facts = fact(&meta, &seals, layout::META_FEED, FeedFacts::decode)?;
        let buckets = buckets.map(|bucket| {
            let index = layout::index_name(bucket.id);
            let rows = layout::rows_name(bucket.id);
            Ok(BucketTables {
                index: txn.open_table(layout::IndexTable::new(&index)).map_err(running_error)?,
                rows: txn.open_table(layout::RowsTable::new(&rows)).map_err(running_error)?,
                bucket,
            })
        });
        Ok(Self {
            kept_is_empty: kept.is_empty().map_err(running_error)?,
            kept,
            state: state_tables(&txn)?,
            outbox: txn.open_table(layout::OUTBOX).map_err(running_error)?,
            held_under: txn.open_table(layout::DEAD_LETTERS).map_err(running_error)?,
            feed: txn.open_table(layout::FEED).map_err(running_error)?,
            feed_facts: feed_facts
                .ok_or_else(|| StoreError::Damaged("it does not say what of the feed it has".into()))?,
            buckets: buckets.collect::<Result<_, StoreError>>()?,
            sums: txn.open_table(layout::SUMS).map_err(running_error)?,
            seals,
            applied: applied.ok_or_else(|| StoreError::Damaged("it does not say how far it was applied".into()))?,
        })
    }
}

/// Returns a sealed fact about the store.
pub(crate) fn fact<T>(
    meta: &ReadOnlyTable<&'static str, &'static [u8]>,
    seals: &Seals,
    name: &str,
    decode: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<Option<T>, StoreError> {
    let Some(value) = meta.get(name).map_err(running_error)? else { return Ok(None) };
    Ok(decode(seals.open(Sealed::Meta, &[name.as_bytes()], value.value())?))
}

/// The tables of state, by encoded scope.
fn state_tables(txn: &ReadTransaction) -> Result<StateTables, StoreError> {
    let names = txn.list_tables().map_err(running_error)?;
    let scopes = names.filter_map(|table| layout::parse_state_name(table.name()));
    let tables = scopes.map(|scope| {
        let name = layout::state_name(&scope);
        Ok((layout::scope_prefix(&scope), txn.open_table(layout::StateTable::new(&name)).map_err(running_error)?))
    });
    tables.collect()
}

impl View {
    /// The memtables, newest first.
    pub(crate) fn memtables(&self) -> impl Iterator<Item = &Memtable> {
        std::iter::once(&self.active).chain(self.frozen.iter().rev().map(|memtable| &**memtable))
    }

    /// Sequence number of the last frame that is durable.
    pub(crate) fn last_sequence(&self) -> u64 {
        self.memtables().map(|memtable| memtable.end.sequence).fold(self.snapshot.applied.sequence, u64::max)
    }

    /// Bytes that are journalled and not yet applied, roughly.
    pub(crate) fn unapplied_bytes(&self) -> usize {
        self.memtables().map(Memtable::bytes).sum()
    }

    /// Hands the active memtable to the applier.
    pub(crate) fn freeze(&mut self) {
        if !self.active.is_empty() {
            self.frozen.push_back(Arc::new(std::mem::take(&mut self.active)));
        }
    }

    /// Hands the journalled frames up to `last` to the applier, without later frames if they can be
    /// separated. Returns true if all of them are in the tables.
    pub(crate) fn push_down(&mut self, last: u64) -> bool {
        if self.active.first <= last {
            self.freeze();
        }
        self.frozen.front().is_none_or(|oldest| oldest.first > last)
    }
}
