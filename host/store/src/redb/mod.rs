//! The store on redb, behind a journal: one folder, one process. Joins reading and writing behind
//! core's seams.

pub(crate) mod applier;
pub(crate) mod buckets;
pub(crate) mod commit;
pub(crate) mod core;
pub(crate) mod crash_file;
#[cfg(test)]
mod damage_tests;
pub mod doctor;
pub(crate) mod feed;
pub(crate) mod folder;
#[cfg(test)]
mod folder_tests;
#[cfg(test)]
mod layers_tests;
pub(crate) mod listings;
pub(crate) mod memtable;
pub(crate) mod open;
pub(crate) mod read;
pub(crate) mod scrub;
pub(crate) mod status;
pub(crate) mod sums;
pub(crate) mod view;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use hapax_core::{
    CrashTracker, Cursor, Feed, FeedPage, Group, HeldKey, HeldMessage, IdempotencyStorage, Inspect, Outbox,
    OutboxPosition, OutboxRow, Record, RecordKey, Scope, StateView, StoreError, StoreFacts, Verdict, Version,
};
use parking_lot::Mutex;

use crate::journal::Journal;
use crate::redb::applier::Applying;
use crate::redb::core::Core;
use crate::redb::listings::Listings;
use crate::redb::open::{Create, OpenError};

/// The store on redb. Reads block for microseconds; `commit` blocks for a sync and belongs on the
/// committer's thread.
///
/// Dropping the store applies the journalled entries to the tables.
pub struct RedbStore {
    /// Dropped before the applier ends, and that before the database closes.
    listings: Listings,
    _applying: Applying,
    core: Arc<Core>,
    journal: Mutex<Journal>,
    running: Arc<dyn CrashTracker>,
}

/// Limits of a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Bytes of redb's page cache.
    pub page_cache_bytes: usize,
    /// Approximate bytes of memory for entries that are journalled and not yet in the tables; above
    /// it, commits wait.
    pub unapplied_bytes_max: usize,
    /// Approximate bytes of memory that are applied to the tables in one transaction. More means
    /// less work; less means a shorter wait for commits that wait for room.
    pub memtable_bytes: usize,
    /// Bytes of the journal's file, in the long run.
    pub journal_bytes: u64,
    /// Records of one bucket at most: a bucket is the unit in which records are forgotten and
    /// filters are built.
    pub bucket_rows_max: u64,
    /// Events of the feed in its table, at most; the oldest are dropped. Events that are not
    /// applied yet are not counted.
    pub events_max: u64,
    /// True if buckets found at the start get bloom filters. Results are the same without them.
    pub filters: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            page_cache_bytes: 128 << 20,
            unapplied_bytes_max: 128 << 20,
            memtable_bytes: 32 << 20,
            journal_bytes: 128 << 20,
            bucket_rows_max: 1 << 20,
            events_max: 1_000_000,
            filters: true,
        }
    }
}

/// One state entry, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRow {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
}

