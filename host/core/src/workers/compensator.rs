//! The compensator: brings failed sagas to their ends. It compensates their steps one by one, the
//! last one first, and then writes the result into the record of the message that failed. After a
//! crash it resumes at the first step that is not marked as compensated. `saga/mod.rs` says what a
//! saga may become; `pipeline/compensate.rs` runs one compensation.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use crate::commit::committer::Committer;
use crate::message::key::{RecordKey, Scope};
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::compensate::{ComponentVersions, NextStep};
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::record::{CLOCK_SKEW_MS, RecordEvent};
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
/// Interval between two searches for sagas that were left behind, and for those that may be
/// forgotten, in milliseconds.
const POLL_INTERVAL_MS: u64 = 60_000;

/// The parts of a compensator.
pub struct CompensatorParts {
    /// Any scope of the tenant whose sagas these are.
    pub scope: Scope,
    /// The store of record.
    pub storage: Arc<dyn IdempotencyStorage>,
    /// The committer of that store.
    pub committer: Arc<Committer>,
    /// The source of time.
    pub clock: Arc<dyn Clock>,
    /// The processors that are at work here.
    pub consumers: Vec<IdempotentConsumer>,
    /// Finds the earlier components of these processors.
    pub versions: Arc<dyn ComponentVersions>,
    /// Takes the outcome of the message that failed, when its saga has ended or is stuck.
    pub observer: Arc<dyn Observer>,
}

struct Compensator {
    parts: CompensatorParts,
    log: SagaLog,
    consumers: BTreeMap<Arc<str>, IdempotentConsumer>,
    stop: watch::Receiver<bool>,
}

/// A task that brings one saga as far as it goes.
type SagaTask = (SagaId, Result<(), StoreError>);

/// The sagas whose tasks have been started.
#[derive(Default)]
struct Started {
    tasks: JoinSet<SagaTask>,
    /// Each with the number of requests that had come when its task was started.
    sagas: BTreeMap<SagaId, u64>,
    /// Requests to compensate that have come so far.
    requests: u64,
}

/// Reason why the compensator stopped waiting.
enum Woken {
    /// There may be sagas to start.
    Search,
    /// The host stops, and no task is under way.
    Stopped,
}

/// Compensates the sagas that are to be compensated until `stop` turns true, then finishes those
/// that need not wait.
pub async fn run_compensator(parts: CompensatorParts, mut stop: watch::Receiver<bool>) -> Result<(), StoreError> {
    let compensator = Compensator::new(parts, stop.clone());
    let mut started = Started::default();
    loop {
        started.start(&compensator, compensator.unsettled().await?);
        compensator.forget_expired().await?;
        match started.wait(&compensator, &mut stop).await? {
            Woken::Search => {}
            Woken::Stopped => return Ok(()),
        }
    }
}

/// Compensates the sagas that are to be compensated now, and waits for retries of compensations,
/// until `stop` turns true.
pub async fn settle_compensations(parts: CompensatorParts, stop: watch::Receiver<bool>) -> Result<(), StoreError> {
    let compensator = Compensator::new(parts, stop);
    let mut started = Started::default();
    started.start(&compensator, compensator.unsettled().await?);
    while let Some(ended) = started.tasks.join_next().await {
        joined(ended)?;
    }
    Ok(())
}

impl Started {
    /// Starts a task for each saga that has none.
    fn start(&mut self, compensator: &Arc<Compensator>, sagas: Vec<SagaId>) {
        for id in sagas {
            if let Entry::Vacant(entry) = self.sagas.entry(id.clone()) {
                entry.insert(self.requests);
                let compensator = compensator.clone();
                self.tasks.spawn(async move {
                    let result = compensator.settle(&id).await;
                    (id, result)
                });
            }
        }
    }

    /// Waits until there may be sagas to start.
    ///
    /// A saga whose task has ended is not started again until then: it has come as far as it can.
    /// If a request has come since its task was started, that may be for it, and the search begins
    /// at once.
    async fn wait(&mut self, compensator: &Compensator, stop: &mut watch::Receiver<bool>) -> Result<Woken, StoreError> {
        let Compensator { parts, .. } = compensator;
        let mut ended_sagas = Vec::new();
        loop {
            let stopping = *stop.borrow();
            if stopping && self.tasks.is_empty() {
                return Ok(Woken::Stopped);
            }
            tokio::select! {
                biased;
                () = parts.committer.compensation_requested() => {
                    self.requests += 1;
                    break;
                }
                _ = stop.wait_for(|stop| *stop), if !stopping => break,
                Some(ended) = self.tasks.join_next() => {
                    let id = joined(ended)?;
                    let missed_a_request = self.sagas.get(&id).is_some_and(|seen| *seen < self.requests);
                    ended_sagas.push(id);
                    if missed_a_request {
                        break;
                    }
                }
                () = async { parts.clock.sleep(POLL_INTERVAL_MS).await }, if !stopping => break,
            };
        }
        for id in ended_sagas {
            self.sagas.remove(&id);
        }
        Ok(Woken::Search)
    }
}

