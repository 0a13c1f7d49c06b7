//! Brings sagas that have failed to their ends: undoes their steps one by one, the last one first, and then says so in the
//! record of the message that failed. Takes up after a crash at the first step that is not marked as undone. What a saga may
//! become is `saga.rs`'; how a step's effects commit is here.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::commit::committer::Committer;
use crate::message::key::{RecordKey, Scope};
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::{IdempotentConsumer, Inner};
use crate::record::{Record, RecordEvent};
use crate::run::checkpoint::{Checkpoints, Fence, RunIdentity};
use crate::run::failure::Failure;
use crate::run::processor::{Invocation, MessageProcessor, StepToCompensate};
use crate::saga::log::{ReadSaga, SagaLog};
use crate::saga::{Member, SagaEvent, SagaId, SagaLogEntry, SagaState, Step};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Expected, SharedChange, Verdict};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::workers::source::{Observer, Report};

/// Sagas read from the store at one time.
const PAGE: usize = 256;
/// Looked for at this distance: sagas that were left, and those that may be forgotten.
const LOOK_AGAIN_MS: u64 = 60_000;

/// Finds the components that registered steps, when they are no longer the ones that run.
pub trait ComponentVersions: Send + Sync + 'static {
    /// The processor's component of that digest; an error for people where it cannot be had.
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>>;
}

/// There are none but those that run.
#[derive(Debug, Clone, Copy, Default)]
pub struct CurrentVersionsOnly;

impl ComponentVersions for CurrentVersionsOnly {
    fn load<'a>(
        &'a self,
        processor: &'a str,
        digest: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn MessageProcessor>, String>> {
        let text = format!("the component {digest} of `{processor}`, which registered the step, is not here");
        Box::pin(std::future::ready(Err(text)))
    }
}

/// What undoing needs.
pub struct CompensatorParts {
    /// The tenant whose sagas these are, by any scope of it.
    pub scope: Scope,
    /// The store of record.
    pub storage: Arc<dyn IdempotencyStorage>,
    /// Its committer.
    pub committer: Arc<Committer>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// The processors that are at work here.
    pub consumers: Vec<IdempotentConsumer>,
    /// Their earlier components.
    pub versions: Arc<dyn ComponentVersions>,
    /// Is told of the message that failed, when its saga has ended or halted.
    pub observer: Arc<dyn Observer>,
}

struct Compensator {
    parts: CompensatorParts,
    log: SagaLog,
    consumers: BTreeMap<Arc<str>, IdempotentConsumer>,
    stop: watch::Receiver<bool>,
}

/// Undoes what there is to undo until `stop` turns true; then brings to its end what need not wait.
pub async fn run_compensator(parts: CompensatorParts, mut stop: watch::Receiver<bool>) -> Result<(), StoreError> {
    let undo = Compensator::new(parts, stop.clone());
    let mut under_way: JoinSet<(SagaId, Result<(), StoreError>)> = JoinSet::new();
    // Each with how often something new had come when it was taken.
    let (mut taken, mut news): (BTreeMap<SagaId, u64>, u64) = (BTreeMap::new(), 0);
    loop {
        for id in undo.left().await? {
            if let Entry::Vacant(place) = taken.entry(id.clone()) {
                place.insert(news);
                let undo = undo.clone();
                under_way.spawn(async move {
                    let ended = undo.bring_to_its_end(&id).await;
                    (id, ended)
                });
            }
        }
        undo.forget().await?;
        // Those that have come as far as they can are left alone until there is something new: it may be for them.
        let mut resting: Vec<SagaId> = Vec::new();
        loop {
            let stopping = *stop.borrow();
            if stopping && under_way.is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = undo.parts.committer.compensation_requested() => {
                    news += 1;
                    break;
                }
                _ = stop.wait_for(|stop| *stop), if !stopping => break,
                Some(ended) = under_way.join_next() => {
                    let id = ended_one(ended)?;
                    let missed_something = taken.get(&id).is_some_and(|seen| *seen < news);
                    resting.push(id);
                    if missed_something {
                        break;
                    }
                }
                () = async { undo.parts.clock.sleep(LOOK_AGAIN_MS).await }, if !stopping => break,
            };
        }
        for id in resting {
            taken.remove(&id);
        }
    }
}

