//! A run's part in its saga: it registers steps before their outbound effects, passes the pivot,
//! joins a saga by name. Each is an event of the saga's log, durable when the call returns. A
//! re-run finds the steps that it registered before.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::message::Message;
use crate::run::checkpoint::{Checkpoints, RunIdentity};
use crate::run::failure::{ContextError, Failure};
use crate::saga::log::ReadSaga;
use crate::saga::{Member, SagaEvent, SagaId, SagaLogEntry, SagaState};
use crate::store::commit::{Commit, Verdict};
use crate::support::error::StoreError;
use crate::support::fault;

/// Most steps of one saga.
const STEPS_MAX: usize = 1_000;
/// Attempts to append to a saga that is being changed concurrently.
const APPENDS_MAX: usize = 100;

/// The progress of a run in its saga.
pub(super) struct SagaProgress {
    /// The saga that the message has joined by name; `None` for the message's own.
    named: Option<SagaId>,
    /// The saga as it was last read; `None` before that.
    read: Option<ReadSaga>,
    /// Index of the next step that a re-run may find: those before it were found, or belong to
    /// other members.
    next_step: usize,
    /// The run has registered a step, or found one that it had registered: it may take it.
    takes_steps: bool,
    /// The processor wants the saga completed.
    pub(super) completes: bool,
}

/// State of a step for which a run asks.
enum StepRequest {
    /// An earlier run registered it, at this index.
    Registered(usize),
    New,
}

impl SagaProgress {
    /// Returns the progress of a run that has not used its saga. A bad name in the attribute `saga`
    /// fails the run when the saga is first used.
    pub(super) fn of(message: &Message) -> Self {
        let named = message.extensions.get("saga").and_then(|name| SagaId::named(name).ok());
        Self { named, read: None, next_step: 0, takes_steps: false, completes: false }
    }

    /// Looks for a step among those that earlier runs of the message registered.
    fn find(&self, member: Option<u32>, name: &str, payload: &Bytes) -> StepRequest {
        let steps = self.read.iter().flat_map(|read| read.saga.steps.iter().enumerate());
        let is_it = |(_, step): &(usize, &crate::saga::Step)| {
            Some(step.member) == member && step.name == name && step.payload == *payload
        };
        match steps.skip(self.next_step).find(is_it) {
            Some((index, _)) => StepRequest::Registered(index),
            None => StepRequest::New,
        }
    }
}

impl Checkpoints {
    /// Registers a step, unless an earlier run of the message has.
    pub(super) async fn step(&self, name: &str, payload: Bytes) -> Result<(), ContextError> {
        self.check_step(name)?;
        let mut progress = self.saga.lock().await;
        let read = self.forward(&mut progress).await?;
        if read.saga.steps.len() >= STEPS_MAX {
            return Err(ContextError::Limit { what: "steps of a saga", limit: STEPS_MAX });
        }
        let member = read.saga.member(&self.identity.message_key);
        if let StepRequest::Registered(index) = progress.find(member, name, &payload) {
            (progress.next_step, progress.takes_steps) = (index + 1, true);
            return Ok(());
        }
        if fault::mutated("step-not-durable") {
            return Ok(());
        }
        fault::point("step-called");
        progress.takes_steps = true;
        self.append(&mut progress, |checkpoints, read| {
            let (member, joined) = checkpoints.joining(read);
            let call = checkpoints.calls.load(Ordering::Relaxed);
            let registered =
                SagaEvent::StepRegistered { member, step: name.to_owned(), payload: payload.clone(), call };
            joined.into_iter().chain([registered]).collect()
        })
        .await?;
        progress.next_step = progress.read.as_ref().map_or(0, |read| read.saga.steps.len());
        fault::point("step-registered");
        Ok(())
    }

    /// Fails if the run may not register the step.
    fn check_step(&self, name: &str) -> Result<(), ContextError> {
        if self.is_compensation() {
            return Err(ContextError::Saga("a compensation registers no steps".into()));
        }
        let known = &self.parts.steps;
        if known.iter().any(|known| known == name) {
            return Ok(());
        }
        let known = known.join("`, `");
        let text = format!("the step `{name}` cannot be compensated: the component's compensations are for `{known}`");
        Err(ContextError::Saga(text))
    }

    pub(super) async fn pivot(&self) -> Result<(), ContextError> {
        let mut progress = self.saga.lock().await;
        self.append(&mut progress, |checkpoints, read| {
            if read.saga.state == SagaState::Pivoted {
                return Vec::new();
            }
            let (member, joined) = checkpoints.joining(read);
            joined.into_iter().chain([SagaEvent::PivotPassed { member }]).collect()
        })
        .await
    }

    pub(super) async fn join(&self, name: &str) -> Result<(), ContextError> {
        let id = SagaId::named(name).map_err(|error| ContextError::Saga(error.to_string()))?;
        let mut progress = self.saga.lock().await;
        if progress.named.as_ref() == Some(&id) {
            return Ok(());
        }
        if progress.named.is_some() || progress.read.is_some() {
            let text = format!("the message is a member of the saga {} already: it joins no other", self.id(&progress));
            return Err(ContextError::Saga(text));
        }
        progress.named = Some(id);
        // A saga that is being compensated accepts no members: fail now, not at the first step.
        self.forward(&mut progress).await.map(drop)
    }

