//! Operator actions on records and held messages. Each action is one commit with its own line in
//! the audit trail, so that no action is done without an entry. If a consumer is at work on the
//! processor, it is kept off the record meanwhile.

pub(crate) mod audit;
pub(crate) mod outbox;
pub(crate) mod saga;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::commit::committer::Committer;
use crate::message::identity::HeldKey;
use crate::message::key::{RecordKey, Scope};
use crate::operator::audit::AuditEntry;
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::admission::{RecordHold, last_version_key};
use crate::pipeline::give_up::GiveUp;
use crate::pipeline::options::Options;
use crate::record::{HistoryEntry, Record, RecordEvent, RecordState};
use crate::saga::log::SagaLog;
use crate::saga::{SagaId, SagaState};
use crate::state::Effects;
use crate::state::RESERVED;
use crate::store::Store;
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange, SharedChange, Verdict};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::store::unfinished::{Unfinished, UnfinishedEntry, unfinished_messages};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;

/// Longest text of an operator's name or reason, in bytes.
const TEXT_BYTES: usize = 1_024;

/// Records that are worked on at one time, at most.
const AT_ONCE: usize = 256;

/// Longest wait for a message that is being processed, in milliseconds. After that, its record is
/// left alone.
const HOLD_MS: u64 = 5_000;

/// Action that an operator can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorAction {
    /// Runs a dead letter again, with all its attempts before it. It runs as soon as its processor
    /// does.
    Redrive(HeldKey),
    /// Forgets a held message. Its record stays: a duplicate still gets the stored error.
    Discard(HeldKey),
    /// Forgets a record before its time: a message under its key counts as new. Refused while its
    /// message may still run.
    Evict(RecordKey),
    /// Gives up a message that has begun and has not ended, as no delivery of it will come any
    /// more: its steps are compensated, or it becomes a dead letter.
    GiveUp(RecordKey),
    /// Continues a saga that is stuck, or ends one that is being compensated.
    Saga(SagaAction, SagaId),
    /// Redrives or discards an outgoing message that its destination refused, by its id.
    Outbox(OutboxAction, String),
}

/// Operator action on an outgoing message that its destination refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutboxAction {
    /// Puts the message back into the outbox, under the same id. Messages of its key that waited
    /// for it go behind it.
    Redrive,
    /// Forgets the message: it is never sent.
    Discard,
}

/// Operator action on a saga that is stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SagaAction {
    /// Retries the step on which the saga is stuck, with all its attempts before it.
    Retry,
    /// Skips the step on which the saga is stuck, since the operator has seen to it. The saga
    /// continues with the step before it.
    Skip,
    /// Ends the saga, since the operator has seen to all steps that are left.
    Resolve,
}

impl SagaAction {
    /// Returns the action's name, as the command line and the API have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Skip => "skip",
            Self::Resolve => "resolve",
        }
    }
}

/// Operator of an action, and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Name of the operator.
    pub actor: String,
    /// Reason for the action.
    pub reason: String,
}

