//! Checkpoints: effects that a run makes durable before its own commit. Steps of its saga, answers
//! of outbound calls and locks are each a small commit that is fenced: a run that has lost its
//! claim can write none. A re-run is answered from them.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::commit::committer::{Committer, Pending};
use crate::message::Message;
use crate::message::key::{RecordKey, Scope};
use crate::record::Output;
use crate::run::answer_journal::Journal;
use crate::run::failure::{ContextError, Failure};
use crate::run::lock::{Acquired, DistributedLock, LOCK_NAME_BYTES, Lock, LockRequest};
use crate::run::outbound::Outbound;
use crate::run::saga_steps::SagaProgress;
use crate::saga::log::{ReadSaga, SagaLog};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Expected, SharedChange, Verdict};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::support::sync::Mutex;

/// Shared by the checkpoints of all runs of a consumer.
pub(crate) struct CheckpointParts {
    pub(crate) scope: Scope,
    pub(crate) committer: Arc<Committer>,
    pub(crate) storage: Arc<dyn IdempotencyStorage>,
    pub(crate) clock: Arc<dyn Clock>,
    /// Makes outbound calls. `None` if none are granted.
    pub(crate) outbound: Option<Arc<dyn Outbound>>,
    pub(crate) locks: Arc<dyn DistributedLock>,
    pub(crate) log: SagaLog,
    /// Digest of the component.
    pub(crate) component: Arc<str>,
    /// Names of the steps that the component can compensate.
    pub(crate) steps: Vec<String>,
}

/// Expectation of the small commits of a run.
pub(crate) enum Fence {
    /// The record has the epoch of the run's claim.
    Claim(LiveLease),
    /// The saga that is being compensated is as it was read.
    Saga(Box<ReadSaga>),
}

/// The lease of a run under way. The heartbeat of its claim renews it.
#[derive(Debug)]
pub(crate) struct LiveLease(Mutex<Lease>);

/// A lease as it was last written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    /// Epoch of the record; `None` if there is no record.
    pub(crate) epoch: Option<u64>,
    /// End of the lease, in milliseconds since the Unix epoch; `None` if the message is not claimed
    /// durably.
    pub(crate) lease_end_ms: Option<u64>,
}

impl LiveLease {
    fn new(lease: Lease) -> Self {
        Self(Mutex::new(lease))
    }

    fn get(&self) -> Lease {
        *self.0.lock()
    }

    /// Sequences `commit` on top of the lease. Later commits expect `renewed`.
    fn renew(&self, committer: &Committer, mut commit: Commit, renewed: Lease) -> Pending {
        let mut now = self.0.lock();
        commit.expected = Expected::of(now.epoch);
        *now = renewed;
        committer.submit(commit)
    }

    /// Sequences a commit that leaves the lease as it is.
    fn submit(&self, committer: &Committer, mut commit: Commit) -> Pending {
        let now = self.0.lock();
        if !fault::mutated("early-writes-unfenced") {
            commit.expected = Expected::of(now.epoch);
        }
        committer.submit(commit)
    }
}

/// The message of a run, and its keys.
#[derive(Clone)]
pub(crate) struct RunIdentity {
    pub(crate) record: RecordKey,
    pub(crate) message_key: RecordKey,
    pub(crate) message: Arc<Message>,
    /// Trace of the run's outbound calls, unless the message brings one.
    pub(crate) trace: u128,
}

/// Makes a run's [`Checkpoints`] when they are first used. Most runs never use them.
pub(crate) struct LazyCheckpoints {
    pub(crate) parts: Arc<CheckpointParts>,
    pub(crate) identity: RunIdentity,
    pub(crate) lease: Lease,
}

impl LazyCheckpoints {
    pub(crate) fn make(&self) -> Checkpoints {
        Checkpoints::new(self.parts.clone(), self.identity.clone(), Fence::Claim(LiveLease::new(self.lease)))
    }
}

