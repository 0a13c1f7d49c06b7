//! Gives up a message that has begun, has not ended, and is not delivered any more: its client went
//! away, or the host died. The message fails for good: its steps are compensated, or it becomes a
//! dead letter. Where a later message of its entity has taken its record over, only its steps are
//! compensated.

use crate::message::identity::HeldKey;
use crate::message::key::RecordKey;
use crate::pipeline::IdempotentConsumer;
use crate::record::{CLOCK_SKEW_MS, Record, RecordEvent, RecordState};
use crate::run::answer_journal::journalled_answers;
use crate::saga::log::{ReadSaga, SagaLog};
use crate::saga::{Member, SagaEvent, SagaId, SagaLogEntry, SagaState};
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange, SharedChange, Verdict};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::store::unfinished::{Unfinished, UnfinishedEntry};
use crate::store::{IdempotencyStorage, Store};
use crate::support::error::StoreError;

/// Gives messages up at one moment.
pub(crate) struct GiveUp<'a> {
    pub(crate) storage: &'a dyn IdempotencyStorage,
    /// Reason, for people.
    pub(crate) reason: &'a str,
    /// Now, in milliseconds since the Unix epoch.
    pub(crate) now_ms: u64,
    /// Time for which the record of a message that has ended is retained, in milliseconds.
    pub(crate) life_ms: u64,
}

impl GiveUp<'_> {
    /// Returns the commit that gives the message up.
    pub(crate) async fn plan(&self, message: &Unfinished) -> Result<Commit, StoreError> {
        let Unfinished { record: key, message_key } = message;
        let found = self.storage.record(key).await?;
        let own = found.as_ref().filter(|record| record.is_of(key, message_key));
        let log = SagaLog::new(self.storage, &key.scope);
        let read = match log.saga_of(message_key).await? {
            Some(named) => log.read(&named).await?,
            None => log.read_own(&SagaId::of_message(message_key)).await?,
        };
        let mut commit = Commit {
            message_key: message_key.clone(),
            expected: Expected::of(found.as_ref().map(|record| record.epoch)),
            at_ms: self.now_ms,
            ..Commit::of(key)
        };
        let mut shared = SharedChange::default();
        match own {
            Some(record) if !record.state.has_ended() => {
                let error = self.error(record);
                shared = self.end_saga(&read, message_key, &error).unwrap_or_default();
                let compensates = read.saga.can_compensate() && read.saga.member(message_key).is_some();
                let event = if compensates {
                    RecordEvent::CompensationStarted { error: error.clone() }
                } else {
                    commit.held_message = self.dead_letter(&read, message, record, error.clone());
                    RecordEvent::GivenUp { error }
                };
                let given_up = record.after_event(event, self.now_ms, self.life_ms).expect("the message has not ended");
                message.record_changes(Some(record), &given_up, &mut shared);
                // Nothing of it is left, and its body is not known: it is forgotten, and counts as
                // new should it come again. A record that holds the last position stays.
                let is_forgotten = !compensates && commit.held_message.is_none() && record.position.is_none();
                commit.record = if is_forgotten { RecordChange::Remove } else { Some(given_up).into() };
            }
            // Overtaken by a later message. A saga that several messages share goes on without it.
            None if !read.id.is_named() => {
                let error = "a later message was seen before this one had ended";
                let ended = self.end_saga(&read, message_key, error);
                // Past its pivot, or without steps: the message never runs again.
                let is_over = read.saga.state.is_forward() && read.saga.events > 0;
                shared = ended.or_else(|| is_over.then(|| read.forget(None))).unwrap_or_default();
            }
            _ => {}
        }
        let answers = journalled_answers(self.storage, message_key).await?;
        commit.effects.writes.extend(answers.into_iter().map(|key| (key, None)));
        commit.shared = (shared != SharedChange::default()).then(|| Box::new(shared));
        Ok(commit)
    }

    fn error(&self, record: &Record) -> String {
        let last = record.state.error().map(|error| format!("; the last error: {error}")).unwrap_or_default();
        format!("given up: {}{last}", self.reason)
    }

    /// Returns the change of the saga of a message that has failed for good: it is compensated, or
    /// ends, or is forgotten.
    fn end_saga(&self, read: &ReadSaga, message_key: &RecordKey, error: &str) -> Option<SharedChange> {
        if !read.saga.state.is_forward() || read.saga.events == 0 {
            return None;
        }
        let member = read.saga.member(message_key);
        let (Some(member), SagaState::Open) = (member, read.saga.state) else {
            // Past its pivot it stays: the message may be redriven, and must not be compensated
            // then.
            return None;
        };
        let mut events = vec![SagaEvent::CompensationStarted { member, error: error.to_owned() }];
        if !read.saga.can_compensate() {
            events.push(SagaEvent::Ended);
        }
        let entries: Vec<_> = events.into_iter().map(|event| SagaLogEntry { event, at_ms: self.now_ms }).collect();
        let expires_ms = self.now_ms.saturating_add(self.life_ms);
        Some(read.append(&entries, expires_ms).expect("an open saga takes these events").0)
    }

    /// Returns the message as a dead letter. Only a member of a saga is known as a whole.
    fn dead_letter(&self, read: &ReadSaga, message: &Unfinished, record: &Record, error: String) -> Option<HeldChange> {
        let member: &Member = read.saga.members.get(read.saga.member(&message.message_key)? as usize)?;
        let held = HeldMessage {
            message: member.message.clone(),
            fingerprint: record.fingerprint,
            position: record.position.clone(),
            hold_reason: HoldReason::Dead,
            error,
            attempts: record.attempts,
            component: record.component.clone(),
            at_ms: self.now_ms,
        };
        Some(HeldChange::Put(Box::new(held)))
    }
}

