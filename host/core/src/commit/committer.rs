//! The one writer: gives every commit its version, collects the waiting commits into a group, has
//! the store write the group, and notifies each waiter of the verdict. Writes the feed counts
//! along, about once a second. Owns a thread, since stores block. Looks into no message.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::commit::feed_counts::FeedCounts;
use crate::commit::overlay;
use crate::commit::overlay::Overlay;
use crate::message::key::{RecordKey, Scope};
use crate::state::Version;
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Group, OutboxPosition, SharedChange, Verdict};
use crate::store::feed::FeedEventKind;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::support::sync::{
    Mutex,
    mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
};

/// Commits in one group, at most.
const GROUP_COMMITS_MAX: usize = 4_096;
/// Bytes of the commits in one group, roughly; the commit that passes it is the group's last.
const GROUP_BYTES_MAX: usize = 8 << 20;

/// Bytes of commits that wait to be written, roughly. When they are used up, runs that have ended
/// wait for room, and so nothing more is pulled.
const WAITING_BYTES_MAX: usize = 64 << 20;

/// Delay between the first feed count and the write of the counts. If the process dies before, the
/// counts are lost.
const FEED_COUNTS_DELAY: Duration = Duration::from_secs(1);

/// The committer of one store; all consumers of the store share it.
pub struct Committer {
    storage: Arc<dyn IdempotencyStorage>,
    sequencer: Mutex<Sequencer>,
    shared: Arc<Shared>,
    /// A permit a byte of [`WAITING_BYTES_MAX`].
    waiting: Arc<Semaphore>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Sequencer {
    next: Version,
    /// Sender of jobs; `None` once the committer was closed.
    jobs: Option<Sender<Job>>,
}

#[derive(Default)]
struct Shared {
    /// The failure that closed the store.
    failed: OnceLock<StoreError>,
    /// Woken when `failed` is set.
    failing: Notify,
    /// Woken when a group with outgoing messages is durable.
    outbox: Notify,
    /// Number of operator actions on the outbox that became durable.
    outbox_actions: AtomicU64,
    /// Woken when there is a saga to compensate.
    compensation: Notify,
    /// Feed counts that are not written yet.
    feed_counts: FeedCounts,
}

impl Shared {
    /// Closes the store, unless an earlier failure has.
    fn fail(&self, error: StoreError) {
        let _ = self.failed.set(error);
        self.failing.notify_waiters();
    }
}

/// Closes the store if it is dropped by a panic of the committer's thread: what the store has of
/// the last group is not known then. It must be dropped before those who wait for that group are
/// told.
struct PanicAlarm<'a>(&'a Shared);

impl Drop for PanicAlarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(StoreError::Closed("the committer panicked; its log has the reason".into()));
        }
    }
}

enum Job {
    Commit(Box<Commit>, Waiter),
    /// A commit that becomes durable together with the marks of the rows that it is about.
    CommitAndSent(Box<Commit>, Waiter, Vec<OutboxPosition>),
    Sent(Vec<OutboxPosition>, oneshot::Sender<Result<(), StoreError>>),
    /// The first feed count since the last write was made.
    FeedCounted,
}

/// Room among the commits that wait to be written; given back when the commit has ended.
pub(crate) struct Room(OwnedSemaphorePermit);

impl Room {
    /// Returns the size of the room, in bytes: the commit's bytes, or all the room there is if the
    /// commit is larger.
    fn bytes(&self) -> usize {
        self.0.num_permits()
    }

    /// Merges two rooms into one, which is given back in one step.
    fn together(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(one), Some(other)) if fault::mutated("room-kept") => {
                other.0.forget();
                Some(one)
            }
            (Some(mut one), Some(other)) => {
                one.0.merge(other.0);
                Some(one)
            }
            (one, other) => one.or(other),
        }
    }
}

/// Waiter for the verdict of a commit. The overlay is notified here and not by the waiting future,
/// which may be dropped.
struct Waiter {
    version: Version,
    overlay: Option<Arc<Overlay>>,
    room: Option<Room>,
    reply: oneshot::Sender<Result<Verdict, StoreError>>,
}

impl Waiter {
    /// Notifies the waiter and the overlay of the verdict. Returns the room that the commit took.
    fn tell(self, verdict: Verdict) -> Option<Room> {
        match (&self.overlay, &verdict) {
            (Some(overlay), Verdict::Committed) => overlay.durable(self.version),
            (Some(overlay), Verdict::EpochMismatch(_) | Verdict::Conflict) => overlay.withdrawn(self.version),
            (None, _) => {}
        }
        let _ = self.reply.send(Ok(verdict));
        self.room
    }
}