impl RedbStore {
    /// Opens the store in the folder `path`, which is created where it is absent.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_with(path, StoreOptions::default())
    }

    /// Opens the store like [`RedbStore::open`], with the given options.
    pub fn open_with(path: &Path, options: StoreOptions) -> Result<Self, OpenError> {
        open::open(path, Create::IfAbsent, options)
    }

    /// Opens a store that must exist.
    pub fn open_existing(path: &Path) -> Result<Self, OpenError> {
        open::open(path, Create::Never, StoreOptions::default())
    }

    /// Opens a store on backends of the caller's, one for the database and one for the journal:
    /// tests lose their unsynced writes.
    pub fn open_backends(
        database: impl redb::StorageBackend,
        journal: impl redb::StorageBackend,
        options: StoreOptions,
    ) -> Result<Self, OpenError> {
        open::open_backends(database, Box::new(journal), options)
    }

    pub(crate) fn over(core: Arc<Core>, journal: Journal, running: Arc<dyn CrashTracker>) -> std::io::Result<Self> {
        Ok(Self {
            listings: Listings::start()?,
            _applying: Applying::start(core.clone())?,
            core,
            journal: Mutex::new(journal),
            running,
        })
    }

    /// Returns the state that the store's parts share, for tests that delay one of them.
    #[cfg(test)]
    pub(crate) fn core(&self) -> Arc<Core> {
        self.core.clone()
    }

    /// Returns up to `limit` state entries whose keys begin with `prefix`, in key order.
    pub fn state_of(&self, scope: &Scope, prefix: &str, limit: usize) -> Result<Vec<StateRow>, StoreError> {
        let scope = crate::format::layout::scope_prefix(scope);
        let entries = self.core.checked(|| read::scan(&self.core, &scope, prefix, None, limit))?;
        // The host's own keys come last.
        let shown = |key: &str| key.starts_with(prefix) && !key.starts_with(hapax_core::RESERVED);
        let rows = entries.into_iter().take_while(|(key, ..)| shown(key));
        Ok(rows.map(|(key, _, value)| StateRow { key, value }).collect())
    }

    /// Checks every row of every table now; the store does the same by itself, slowly. Closes the
    /// store at the first damage.
    pub fn scrub(&self) -> Result<(), StoreError> {
        self.core.checked(|| scrub::pass(&self.core, &|| true))
    }

    /// Brings everything that is journalled into the tables.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.core.flush()
    }
}

impl IdempotencyStorage for RedbStore {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(ready(self.core.checked(|| read::record(&self.core, key))))
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        Box::pin(async move { self.core.checked(|| commit::commit(&self.core, &mut self.journal.lock(), group)) })
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        Arc::new(read::ScopeView::new(self.core.clone(), scope))
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        Box::pin(ready(Ok(self.journal.lock().last_version())))
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move { self.core.checked(|| applier::cleanup(&self.core, older_than_ms, limit)) })
    }

    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move { self.core.checked(|| applier::sweep(&self.core, &self.journal, now_ms)) })
    }

    fn failure(&self) -> Option<StoreError> {
        self.core.failure().err()
    }

    fn crash_tracker(&self) -> Arc<dyn CrashTracker> {
        self.running.clone()
    }
}

impl Outbox for RedbStore {
    fn outbox_len(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(ready(self.core.checked(|| read::outbox_len(&self.core))))
    }

    fn pending_within(
        &self,
        after: Option<OutboxPosition>,
        limit: usize,
        bytes_max: usize,
    ) -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>> {
        Box::pin(ready(self.core.checked(|| read::pending(&self.core, after, limit, bytes_max))))
    }
}

impl Inspect for RedbStore {
    fn facts(&self) -> BoxFuture<'_, Result<StoreFacts, StoreError>> {
        Box::pin(ready(self.core.checked(|| status::facts(&self.core))))
    }

    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>> {
        let (core, processor, after) = (self.core.clone(), processor.map(str::to_owned), after.cloned());
        self.listings.run(move || core.checked(|| read::records(&core, processor.as_deref(), after.as_ref(), limit)))
    }

    fn held_under<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<HeldMessage>, StoreError>> {
        Box::pin(ready(self.core.checked(|| read::held_under(&self.core, key))))
    }

    fn held_messages<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a HeldKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(HeldKey, HeldMessage)>, StoreError>> {
        Box::pin(ready(self.core.checked(|| read::held_messages(&self.core, processor, after, limit))))
    }
}

impl Feed for RedbStore {
    fn events(
        &self,
        of: Option<u128>,
        after: Option<Cursor>,
        limit: usize,
    ) -> BoxFuture<'_, Result<FeedPage, StoreError>> {
        if of.is_none() {
            return Box::pin(ready(self.core.checked(|| feed::events(&self.core, of, after, limit))));
        }
        let core = self.core.clone();
        self.listings.run(move || core.checked(|| feed::events(&core, of, after, limit)))
    }
}
