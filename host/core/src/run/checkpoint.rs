//! What a run makes durable before its own commit: steps of its saga, answers from outside, locks. Each is a small commit that
//! rests on the run's claim: who has lost it can write none. What a re-run asks for again is answered from here.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use bytes::Bytes;

use crate::commit::committer::{Committer, Pending};
use crate::message::Message;
use crate::message::key::{RecordKey, Scope};
use crate::record::Output;
use crate::run::answer_journal::Journal;
use crate::run::context::Context;
use crate::run::failure::{ContextError, Failure};
use crate::run::lock::{Acquired, DistributedLock, LOCK_NAME_BYTES, Lock, LockRequest};
use crate::run::outbound::Outbound;
use crate::run::outbound_call::OutboundCaller;
use crate::saga::log::{ReadSaga, SagaLog};
use crate::saga::{Member, SagaEvent, SagaId, SagaLogEntry, SagaState};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Expected, SharedChange, Verdict};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::support::sync::Mutex;

/// Steps that one saga may have, at most.
const STEPS_MAX: usize = 1_000;
/// An append to a saga that meets another one is tried again so often.
const APPENDS_MAX: usize = 100;

/// What all runs of a consumer share.
pub(crate) struct CheckpointParts {
    pub(crate) scope: Scope,
    pub(crate) committer: Arc<Committer>,
    pub(crate) storage: Arc<dyn IdempotencyStorage>,
    pub(crate) clock: Arc<dyn Clock>,
    /// Who calls outside; `None`: nobody may.
    pub(crate) outbound: Option<Arc<dyn Outbound>>,
    pub(crate) locks: Arc<dyn DistributedLock>,
    pub(crate) log: SagaLog,
    /// Digest of the component.
    pub(crate) component: Arc<str>,
    /// The steps that can be undone.
    pub(crate) steps: Vec<String>,
}

/// What the small commits of a run rest on.
pub(crate) enum Fence {
    /// The record has this epoch, as the claim has left it.
    Claim(LiveLease),
    /// The saga that is being undone is as it was read.
    Saga(Box<ReadSaga>),
}

/// The claim of a run, which its heartbeat renews.
#[derive(Debug)]
pub(crate) struct LiveLease(Mutex<Lease>);

/// See [`LiveLease`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    /// Epoch of the record; `None`: there is none.
    pub(crate) epoch: Option<u64>,
    /// Until when nobody else may take it over, in milliseconds since the Unix epoch; `None`: it is not written down.
    pub(crate) lease_end_ms: Option<u64>,
}

impl LiveLease {
    pub(crate) fn new(claimed: Lease) -> Self {
        Self(Mutex::new(claimed))
    }

    pub(crate) fn get(&self) -> Lease {
        *self.0.lock()
    }

    /// Sequences `commit` on top of the claim; what comes later rests on what it makes of it.
    pub(crate) fn renew(&self, committer: &Committer, mut commit: Commit, claimed: Lease) -> Pending {
        let mut now = self.0.lock();
        commit.expected = Expected::of(now.epoch);
        *now = claimed;
        committer.submit(commit)
    }

    /// Sequences a commit that leaves the claim as it is.
    fn submit(&self, committer: &Committer, mut commit: Commit) -> Pending {
        let now = self.0.lock();
        if !fault::mutated("early-writes-unfenced") {
            commit.expected = Expected::of(now.epoch);
        }
        committer.submit(commit)
    }
}

/// Whose run it is.
#[derive(Clone)]
pub(crate) struct RunIdentity {
    pub(crate) record: RecordKey,
    pub(crate) message_key: RecordKey,
    pub(crate) message: Arc<Message>,
    /// The trace of its calls, unless the message has one.
    pub(crate) trace: u128,
}

/// What makes a run's [`Checkpoints`]. Most runs never need one.
pub(crate) struct LazyCheckpoints {
    pub(crate) parts: Arc<CheckpointParts>,
    pub(crate) identity: RunIdentity,
    pub(crate) claimed: Lease,
}

