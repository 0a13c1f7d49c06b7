//! Locks with fencing tokens: the seam, and the implementation over the store itself. A lock is an
//! entry of the state that no processor owns. The commit that relies on the lock checks that it is
//! still held.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::commit::committer::Committer;
use crate::message::key::{RecordKey, Scope};
use crate::state::{StateView, Version};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, SharedChange, Verdict};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;

/// Longest name of a lock, in bytes.
pub const LOCK_NAME_BYTES: usize = 256;

/// A request for a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockRequest<'a> {
    /// The lock's name.
    pub name: &'a str,
    /// Name of the requester. A requester that holds the lock already gets it anew, under a new
    /// fence.
    pub owner: &'a str,
    /// Duration of the lock, in milliseconds.
    pub ttl_ms: u64,
}

/// A lock that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// The lock's name.
    pub name: String,
    /// Name of the holder.
    pub owner: String,
    /// Fencing token, greater than that of every earlier holder of the name.
    pub fence: u64,
    /// Version of the lock's entry in the store, which must still hold when the holder commits; 0
    /// where the lock has no entry there.
    pub version: Version,
}

/// Result of a request for a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// The lock is held.
    Held(Lock),
    /// Another owner holds the lock, for so many milliseconds more if it is not extended.
    Busy {
        /// Delay before the next request, in milliseconds.
        retry_after_ms: u64,
    },
}

/// Locks by name.
///
/// Contract: while a lock is held and its time is not over, no other owner acquires it; fences of a
/// name only grow, also over restarts. A lock alone protects nothing against a holder that is late:
/// the fence does, where it is checked.
pub trait DistributedLock: Send + Sync + 'static {
    /// Acquires a lock if no other owner holds it. Durable when it returns.
    fn acquire<'a>(&'a self, ask: LockRequest<'a>) -> BoxFuture<'a, Result<Acquired, StoreError>>;
    /// Holds the lock for `ttl_ms` milliseconds from now. Returns `None` if the lock is another
    /// owner's by now, or nobody's.
    fn extend<'a>(&'a self, lock: &'a Lock, ttl_ms: u64) -> BoxFuture<'a, Result<Option<Lock>, StoreError>>;
    /// Gives the lock back. A lock that is another owner's by now is left alone.
    fn release<'a>(&'a self, lock: &'a Lock) -> BoxFuture<'a, Result<(), StoreError>>;
}

/// Locks of a tenant, in the store of record.
///
/// An entry stays when its lock is given back: the fence must not restart.
pub struct StoreLocks {
    scope: Scope,
    view: Arc<dyn StateView>,
    committer: Arc<Committer>,
    clock: Arc<dyn Clock>,
}

/// A lock's entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    fence: u64,
    /// Name of the holder; empty: nobody.
    owner: String,
    /// End of the lock, in milliseconds since the Unix epoch.
    until_ms: u64,
}

impl StoreLocks {
    /// Returns the locks of the tenant of `scope`.
    pub fn new(
        storage: &dyn IdempotencyStorage,
        committer: Arc<Committer>,
        clock: Arc<dyn Clock>,
        scope: &Scope,
    ) -> Self {
        let scope = scope.shared();
        Self { view: storage.view(&scope), committer, clock, scope }
    }

    async fn read(&self, name: &str) -> Result<(Version, Option<Entry>), StoreError> {
        let (version, value) = self.view.get(&key(name)).await?;
        let damaged = |error| StoreError::Damaged(format!("the lock `{name}`: {error}").into());
        let entry = value.map(|value| postcard::from_bytes(&value).map_err(damaged)).transpose()?;
        Ok((version, entry))
    }

    /// Writes the entry if it is at `version`. Returns its new version, or `None` if another writer
    /// was faster.
    async fn write(&self, name: &str, version: Version, entry: &Entry) -> Result<Option<Version>, StoreError> {
        let record = RecordKey::new(self.scope.clone(), "lock".into(), name.into());
        let mut shared = SharedChange::default();
        if !fault::mutated("lock-written-blindly") {
            shared.reads.insert(key(name), version);
        }
        shared.writes.insert(key(name), Some(encoded(entry)));
        let commit = Commit { shared: Some(Box::new(shared)), at_ms: self.clock.now_ms(), ..Commit::of(&record) };
        let pending = self.committer.submit(commit);
        let written = pending.version();
        Ok((pending.durable().await? == Verdict::Committed).then_some(written))
    }
}

impl DistributedLock for StoreLocks {
    fn acquire<'a>(&'a self, ask: LockRequest<'a>) -> BoxFuture<'a, Result<Acquired, StoreError>> {
        Box::pin(async move {
            loop {
                let (version, entry) = self.read(ask.name).await?;
                let now_ms = self.clock.now_ms();
                let holder = entry.as_ref().filter(|entry| !entry.owner.is_empty() && entry.owner != ask.owner);
                if let Some(held) = holder.filter(|held| held.until_ms > now_ms) {
                    return Ok(Acquired::Busy { retry_after_ms: held.until_ms - now_ms });
                }
                let fence = entry.map_or(0, |entry| entry.fence) + 1;
                let until_ms = now_ms.saturating_add(ask.ttl_ms);
                let entry = Entry { fence, owner: ask.owner.to_owned(), until_ms };
                if let Some(version) = self.write(ask.name, version, &entry).await? {
                    let (name, owner) = (ask.name.to_owned(), ask.owner.to_owned());
                    return Ok(Acquired::Held(Lock { name, owner, fence, version }));
                }
                // Another writer was faster: read the entry again.
            }
        })
    }

    fn extend<'a>(&'a self, lock: &'a Lock, ttl_ms: u64) -> BoxFuture<'a, Result<Option<Lock>, StoreError>> {
        Box::pin(async move {
            let until_ms = self.clock.now_ms().saturating_add(ttl_ms);
            let entry = Entry { fence: lock.fence, owner: lock.owner.clone(), until_ms };
            let written = self.write(&lock.name, lock.version, &entry).await?;
            Ok(written.map(|version| Lock { version, ..lock.clone() }))
        })
    }

    fn release<'a>(&'a self, lock: &'a Lock) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let entry = Entry { fence: lock.fence, owner: String::new(), until_ms: 0 };
            self.write(&lock.name, lock.version, &entry).await.map(drop)
        })
    }
}

impl Lock {
    /// Makes `change` hold only if the lock is still held, and give the lock back.
    pub(crate) fn release_in(&self, change: &mut SharedChange) {
        if !fault::mutated("fence-unchecked") {
            change.reads.insert(key(&self.name), self.version);
        }
        let entry = Entry { fence: self.fence, owner: String::new(), until_ms: 0 };
        change.writes.insert(key(&self.name), Some(encoded(&entry)));
    }
}

fn key(name: &str) -> String {
    format!("lock/{name}")
}

fn encoded(entry: &Entry) -> Bytes {
    postcard::to_stdvec(entry).expect("an entry can be encoded").into()
}