/// Undoes what there is to undo now, and waits for compensations that are due again later; until `stop` turns true.
pub async fn settle_compensations(parts: CompensatorParts, stop: watch::Receiver<bool>) -> Result<(), StoreError> {
    let undo = Compensator::new(parts, stop);
    let mut under_way = JoinSet::new();
    for id in undo.left().await? {
        let undo = undo.clone();
        under_way.spawn(async move {
            let ended = undo.bring_to_its_end(&id).await;
            (id, ended)
        });
    }
    while let Some(ended) = under_way.join_next().await {
        ended_one(ended)?;
    }
    Ok(())
}

fn ended_one(ended: Result<(SagaId, Result<(), StoreError>), tokio::task::JoinError>) -> Result<SagaId, StoreError> {
    match ended {
        Ok((id, result)) => result.map(|()| id),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(StoreError::Closed(error.to_string().into())),
    }
}

/// What became of an attempt to undo a step.
enum Progress {
    /// The saga has gone on, here or elsewhere: read it again.
    On,
    /// It waits for something that is not here.
    Waits,
}

impl Compensator {
    fn new(parts: CompensatorParts, stop: watch::Receiver<bool>) -> Arc<Self> {
        let by_name = |consumer: &IdempotentConsumer| (consumer.scope().processor.clone(), consumer.clone());
        let log = SagaLog::new(&*parts.storage, &parts.scope);
        Arc::new(Self { log, consumers: parts.consumers.iter().map(by_name).collect(), stop, parts })
    }

    /// The sagas that are not at their ends.
    async fn left(&self) -> Result<Vec<SagaId>, StoreError> {
        let mut left: Vec<SagaId> = Vec::new();
        loop {
            let page = self.log.undone_now(left.last(), PAGE).await?;
            let full = page.len() == PAGE;
            left.extend(page);
            if !full {
                return Ok(left);
            }
        }
    }

    /// Forgets sagas whose time is over.
    async fn forget(&self) -> Result<(), StoreError> {
        loop {
            let now_ms = self.parts.clock.now_ms();
            let page = self.log.forgettable(now_ms, PAGE).await?;
            for (id, expired_ms) in &page {
                let read = self.log.read(id).await?;
                let shared = Some(Box::new(read.forget(Some(*expired_ms))));
                let key = RecordKey::new(self.parts.scope.shared(), "saga".into(), id.as_str().into());
                let commit = Commit { shared, at_ms: now_ms, ..Commit::of(&key) };
                self.parts.committer.submit(commit).durable().await?;
            }
            if page.len() < PAGE {
                return Ok(());
            }
        }
    }

    async fn bring_to_its_end(&self, id: &SagaId) -> Result<(), StoreError> {
        loop {
            let read = self.log.read(id).await?;
            let went = match (read.saga.state, read.saga.next_step()) {
                (SagaState::Compensating, Some((index, step))) => {
                    if !self.wait_until(step.due_ms).await {
                        return Ok(());
                    }
                    self.undo(&read, index, step).await?
                }
                (SagaState::Compensating, None) => self.tell(&read, RecordEvent::CompensationDone).await?,
                (SagaState::Stuck, _) => self.tell(&read, RecordEvent::CompensationGivenUp).await?,
                _ => return Ok(()),
            };
            if let Progress::Waits = went {
                return Ok(());
            }
        }
    }

    /// Waits for a compensation's time; `false` if the host stops meanwhile.
    async fn wait_until(&self, due_ms: u64) -> bool {
        let after_ms = due_ms.saturating_sub(self.parts.clock.now_ms());
        if after_ms == 0 {
            return true;
        }
        let mut stop = self.stop.clone();
        tokio::select! {
            () = self.parts.clock.sleep(after_ms) => true,
            _ = stop.wait_for(|stop| *stop) => false,
        }
    }