impl LazyCheckpoints {
    pub(crate) fn make(&self) -> Checkpoints {
        Checkpoints::new(self.parts.clone(), self.identity.clone(), Fence::Claim(LiveLease::new(self.claimed)))
    }
}

/// One run's.
pub(crate) struct Checkpoints {
    pub(crate) parts: Arc<CheckpointParts>,
    pub(crate) identity: RunIdentity,
    fence: Fence,
    saga: tokio::sync::Mutex<SagaSoFar>,
    pub(crate) journal: tokio::sync::Mutex<Option<Journal>>,
    pub(crate) calls: AtomicU32,
    held: tokio::sync::Mutex<Vec<Lock>>,
    /// Why the run must end, whatever the processor says.
    over: Mutex<Option<Failure>>,
}

/// The run's part in its saga.
struct SagaSoFar {
    /// The saga that the message has joined by name; `None`: its own.
    named: Option<SagaId>,
    /// As it was read last; `None`: not yet.
    read: Option<ReadSaga>,
    /// Steps before this one were registered again by this run, or are other members'.
    cursor: usize,
    /// The processor wants it completed.
    completes: bool,
}

/// What the end of a run takes along.
pub(crate) struct PriorEffects {
    /// The saga, if the message has joined one by name or there are steps.
    pub(crate) saga: Option<ReadSaga>,
    pub(crate) completes_saga: bool,
    /// Keys of all answers that are kept.
    pub(crate) journal: Vec<String>,
    /// Those of the first refusal (4xx) and of what came after it.
    pub(crate) refused: Vec<String>,
    pub(crate) held: Vec<Lock>,
    over: Option<Failure>,
}

impl PriorEffects {
    /// How the run has ended, by what the processor says and what there is besides.
    pub(crate) fn judged(&self, result: Result<Output, Failure>) -> Result<Output, Failure> {
        if let Some(failure) = &self.over {
            return Err(failure.clone());
        }
        match &self.saga {
            Some(read) if result.is_ok() && !read.saga.state.is_forward() => {
                let state = read.saga.state.name();
                Err(Failure::Reject(format!("the saga {} is {state}: nothing joins it any more", read.id)))
            }
            _ => result,
        }
    }

    /// Why the run has ended, whatever the processor says.
    pub(crate) fn over(&self) -> Option<Failure> {
        self.over.clone()
    }

    /// The saga's name, if it has one of its own.
    pub(crate) fn saga_name(&self) -> Option<&str> {
        self.saga.as_ref().filter(|read| read.id.is_named()).map(|read| read.id.as_str())
    }
}

impl Checkpoints {
    pub(crate) fn new(parts: Arc<CheckpointParts>, identity: RunIdentity, fence: Fence) -> Self {
        // What the attribute says is looked at when it is needed: a name that is none fails the run then.
        let named = identity.message.extensions.get("saga").and_then(|name| SagaId::named(name).ok());
        Self {
            parts,
            identity,
            fence,
            saga: SagaSoFar { named, read: None, cursor: 0, completes: false }.into(),
            journal: None.into(),
            calls: AtomicU32::new(0),
            held: Vec::new().into(),
            over: Mutex::new(None),
        }
    }

    /// Renews the run's claim; `None` where it rests on none.
    pub(crate) fn renew(&self, commit: Commit, claimed: Lease) -> Option<Pending> {
        match &self.fence {
            Fence::Claim(claim) => Some(claim.renew(&self.parts.committer, commit, claimed)),
            Fence::Saga(_) => None,
        }
    }

    /// Ends the run, whatever the processor makes of it.
    pub(crate) fn end(&self, failure: Failure) {
        self.over.lock().get_or_insert(failure);
    }

    /// Whether the run may still do something that cannot be taken back.
    pub(crate) fn check_claim(&self) -> Result<(), ContextError> {
        let Fence::Claim(claim) = &self.fence else { return Ok(()) };
        let over = claim.get().lease_end_ms.is_some_and(|end_ms| end_ms <= self.parts.clock.now_ms());
        if over && !fault::mutated("zombie-goes-on") { Err(self.lost()) } else { Ok(()) }
    }