/// Reason why an action was not done. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OperatorError {
    /// Nothing is stored under that key.
    #[error("there is no {what} {key}")]
    NotFound {
        /// Kind of the thing that was looked for.
        what: &'static str,
        /// Key that was looked for.
        key: String,
    },
    /// The action is not allowed.
    #[error("{0}")]
    Refused(String),
    /// Another writer changed the record at the same time.
    #[error("{0} was changed meanwhile; look at it again")]
    Changed(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Does the actions of operators.
pub struct Operator {
    pub(crate) store: Arc<dyn Store>,
    committer: Arc<Committer>,
    pub(crate) clock: Arc<dyn Clock>,
    /// Consumers that are at work, by processor.
    pub(crate) consumers: BTreeMap<Arc<str>, IdempotentConsumer>,
}

/// An action that is allowed: its commit, and the message that runs after it.
pub(crate) struct Plan {
    pub(crate) commit: Commit,
    pub(crate) redriven: Option<(HeldKey, HeldMessage)>,
}

impl OperatorAction {
    /// Returns the name of the action, as the audit trail has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Redrive(_) => "redrive",
            Self::Discard(_) => "discard",
            Self::Evict(_) => "evict",
            Self::GiveUp(_) => "give-up",
            Self::Saga(SagaAction::Retry, _) => "saga-retry",
            Self::Saga(SagaAction::Skip, _) => "saga-skip",
            Self::Saga(SagaAction::Resolve, _) => "saga-resolve",
            Self::Outbox(OutboxAction::Redrive, _) => "outbox-redrive",
            Self::Outbox(OutboxAction::Discard, _) => "outbox-discard",
        }
    }

    /// Returns the record of the action, or `None` if the action is on a saga or on the outbox.
    pub fn record(&self) -> Option<&RecordKey> {
        match self {
            Self::Redrive(key) | Self::Discard(key) => Some(&key.record),
            Self::Evict(key) | Self::GiveUp(key) => Some(key),
            Self::Saga(..) | Self::Outbox(..) => None,
        }
    }

    /// Returns the subject of the action. No two actions on one subject are done at the same time.
    fn subject(&self) -> String {
        self.record().map_or_else(|| self.key(), RecordKey::to_string)
    }

    /// Returns the key of the action's subject, as text.
    pub fn key(&self) -> String {
        match self {
            Self::Redrive(key) | Self::Discard(key) => key.to_string(),
            Self::Evict(key) | Self::GiveUp(key) => key.to_string(),
            Self::Saga(_, id) => id.to_string(),
            Self::Outbox(_, id) => id.clone(),
        }
    }
}

impl Operator {
    /// Joins the parts. Every consumer that works on the store must be among `consumers`.
    pub fn new(
        store: Arc<dyn Store>,
        committer: Arc<Committer>,
        clock: Arc<dyn Clock>,
        consumers: impl IntoIterator<Item = IdempotentConsumer>,
    ) -> Self {
        let by_name = |consumer: IdempotentConsumer| (consumer.scope().processor.clone(), consumer);
        Self { store, committer, clock, consumers: consumers.into_iter().map(by_name).collect() }
    }

    /// Runs a dead letter again; see [`OperatorAction::Redrive`].
    pub async fn redrive(&self, key: &HeldKey, by: &Actor) -> Result<(), OperatorError> {
        self.perform(&OperatorAction::Redrive(key.clone()), by).await
    }

    /// Forgets a dead letter or a parked message; see [`OperatorAction::Discard`].
    pub async fn discard(&self, key: &HeldKey, by: &Actor) -> Result<(), OperatorError> {
        self.perform(&OperatorAction::Discard(key.clone()), by).await
    }

    /// Forgets a record before its time; see [`OperatorAction::Evict`].
    pub async fn evict(&self, key: &RecordKey, by: &Actor) -> Result<(), OperatorError> {
        self.perform(&OperatorAction::Evict(key.clone()), by).await
    }

    /// Checks that an action is allowed, as things are now. Changes nothing.
    pub async fn check(&self, deed: &OperatorAction, by: &Actor) -> Result<(), OperatorError> {
        self.plan(deed, by).await.map(drop)
    }

    /// Does one action.
    pub async fn perform(&self, deed: &OperatorAction, by: &Actor) -> Result<(), OperatorError> {
        let mut done = self.perform_all(std::slice::from_ref(deed), by).await;
        done.pop().expect("one deed has one result")
    }

