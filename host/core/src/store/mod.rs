//! The seam to a store: what the pipeline asks of it, and what it promises back. Verbs of the domain, not of a database.

pub(crate) mod commit;
pub(crate) mod crash_tracker;
pub(crate) mod feed;
pub(crate) mod held_message;

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
    /// The record under `key`, as of the last durable commit. Called by many tasks at once; may block for a read.
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// Writes a group in one transaction and answers a verdict a commit, in order.
    ///
    /// When it returns `Ok`, every `Committed` is durable. One commit's conflict never touches its neighbours. When it
    /// returns `Err`, nothing of the group may be acknowledged, and whether it is there is not known until the store is
    /// opened again. Called by one thread, which it may block.
    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>>;

    /// A view of the processor's state. Each read sees at least every commit that was durable when the read began;
    /// reads of one view need not be of one moment (the commit checks what was read).
    fn view(&self, scope: &Scope) -> Arc<dyn StateView>;

    /// A version that no commit has ever exceeded; 0 in an empty store. Stores may reserve versions ahead.
    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>>;

    /// Forgets terminal records last changed before `older_than_ms` (since the Unix epoch), at most `limit` of them;
    /// answers how many. The feed does not tell of them. Records that are in progress, due again, or to be compensated always stay.
    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Forgets records whose retention ended before `now_ms` (since the Unix epoch), in whatever portions the store keeps
    /// them: some may stay a while longer, none goes earlier. Never touches what is in progress, due again, unsent, or has
    /// no expiry. Costs nothing for what stays. Answers how many records went; the feed tells it too, once a portion.
    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Where it is noted, outside the transactions, which messages are being run.
    fn crash_tracker(&self) -> Arc<dyn CrashTracker> {
        Arc::new(NoCrashTracker)
    }

    /// Whether the key's message has completed.
    fn is_processed<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.processed_result(key).await?.is_some()) })
    }

    /// The stored result of the key's message, if it has completed.
    fn processed_result<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Output>, StoreError>> {
        Box::pin(async move {
            Ok(self.record(key).await?.and_then(|record| match record.state {
                RecordState::Completed { output } => Some(output),
                _ => None,
            }))
        })
    }
}

/// Pending messages of a store. That they were sent is committed with a [`Group`].
pub trait Outbox: Send + Sync + 'static {
    /// Up to `limit` rows after `after` (`None`: from the first), in order.
    fn pending(&self, after: Option<OutboxPosition>, limit: usize)
    -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>>;

    /// Returns the number of pending rows.
    fn outbox_len(&self) -> BoxFuture<'_, Result<u64, StoreError>>;
}

/// Numbers of a store at one moment. They cost no read of a record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StoreFacts {
    /// Bytes that are journalled and not yet in the tables, roughly.
    pub unapplied_bytes: u64,
    /// Buckets of records in the tables.
    pub buckets: u64,
    /// Messages in the outbox.
    pub outbox_pending: u64,
    /// Held messages: dead letters, and those that are parked or redriven.
    pub held_messages: u64,
}

/// Read-only paging for people.
pub trait Inspect: Send + Sync + 'static {
    /// Up to `limit` records after `after`, in the order of their keys; of one processor if given.
    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>>;

    /// The messages that are kept under a record.
    fn held_under<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<HeldMessage>, StoreError>>;

    /// Up to `limit` kept messages after `after`, in the order of their records' keys; of one processor if given.
    fn held_messages<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a HeldKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(HeldKey, HeldMessage)>, StoreError>>;

    /// Returns the numbers of the store.
    fn facts(&self) -> BoxFuture<'_, Result<StoreFacts, StoreError>>;
}

/// Everything the host asks of its store of record.
pub trait Store: IdempotencyStorage + Outbox + Inspect + Feed {}

impl<T: IdempotencyStorage + Outbox + Inspect + Feed> Store for T {}
