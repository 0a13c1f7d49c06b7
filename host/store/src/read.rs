//! Reads of the redb store. Each is a read transaction of its own, so it sees every commit that was durable when it began.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use hapax_core::context::{Entry, StateView, Version};
use hapax_core::key::{RecordKey, Scope};
use hapax_core::message::Message;
use hapax_core::record::Record;
use hapax_core::storage::{DeadLetter, OutboxPosition, OutboxRow, StoreError};
use redb::{Database, ReadableDatabase as _, ReadableTable, ReadableTableMetadata as _};

use crate::layout;
use crate::open::running_error;

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("{what} cannot be decoded").into())
}

pub(crate) fn record(database: &Database, key: &RecordKey) -> Result<Option<Record>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::RECORDS).map_err(running_error)?;
    match table.get(layout::record_key(key).as_slice()).map_err(running_error)? {
        None => Ok(None),
        Some(value) => layout::decode(value.value()).map(Some).ok_or_else(|| damaged("a record")),
    }
}

pub(crate) fn last_version(database: &Database) -> Result<Version, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let meta = txn.open_table(layout::META).map_err(running_error)?;
    let value = meta.get(layout::META_LAST_VERSION).map_err(running_error)?;
    let bytes = value.and_then(|value| value.value().try_into().ok());
    bytes.map(u64::from_le_bytes).ok_or_else(|| damaged("the last version"))
}

pub(crate) fn pending(
    database: &Database,
    after: Option<OutboxPosition>,
    limit: usize,
) -> Result<Vec<OutboxRow>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::OUTBOX).map_err(running_error)?;
    let start = after.map_or(Bound::Unbounded, |after| Bound::Excluded((after.version, after.index)));
    let rows = table.range::<(u64, u32)>((start, Bound::Unbounded)).map_err(running_error)?;
    rows.take(limit)
        .map(|row| {
            let (position, message) = row.map_err(running_error)?;
            let (version, index) = position.value();
            let message: Message = layout::decode(message.value()).ok_or_else(|| damaged("an outbox message"))?;
            Ok(OutboxRow { position: OutboxPosition { version, index }, message })
        })
        .collect()
}

pub(crate) fn outbox_len(database: &Database) -> Result<u64, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    txn.open_table(layout::OUTBOX).map_err(running_error)?.len().map_err(running_error)
}

pub(crate) fn records(
    database: &Database,
    processor: Option<&str>,
    after: Option<&RecordKey>,
    limit: usize,
) -> Result<Vec<(RecordKey, Record)>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::RECORDS).map_err(running_error)?;
    let prefix = processor.map(|processor| layout::scope_prefix(&Scope::of(processor)));
    let end = prefix.as_deref().map(layout::after_prefix);
    let after = after.map(layout::record_key);
    let start = match (&after, &prefix) {
        (Some(after), _) => Bound::Excluded(after.as_slice()),
        (None, Some(prefix)) => Bound::Included(prefix.as_slice()),
        (None, None) => Bound::Unbounded,
    };
    let range = (start, end.as_deref().map_or(Bound::Unbounded, Bound::Excluded));
    let rows = table.range::<&[u8]>(range).map_err(running_error)?;
    rows.take(limit)
        .map(|row| {
            let (key, record) = row.map_err(running_error)?;
            let key = layout::parse_record_key(key.value()).ok_or_else(|| damaged("a record's key"))?;
            Ok((key, layout::decode(record.value()).ok_or_else(|| damaged("a record"))?))
        })
        .collect()
}

pub(crate) fn dead_letters(database: &Database, key: &RecordKey) -> Result<Vec<DeadLetter>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::DEAD_LETTERS).map_err(running_error)?;
    let start = layout::record_key(key);
    let end = layout::after_prefix(&start);
    let rows = table.range::<&[u8]>(start.as_slice()..end.as_slice()).map_err(running_error)?;
    rows.map(|row| {
        let (_, letter) = row.map_err(running_error)?;
        layout::decode(letter.value()).ok_or_else(|| damaged("a dead letter"))
    })
    .collect()
}

pub(crate) fn scan_state(
    database: &Database,
    scope: &Scope,
    start: &str,
    end: Option<&str>,
    limit: usize,
) -> Result<Vec<Entry>, StoreError> {
    let txn = database.begin_read().map_err(running_error)?;
    let table = txn.open_table(layout::STATE).map_err(running_error)?;
    scan_table(&table, &layout::scope_prefix(scope), start, end, limit)
}

/// The entries of a range, from a read or from a write transaction.
pub(crate) fn scan_table(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    prefix: &[u8],
    start: &str,
    end: Option<&str>,
    limit: usize,
) -> Result<Vec<Entry>, StoreError> {
    if end.is_some_and(|end| end <= start) {
        return Ok(Vec::new());
    }
    let start = layout::state_key(prefix, start);
    let end = end.map_or_else(|| layout::after_prefix(prefix), |end| layout::state_key(prefix, end));
    let rows = table.range::<&[u8]>(start.as_slice()..end.as_slice()).map_err(running_error)?;
    rows.take(limit)
        .map(|row| {
            let (key, value) = row.map_err(running_error)?;
            let (_, key) = layout::parse_state_key(key.value()).ok_or_else(|| damaged("a state key"))?;
            let (version, value) = layout::parse_state_value(value.value()).ok_or_else(|| damaged("a state entry"))?;
            Ok((key, version, Bytes::copy_from_slice(value)))
        })
        .collect()
}

/// A view of one processor's state.
pub(crate) struct RedbView {
    database: Arc<Database>,
    scope: Scope,
    prefix: Vec<u8>,
}

impl RedbView {
    pub(crate) fn new(database: Arc<Database>, scope: &Scope) -> Self {
        Self { database, scope: scope.clone(), prefix: layout::scope_prefix(scope) }
    }

    fn get_now(&self, key: &str) -> Result<(Version, Option<Bytes>), StoreError> {
        let txn = self.database.begin_read().map_err(running_error)?;
        let table = txn.open_table(layout::STATE).map_err(running_error)?;
        match table.get(layout::state_key(&self.prefix, key).as_slice()).map_err(running_error)? {
            None => Ok((0, None)),
            Some(value) => {
                let (version, value) =
                    layout::parse_state_value(value.value()).ok_or_else(|| damaged("a state entry"))?;
                Ok((version, Some(Bytes::copy_from_slice(value))))
            }
        }
    }
}

impl StateView for RedbView {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        Box::pin(ready(self.get_now(key)))
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(ready(scan_state(&self.database, &self.scope, start, end, limit)))
    }
}