    /// Does many actions, in the order given, and returns one result for each. Actions on different
    /// records are done at the same time. Redriven messages begin to run when all actions are done.
    /// Messages of one ordering key run in the order in which they were held.
    pub async fn perform_all(&self, deeds: &[OperatorAction], by: &Actor) -> Vec<Result<(), OperatorError>> {
        // In the order given: if the host dies, the first of many actions are done.
        let mut of_record: Vec<Vec<usize>> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        for (index, deed) in deeds.iter().enumerate() {
            let place = *places.entry(deed.subject()).or_insert(of_record.len());
            of_record.resize_with(of_record.len().max(place + 1), Vec::new);
            of_record[place].push(index);
        }
        let one_by_one = async |indices: Vec<usize>| {
            let mut results = Vec::new();
            for index in indices {
                results.push((index, self.perform_one(&deeds[index], by).await));
            }
            results
        };
        let records = stream::iter(of_record).map(one_by_one).buffer_unordered(AT_ONCE);
        let mut results: Vec<_> = records.collect::<Vec<_>>().await.into_iter().flatten().collect();
        results.sort_by_key(|(index, _)| *index);
        let redriven = results.iter().filter_map(|(_, result)| result.as_ref().ok()?.as_ref());
        self.run(redriven.cloned().collect());
        results.into_iter().map(|(_, result)| result.map(drop)).collect()
    }

    /// Returns `true` if a consumer of `processor` is at work.
    pub fn has_processor(&self, processor: &str) -> bool {
        self.consumers.contains_key(processor)
    }

    /// Returns the names of the processors at work, in order; none where the store is stopped.
    pub fn processors(&self) -> impl Iterator<Item = &str> {
        self.consumers.keys().map(|name| &**name)
    }

    /// Returns up to `limit` lines of a processor's audit trail, oldest first.
    pub async fn trail(&self, processor: &str, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        self.trail_since(processor, 0, limit).await
    }

    /// Returns up to `limit` lines of a processor's audit trail from `since_ms` (milliseconds since
    /// the Unix epoch) on, oldest first.
    pub async fn trail_since(
        &self,
        processor: &str,
        since_ms: u64,
        limit: usize,
    ) -> Result<Vec<AuditEntry>, StoreError> {
        let view = self.store.view(&Scope::of(processor));
        let (start, end) = (format!("{RESERVED}audit/{since_ms:013}"), format!("{RESERVED}audit0"));
        let entries = view.scan(&start, Some(&end), limit).await?;
        let read = |(_, _, line): &(String, u64, Bytes)| {
            serde_json::from_slice(line)
                .map_err(|error| StoreError::Damaged(format!("an entry of the audit trail: {error}").into()))
        };
        entries.iter().map(read).collect()
    }

    /// Does one action. Returns the message that runs after it, if the action is a redrive.
    async fn perform_one(
        &self,
        deed: &OperatorAction,
        by: &Actor,
    ) -> Result<Option<(HeldKey, HeldMessage)>, OperatorError> {
        let _held = match deed.record() {
            Some(record) => self.hold(record).await?,
            None => None,
        };
        let Plan { commit, redriven } = self.plan(deed, by).await?;
        let audited = self.audited(deed, &commit, by);
        let mut commit = Commit { at_ms: self.clock.now_ms(), ..commit };
        commit.effects.writes.extend(audited.writes);
        let key = deed.key();
        fault::point("operator-planned");
        match self.committer.submit(commit).durable().await? {
            Verdict::Committed => {}
            Verdict::EpochMismatch(_) | Verdict::Conflict => return Err(OperatorError::Changed(key)),
        }
        fault::point("operator-durable");
        match deed {
            OperatorAction::Saga(..) | OperatorAction::GiveUp(_) => self.committer.wake_compensator(),
            OperatorAction::Outbox(..) => self.committer.wake_relay(),
            OperatorAction::Redrive(_) | OperatorAction::Discard(_) | OperatorAction::Evict(_) => {}
        }
        Ok(redriven)
    }

    /// Passes the redriven messages to their consumers, which run them.
    fn run(&self, redriven: Vec<(HeldKey, HeldMessage)>) {
        for (name, consumer) in &self.consumers {
            let of_it = redriven.iter().filter(|(key, _)| key.record.scope.processor == *name);
            consumer.run_redriven(of_it);
        }
    }