    /// Undoes one step; its effects commit with the note that it is undone.
    async fn undo(&self, read: &ReadSaga, index: u32, step: &Step) -> Result<Progress, StoreError> {
        let member = &read.saga.members[step.member as usize];
        let Some(consumer) = self.consumers.get(&member.message_key.scope.processor) else {
            let processor = &member.message_key.scope.processor;
            tracing::error!(saga = %read.id, step = step.name, "the step is not undone: this host has no processor `{processor}`");
            return Ok(Progress::Waits);
        };
        let inner = &*consumer.inner;
        let _place = inner.runs.acquire().await.expect("the semaphore is never closed");
        let running = inner.begin_run();
        fault::point("undo-begins");
        let (result, commit) = inner.undo_once(read, index, step, member, &*self.parts.versions).await?;
        fault::point("step-undone");
        let event = match result {
            Ok(()) => SagaEvent::Compensated { step: index },
            Err(failure) => inner.undo_failed(index, step, &commit.message_key, failure, self.parts.clock.now_ms()),
        };
        let undone = matches!(event, SagaEvent::Compensated { .. });
        if let SagaEvent::AttemptFailed { error, .. } | SagaEvent::Stuck { error, .. } = &event {
            tracing::warn!(saga = %read.id, step = step.name, "the step is not undone: {error}");
        }
        let entry = SagaLogEntry { event, at_ms: self.parts.clock.now_ms() };
        let (appended, _) = read.append(&[entry], u64::MAX).expect("this is the step that is to be undone");
        let mut shared = commit.shared.map_or_else(SharedChange::default, |shared| *shared);
        shared.reads.extend(appended.reads);
        if !(undone && fault::mutated("undone-not-noted")) {
            shared.writes.extend(appended.writes);
        }
        let commit = Commit { shared: Some(Box::new(shared)), ..commit };
        let room = inner.parts.committer.room(&commit).await;
        let Ok(pending) = inner.sequence(Box::new(commit), room) else { return Ok(Progress::On) };
        drop(running);
        pending.durable().await?;
        fault::point("undo-noted");
        Ok(Progress::On)
    }

    /// Has the record of the message that failed say what became of the saga.
    async fn tell(&self, read: &ReadSaga, event: RecordEvent) -> Result<Progress, StoreError> {
        let Some(member) = read.saga.failed() else { return Ok(Progress::Waits) };
        let found = self.parts.storage.admit(&member.record).await?;
        let now_ms = self.parts.clock.now_ms();
        let life_ms = self.life_ms(member);
        let told = found.as_ref().and_then(|record| record.after_event(event.clone(), now_ms, life_ms).ok());
        let ended = event == RecordEvent::CompensationDone;
        let shared = if ended {
            let entry = SagaLogEntry { event: SagaEvent::Ended, at_ms: now_ms };
            read.append(&[entry], now_ms.saturating_add(life_ms)).expect("every step is undone").0
        } else if told.is_some() {
            read.unchanged()
        } else {
            return Ok(Progress::Waits);
        };
        let commit = Commit {
            expected: Expected::of(found.map(|record| record.epoch)),
            record: told.clone().into(),
            shared: Some(Box::new(shared)),
            at_ms: now_ms,
            ..Commit::of(&member.record)
        };
        fault::point("saga-ending");
        if self.parts.committer.submit(commit).durable().await? == Verdict::Committed {
            fault::point("saga-ended");
            self.report(member, told.as_ref(), ended);
        }
        Ok(Progress::On)
    }

    fn life_ms(&self, member: &Member) -> u64 {
        let consumer = self.consumers.get(&member.message_key.scope.processor);
        consumer.map_or(Options::default().retention_ms, |consumer| consumer.options().record_life_ms())
    }

