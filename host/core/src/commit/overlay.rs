//! The overlay: writes that are executed and not yet durable, visible to later messages of the same
//! processor; and the check that the reads of a message still hold when its turn to commit comes.
//! Reads below the overlay come from the store.
//!
//! Optimistic concurrency control: runs read without locks, remember versions, and are checked when
//! they are sequenced. An entry stays until it is durable *and* every run that began before it has
//! ended, so the check never needs the store.

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::collections::btree_map::{self, BTreeMap};
use std::convert::Infallible;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use smallvec::SmallVec;
use tokio::sync::Notify;

use crate::state::{Entry, RangeRead, ReadSet, StateView, Version};
use crate::support::error::StoreError;
use crate::support::fault;
use crate::support::sync::{Mutex, MutexGuard};

/// The not yet durable writes of one processor.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    inner: Mutex<Inner>,
    /// Held by the run that has reserved the order, and by those that want to, one by one.
    reserving: Arc<tokio::sync::Mutex<()>>,
    /// Woken when the reservation has ended.
    released: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Version of the last sequenced commit.
    last: Version,
    /// Writes by key, oldest first; `None` deletes.
    keys: BTreeMap<Arc<str>, Versions>,
    /// Sequenced commits that still have entries, oldest first.
    commits: VecDeque<Sequenced>,
    /// Runs under way, counted by the last version at the time when they began.
    running: BTreeMap<Version, usize>,
    /// Commits that are not durable yet and that the store may refuse: mostly none.
    unsure: BTreeSet<Version>,
    /// A run has reserved the order: until it ends, no other commit is sequenced.
    is_reserved: bool,
}

/// Writes of one key, oldest first; mostly one.
type Versions = SmallVec<[(Version, Option<Bytes>); 1]>;

#[derive(Debug)]
struct Sequenced {
    version: Version,
    keys: SmallVec<[Arc<str>; 1]>,
    durable: bool,
}

/// A run that reads through the overlay. Dropping this ends it.
pub(crate) struct ReadingRun {
    overlay: Arc<Overlay>,
    began: Version,
}

/// The turn to be sequenced.
pub(crate) struct Turn<'a> {
    inner: MutexGuard<'a, Inner>,
    /// Set if the store may refuse the commit: of its own, or since it read what such a commit
    /// wrote.
    pub(crate) may_be_refused: bool,
}

/// Reason why a commit is not sequenced now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// The reads of the run have changed: run it again.
    StaleReads,
    /// Another run has reserved the order: wait until it is [`Overlay::unreserved`].
    Reserved,
}

/// The order, reserved for one run: what it reads cannot change until this is dropped.
pub(crate) struct Reservation {
    overlay: Arc<Overlay>,
    _reserving: tokio::sync::OwnedMutexGuard<()>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.overlay.inner.lock().is_reserved = false;
        self.overlay.released.notify_waiters();
    }
}

impl Overlay {
    /// Begins a run. Entries that it may have missed stay until it ends.
    pub(crate) fn begin(self: &Arc<Self>) -> ReadingRun {
        let mut inner = self.inner.lock();
        let began = inner.last;
        *inner.running.entry(began).or_default() += 1;
        ReadingRun { overlay: self.clone(), began }
    }

    /// Reserves the order for a run that has been overtaken too often. Waits for the runs that have
    /// reserved it before.
    pub(crate) async fn reserve(self: &Arc<Self>) -> Reservation {
        let reserving = self.reserving.clone().lock_owned().await;
        self.inner.lock().is_reserved = true;
        Reservation { overlay: self.clone(), _reserving: reserving }
    }

    /// Completes when the order is not reserved.
    pub(crate) async fn unreserved(&self) {
        loop {
            // Registered before the check: a release in between wakes it.
            let mut released = std::pin::pin!(self.released.notified());
            released.as_mut().enable();
            if !self.inner.lock().is_reserved {
                return;
            }
            released.await;
        }
    }

    /// Checks `reads` and, if they hold, returns the turn to be sequenced: until it is dropped, no
    /// other commit of this processor is sequenced. `may_be_refused`: the store may refuse the
    /// commit for a reason of its own.
    pub(crate) fn turn(
        &self,
        reads: &ReadSet,
        may_be_refused: bool,
        reservation: Option<&Reservation>,
    ) -> Result<Turn<'_>, NotNow> {
        let inner = self.inner.lock();
        if inner.is_reserved && reservation.is_none() {
            return Err(NotNow::Reserved);
        }
        if !inner.holds(reads) {
            return Err(NotNow::StaleReads);
        }
        let may_be_refused = may_be_refused || inner.rest_on_unsure(reads);
        Ok(Turn { inner, may_be_refused })
    }

    /// The commit `version` is durable. Its entries go as soon as no run needs them.
    pub(crate) fn durable(&self, version: Version) {
        let mut inner = self.inner.lock();
        if let Ok(at) = inner.commits.binary_search_by_key(&version, |commit| commit.version) {
            inner.commits[at].durable = true;
        }
        inner.unsure.remove(&version);
        inner.prune();
    }

    /// The commit `version` was rejected. Removes its writes, so that runs that read them fail
    /// validation.
    pub(crate) fn withdrawn(&self, version: Version) {
        let mut inner = self.inner.lock();
        inner.unsure.remove(&version);
        if let Ok(at) = inner.commits.binary_search_by_key(&version, |commit| commit.version)
            && let Some(commit) = inner.commits.remove(at)
        {
            inner.remove_entries(commit);
        }
    }

    /// Returns whether no entry is held.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        inner.keys.is_empty() && inner.commits.is_empty()
    }

    /// Returns a view of the state with all sequenced commits, over `below`.
    pub(crate) fn over(self: &Arc<Self>, below: Arc<dyn StateView>) -> Arc<dyn StateView> {
        Arc::new(OverlayView { overlay: self.clone(), below })
    }
}