    /// Keeps the consumer off a record. A message that waits for its retry may hold the record for
    /// long: the wait here ends after `HOLD_MS`.
    async fn hold(&self, key: &RecordKey) -> Result<Option<RecordHold>, OperatorError> {
        let Some(consumer) = self.consumers.get(&key.scope.processor) else { return Ok(None) };
        tokio::select! {
            biased;
            held = consumer.hold_record(key) => Ok(Some(held)),
            () = self.clock.sleep(HOLD_MS) => {
                Err(OperatorError::Refused(format!("{key} is being processed, or waits for its retry; try again later")))
            }
        }
    }

    async fn plan(&self, deed: &OperatorAction, by: &Actor) -> Result<Plan, OperatorError> {
        match deed {
            OperatorAction::Saga(deed, id) => self.plan_saga(*deed, id, by).await,
            OperatorAction::Outbox(deed, id) => self.plan_outbox(*deed, id).await,
            OperatorAction::Redrive(key) => self.plan_redrive(key).await,
            OperatorAction::Discard(key) => self.plan_discard(key).await,
            OperatorAction::Evict(key) => self.plan_evict(key).await,
            OperatorAction::GiveUp(key) => self.plan_give_up(key, by).await,
        }
    }

    async fn plan_redrive(&self, key: &HeldKey) -> Result<Plan, OperatorError> {
        let held_message = self.held_message(key).await?;
        let processor = &key.record.scope.processor;
        if !self.consumers.is_empty() && !self.consumers.contains_key(processor) {
            return Err(refused(key, &format!("would not run: this host has no processor `{processor}`")));
        }
        match held_message.hold_reason {
            HoldReason::Redriven => return Err(refused(key, "is on its way already")),
            HoldReason::Parked { .. } => return Err(refused(key, "is parked: it runs by itself")),
            HoldReason::Dead => {}
        }
        let found = self.store.record(&key.record).await?;
        // Past its retention a record counts as absent, swept or not.
        let live = found.as_ref().filter(|record| !record.has_expired(self.clock.now_ms()));
        let record = match live {
            _ if fault::mutated("redrive-without-record") => RecordChange::Keep,
            Some(record) if record.fingerprint == held_message.fingerprint => match &record.state {
                RecordState::DeadLettered { .. } => RecordChange::Put(self.redriven(record, &held_message).into()),
                state => {
                    let state = state.name();
                    return Err(refused(key, &format!("cannot run again: its record is {state}; discard it")));
                }
            },
            Some(_) if held_message.position.is_none() => {
                return Err(refused(
                    key,
                    "has another body than the message that had its key first; send it under a key of its own, and discard it",
                ));
            }
            // The record is gone, or is of another message of the entity: the pipeline decides.
            Some(_) | None => RecordChange::Keep,
        };
        let held_message = HeldMessage { hold_reason: HoldReason::Redriven, ..held_message };
        let commit = Commit {
            expected: Expected::of(found.as_ref().map(|record| record.epoch)),
            record,
            held_message: Some(HeldChange::Put(Box::new(held_message.clone()))),
            ..Commit::of(&key.record)
        };
        Ok(Plan { commit, redriven: Some((held_message.key(&key.record), held_message)) })
    }

    async fn plan_discard(&self, key: &HeldKey) -> Result<Plan, OperatorError> {
        let held_message = self.held_message(key).await?;
        let gone = Commit {
            held_message: Some(HeldChange::Remove(held_message.fingerprint)),
            shared: self.saga_past_its_pivot(key, &held_message).await?,
            ..Commit::of(&key.record)
        };
        if held_message.hold_reason != HoldReason::Redriven {
            return Ok(Plan { commit: gone, redriven: None });
        }
        // No run follows: the record must not say that the message is due.
        let found = self.store.record(&key.record).await?;
        let given_up = found.as_ref().filter(|record| record.fingerprint == held_message.fingerprint);
        let given_up = given_up.and_then(|record| self.given_up_again(record));
        let commit = Commit {
            expected: Expected::of(found.as_ref().map(|record| record.epoch)),
            record: given_up.into(),
            ..gone
        };
        Ok(Plan { commit, redriven: None })
    }