fn joined(ended: Result<SagaTask, JoinError>) -> Result<SagaId, StoreError> {
    match ended {
        Ok((id, result)) => result.map(|()| id),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(StoreError::Closed(error.to_string().into())),
    }
}

/// The progress of a saga.
enum Progress {
    /// The saga has advanced, here or elsewhere: read it again.
    Advanced,
    /// The saga waits for something that this host does not have.
    Blocked,
}

impl Compensator {
    fn new(parts: CompensatorParts, stop: watch::Receiver<bool>) -> Arc<Self> {
        let by_name = |consumer: &IdempotentConsumer| (consumer.scope().processor.clone(), consumer.clone());
        let log = SagaLog::new(&*parts.storage, &parts.scope);
        Arc::new(Self { log, consumers: parts.consumers.iter().map(by_name).collect(), stop, parts })
    }

    /// Returns the sagas that are being compensated or are stuck.
    async fn unsettled(&self) -> Result<Vec<SagaId>, StoreError> {
        let mut unsettled: Vec<SagaId> = Vec::new();
        loop {
            let page = self.log.compensating(unsettled.last(), PAGE).await?;
            let full = page.len() == PAGE;
            unsettled.extend(page);
            if !full {
                return Ok(unsettled);
            }
        }
    }

    /// Forgets sagas whose retention is over.
    async fn forget_expired(&self) -> Result<(), StoreError> {
        loop {
            let now_ms = self.parts.clock.now_ms();
            let page = self.log.expired(now_ms, PAGE).await?;
            for (id, expired_ms) in &page {
                let read = self.log.read(id).await?;
                // A saga that was opened again, or another one of the same message, goes on.
                let goes_on = !read.saga.state.has_ended();
                let change = if goes_on { read.stays(*expired_ms) } else { read.forget(Some(*expired_ms)) };
                let shared = Some(Box::new(change));
                let key = RecordKey::new(self.parts.scope.shared(), "saga".into(), id.as_str().into());
                let commit = Commit { shared, at_ms: now_ms, ..Commit::of(&key) };
                self.parts.committer.submit(commit).durable().await?;
            }
            if page.len() < PAGE {
                return Ok(());
            }
        }
    }

    /// Brings a saga as far as it goes.
    async fn settle(&self, id: &SagaId) -> Result<(), StoreError> {
        loop {
            let read = self.log.read(id).await?;
            let progress = match (read.saga.state, read.saga.next_step()) {
                (SagaState::Compensating, Some((index, step))) => {
                    if !self.wait_until(self.due_ms(&read, step)).await {
                        return Ok(());
                    }
                    let member = &read.saga.members[step.member as usize];
                    self.compensate(&NextStep { read: &read, member, index, step }).await?
                }
                (SagaState::Compensating, None) => self.conclude(&read, RecordEvent::CompensationDone).await?,
                (SagaState::Stuck, _) => self.conclude(&read, RecordEvent::CompensationGivenUp).await?,
                _ => return Ok(()),
            };
            if let Progress::Blocked = progress {
                return Ok(());
            }
        }
    }

    /// Returns the time at which a compensation is due. A time that was written by a clock that was
    /// ahead, or under another policy, does not hold it up.
    fn due_ms(&self, read: &ReadSaga, step: &Step) -> u64 {
        let changed_ms = read.saga.changed_ms;
        if changed_ms > self.parts.clock.now_ms().saturating_add(CLOCK_SKEW_MS) && !fault::mutated("due-times-believed")
        {
            return 0;
        }
        let member = &read.saga.members[step.member as usize];
        let consumer = self.consumers.get(&member.message_key.scope.processor);
        let longest_ms = consumer.map_or(u64::MAX, |consumer| consumer.options().longest_delay_ms());
        step.due_ms.min(changed_ms.saturating_add(longest_ms))
    }

    /// Waits until a compensation is due. Returns `false` if the host stops meanwhile.
    async fn wait_until(&self, due_ms: u64) -> bool {
        let after_ms = due_ms.saturating_sub(self.parts.clock.now_ms());
        if after_ms == 0 {
            return true;
        }
        let mut stop = self.stop.clone();
        tokio::select! {
            biased;
            () = self.parts.clock.sleep(after_ms) => true,
            _ = stop.wait_for(|stop| *stop) => false,
        }
    }