    fn report(&self, member: &Member, record: Option<&Record>, ended: bool) {
        let Some(error) = record.and_then(|record| record.state.error()).map(str::to_owned) else { return };
        if !ended {
            tracing::error!(key = %member.record, "a saga is halted, and waits for `hapax saga retry`, `skip` or `resolve`: {error}");
        }
        let outcome = if ended { Outcome::Compensated { error } } else { Outcome::CompensationFailed { error } };
        if let Some(consumer) = self.consumers.get(&member.message_key.scope.processor) {
            consumer.inner.parts.metrics.ended(consumer.scope(), outcome.name(), 0);
        }
        self.parts.observer.ended(Report::Ended { message: &member.message, outcome: &outcome });
    }
}

impl Inner {
    /// Has a step undone; what it did is to be committed together with the saga's event.
    async fn undo_once(
        &self,
        read: &ReadSaga,
        index: u32,
        step: &Step,
        member: &Member,
        versions: &dyn ComponentVersions,
    ) -> Result<(Result<(), Failure>, Commit), StoreError> {
        let message_key = member.message_key.compensation(read.id.as_str(), index);
        let invocation = Invocation {
            message: Arc::new(member.message.clone()),
            idempotency_key: member.message_key.key.clone(),
            attempt: step.attempts + 1,
            seed: message_key.seed(),
        };
        let to_undo = StepToCompensate { invocation, name: step.name.clone(), payload: step.payload.clone() };
        let identity = RunIdentity {
            record: message_key.clone(),
            message_key: message_key.clone(),
            message: to_undo.invocation.message.clone(),
            trace: member.message_key.digest(),
        };
        let early = Arc::new(Checkpoints::new(self.early.clone(), identity, Fence::Saga(Box::new(read.clone()))));
        let mut context = self.context(&message_key).with_early(early.clone());
        let result = match self.version(member, versions).await {
            Ok(version) => match version.compensation() {
                Some(compensation) => compensation.compensate(&to_undo, &mut context).await,
                None => Err(Failure::Reject("the component has no compensations".into())),
            },
            Err(missing) => Err(Failure::Reject(missing)),
        };
        let (reads, effects) = context.finish();
        let taken = early.take(true).await?;
        let result = taken.over().map_or(result, Err);
        let mut shared = SharedChange::default();
        for lock in &taken.held {
            lock.given_back(&mut shared);
        }
        let mut commit = Commit {
            reads,
            effects: if result.is_ok() { effects } else { Default::default() },
            shared: Some(Box::new(shared)),
            at_ms: self.parts.clock.now_ms(),
            ..Commit::of(&message_key)
        };
        let forgotten = if result.is_ok() { taken.journal } else { taken.refused };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
        Ok((result, commit))
    }

    /// The version that registered the member's steps.
    async fn version(
        &self,
        member: &Member,
        versions: &dyn ComponentVersions,
    ) -> Result<Arc<dyn MessageProcessor>, String> {
        if member.component == *self.component() {
            return Ok(self.parts.processor.clone());
        }
        versions.load(&member.message_key.scope.processor, &member.component).await
    }

    /// What a failed attempt to undo a step makes of the saga.
    fn undo_failed(
        &self,
        index: u32,
        step: &Step,
        message_key: &RecordKey,
        failure: Failure,
        now_ms: u64,
    ) -> SagaEvent {
        let options = &self.parts.options;
        let attempts = step.attempts + 1;
        match failure {
            Failure::Retry { reason, after_ms } if attempts < options.compensation_attempts_max => {
                let asked_ms = after_ms.map(|after_ms| after_ms.min(options.retry_after_max_ms));
                let after_ms = asked_ms.unwrap_or_else(|| options.backoff_ms(message_key, attempts));
                SagaEvent::AttemptFailed { step: index, error: reason, retry_at_ms: now_ms.saturating_add(after_ms) }
            }
            Failure::Retry { reason, .. } => {
                SagaEvent::Stuck { step: index, error: format!("failed {attempts} times, the last time: {reason}") }
            }
            for_good => SagaEvent::Stuck { step: index, error: for_good.to_string() },
        }
    }
}