    pub(crate) fn lost(&self) -> ContextError {
        self.end(Failure::retry(LOST));
        ContextError::Lost
    }

    /// Makes `commit` durable on top of the claim. `Conflict` where the shared state is no longer as it was read.
    pub(crate) async fn write(&self, commit: Commit) -> Result<Verdict, ContextError> {
        let verdict = match &self.fence {
            Fence::Claim(claim) => claim.submit(&self.parts.committer, commit).durable().await?,
            Fence::Saga(read) => {
                let mut shared = commit.shared.map_or_else(SharedChange::default, |shared| *shared);
                shared.reads.extend(read.unchanged().reads);
                let commit = Commit { shared: Some(Box::new(shared)), ..commit };
                self.parts.committer.submit(commit).durable().await?
            }
        };
        match verdict {
            Verdict::Taken(_) => Err(self.lost()),
            verdict => Ok(verdict),
        }
    }

    pub(crate) fn commit(&self) -> Commit {
        Commit {
            message_key: self.identity.message_key.clone(),
            at_ms: self.parts.clock.now_ms(),
            ..Commit::of(&self.identity.record)
        }
    }

    fn entry(&self, event: SagaEvent) -> SagaLogEntry {
        SagaLogEntry { event, at_ms: self.parts.clock.now_ms() }
    }

