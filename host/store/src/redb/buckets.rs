//! Buckets: records that expire together have tables of their own, so that inserts land close
//! together and retention drops tables instead of rows. Each has a bloom filter in memory, which
//! only ever spares a read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use fastbloom::AtomicBloomFilter;
use hapax_core::{StoreError, fault};
use redb::{ReadOnlyTable, ReadableTable as _};

use crate::redb::open::running_error;

/// Bits of filter a record: about one look-up in a hundred is let through for nothing.
const FILTER_BITS: usize = 10;

/// One bucket, as the host knows it.
#[derive(Debug)]
pub(crate) struct Bucket {
    pub(crate) id: u64,
    /// All its records have expired at this time, in milliseconds since the Unix epoch.
    pub(crate) end_ms: u64,
    pub(crate) rows: AtomicU64,
    /// True once the bucket's drop is journalled: it takes no more records.
    going: AtomicBool,
    /// Set once it holds every record of the bucket; until then the bucket is read.
    filter: OnceLock<AtomicBloomFilter>,
}

impl Bucket {
    /// A bucket with no rows, and so with a whole filter, made for `rows_max` of them.
    pub(crate) fn new(id: u64, end_ms: u64, rows_max: u64) -> Self {
        let filter = OnceLock::from(filter(rows_max));
        Self { id, end_ms, rows: AtomicU64::new(0), going: AtomicBool::new(false), filter }
    }

    /// A bucket that was found in the store.
    pub(crate) fn found(id: u64, end_ms: u64, rows: u64) -> Self {
        Self { id, end_ms, rows: AtomicU64::new(rows), going: AtomicBool::new(false), filter: OnceLock::new() }
    }

    /// Marks that it goes; `false` if it was marked already.
    pub(crate) fn goes(&self) -> bool {
        !self.going.swap(true, Ordering::Relaxed) || fault::mutated("swept-twice")
    }

    /// Returns false only if the record is certainly absent; true while there is no filter.
    pub(crate) fn may_hold(&self, hash: u128) -> bool {
        self.filter.get().is_none_or(|filter| filter.contains_hash(hash as u64))
    }

    pub(crate) fn has_filter(&self) -> bool {
        self.filter.get().is_some()
    }

    /// A record is about to be committed into the bucket.
    pub(crate) fn note(&self, hash: u128) {
        self.rows.fetch_add(1, Ordering::Relaxed);
        if let Some(filter) = self.filter.get() {
            filter.insert_hash(hash as u64);
        }
    }

    /// Builds the filter from the bucket's index, for as many rows as it has, or for `rows_max` if
    /// that is more. Nothing may be inserted into the bucket meanwhile. Gives up when `stop` says
    /// so.
    pub(crate) fn build_filter(
        &self,
        index: &ReadOnlyTable<u128, u64>,
        rows_max: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), StoreError> {
        let built = filter(rows_max.max(self.rows.load(Ordering::Relaxed)));
        if fault::mutated("bloom-half-built") {
            let _ = self.filter.set(built);
            return Ok(());
        }
        for (number, row) in index.iter().map_err(running_error)?.enumerate() {
            if number % 65_536 == 65_535 && stop() {
                return Ok(());
            }
            built.insert_hash(row.map_err(running_error)?.0.value() as u64);
        }
        // Only one thread builds; were there two, both filters would be whole.
        let _ = self.filter.set(built);
        Ok(())
    }
}

fn filter(rows: u64) -> AtomicBloomFilter {
    let rows = rows.max(64) as usize;
    // Hashes come in ready-made; the filter's own hasher is not used.
    AtomicBloomFilter::with_num_bits(rows * FILTER_BITS).seed(&0).expected_items(rows)
}

/// The buckets that take new records: at most one per window. The others only lose rows.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    pub(crate) open: Vec<Arc<Bucket>>,
    pub(crate) next_id: u64,
}

impl Catalogue {
    /// The bucket that takes records of the window ending at `end_ms`, if there is one with room.
    pub(crate) fn open_for(&self, end_ms: u64, rows_max: u64) -> Option<&Arc<Bucket>> {
        let room = |bucket: &&Arc<Bucket>| bucket.rows.load(Ordering::Relaxed) < rows_max;
        self.open.iter().find(|bucket| bucket.end_ms == end_ms).filter(room)
    }

    /// Makes the next bucket of a window; the one that was open takes no more.
    pub(crate) fn next_for(&mut self, end_ms: u64, rows_max: u64) -> Arc<Bucket> {
        let bucket = Arc::new(Bucket::new(self.next_id, end_ms, rows_max));
        self.next_id += 1;
        self.open.retain(|open| open.end_ms != end_ms);
        self.open.push(bucket.clone());
        bucket
    }

    /// The bucket takes no more records.
    pub(crate) fn close(&mut self, id: u64) {
        self.open.retain(|bucket| bucket.id != id);
    }
}