    async fn plan_evict(&self, key: &RecordKey) -> Result<Plan, OperatorError> {
        let record = self.store.record(key).await?;
        let record = record.ok_or_else(|| OperatorError::NotFound { what: "record", key: key.to_string() })?;
        if !record.state.is_terminal() {
            return Err(OperatorError::Refused(format!("{key} is {}: it has not ended", record.state.name())));
        }
        let mut commit =
            Commit { expected: Expected::Epoch(record.epoch), record: RecordChange::Remove, ..Commit::of(key) };
        // Where versions have no gaps, the last one outlives its record: it goes with it here.
        commit.effects.writes.insert(last_version_key(key), None);
        Ok(Plan { commit, redriven: None })
    }

    async fn plan_give_up(&self, key: &RecordKey, by: &Actor) -> Result<Plan, OperatorError> {
        let entry = self.unfinished(key).await?;
        let message = match &entry {
            Some(entry) => entry.message.clone(),
            // Begun under an earlier version of the host, which had no index.
            None => Unfinished { record: key.clone(), message_key: key.clone() },
        };
        let record = self.store.record(&message.record).await?;
        let own = record.as_ref().filter(|record| message.is_of(record));
        match own {
            Some(record) => self.may_be_given_up(&message.record, record).await?,
            None if entry.is_some() => {}
            None => return Err(OperatorError::NotFound { what: "unfinished message", key: key.to_string() }),
        }
        let consumer = self.consumers.get(&key.scope.processor);
        let life_ms = consumer.map_or(Options::default().record_life_ms(), |it| it.options().record_life_ms());
        let reason = if by.reason.is_empty() { "an operator decided so" } else { &by.reason };
        let give_up = GiveUp { storage: &*self.store, reason, now_ms: self.clock.now_ms(), life_ms };
        let mut commit = give_up.plan(&message).await?;
        if let Some(entry) = entry {
            entry.remove(commit.shared.get_or_insert_default());
        }
        Ok(Plan { commit, redriven: None })
    }

    /// Fails if the message of `record` has ended, runs by itself, or may be running.
    async fn may_be_given_up(&self, key: &RecordKey, record: &Record) -> Result<(), OperatorError> {
        let refuse = |why_not: String| Err(OperatorError::Refused(format!("{key} {why_not}")));
        if record.state.has_ended() {
            return refuse(format!("is {}: it has ended, or is about to", record.state.name()));
        }
        // Where nobody is at work, a claim is of a host that is gone.
        let claimed_ms = self.consumers.get(&key.scope.processor).and_then(|consumer| {
            let options = consumer.options();
            record.claimed_by_another_ms(&options.owner, self.clock.now_ms(), options.lease_ms)
        });
        if let Some(claimed_ms) = claimed_ms {
            return refuse(format!("is claimed by another owner for {claimed_ms} ms more; try again then"));
        }
        let held = self.store.held_under(key).await?;
        if held.iter().any(|held| held.fingerprint == record.fingerprint && held.hold_reason != HoldReason::Dead) {
            return refuse("is held, and runs by itself: `hapax dlq discard` ends it".into());
        }
        Ok(())
    }

    /// Returns the entry of an unfinished message, by its own key or by that of its record.
    async fn unfinished(&self, key: &RecordKey) -> Result<Option<UnfinishedEntry>, StoreError> {
        let (mut last, mut of_record) = (None, None);
        loop {
            let page = unfinished_messages(&*self.store, &key.scope, u64::MAX, last.as_ref(), AT_ONCE).await?;
            let is_last = page.len() < AT_ONCE;
            for entry in &page {
                if entry.message.message_key == *key {
                    return Ok(Some(entry.clone()));
                }
                if entry.message.record == *key {
                    of_record = Some(entry.clone());
                }
            }
            if is_last {
                return Ok(of_record);
            }
            last = page.into_iter().last();
        }
    }

