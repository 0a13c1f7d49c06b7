//! The seam to a store: the calls of the pipeline, and the promises of the store. Verbs of the
//! domain, not of a database.

pub(crate) mod commit;
pub(crate) mod crash_tracker;
pub(crate) mod feed;
pub(crate) mod held_message;
pub(crate) mod unfinished;

use futures_util::future::BoxFuture;
use serde::Serialize;
use std::sync::Arc;

use crate::message::identity::HeldKey;
use crate::message::key::{RecordKey, Scope};
use crate::record::{Output, Record, RecordState};
use crate::state::{StateView, Version};
use crate::store::commit::{Group, OutboxPosition, OutboxRow, Verdict};
use crate::store::crash_tracker::{CrashTracker, NoCrashTracker};
use crate::store::feed::Feed;
use crate::store::held_message::HeldMessage;
use crate::support::error::StoreError;

/// The store of record.
pub trait IdempotencyStorage: Send + Sync + 'static {
    /// Returns the record under `key`, as of the last durable commit. Called by many tasks at once;
    /// may block for a read.
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// Writes a group in one transaction and returns one verdict per commit, in order.
    ///
    /// When it returns `Ok`, every `Committed` is durable. One commit's conflict never affects its
    /// neighbours. When it returns `Err`, nothing of the group may be acknowledged, and it is
    /// unknown until the store is opened again if the group was written. Called by one thread,
    /// which it may block.
    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>>;

    /// Returns a view of the processor's state. Each read sees at least every commit that was
    /// durable when the read began. Reads of one view may see different points in time: the commit
    /// checks the versions that were read.
    fn view(&self, scope: &Scope) -> Arc<dyn StateView>;

    /// Returns a version that no commit has ever exceeded; 0 in an empty store. Stores may reserve
    /// versions ahead.
    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>>;

    /// Removes terminal records last changed before `older_than_ms` (since the Unix epoch), at most
    /// `limit` of them, and returns their number. The feed does not show them. Records that are in
    /// progress, due again, or to be compensated always stay.
    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Removes records whose retention ended before `now_ms` (since the Unix epoch), in the
    /// portions in which the store holds them: some may stay a while longer, none is removed
    /// earlier. Never removes a record that is in progress, due again, unsent, or without expiry.
    /// Records that stay cost nothing. Returns the number of removed records; the feed shows it
    /// too, once per portion.
    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Returns the failure that closed the store, also where no commit has met it yet: a read, or a
    /// check of the store's own, may have found damage.
    fn failure(&self) -> Option<StoreError> {
        None
    }

    /// Returns the tracker that marks, outside the transactions, the messages that are being run.
    fn crash_tracker(&self) -> Arc<dyn CrashTracker> {
        Arc::new(NoCrashTracker)
    }

    /// Returns `true` if the key's message has completed.
    fn is_processed<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.processed_result(key).await?.is_some()) })
    }

    /// Returns the stored result of the key's message, if it has completed.
    fn processed_result<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Output>, StoreError>> {
        Box::pin(async move {
            Ok(self.record(key).await?.and_then(|record| match record.state {
                RecordState::Completed { output } => Some(output),
                _ => None,
            }))
        })
    }
}

/// Pending messages of a store. A [`Group`] commits that they were sent.
pub trait Outbox: Send + Sync + 'static {
    /// Returns up to `limit` rows after `after` (`None`: from the first), in order: as many as have
    /// `bytes_max` bytes together, as they are stored, and at least one. Whoever holds the result
    /// holds no more than that.
    fn pending_within(
        &self,
        after: Option<OutboxPosition>,
        limit: usize,
        bytes_max: usize,
    ) -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>>;

    /// Returns up to `limit` rows after `after` (`None`: from the first), in order.
    fn pending(
        &self,
        after: Option<OutboxPosition>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>> {
        self.pending_within(after, limit, usize::MAX)
    }

    /// Returns the number of pending rows.
    fn outbox_len(&self) -> BoxFuture<'_, Result<u64, StoreError>>;
}

/// Numbers of a store at one point in time. They cost no read of a record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StoreFacts {
    /// Approximate number of bytes that are in the journal and not yet in the tables.
    pub unapplied_bytes: u64,
    /// Number of buckets of records in the tables.
    pub buckets: u64,
    /// Number of messages in the outbox.
    pub outbox_pending: u64,
    /// Number of held messages: dead letters, and those that are parked or redriven.
    pub held_messages: u64,
}

/// Read-only paging for people.
pub trait Inspect: Send + Sync + 'static {
    /// Returns up to `limit` records after `after`, in the order of their keys; of one processor if
    /// given.
    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>>;

    /// Returns the messages that are held under a record.
    fn held_under<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<HeldMessage>, StoreError>>;

    /// Returns up to `limit` held messages after `after`, in the order of their records' keys; of
    /// one processor if given.
    fn held_messages<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a HeldKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(HeldKey, HeldMessage)>, StoreError>>;

    /// Returns the numbers of the store.
    fn facts(&self) -> BoxFuture<'_, Result<StoreFacts, StoreError>>;
}

/// All traits that the host needs from its store of record.
pub trait Store: IdempotencyStorage + Outbox + Inspect + Feed {}

impl<T: IdempotencyStorage + Outbox + Inspect + Feed> Store for T {}