/// A commit on its way; `durable` waits for its end.
pub struct Pending {
    version: Version,
    verdict: oneshot::Receiver<Result<Verdict, StoreError>>,
}

impl Pending {
    /// Returns the version that the commit got.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the verdict on the commit. `Ok(Committed)` means durable.
    pub async fn durable(self) -> Result<Verdict, StoreError> {
        self.verdict.await.unwrap_or_else(|_| Err(StoreError::Closed("the committer has stopped".into())))
    }
}

impl Committer {
    /// Starts the committer of `storage`.
    pub async fn start(storage: Arc<dyn IdempotencyStorage>) -> Result<Arc<Self>, StoreError> {
        let last = storage.last_version().await?;
        let (jobs, inbox) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let work = Worker { storage: storage.clone(), inbox, shared: shared.clone(), feed_counts_due: None };
        let thread = thread::Builder::new()
            .name("hapax-committer".into())
            .spawn(move || {
                let shared = work.shared.clone();
                let _alarm = PanicAlarm(&shared);
                work.run();
            })
            .map_err(|error| StoreError::Io(error.to_string().into()))?;
        let sequencer = Sequencer { next: last + 1, jobs: Some(jobs) };
        let waiting = Arc::new(Semaphore::new(WAITING_BYTES_MAX));
        Ok(Arc::new(Self {
            storage,
            sequencer: Mutex::new(sequencer),
            shared,
            waiting,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Sequences a commit: gives it its version, in place of any that it states. Commits are
    /// written in the order of their versions.
    pub fn submit(&self, commit: Commit) -> Pending {
        self.sequence(Box::new(commit), None)
    }

    /// Returns whether no commit has room.
    #[cfg(all(test, feature = "shuttle"))]
    pub(crate) fn all_room_is_free(&self) -> bool {
        self.waiting.available_permits() == WAITING_BYTES_MAX
    }

    /// Waits for room for a commit. A commit that is larger than all of the room waits until it is
    /// alone.
    pub(crate) async fn room(&self, commit: &Commit) -> Room {
        let bytes = commit.bytes().min(WAITING_BYTES_MAX) as u32;
        Room(self.waiting.clone().acquire_many_owned(bytes).await.expect("the semaphore is never closed"))
    }

    /// Sequences a commit in a turn of the overlay. The overlay shows the commit's writes to later
    /// runs from now on, and is notified of the verdict.
    pub(crate) fn submit_in_turn(
        &self,
        commit: Box<Commit>,
        room: Room,
        overlay: &Arc<Overlay>,
        turn: &mut overlay::Turn<'_>,
    ) -> Pending {
        self.sequence(commit, Some((room, overlay, turn)))
    }

    fn sequence(
        &self,
        mut commit: Box<Commit>,
        in_turn: Option<(Room, &Arc<Overlay>, &mut overlay::Turn<'_>)>,
    ) -> Pending {
        let (reply, verdict) = oneshot::channel();
        let mut sequencer = self.sequencer.lock();
        commit.version = sequencer.next;
        sequencer.next += 1;
        let version = commit.version;
        if fault::mutated("version-taken-before-the-turn") {
            drop(sequencer);
            sequencer = self.sequencer.lock();
        }
        let (room, overlay) = in_turn
            .map(|(room, overlay, turn)| {
                turn.show(commit.version, &commit.effects.writes);
                (room, overlay.clone())
            })
            .unzip();
        // A closed committer drops the reply, which the waiter sees.
        if let Some(jobs) = &sequencer.jobs {
            let waiter = Waiter { version: commit.version, overlay, room, reply };
            let _ = jobs.send(Job::Commit(commit, waiter));
        }
        Pending { version, verdict }
    }

    /// Marks outbox rows as sent, in the next group.
    pub async fn mark_sent(&self, sent: Vec<OutboxPosition>) -> Result<(), StoreError> {
        let (reply, done) = oneshot::channel();
        if let Some(jobs) = &self.sequencer.lock().jobs {
            let _ = jobs.send(Job::Sent(sent, reply));
        }
        done.await.unwrap_or_else(|_| Err(StoreError::Closed("the committer has stopped".into())))
    }

    /// Marks outbox rows as sent and writes to the state that no processor owns, both in one group:
    /// either is durable only with the other.
    pub(crate) async fn mark_sent_with(
        &self,
        sent: Vec<OutboxPosition>,
        shared: SharedChange,
    ) -> Result<(), StoreError> {
        let key = RecordKey::new(Scope::of("").shared(), "outbox".into(), "relay".into());
        // Marks have no condition, so the commit may have none: a conflict would leave them alone.
        let shared = SharedChange { reads: BTreeMap::new(), ..shared };
        let mut commit = Box::new(Commit { shared: Some(Box::new(shared)), ..Commit::of(&key) });
        let (reply, verdict) = oneshot::channel();
        {
            let mut sequencer = self.sequencer.lock();
            commit.version = sequencer.next;
            sequencer.next += 1;
            if let Some(jobs) = &sequencer.jobs {
                let waiter = Waiter { version: commit.version, overlay: None, room: None, reply };
                let _ = jobs.send(Job::CommitAndSent(commit, waiter, sent));
            }
        }
        verdict.await.unwrap_or_else(|_| Err(StoreError::Closed("the committer has stopped".into()))).map(drop)
    }

    /// Notifies the relay that an operator has changed the outbox, durably.
    pub(crate) fn wake_relay(&self) {
        self.shared.outbox_actions.fetch_add(1, Ordering::SeqCst);
        self.shared.outbox.notify_one();
    }

    /// Returns the number of operator actions on the outbox so far: if it has changed, what was
    /// read of the outbox may be old.
    pub(crate) fn outbox_actions(&self) -> u64 {
        self.shared.outbox_actions.load(Ordering::SeqCst)
    }

    /// Counts a message of `key` in the feed that was answered and left nothing behind. The feed
    /// shows it about a second later. Nothing waits for the write.
    pub(crate) fn notify_feed(&self, kind: FeedEventKind, key: &RecordKey, now_ms: u64) {
        if self.shared.feed_counts.count(kind, key.digest(), now_ms)
            && let Some(jobs) = &self.sequencer.lock().jobs
        {
            let _ = jobs.send(Job::FeedCounted);
        }
    }

    /// Completes when a group with outgoing messages became durable since the last call.
    pub async fn outbox_written(&self) {
        self.shared.outbox.notified().await;
    }

    /// Notifies the compensator that there is, durably, a saga to compensate.
    pub(crate) fn wake_compensator(&self) {
        self.shared.compensation.notify_one();
    }

    /// Completes when there was a saga to compensate since the last call.
    pub(crate) async fn compensation_requested(&self) {
        self.shared.compensation.notified().await;
    }

    /// Returns the failure that closed the store, if one did.
    pub fn failure(&self) -> Option<&StoreError> {
        if self.shared.failed.get().is_none()
            && let Some(failure) = self.storage.failure()
        {
            // The first failure stays.
            let _ = self.shared.failed.set(failure);
        }
        self.shared.failed.get()
    }

    /// Completes when a failure has closed the store.
    pub async fn failed(&self) -> StoreError {
        let mut failing = std::pin::pin!(self.shared.failing.notified());
        // Registered before the look: a failure in between wakes it.
        failing.as_mut().enable();
        if self.failure().is_none() {
            failing.await;
        }
        self.failure().cloned().unwrap_or_else(|| StoreError::Closed("the committer has stopped".into()))
    }

    /// Writes the submitted commits, then stops the thread.
    pub fn close(&self) {
        self.sequencer.lock().jobs = None;
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.close();
    }
}

struct Worker {
    storage: Arc<dyn IdempotencyStorage>,
    inbox: Receiver<Job>,
    shared: Arc<Shared>,
    /// Time at which the feed counts are to be written, if there are any.
    feed_counts_due: Option<Instant>,
}

impl Worker {
    /// Runs the thread. Group commit is natural: while one group is synced, the next one gathers in
    /// the inbox.
    fn run(mut self) {
        while let Ok(first) = self.next() {
            let mut group = Group::default();
            let mut waiting = Vec::new();
            let mut senders = Vec::new();
            let mut bytes = 0;
            let mut next = first;
            while let Some(job) = next {
                match job {
                    Job::Commit(commit, waiter) => {
                        bytes += waiter.room.as_ref().map_or_else(|| commit.bytes(), Room::bytes);
                        group.commits.push(*commit);
                        waiting.push(waiter);
                    }
                    Job::CommitAndSent(commit, waiter, sent) => {
                        bytes += commit.bytes();
                        group.commits.push(*commit);
                        waiting.push(waiter);
                        group.sent.extend(sent);
                    }
                    Job::Sent(sent, reply) => {
                        group.sent.extend(sent);
                        senders.push(reply);
                    }
                    Job::FeedCounted => self.feed_counts_due = Some(Instant::now() + FEED_COUNTS_DELAY),
                }
                let full = group.commits.len() >= GROUP_COMMITS_MAX || bytes >= GROUP_BYTES_MAX;
                next = if full { None } else { self.inbox.try_recv().ok() };
            }
            if self.feed_counts_due.is_some_and(|due| due <= Instant::now()) {
                self.feed_counts_due = None;
                group.feed_entries = self.shared.feed_counts.take();
            }
            if !(waiting.is_empty() && senders.is_empty() && group.feed_entries.is_empty()) {
                self.write(&group, waiting, senders);
            }
        }
        let last = Group { feed_entries: self.shared.feed_counts.take(), ..Group::default() };
        if !last.feed_entries.is_empty() {
            self.write(&last, Vec::new(), Vec::new());
        }
    }

    /// Waits for the first job of a group. Returns `None` if there is none, but the feed counts are
    /// to be written.
    fn next(&self) -> Result<Option<Job>, mpsc::RecvError> {
        let Some(due) = self.feed_counts_due else { return self.inbox.recv().map(Some) };
        match self.inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(job) => Ok(Some(job)),
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(mpsc::RecvError),
        }
    }

    fn write(&self, group: &Group, waiting: Vec<Waiter>, senders: Vec<oneshot::Sender<Result<(), StoreError>>>) {
        let _alarm = PanicAlarm(&self.shared);
        fault::point("group-gathered");
        if fault::mutated("committer-panics") {
            panic!("a fault that was injected");
        }
        if fault::mutated("ack-before-sync") {
            return self.acknowledge_first(group, waiting, senders);
        }
        let verdicts = match self.shared.failed.get() {
            Some(failure) => Err(failure.clone()),
            None => futures_executor::block_on(self.storage.commit(group)),
        };
        match verdicts {
            Ok(verdicts) => {
                fault::point("group-durable");
                if fault::mutated("close-loses-a-verdict")
                    && matches!(self.inbox.try_recv(), Err(mpsc::TryRecvError::Disconnected))
                {
                    return;
                }
                let tell = |room, (waiter, verdict): (Waiter, Verdict)| Room::together(room, waiter.tell(verdict));
                drop(waiting.into_iter().zip(verdicts).fold(None, tell));
                for reply in senders {
                    let _ = reply.send(Ok(()));
                }
                if group.commits.iter().any(Commit::fills_outbox) {
                    self.shared.outbox.notify_one();
                }
            }
            Err(error) => {
                // The contents of the disk are not known now: going on could acknowledge a commit
                // that is not there.
                self.shared.fail(error.clone());
                for waiter in waiting {
                    let _ = waiter.reply.send(Err(error.clone()));
                }
                for reply in senders {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    /// Injects the fault "the acknowledgement moves before the sync".
    fn acknowledge_first(
        &self,
        group: &Group,
        waiting: Vec<Waiter>,
        senders: Vec<oneshot::Sender<Result<(), StoreError>>>,
    ) {
        for waiter in waiting {
            drop(waiter.tell(Verdict::Committed));
        }
        for reply in senders {
            let _ = reply.send(Ok(()));
        }
        // Long enough for the acknowledgements to be seen outside before a fault point in the
        // commit ends the process.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let _ = futures_executor::block_on(self.storage.commit(group));
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::state::ReadSet;

    /// A future that was dropped must not leave its commit in the overlay for ever.
    #[test]
    fn the_overlay_is_told_though_nobody_waits() {
        for verdict in [Verdict::Committed, Verdict::Conflict] {
            let overlay = Arc::new(Overlay::default());
            let writes = BTreeMap::from([("key".to_owned(), None)]);
            overlay.turn(&ReadSet::default(), false, None).expect("nothing was read").show(1, &writes);
            assert!(!overlay.is_empty());
            let (reply, gone) = oneshot::channel();
            drop(gone);
            Waiter { version: 1, overlay: Some(overlay.clone()), room: None, reply }.tell(verdict);
            assert!(overlay.is_empty());
        }
    }
}