    /// Returns the change that forgets the message's own saga, if that is past its pivot: the
    /// message never runs again, so nothing else ends the saga.
    async fn saga_past_its_pivot(
        &self,
        key: &HeldKey,
        held_message: &HeldMessage,
    ) -> Result<Option<Box<SharedChange>>, StoreError> {
        let position = held_message.position.as_ref();
        let message_key = position.map_or_else(|| key.record.clone(), |position| position.message_key(&key.record));
        let log = SagaLog::new(&*self.store, &key.record.scope);
        let read = log.read(&SagaId::of_message(&message_key)).await?;
        Ok((read.saga.state == SagaState::Pivoted).then(|| Box::new(read.forget(None))))
    }

    async fn held_message(&self, key: &HeldKey) -> Result<HeldMessage, OperatorError> {
        let held_messages = self.store.held_under(&key.record).await?;
        let found = held_messages.into_iter().find(|held_message| held_message.fingerprint.digest == key.fingerprint);
        found.ok_or_else(|| OperatorError::NotFound { what: "dead letter", key: key.to_string() })
    }

    /// Returns the record of a dead letter that is to run again.
    fn redriven(&self, found: &Record, held_message: &HeldMessage) -> Record {
        let at_ms = self.clock.now_ms();
        let entry = HistoryEntry {
            event: RecordEvent::Redriven { at_ms },
            at_ms,
            epoch: found.epoch + 1,
            attempts: 0,
            component: held_message.component.clone(),
            expires_ms: None,
        };
        found.after(&entry).expect("the record is dead-lettered: it was looked at before")
    }

    /// Returns the record of a redriven message that is not to run after all: dead-lettered as
    /// before, and retained as long again. Returns `None` if the record is in another state.
    fn given_up_again(&self, found: &Record) -> Option<Record> {
        let RecordState::RetryDue { .. } = found.state else { return None };
        let before = found.history.iter().rfind(|entry| matches!(entry.event, RecordEvent::GivenUp { .. }))?;
        let at_ms = self.clock.now_ms();
        let life_ms = before.expires_ms.map(|expires_ms| expires_ms.saturating_sub(before.at_ms));
        let expires_ms = life_ms.map(|life_ms| at_ms.saturating_add(life_ms));
        found.after(&HistoryEntry { at_ms, epoch: found.epoch + 1, expires_ms, ..before.clone() }).ok()
    }

    /// Returns the effects that write the audit entry of an action.
    fn audited(&self, deed: &OperatorAction, commit: &Commit, by: &Actor) -> Effects {
        if fault::mutated("deed-unaudited") {
            return Effects::default();
        }
        let at_ms = self.clock.now_ms();
        let cut = |text: &str| text.chars().take(TEXT_BYTES / 4).collect();
        let action = deed.name();
        let line = AuditEntry {
            at_ms,
            actor: cut(&by.actor),
            action: action.to_owned(),
            key: deed.key(),
            reason: cut(&by.reason),
        };
        let line = serde_json::to_vec(&line).expect("a line of texts and a number");
        // By the subject and not by the record: two sagas may have failed with one record.
        let subject = if fault::mutated("audited-by-record") { commit.key.to_string() } else { deed.key() };
        let subject = RecordKey::new(commit.key.scope.clone(), action.into(), subject.into()).digest();
        let name = format!("{RESERVED}audit/{at_ms:013}/{action}/{subject:032x}");
        Effects { writes: BTreeMap::from([(name, Some(line.into()))]), ..Effects::default() }
    }
}

fn refused(key: &HeldKey, why: &str) -> OperatorError {
    OperatorError::Refused(format!("{key} {why}"))
}