/// The checkpoints of one run.
pub(crate) struct Checkpoints {
    pub(crate) parts: Arc<CheckpointParts>,
    pub(crate) identity: RunIdentity,
    fence: Fence,
    pub(super) saga: tokio::sync::Mutex<SagaProgress>,
    pub(super) journal: tokio::sync::Mutex<Option<Journal>>,
    /// Number of outbound calls that have their index.
    pub(super) calls: AtomicU32,
    held_locks: tokio::sync::Mutex<Vec<Lock>>,
    /// Set if the run must fail, whatever the processor answers.
    failure: Mutex<Option<Failure>>,
}

/// Effects that a run and earlier runs of the message made durable before the commit that ends the
/// run.
pub(crate) struct PriorEffects {
    /// The saga, if the message has joined one by name or has registered steps.
    pub(crate) saga: Option<ReadSaga>,
    /// The processor wants its saga completed.
    pub(crate) completes_saga: bool,
    /// Keys of all journalled answers.
    pub(crate) journal: Vec<String>,
    /// Keys of the first refusal (4xx) and of the answers after it.
    pub(crate) refused: Vec<String>,
    pub(crate) held_locks: Vec<Lock>,
    failure: Option<Failure>,
}

impl PriorEffects {
    /// Returns the result of the run: the processor's, unless the run must fail.
    pub(crate) fn override_result(&self, result: Result<Output, Failure>) -> Result<Output, Failure> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        match &self.saga {
            Some(read) if result.is_ok() && !read.saga.state.is_forward() => {
                let state = read.saga.state.name();
                Err(Failure::Reject(format!("the saga {} is {state}: no message joins it any more", read.id)))
            }
            _ => result,
        }
    }

    /// Returns the failure with which the run must fail, whatever the processor answers.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure.clone()
    }

    /// Returns the name of the saga, if the message joined it by name.
    pub(crate) fn saga_name(&self) -> Option<&str> {
        self.saga.as_ref().filter(|read| read.id.is_named()).map(|read| read.id.as_str())
    }
}

/// Error of a run that has lost its claim.
const LOST: &str = "the run was too slow: its claim is over, and another owner may have taken the message over";

impl Checkpoints {
    pub(crate) fn new(parts: Arc<CheckpointParts>, identity: RunIdentity, fence: Fence) -> Self {
        Self {
            saga: SagaProgress::of(&identity.message).into(),
            parts,
            identity,
            fence,
            journal: None.into(),
            calls: AtomicU32::new(0),
            held_locks: Vec::new().into(),
            failure: Mutex::new(None),
        }
    }

    /// Renews the run's claim. Returns `None` if the run is not fenced by one.
    pub(crate) fn renew(&self, commit: Commit, renewed: Lease) -> Option<Pending> {
        match &self.fence {
            Fence::Claim(lease) => Some(lease.renew(&self.parts.committer, commit, renewed)),
            Fence::Saga(_) => None,
        }
    }

    /// Makes the run fail, whatever the processor answers.
    pub(super) fn fail(&self, failure: Failure) {
        self.failure.lock().get_or_insert(failure);
    }

    /// Fails if the lease is over: the run may do nothing that cannot be taken back.
    pub(super) fn check_lease(&self) -> Result<(), ContextError> {
        let Fence::Claim(lease) = &self.fence else { return Ok(()) };
        let over = lease.get().lease_end_ms.is_some_and(|end_ms| end_ms <= self.parts.clock.now_ms());
        if over && !fault::mutated("zombie-goes-on") { Err(self.lost()) } else { Ok(()) }
    }

    /// Returns whether the run compensates a step, and so registers none.
    pub(super) fn is_compensation(&self) -> bool {
        matches!(self.fence, Fence::Saga(_))
    }

    pub(super) fn lost(&self) -> ContextError {
        self.fail(Failure::retry(LOST));
        ContextError::Lost
    }

