//! State shared by the parts of an open store: the database, the view that readers see, and the
//! applier's progress.

use std::sync::atomic::{AtomicBool, Ordering};

use hapax_core::{StoreError, fault};
use parking_lot::{Condvar, Mutex, RwLock};
use redb::Database;

use crate::StoreOptions;
use crate::format::seal::Seals;
use crate::redb::buckets::Catalogue;
use crate::redb::view::{Snapshot, View};

/// Shared by the committer, the applier and every reader. Locks are taken in the order catalogue,
/// progress, view.
pub(crate) struct Core {
    pub(crate) database: Closing,
    pub(crate) options: StoreOptions,
    pub(crate) seals: Seals,
    /// True once the store is closed, for reads, which take no lock.
    pub(crate) closed: AtomicBool,
    pub(crate) view: RwLock<View>,
    /// Held by the thread that writes the tables.
    pub(crate) catalogue: Mutex<Catalogue>,
    pub(crate) progress: Mutex<Progress>,
    /// Something that a commit or a reader waits for has changed: the snapshot, or a failure.
    pub(crate) changed: Condvar,
    /// There may be something for the applier to do.
    pub(crate) work: Condvar,
    /// The store closes.
    pub(crate) stopping: Condvar,
}

/// A database that is closed without a panic: redb takes some damage for a mistake of its own also
/// then. Everything that was committed is durable before; what redb writes when it closes only
/// spares it work at the next start.
pub(crate) struct Closing(Option<Database>);

impl Closing {
    pub(crate) fn new(database: Database) -> Self {
        Self(Some(database))
    }
}

impl std::ops::Deref for Closing {
    type Target = Database;

    fn deref(&self) -> &Database {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let database = self.0.take();
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(database))).is_err() {
            tracing::error!("store: the database is damaged and could not be closed in order; run `hapax doctor`");
        }
    }
}

/// State of the running store.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Everything is to be applied now, and then the threads end.
    pub(crate) closing: bool,
    /// The failure that closed the store.
    pub(crate) failed: Option<StoreError>,
}

/// Reason for a new snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Published {
    /// The oldest frozen memtable is in it.
    Applied,
    /// Rows or buckets are gone.
    Other,
}

impl Core {
    /// Makes `snapshot` what readers see; in the same moment the memtable that was applied goes.
    /// Called under the catalogue's lock: snapshots follow one another as their transactions did.
    pub(crate) fn publish(&self, snapshot: Snapshot, published: Published) {
        let gone = {
            let mut view = self.view.write();
            let before = std::mem::replace(&mut view.snapshot, snapshot.into());
            (before, if published == Published::Applied { view.frozen.pop_front() } else { None })
        };
        // Freed outside the lock: it may be large.
        drop(gone);
        self.wake();
    }

    /// Wakes every thread that waits for a change.
    pub(crate) fn wake(&self) {
        let progress = self.progress.lock();
        self.changed.notify_all();
        self.work.notify_all();
        if progress.closing || progress.failed.is_some() {
            self.stopping.notify_all();
        }
    }

    /// Closes the store.
    pub(crate) fn fail(&self, error: StoreError) {
        tracing::error!("store: {error}");
        self.progress.lock().failed.get_or_insert(error);
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    /// Closes the store if a read has found damage: what else it would answer is not known.
    pub(crate) fn checked<T>(&self, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        if self.closed.load(Ordering::Acquire) {
            self.failure()?;
        }
        // redb panics on some damage, as if it were a bug of its own.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
            Err(StoreError::Damaged("the pages of the database contradict each other; run `hapax doctor`".into()))
        });
        if let Err(error @ StoreError::Damaged(_)) = &result
            && !fault::mutated("damage-closes-nothing")
        {
            self.fail(error.clone());
        }
        result
    }

    /// The failure that closed the store, if one did.
    pub(crate) fn failure(&self) -> Result<(), StoreError> {
        self.progress.lock().failed.clone().map_or(Ok(()), Err)
    }

    /// Waits until `ready` answers something, looking again after every change. The applier must be
    /// able to bring it about.
    pub(crate) fn wait_for<T>(&self, mut ready: impl FnMut(&mut View) -> Option<T>) -> Result<T, StoreError> {
        if let Some(answer) = ready(&mut self.view.write()) {
            return Ok(answer);
        }
        let mut progress = self.progress.lock();
        loop {
            if let Some(error) = &progress.failed {
                return Err(error.clone());
            }
            if let Some(answer) = ready(&mut self.view.write()) {
                return Ok(answer);
            }
            // `ready` may have frozen a memtable. Only the applier hears of it: waiters that woke
            // each other would go on for as long as they wait.
            self.work.notify_all();
            if hapax_core::fault::mutated("waiters-wake-each-other") {
                self.changed.notify_all();
            }
            self.changed.wait(&mut progress);
        }
    }

    /// Applies everything that is journalled by now. Does not wait for entries journalled
    /// meanwhile: under load that would never end.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        let last = self.view.read().last_sequence();
        self.wait_for(|view| view.push_down(last).then_some(()))
    }
}
