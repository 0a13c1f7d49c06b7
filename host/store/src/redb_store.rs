//! The store on redb: one folder, one process. Joins reading and writing behind core's seams.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use hapax_core::context::{StateView, Version};
use hapax_core::key::{RecordKey, Scope};
use hapax_core::record::Record;
use hapax_core::storage::{
    DeadLetter, Group, IdempotencyStorage, Inspect, Outbox, OutboxPosition, OutboxRow, StoreError, Verdict,
};
use redb::Database;

use crate::open::{self, Create, OpenError};
use crate::{read, write};

/// The store on redb. Reads block for microseconds; `commit` blocks for a sync and belongs on the committer's thread.
pub struct RedbStore {
    database: Arc<Database>,
    /// The greatest version that the next commits may have without a new reservation.
    reserved: AtomicU64,
}

/// One state entry, for people.
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
        Ok(Self::over(open::open(path, Create::IfAbsent)?))
    }

    /// Opens a store that must be there.
    pub fn open_existing(path: &Path) -> Result<Self, OpenError> {
        Ok(Self::over(open::open(path, Create::Never)?))
    }

    /// Opens a store on a backend of the caller's: tests lose its unsynced writes.
    pub fn open_backend(backend: impl redb::StorageBackend) -> Result<Self, OpenError> {
        Ok(Self::over(open::open_backend(backend)?))
    }

    fn over(database: Database) -> Self {
        // The first commit reserves: what an earlier process had reserved and not used is skipped.
        Self { database: Arc::new(database), reserved: AtomicU64::new(0) }
    }

    /// Up to `limit` state entries whose keys begin with `prefix`, in key order.
    pub fn state_of(&self, scope: &Scope, prefix: &str, limit: usize) -> Result<Vec<StateRow>, StoreError> {
        let entries = read::scan_state(&self.database, scope, prefix, None, limit)?;
        let rows = entries.into_iter().take_while(|(key, ..)| key.starts_with(prefix));
        Ok(rows.map(|(key, _, value)| StateRow { key, value }).collect())
    }

    /// How many messages wait in the outbox.
    pub fn outbox_len(&self) -> Result<u64, StoreError> {
        read::outbox_len(&self.database)
    }

    /// Writes another format's number into the store: for the test that it is refused then.
    #[doc(hidden)]
    pub fn set_format_for_test(&self, format: u32) -> Result<(), StoreError> {
        write::set_format(&self.database, format)
    }
}

impl IdempotencyStorage for RedbStore {
    fn admit<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(ready(read::record(&self.database, key)))
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        Box::pin(async move { write::commit(&self.database, &self.reserved, group) })
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        Arc::new(read::RedbView::new(self.database.clone(), scope))
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        Box::pin(ready(read::last_version(&self.database)))
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move { write::cleanup(&self.database, older_than_ms, limit) })
    }
}

impl Outbox for RedbStore {
    fn pending(
        &self,
        after: Option<OutboxPosition>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>> {
        Box::pin(ready(read::pending(&self.database, after, limit)))
    }
}

impl Inspect for RedbStore {
    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>> {
        Box::pin(ready(read::records(&self.database, processor, after, limit)))
    }

    fn dead_letters<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<DeadLetter>, StoreError>> {
        Box::pin(ready(read::dead_letters(&self.database, key)))
    }
}
