//! Status of an open store, in numbers that are cheap to read. Reads no record.

use std::collections::BTreeMap;

use bytes::Bytes;
use hapax_core::{StoreError, StoreFacts};
use redb::ReadableTableMetadata as _;

use crate::redb::core::Core;
use crate::redb::open::running_error;
use crate::redb::view::View;

pub(crate) fn facts(core: &Core) -> Result<StoreFacts, StoreError> {
    let outbox_pending = crate::redb::read::outbox_len(core)?;
    let view = core.view.read();
    Ok(StoreFacts {
        unapplied_bytes: view.unapplied_bytes() as u64,
        buckets: view.snapshot.buckets.len() as u64,
        outbox_pending,
        held_messages: held_messages(&view)?,
    })
}

/// Returns the number of rows in the table, plus entries added and minus entries removed since.
fn held_messages(view: &View) -> Result<u64, StoreError> {
    let mut newest: BTreeMap<&Bytes, bool> = BTreeMap::new();
    for memtable in view.memtables() {
        for (key, held_message) in &memtable.held_under {
            newest.entry(key).or_insert(held_message.is_some());
        }
    }
    let table = &view.snapshot.held_under;
    let mut count = table.len().map_err(running_error)?;
    for (key, there) in newest {
        match (table.get(&key[..]).map_err(running_error)?.is_some(), there) {
            (false, true) => count += 1,
            (true, false) => count = count.saturating_sub(1),
            (true, true) | (false, false) => {}
        }
    }
    Ok(count)
}