    /// Makes `commit` durable under the fence. Returns `Conflict` if the shared state is no longer
    /// as it was read.
    pub(super) async fn write(&self, commit: Commit) -> Result<Verdict, ContextError> {
        let verdict = match &self.fence {
            Fence::Claim(lease) => lease.submit(&self.parts.committer, commit).durable().await?,
            Fence::Saga(read) => {
                let mut shared = commit.shared.map_or_else(SharedChange::default, |shared| *shared);
                shared.reads.extend(read.unchanged().reads);
                let commit = Commit { shared: Some(Box::new(shared)), ..commit };
                self.parts.committer.submit(commit).durable().await?
            }
        };
        match verdict {
            Verdict::EpochMismatch(_) => Err(self.lost()),
            verdict => Ok(verdict),
        }
    }

    /// Returns a commit of the message that changes nothing.
    pub(super) fn empty_commit(&self) -> Commit {
        let RunIdentity { record, message_key, .. } = &self.identity;
        Commit { message_key: message_key.clone(), at_ms: self.parts.clock.now_ms(), ..Commit::of(record) }
    }

    pub(super) async fn acquire(&self, name: &str, ttl_ms: u64) -> Result<Acquired, ContextError> {
        if name.is_empty() || name.len() > LOCK_NAME_BYTES {
            let text = format!("a lock's name has 1 to {LOCK_NAME_BYTES} bytes, not {}", name.len());
            return Err(ContextError::Saga(text));
        }
        self.check_lease()?;
        let owner = self.identity.message_key.to_string();
        let acquired = self.parts.locks.acquire(LockRequest { name, owner: &owner, ttl_ms }).await?;
        if let Acquired::Held(lock) = &acquired {
            let mut held = self.held_locks.lock().await;
            held.retain(|held| held.name != lock.name);
            held.push(lock.clone());
        }
        Ok(acquired)
    }

    pub(super) async fn extend(&self, name: &str, fence: u64, ttl_ms: u64) -> Result<bool, ContextError> {
        let mut held = self.held_locks.lock().await;
        let Some(lock) = held.iter_mut().find(|held| held.name == name && held.fence == fence) else {
            return Ok(false);
        };
        let Some(extended) = self.parts.locks.extend(lock, ttl_ms).await? else { return Ok(false) };
        *lock = extended;
        Ok(true)
    }

    pub(super) async fn release(&self, name: &str, fence: u64) -> Result<(), ContextError> {
        let mut held = self.held_locks.lock().await;
        let Some(index) = held.iter().position(|held| held.name == name && held.fence == fence) else {
            return Ok(());
        };
        let lock = held.remove(index);
        Ok(self.parts.locks.release(&lock).await?)
    }

    /// Ends the checkpoints, and returns the effects that were made durable. `ran_before`: earlier
    /// runs may have left steps and answers for which this run did not ask.
    pub(crate) async fn finish(&self, ran_before: bool) -> Result<PriorEffects, StoreError> {
        let answers = self.journalled(ran_before).await?;
        let key = |(index, _): &(u32, u16)| self.journal_key(*index);
        let refused = answers.iter().skip_while(|(_, status)| *status < 400).map(key).collect();
        let mut saga = self.saga.lock().await;
        Ok(PriorEffects {
            saga: self.finish_saga(&mut saga, ran_before).await?,
            completes_saga: saga.completes,
            journal: answers.iter().map(key).collect(),
            refused,
            held_locks: std::mem::take(&mut *self.held_locks.lock().await),
            failure: self.failure.lock().take(),
        })
    }

    /// Returns index and status of each journalled answer, in order.
    async fn journalled(&self, ran_before: bool) -> Result<Vec<(u32, u16)>, StoreError> {
        let mut journal = self.journal.lock().await;
        if journal.is_none() && ran_before {
            *journal = Some(self.read_journal().await?);
        }
        // A journal is ordered by index.
        Ok(journal.iter().flatten().map(|(index, answered)| (*index, answered.response.status)).collect())
    }
}