    /// Compensates one step. Its effects commit together with the event that it is compensated.
    async fn compensate(&self, next: &NextStep<'_>) -> Result<Progress, StoreError> {
        let NextStep { read, member, step, .. } = next;
        let processor = &member.message_key.scope.processor;
        let Some(consumer) = self.consumers.get(processor) else {
            tracing::error!(saga = %read.id, step = step.name, "the step is not compensated: this host has no processor `{processor}`");
            return Ok(Progress::Blocked);
        };
        let pipeline = &*consumer.pipeline;
        if !self.unless_stopped(pipeline.step_is_at_rest(member)).await? {
            return Ok(Progress::Blocked);
        }
        let _slot = pipeline.permits.slot().await;
        let reading = pipeline.overlay.begin();
        fault::point("compensation-begins");
        let compensated = pipeline.compensate(next, &*self.parts.versions).await?;
        fault::point("step-compensated");
        let event = pipeline.compensation_event(next, &compensated);
        if let SagaEvent::CompensationFailed { error, .. } | SagaEvent::Stuck { error, .. } = &event {
            tracing::warn!(saga = %read.id, step = step.name, "the step is not compensated: {error}");
        }
        let is_settled = matches!(event, SagaEvent::Compensated { .. } | SagaEvent::Stuck { .. });
        let is_unmarked = compensated.result.is_ok() && fault::mutated("undone-not-noted");
        let entry = SagaLogEntry { event, at_ms: self.parts.clock.now_ms() };
        let (appended, _) = read.append(&[entry], u64::MAX).expect("this is the next step of the saga");
        let commit = compensated.commit;
        let mut shared = commit.shared.map_or_else(SharedChange::default, |shared| *shared);
        shared.reads.extend(appended.reads);
        if !is_unmarked {
            shared.writes.extend(appended.writes);
        }
        let commit = Commit { shared: Some(Box::new(shared)), ..commit };
        let Some(sequenced) = pipeline.sequence(Box::new(commit), true, None).await else {
            return Ok(Progress::Advanced);
        };
        drop(reading);
        let verdict = sequenced.pending.durable().await?;
        fault::point("compensation-recorded");
        if is_settled && verdict == Verdict::Committed {
            pipeline.forget_deaths(next);
        }
        Ok(Progress::Advanced)
    }

    /// Waits for `waiting`. Returns `false` if the host stops meanwhile.
    async fn unless_stopped(&self, waiting: impl Future<Output = Result<(), StoreError>>) -> Result<bool, StoreError> {
        let mut stop = self.stop.clone();
        tokio::select! {
            biased;
            waited = waiting => waited.map(|()| true),
            _ = stop.wait_for(|stop| *stop) => Ok(false),
        }
    }

    /// Writes the result of the saga into the record of the message that failed. Where messages
    /// have positions, that record may be of a later message by now: then it stays as it is.
    async fn conclude(&self, read: &ReadSaga, event: RecordEvent) -> Result<Progress, StoreError> {
        let Some(member) = read.saga.failed() else { return Ok(Progress::Blocked) };
        let found = self.parts.storage.record(&member.record).await?;
        let now_ms = self.parts.clock.now_ms();
        let life_ms = self.life_ms(member);
        let own = found.as_ref().filter(|record| record.is_of(&member.record, &member.message_key));
        let record = own.and_then(|record| record.after_event(event.clone(), now_ms, life_ms).ok());
        let ended = event == RecordEvent::CompensationDone;
        let shared = if ended {
            let entry = SagaLogEntry { event: SagaEvent::Ended, at_ms: now_ms };
            read.append(&[entry], now_ms.saturating_add(life_ms)).expect("every step is compensated").0
        } else if record.is_some() {
            read.unchanged()
        } else {
            return Ok(Progress::Blocked);
        };
        let commit = Commit {
            expected: Expected::of(found.map(|record| record.epoch)),
            record: record.clone().into(),
            shared: Some(Box::new(shared)),
            at_ms: now_ms,
            ..Commit::of(&member.record)
        };
        fault::point("saga-ending");
        if self.parts.committer.submit(commit).durable().await? == Verdict::Committed {
            fault::point("saga-ended");
            self.report(read, member, ended);
        }
        Ok(Progress::Advanced)
    }

    fn life_ms(&self, member: &Member) -> u64 {
        let consumer = self.consumers.get(&member.message_key.scope.processor);
        consumer.map_or(Options::default().retention_ms, |consumer| consumer.options().record_life_ms())
    }

    fn report(&self, read: &ReadSaga, member: &Member, ended: bool) {
        let Some((_, error)) = read.saga.failure.clone() else { return };
        if !ended {
            tracing::error!(key = %member.record, "a saga is stuck, and waits for `hapax saga retry`, `skip` or `resolve`: {error}");
        }
        let outcome = if ended { Outcome::Compensated { error } } else { Outcome::CompensationFailed { error } };
        if let Some(consumer) = self.consumers.get(&member.message_key.scope.processor) {
            consumer.pipeline.parts.metrics.ended(consumer.scope(), outcome.name(), 0);
        }
        self.parts.observer.ended(Report::Ended { message: &member.message, outcome: &outcome });
    }
}
