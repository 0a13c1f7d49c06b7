//! The index of unfinished messages: those whose record says that they are claimed, or due again.
//! An entry goes with its record: a message that is never delivered again is found here, and given
//! up in the end. The index is part of the state that no processor owns.
//!
//! Keys: `unfinished/<when>/<digest of the message's own key>`, where `<when>` is the end of the
//! claim, or the time at which the retry is due.

use serde::{Deserialize, Serialize};

use crate::message::key::{RecordKey, Scope};
use crate::record::{Record, RecordState};
use crate::state::Entry;
use crate::store::IdempotencyStorage;
use crate::store::commit::SharedChange;
use crate::support::error::StoreError;
use crate::support::fault;

const UNFINISHED: &str = "unfinished/";

/// A message that has begun and has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// Key of its record.
    pub record: RecordKey,
    /// The message's own key.
    pub message_key: RecordKey,
}

/// An entry of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnfinishedEntry {
    /// The message.
    pub message: Unfinished,
    /// Time at which its claim ends, or its retry is due, in milliseconds since the Unix epoch.
    pub when_ms: u64,
}

impl Unfinished {
    /// Returns `true` if `record`, which is stored under the message's record key, is of this
    /// message, and not of a later one of the entity.
    pub fn is_of(&self, record: &Record) -> bool {
        record.is_of(&self.record, &self.message_key)
    }

    /// Returns the index key of the message in this state, or `None` if the state is no unfinished
    /// one.
    fn key(&self, state: &RecordState) -> Option<String> {
        let when_ms = match state {
            RecordState::InProgress { lease_end_ms, .. } => *lease_end_ms,
            RecordState::RetryDue { at_ms, .. } => *at_ms,
            _ => return None,
        };
        Some(self.key_at(when_ms))
    }

    fn key_at(&self, when_ms: u64) -> String {
        format!("{UNFINISHED}{when_ms:020}/{:032x}", self.message_key.digest())
    }

    /// Adds to `change` what brings the index up to date with the change of the message's record
    /// from `before` to `after`.
    pub(crate) fn record_changes(&self, before: Option<&Record>, after: &Record, change: &mut SharedChange) {
        if fault::mutated("unfinished-not-indexed") {
            return;
        }
        let (was, is) = (before.and_then(|record| self.key(&record.state)), self.key(&after.state));
        if was != is {
            change.writes.extend(was.map(|key| (key, None)));
        }
        if let Some(key) = is {
            let value = postcard::to_stdvec(self).expect("two keys can be encoded");
            change.writes.insert(key, Some(value.into()));
        }
    }
}

impl UnfinishedEntry {
    /// Adds to `change` what moves the entry to another time.
    pub(crate) fn move_to(&self, when_ms: u64, change: &mut SharedChange) {
        self.remove(change);
        let value = postcard::to_stdvec(&self.message).expect("two keys can be encoded");
        change.writes.insert(self.message.key_at(when_ms), Some(value.into()));
    }

    /// Adds to `change` the removal of the entry.
    pub(crate) fn remove(&self, change: &mut SharedChange) {
        change.writes.insert(self.message.key_at(self.when_ms), None);
    }
}

/// Returns up to `limit` unfinished messages of a tenant whose time was over before `before_ms`
/// (since the Unix epoch), the oldest first, after `after`.
pub async fn unfinished_messages(
    storage: &(impl IdempotencyStorage + ?Sized),
    tenant: &Scope,
    before_ms: u64,
    after: Option<&UnfinishedEntry>,
    limit: usize,
) -> Result<Vec<UnfinishedEntry>, StoreError> {
    unfinished_between(storage, tenant, (0, before_ms), after, limit).await
}

/// Returns up to `limit` unfinished messages of a tenant whose time is in the range, the oldest
/// first, after `after`.
pub(crate) async fn unfinished_between(
    storage: &(impl IdempotencyStorage + ?Sized),
    tenant: &Scope,
    (from_ms, before_ms): (u64, u64),
    after: Option<&UnfinishedEntry>,
    limit: usize,
) -> Result<Vec<UnfinishedEntry>, StoreError> {
    let first = || format!("{UNFINISHED}{from_ms:020}");
    let start = after.map_or_else(first, |after| format!("{}\0", after.message.key_at(after.when_ms)));
    let end = format!("{UNFINISHED}{before_ms:020}");
    if start >= end {
        return Ok(Vec::new());
    }
    let page = storage.view(&tenant.shared()).scan(&start, Some(&end), limit).await?;
    page.iter().map(read).collect()
}

fn read((key, _, value): &Entry) -> Result<UnfinishedEntry, StoreError> {
    let damaged = || StoreError::Damaged(format!("`{key}` names no unfinished message").into());
    let when = key.strip_prefix(UNFINISHED).and_then(|rest| rest.split_once('/')).ok_or_else(damaged)?.0;
    let (when_ms, message) = (when.parse().ok(), postcard::from_bytes(value).ok());
    Ok(UnfinishedEntry { message: message.ok_or_else(damaged)?, when_ms: when_ms.ok_or_else(damaged)? })
}