    /// The run's saga, read at its first use; refuses one that does not go forward.
    async fn forward<'a>(&self, so_far: &'a mut SagaSoFar) -> Result<&'a ReadSaga, ContextError> {
        if so_far.read.is_none() {
            so_far.read = Some(self.parts.log.read(&self.id(so_far)).await?);
        }
        let read = so_far.read.as_ref().expect("it was read");
        match read.saga.state {
            SagaState::Open | SagaState::Pivoted => Ok(read),
            state => {
                Err(ContextError::Saga(format!("the saga {} is {}: nothing joins it any more", read.id, state.name())))
            }
        }
    }

    /// Appends what `events` makes of the saga as it is, until nobody came in between; nothing where it makes none.
    async fn append(
        &self,
        so_far: &mut SagaSoFar,
        events: impl Fn(&Checkpoints, &ReadSaga) -> Result<Vec<SagaEvent>, ContextError>,
    ) -> Result<(), ContextError> {
        for _ in 0..APPENDS_MAX {
            let read = self.forward(so_far).await?;
            let entries: Vec<SagaLogEntry> = events(self, read)?.into_iter().map(|event| self.entry(event)).collect();
            if entries.is_empty() {
                return Ok(());
            }
            let appended = read.append(&entries, u64::MAX).map_err(|error| ContextError::Saga(error.to_string()))?;
            self.check_claim()?;
            let commit = Commit { shared: Some(Box::new(appended.0)), ..self.commit() };
            let verdict = self.write(commit).await?;
            // Its own append is in there now, or somebody else's.
            so_far.read = Some(self.parts.log.read(&self.id(so_far)).await?);
            if verdict == Verdict::Committed {
                return Ok(());
            }
        }
        Err(ContextError::Saga(format!("the saga {} changes too often", self.id(so_far))))
    }

    /// The event by which this message joins, unless it has.
    fn joining(&self, read: &ReadSaga) -> (u32, Option<SagaEvent>) {
        match read.saga.member(&self.identity.message_key) {
            Some(member) => (member, None),
            None => (read.saga.members.len() as u32, Some(SagaEvent::Joined(Box::new(self.member())))),
        }
    }

    fn member(&self) -> Member {
        let RunIdentity { record, message_key, message, .. } = &self.identity;
        Member::of(record, message_key, message, &self.parts.component)
    }

    /// The run's saga.
    fn id(&self, so_far: &SagaSoFar) -> SagaId {
        so_far.named.clone().unwrap_or_else(|| SagaId::of_message(&self.identity.message_key))
    }

    async fn step(&self, name: &str, payload: Bytes) -> Result<(), ContextError> {
        if let Fence::Saga(_) = self.fence {
            return Err(ContextError::Saga("a compensation registers no steps".into()));
        }
        if !self.parts.steps.iter().any(|known| known == name) {
            let known = self.parts.steps.join("`, `");
            let text = format!("the step `{name}` cannot be undone: the component's compensations are for `{known}`");
            return Err(ContextError::Saga(text));
        }
        let mut so_far = self.saga.lock().await;
        let read = self.forward(&mut so_far).await?;
        if read.saga.steps.len() >= STEPS_MAX {
            return Err(ContextError::Limit { what: "steps of a saga", limit: STEPS_MAX });
        }
        // A re-run registers what it registered before: that stands.
        let member = read.saga.member(&self.identity.message_key);
        let cursor = so_far.cursor;
        let again = so_far
            .read
            .iter()
            .flat_map(|read| (0..).zip(&read.saga.steps))
            .skip(cursor)
            .find(|(_, step)| Some(step.member) == member && step.name == name && step.payload == payload);
        if let Some((index, _)) = again {
            so_far.cursor = index + 1;
            return Ok(());
        }
        if fault::mutated("step-not-durable") {
            return Ok(());
        }
        fault::point("step-called");
        self.append(&mut so_far, |early, read| {
            let (member, joined) = early.joining(read);
            let registered = SagaEvent::Registered { member, step: name.to_owned(), payload: payload.clone() };
            Ok(joined.into_iter().chain([registered]).collect())
        })
        .await?;
        so_far.cursor = so_far.read.as_ref().map_or(0, |read| read.saga.steps.len());
        fault::point("step-registered");
        Ok(())
    }

    async fn pivot(&self) -> Result<(), ContextError> {
        let mut so_far = self.saga.lock().await;
        self.append(&mut so_far, |early, read| {
            if read.saga.state == SagaState::Pivoted {
                return Ok(Vec::new());
            }
            let (member, joined) = early.joining(read);
            Ok(joined.into_iter().chain([SagaEvent::PivotPassed { member }]).collect())
        })
        .await
    }

    async fn join(&self, name: &str) -> Result<(), ContextError> {
        let id = SagaId::named(name).map_err(|error| ContextError::Saga(error.to_string()))?;
        let mut so_far = self.saga.lock().await;
        if so_far.named.as_ref() == Some(&id) {
            return Ok(());
        }
        if so_far.named.is_some() || so_far.read.is_some() {
            let text = format!("the message has a part in the saga {} already: it joins no other", self.id(&so_far));
            return Err(ContextError::Saga(text));
        }
        *so_far = SagaSoFar { named: Some(id), read: None, cursor: 0, completes: so_far.completes };
        // One that is undone already takes nobody in.
        self.forward(&mut so_far).await.map(drop)
    }

    async fn complete(&self) -> Result<(), ContextError> {
        let mut so_far = self.saga.lock().await;
        self.forward(&mut so_far).await?;
        so_far.completes = true;
        Ok(())
    }

    async fn acquire(&self, name: &str, ttl_ms: u64) -> Result<Acquired, ContextError> {
        if name.is_empty() || name.len() > LOCK_NAME_BYTES {
            return Err(ContextError::Saga(format!(
                "a lock's name has 1 to {LOCK_NAME_BYTES} bytes, not {}",
                name.len()
            )));
        }
        self.check_claim()?;
        let owner = self.identity.message_key.to_string();
        let acquired = self.parts.locks.acquire(LockRequest { name, owner: &owner, ttl_ms }).await?;
        if let Acquired::Held(lock) = &acquired {
            let mut held = self.held.lock().await;
            held.retain(|held| held.name != lock.name);
            held.push(lock.clone());
        }
        Ok(acquired)
    }

    async fn extend(&self, name: &str, fence: u64, ttl_ms: u64) -> Result<bool, ContextError> {
        let mut held = self.held.lock().await;
        let Some(lock) = held.iter_mut().find(|held| held.name == name && held.fence == fence) else {
            return Ok(false);
        };
        match self.parts.locks.extend(lock, ttl_ms).await? {
            Some(extended) => {
                *lock = extended;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    async fn release(&self, name: &str, fence: u64) -> Result<(), ContextError> {
        let mut held = self.held.lock().await;
        let Some(place) = held.iter().position(|held| held.name == name && held.fence == fence) else { return Ok(()) };
        let lock = held.remove(place);
        Ok(self.parts.locks.release(&lock).await?)
    }

    /// What the end of the run takes along. `reads_journal`: earlier runs may have left answers that this one did not ask for.
    pub(crate) async fn take(&self, reads_journal: bool) -> Result<PriorEffects, StoreError> {
        let mut so_far = self.saga.lock().await;
        if so_far.read.is_none() && (so_far.named.is_some() || (reads_journal && !self.parts.steps.is_empty())) {
            so_far.read = Some(self.parts.log.read(&self.id(&so_far)).await?);
        }
        let mut journal = self.journal.lock().await;
        if journal.is_none() && reads_journal && self.parts.outbound.is_some() {
            *journal = Some(self.read_journal().await?);
        }
        let mut journal: Vec<(u32, u16)> =
            journal.iter().flatten().map(|(place, answered)| (*place, answered.response.status)).collect();
        journal.sort_unstable();
        let refused = journal.iter().skip_while(|(_, status)| *status < 400);
        let key = |(place, _): &(u32, u16)| self.journal_key(*place);
        Ok(PriorEffects {
            refused: refused.map(key).collect(),
            saga: so_far.read.take().filter(|read| read.id.is_named() || read.saga.events > 0),
            completes_saga: so_far.completes,
            journal: journal.iter().map(key).collect(),
            held: std::mem::take(&mut *self.held.lock().await),
            over: self.over.lock().take(),
        })
    }
}

/// What a run is told that has lost its claim.
const LOST: &str = "the run was too slow: its claim is over, and another owner may have taken the message over";

impl Context {
    /// Registers a step before its outside effect. Durable when it returns; a re-run that registers the same again registers
    /// nothing. What fails here ends the run.
    pub async fn step(&mut self, name: &str, payload: impl Into<Bytes>) -> Result<(), ContextError> {
        self.early()?.step(name, payload.into()).await
    }

    /// From here on there is no way back: nothing of the saga is undone. Durable when it returns.
    pub async fn pivot(&mut self) -> Result<(), ContextError> {
        self.early()?.pivot().await
    }

    /// Makes the message part of the saga `name`; before its first step only.
    pub async fn join_saga(&mut self, name: &str) -> Result<(), ContextError> {
        self.early()?.join(name).await
    }

    /// The saga is complete once the message has committed.
    pub async fn complete_saga(&mut self) -> Result<(), ContextError> {
        self.early()?.complete().await
    }

    /// Acquires a lock. The message commits only if it is still held then, and gives it back.
    pub async fn acquire(&mut self, name: &str, ttl_ms: u64) -> Result<Acquired, ContextError> {
        self.early()?.acquire(name, ttl_ms).await
    }

    /// Holds a lock for `ttl_ms` from now; `false` if it is lost.
    pub async fn extend(&mut self, name: &str, fence: u64, ttl_ms: u64) -> Result<bool, ContextError> {
        self.early()?.extend(name, fence, ttl_ms).await
    }

    /// Gives a lock back before the message ends.
    pub async fn release(&mut self, name: &str, fence: u64) -> Result<(), ContextError> {
        self.early()?.release(name, fence).await
    }

    /// Who makes the run's calls to the outside. `None` where a context is no message's.
    pub fn caller(&self) -> Option<OutboundCaller> {
        self.early().ok().cloned().map(OutboundCaller)
    }

    fn early(&self) -> Result<&Arc<Checkpoints>, ContextError> {
        self.made_early().ok_or_else(|| ContextError::Saga("this context is no message's".into()))
    }
}