impl IdempotentConsumer {
    /// Gives up a message whose time was over so long ago that no delivery follows, unless it is
    /// being run or held here. Returns whether it was given up.
    pub(crate) async fn give_up(&self, entry: &UnfinishedEntry, store: &dyn Store) -> Result<bool, StoreError> {
        let parts = &self.pipeline.parts;
        let key = &entry.message.record;
        let Some(_hold) = self.pipeline.admission.try_hold_record(key) else { return Ok(false) };
        let found = store.record(key).await?;
        let own = found.as_ref().filter(|record| record.is_of(key, &entry.message.message_key));
        if entry.when_ms > self.latest_ms() {
            let mut commit = Commit { at_ms: parts.clock.now_ms(), ..Commit::of(key) };
            entry.move_to(parts.clock.now_ms(), commit.shared.get_or_insert_default());
            parts.committer.submit(commit).durable().await?;
            return Ok(false);
        }
        if let Some(record) = own
            && (self.runs_by_itself(key, record, store).await? || self.is_claimed(record))
        {
            return Ok(false);
        }
        let now_ms = parts.clock.now_ms();
        let give_up = GiveUp {
            storage: &*parts.storage,
            reason: "no delivery of it came any more",
            now_ms,
            life_ms: parts.options.record_life_ms(),
        };
        let mut commit = give_up.plan(&entry.message).await?;
        entry.remove(commit.shared.get_or_insert_default());
        let given_up = parts.committer.submit(commit).durable().await? == Verdict::Committed;
        parts.committer.wake_compensator();
        Ok(given_up)
    }

    /// Returns the latest time that an unfinished message may wait for, in milliseconds since the
    /// Unix epoch. A later one was written by a clock that was ahead.
    pub(crate) fn latest_ms(&self) -> u64 {
        let longest_ms = self.options().longest_delay_ms().max(self.options().lease_ms);
        self.clock().now_ms().saturating_add(longest_ms).saturating_add(CLOCK_SKEW_MS)
    }

    /// Returns whether the store holds the message of `record` to run it.
    async fn runs_by_itself(&self, key: &RecordKey, record: &Record, store: &dyn Store) -> Result<bool, StoreError> {
        let held = store.held_under(key).await?;
        let is_it = |held: &HeldMessage| {
            held.key(key) == HeldKey { record: key.clone(), fingerprint: record.fingerprint.digest }
                && held.hold_reason != HoldReason::Dead
        };
        Ok(held.iter().any(is_it))
    }

    fn is_claimed(&self, record: &Record) -> bool {
        let options = self.options();
        let RecordState::InProgress { .. } = record.state else { return false };
        record.claimed_by_another_ms(&options.owner, self.clock().now_ms(), options.lease_ms).is_some()
    }
}