    pub(super) async fn complete(&self) -> Result<(), ContextError> {
        let mut progress = self.saga.lock().await;
        self.forward(&mut progress).await?;
        progress.completes = true;
        Ok(())
    }

    /// Returns the saga of which the run is a member, for the commit that ends it: `None` if the
    /// run has none.
    pub(super) async fn finish_saga(
        &self,
        progress: &mut SagaProgress,
        ran_before: bool,
    ) -> Result<Option<ReadSaga>, StoreError> {
        if progress.read.is_none() && (progress.named.is_some() || ran_before) {
            progress.read = Some(self.read(progress).await?);
        }
        Ok(progress.read.take().filter(|read| read.id.is_named() || read.saga.events > 0))
    }

    /// Returns the run's saga, read at its first use. Fails if it no longer goes forward.
    async fn forward<'a>(&self, progress: &'a mut SagaProgress) -> Result<&'a ReadSaga, ContextError> {
        if progress.read.is_none() {
            progress.read = Some(self.read(progress).await?);
        }
        let read = progress.read.as_ref().expect("it was read");
        if read.saga.state.is_forward() {
            return Ok(read);
        }
        let state = read.saga.state.name();
        Err(ContextError::Saga(format!("the saga {} is {state}: no message joins it any more", read.id)))
    }

    /// Appends the events that `events` derives from the saga as it is. Tries again if another
    /// append came between. Appends nothing if `events` returns none.
    async fn append(
        &self,
        progress: &mut SagaProgress,
        events: impl Fn(&Checkpoints, &ReadSaga) -> Vec<SagaEvent>,
    ) -> Result<(), ContextError> {
        for _ in 0..APPENDS_MAX {
            let read = self.forward(progress).await?;
            let at_ms = self.parts.clock.now_ms();
            let entries: Vec<_> = events(self, read).into_iter().map(|event| SagaLogEntry { event, at_ms }).collect();
            if entries.is_empty() {
                return Ok(());
            }
            let (shared, _) = read.append(&entries, u64::MAX).map_err(|error| ContextError::Saga(error.to_string()))?;
            self.check_lease()?;
            let commit = Commit { shared: Some(Box::new(shared)), ..self.empty_commit() };
            let verdict = self.write(commit).await?;
            // Read again: the log has this append now, or that of another member.
            progress.read = Some(self.read(progress).await?);
            if verdict == Verdict::Committed {
                return Ok(());
            }
        }
        let text =
            format!("the saga {} changes too often: {APPENDS_MAX} times another message was faster", self.id(progress));
        self.fail(Failure::retry(text));
        Err(ContextError::Lost)
    }

    /// Re-opens the steps of the message that were compensated while this run was under way: it may
    /// have taken them afterwards.
    pub(crate) async fn reopen_steps(&self) -> Result<(), StoreError> {
        let progress = self.saga.lock().await;
        if !progress.takes_steps || fault::mutated("steps-stay-compensated") || fault::mutated("sagas-ignore-runs") {
            return Ok(());
        }
        let id = self.id(&progress);
        for _ in 0..APPENDS_MAX {
            if self.parts.log.state(&id).await?.is_none_or(|state| state.is_forward() || state == SagaState::Completed)
            {
                return Ok(());
            }
            let read = self.parts.log.read(&id).await?;
            let Some(member) = read.saga.member(&self.identity.message_key) else { return Ok(()) };
            if !read.saga.has_compensated(member) {
                return Ok(());
            }
            let reopened = SagaLogEntry { event: SagaEvent::Reopened { member }, at_ms: self.parts.clock.now_ms() };
            let (shared, _) = read.append(&[reopened], u64::MAX).expect("steps of the member are compensated");
            let commit = Commit { shared: Some(Box::new(shared)), ..self.empty_commit() };
            // Not fenced: the run may have lost its claim, and its steps are in the world.
            if self.parts.committer.submit(commit).durable().await? == Verdict::Committed {
                self.parts.committer.wake_compensator();
                return Ok(());
            }
        }
        Err(StoreError::Io("the log of a saga changes too often".into()))
    }

    /// Reads the run's saga. A saga of the message's own that has ended counts as absent: it was of
    /// a message that the host has forgotten since.
    async fn read(&self, progress: &SagaProgress) -> Result<ReadSaga, StoreError> {
        let id = self.id(progress);
        if id.is_named() { self.parts.log.read(&id).await } else { self.parts.log.read_own(&id).await }
    }

    /// Returns the number of this message in the saga, and the event by which it joins if it has
    /// not.
    fn joining(&self, read: &ReadSaga) -> (u32, Option<SagaEvent>) {
        let RunIdentity { record, message_key, message, .. } = &self.identity;
        match read.saga.member(message_key) {
            Some(member) => (member, None),
            None => {
                let member = Member::of(record, message_key, message, &self.parts.component);
                (read.saga.members.len() as u32, Some(SagaEvent::Joined(Box::new(member))))
            }
        }
    }

    /// Returns the name of the run's saga.
    fn id(&self, progress: &SagaProgress) -> SagaId {
        progress.named.clone().unwrap_or_else(|| SagaId::of_message(&self.identity.message_key))
    }
}