impl Turn<'_> {
    /// Makes `writes` visible under the version that the commit got.
    pub(crate) fn show(&mut self, version: Version, writes: &BTreeMap<String, Option<Bytes>>) {
        let inner = &mut *self.inner;
        inner.last = version;
        if writes.is_empty() {
            return;
        }
        if self.may_be_refused {
            inner.unsure.insert(version);
        }
        let mut keys = SmallVec::with_capacity(writes.len());
        for (key, value) in writes {
            let key: Arc<str> = key.as_str().into();
            keys.push(key.clone());
            inner.keys.entry(key).or_default().push((version, value.clone()));
        }
        inner.commits.push_back(Sequenced { version, keys, durable: false });
    }
}

/// Returns the latest version of a key; 0 if its latest write deletes it, because a deleted key
/// reads as absent.
fn current_version(versions: &Versions) -> Option<Version> {
    versions.last().map(|(version, value)| if value.is_some() { *version } else { 0 })
}

impl Inner {
    fn holds(&self, reads: &ReadSet) -> bool {
        let version = |key: &str| Ok(self.keys.get(key).and_then(current_version));
        let range = |read: &RangeRead| {
            let written = self.within(&read.start, read.end.as_deref());
            Ok(read.unchanged_by(written.filter_map(|(key, versions)| Some((&**key, current_version(versions)?)))))
        };
        let Ok(holds) = reads.holds::<Infallible>(version, range);
        holds
    }

    /// Returns whether a commit that the store may refuse wrote what `reads` saw.
    fn rest_on_unsure(&self, reads: &ReadSet) -> bool {
        if self.unsure.is_empty() {
            return false;
        }
        let is_unsure = |versions: &Versions| versions.iter().any(|(version, _)| self.unsure.contains(version));
        reads.keys.keys().any(|key| self.keys.get(key.as_str()).is_some_and(is_unsure))
            || reads
                .ranges
                .iter()
                .any(|read| self.within(&read.start, read.end.as_deref()).any(|(_, versions)| is_unsure(versions)))
    }

    fn within(&self, start: &str, end: Option<&str>) -> impl Iterator<Item = (&Arc<str>, &Versions)> {
        self.keys.range::<str, _>((Bound::Included(start), end.map_or(Bound::Unbounded, Bound::Excluded)))
    }

    fn prune(&mut self) {
        let needed_after = self.running.keys().next().copied().unwrap_or(Version::MAX);
        while let Some(commit) = self.commits.front() {
            let needed = commit.version > needed_after && !fault::mutated("overlay-pruned-early");
            if !commit.durable || needed {
                return;
            }
            let commit = self.commits.pop_front().expect("there is a front");
            self.remove_entries(commit);
        }
    }

    fn remove_entries(&mut self, commit: Sequenced) {
        for key in commit.keys {
            if let btree_map::Entry::Occupied(mut versions) = self.keys.entry(key) {
                versions.get_mut().retain(|(version, _)| *version != commit.version);
                if versions.get().is_empty() {
                    versions.remove();
                }
            }
        }
    }
}

impl Drop for ReadingRun {
    fn drop(&mut self) {
        let mut inner = self.overlay.inner.lock();
        if let Some(count) = inner.running.get_mut(&self.began) {
            *count -= 1;
            if *count == 0 {
                inner.running.remove(&self.began);
                inner.prune();
            }
        }
    }
}

struct OverlayView {
    overlay: Arc<Overlay>,
    below: Arc<dyn StateView>,
}

impl StateView for OverlayView {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        let above = self.overlay.inner.lock().keys.get(key).and_then(|versions| versions.last().cloned());
        match above {
            Some((version, Some(value))) => Box::pin(std::future::ready(Ok((version, Some(value))))),
            Some((_, None)) => Box::pin(std::future::ready(Ok((0, None)))),
            None => self.below.get(key),
        }
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move {
            let above: Vec<(String, (Version, Option<Bytes>))> = self
                .overlay
                .inner
                .lock()
                .within(start, end)
                .filter_map(|(key, versions)| Some((key.to_string(), versions.last()?.clone())))
                .collect();
            // Deletes above may hide entries below: read that many more.
            let hidden = above.iter().filter(|(_, (_, value))| value.is_none()).count();
            let below = self.below.scan(start, end, limit.saturating_add(hidden)).await?;
            let mut merged: BTreeMap<String, (Version, Option<Bytes>)> =
                below.into_iter().map(|(key, version, value)| (key, (version, Some(value)))).collect();
            merged.extend(above);
            let present = merged.into_iter().filter_map(|(key, (version, value))| Some((key, version, value?)));
            Ok(present.take(limit).collect())
        })
    }
}
