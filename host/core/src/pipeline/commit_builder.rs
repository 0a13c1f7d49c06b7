//! Builds the commit of a run: record, effects, held message, saga events, locks; and the message's
//! outcome. Pure functions; they write nothing.

use std::sync::Arc;

use crate::message::identity::{Identity, Position};
use crate::pipeline::Parts;
use crate::pipeline::admission::last_version_key;
use crate::pipeline::claim::RunRight;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::run_result::RunResult;
use crate::record::history::{self, RecordOrigin};
use crate::record::{HistoryEntry, Output, Record, RecordEvent, next_state};
use crate::run::checkpoint::PriorEffects;
use crate::run::failure::Failure;
use crate::saga::log::ReadSaga;
use crate::saga::{Member, SagaEvent, SagaLogEntry, SagaState};
use crate::state::Effects;
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange, SharedChange};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::store::unfinished::Unfinished;
use crate::support::fault;

/// Everything that decides what a run leaves behind, except the run itself.
pub(super) struct CommitBuilder<'a> {
    options: &'a Options,
    /// Digest of the component.
    component: &'a Arc<str>,
    pub(super) message: &'a Accepted,
    /// Now, in milliseconds since the Unix epoch.
    pub(super) now_ms: u64,
}

/// A commit that is ready to be sequenced, and the outcome of its message once it is durable.
pub(super) struct Built {
    pub(super) commit: Box<Commit>,
    pub(super) outcome: Outcome,
}

impl<'a> CommitBuilder<'a> {
    pub(super) fn new(parts: &'a Parts, component: &'a Arc<str>, message: &'a Accepted) -> Self {
        Self { options: &parts.options, component, message, now_ms: parts.clock.now_ms() }
    }

    /// Builds the commit of `run`.
    pub(super) fn build(&self, right: &RunRight, run: RunResult) -> Built {
        let RunResult { attempts, result, reads, effects, prior } = run;
        let (result, saga) = match &prior {
            Some(prior) => (prior.override_result(result), prior.saga.as_ref()),
            None => (result, None),
        };
        let (event, outcome) = self.judge(attempts, result, saga);
        let completed = matches!(outcome, Outcome::Completed { .. });
        let expected = match right.expected() {
            Expected::Absent if fault::mutated("mark-before-run") => Expected::Epoch(1),
            found => found,
        };
        let saga_name = prior.as_ref().and_then(|prior| prior.saga_name());
        let mut commit = Box::new(Commit {
            expected,
            record: RecordChange::Put(self.record(right, attempts, saga_name, event).into()),
            reads,
            effects: if completed || fault::mutated("failed-run-keeps-its-effects") {
                effects
            } else {
                Effects::default()
            },
            held_message: self.held_change(right, &outcome, attempts),
            ..self.empty_commit()
        });
        self.remember_version(&mut commit, &outcome);
        self.index(&mut commit, right);
        if let Some(prior) = prior {
            self.settle_prior(&mut commit, *prior, &outcome);
        }
        Built { commit, outcome }
    }

    /// Returns a commit of the message that changes nothing.
    pub(super) fn empty_commit(&self) -> Commit {
        let identity = &self.message.identity;
        Commit { message_key: identity.message_key.clone(), at_ms: self.now_ms, ..Commit::of(&identity.record) }
    }

    /// Decides on the result of a run: completed, to be retried, or failed for good.
    fn judge(&self, attempts: u32, result: Result<Output, Failure>, saga: Option<&ReadSaga>) -> (RecordEvent, Outcome) {
        let failure = match result {
            Ok(output) => return (RecordEvent::Completed(output.clone()), Outcome::Completed { output }),
            Err(failure) => failure,
        };
        let error = match failure {
            Failure::Retry { reason, after_ms }
                if attempts < self.options.attempts_max && !fault::mutated("failure-is-final") =>
            {
                let after_ms = self.options.retry_delay_ms(&self.message.identity.message_key, attempts, after_ms);
                let retry_at_ms = self.now_ms.saturating_add(after_ms);
                let event = RecordEvent::Failed { error: reason.clone(), retry_at_ms };
                return (event, Outcome::Retry { error: reason, after_ms });
            }
            failure => failure.after_last_attempt(attempts),
        };
        if saga.is_some_and(|read| read.saga.can_compensate()) {
            (RecordEvent::CompensationStarted { error: error.clone() }, Outcome::Compensating { error })
        } else {
            (RecordEvent::GivenUp { error: error.clone() }, Outcome::DeadLettered { error })
        }
    }

    /// Returns the record after `event`.
    pub(super) fn record(&self, right: &RunRight, attempts: u32, saga: Option<&str>, event: RecordEvent) -> Record {
        let found = right.found.as_deref();
        let state = next_state(found.map(|record| &record.state), event.clone())
            .expect("the right to run is only given where a run may end");
        let life_ms = self.options.record_life_ms();
        let entry = HistoryEntry {
            event,
            at_ms: self.now_ms,
            epoch: right.epoch.unwrap_or(0) + u64::from(!fault::mutated("epoch-stands-still")),
            attempts,
            component: self.component.clone(),
            expires_ms: state.is_terminal().then(|| self.now_ms.saturating_add(life_ms)),
        };
        let origin = RecordOrigin {
            at_ms: found.map_or(right.admitted_ms, |record| record.received_ms),
            fingerprint: self.message.identity.fingerprint,
            position: self.message.identity.position.clone(),
            saga: saga.map(str::to_owned).or_else(|| found.and_then(|record| record.saga.clone())),
        };
        history::append(&origin, found.map_or_else(Vec::new, |record| record.history.clone()), state, &entry)
    }

    /// Brings the index of unfinished messages up to date with the record of `commit`.
    pub(super) fn index(&self, commit: &mut Commit, right: &RunRight) {
        let Some(after) = commit.record.put() else { return };
        let before = right.found.as_deref();
        if before.is_none() && after.state.has_ended() {
            // The normal way: one run, and nothing is left behind.
            return;
        }
        let Identity { record, message_key, .. } = &self.message.identity;
        let unfinished = Unfinished { record: record.clone(), message_key: message_key.clone() };
        let mut shared = commit.shared.take().unwrap_or_default();
        unfinished.record_changes(before, after, &mut shared);
        commit.shared = (*shared != SharedChange::default()).then_some(shared);
    }

    /// Has the version of a message outlive its record, where versions have no gaps: the next one
    /// must find its predecessor, however long the entity was quiet.
    fn remember_version(&self, commit: &mut Commit, outcome: &Outcome) {
        let identity = &self.message.identity;
        if let Some(Position::Version(version)) = identity.position
            && self.options.strategy.gaps().is_some()
            && !matches!(outcome, Outcome::Retry { .. })
        {
            let value = version.to_le_bytes().to_vec().into();
            commit.effects.writes.insert(last_version_key(&identity.record), Some(value));
        }
    }

    /// Settles the effects that were made durable before the commit: they end with the message, or
    /// are retained for its next run.
    fn settle_prior(&self, commit: &mut Commit, prior: PriorEffects, outcome: &Outcome) {
        let mut shared = commit.shared.take().map_or_else(SharedChange::default, |shared| *shared);
        if let Some(change) = self.saga_change(&prior, outcome) {
            shared.reads.extend(change.reads);
            shared.writes.extend(change.writes);
        }
        for lock in &prior.held_locks {
            lock.release_in(&mut shared);
        }
        if shared != SharedChange::default() {
            commit.shared = Some(Box::new(shared));
        }
        let forgotten = match outcome {
            Outcome::Retry { .. } => prior.refused,
            _ => prior.journal,
        };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
    }

    /// Returns the change of the saga of which the message is a member.
    fn saga_change(&self, prior: &PriorEffects, outcome: &Outcome) -> Option<SharedChange> {
        let read = prior.saga.as_ref()?;
        let (is_named, is_open) = (read.id.is_named(), read.saga.state == SagaState::Open);
        match outcome {
            Outcome::Completed { .. } if !is_named => Some(read.forget(None)),
            Outcome::Completed { .. } if prior.completes_saga => Some(self.append(read, vec![SagaEvent::Completed])),
            Outcome::Completed { .. } => Some(read.unchanged()),
            Outcome::Compensating { error } => Some(self.append(read, self.compensation_started(read, error))),
            // Nothing to compensate, but no other message joins the saga any more.
            Outcome::DeadLettered { error } if is_named && is_open => {
                let mut events = self.compensation_started(read, error);
                events.push(SagaEvent::Ended);
                Some(self.append(read, events))
            }
            Outcome::DeadLettered { .. } if is_open => Some(read.forget(None)),
            _ => None,
        }
    }

    /// Returns the events that start the compensation of a saga, since this message has failed for
    /// good.
    fn compensation_started(&self, read: &ReadSaga, error: &str) -> Vec<SagaEvent> {
        let known = read.saga.member(&self.message.identity.message_key);
        let joined = known.is_none().then(|| SagaEvent::Joined(Box::new(self.member())));
        let member = known.unwrap_or(read.saga.members.len() as u32);
        joined.into_iter().chain([SagaEvent::CompensationStarted { member, error: error.to_owned() }]).collect()
    }

    fn append(&self, read: &ReadSaga, events: Vec<SagaEvent>) -> SharedChange {
        let expires_ms = self.now_ms.saturating_add(self.options.record_life_ms());
        let entries: Vec<_> = events.into_iter().map(|event| SagaLogEntry { event, at_ms: self.now_ms }).collect();
        read.append(&entries, expires_ms).expect("the outcome was judged by this saga").0
    }

    /// Returns the message as a member of a saga.
    fn member(&self) -> Member {
        let identity = &self.message.identity;
        Member::of(&identity.record, &identity.message_key, &self.message.message, self.component)
    }

    /// Returns the change of the saga of a message that never runs again, since a later one was
    /// seen. A saga that several messages share goes on without it.
    pub(super) fn superseded(&self, prior: &PriorEffects) -> Option<SharedChange> {
        let read = prior.saga.as_ref().filter(|read| !read.id.is_named() && read.saga.state.is_forward())?;
        let member = read.saga.member(&self.message.identity.message_key).filter(|_| read.saga.can_compensate());
        let Some(member) = member else { return Some(read.forget(None)) };
        let error = "a later message was seen before this one had ended".to_owned();
        let started = SagaLogEntry { event: SagaEvent::CompensationStarted { member, error }, at_ms: self.now_ms };
        Some(read.append(&[started], u64::MAX).expect("the saga can be compensated").0)
    }

    /// Returns the change of the held message. A message that ended well is held no longer, for
    /// whatever reason it was.
    fn held_change(&self, right: &RunRight, outcome: &Outcome, attempts: u32) -> Option<HeldChange> {
        match outcome {
            Outcome::DeadLettered { error } => {
                let held = self.held_message(HoldReason::Dead, error.clone(), attempts);
                Some(HeldChange::Put(Box::new(held)))
            }
            Outcome::Retry { .. } => None,
            _ => self.may_be_held(right).then_some(HeldChange::Remove(self.message.identity.fingerprint)),
        }
    }

    fn may_be_held(&self, right: &RunRight) -> bool {
        right.found.is_some() || self.message.is_held || self.options.strategy.gaps().is_some()
    }

    /// Returns the message as one to be held.
    pub(super) fn held_message(&self, reason: HoldReason, error: String, attempts: u32) -> HeldMessage {
        let identity = &self.message.identity;
        HeldMessage {
            message: (*self.message.message).clone(),
            fingerprint: identity.fingerprint,
            position: identity.position.clone(),
            hold_reason: reason,
            error,
            attempts,
            component: self.component.clone(),
            at_ms: self.now_ms,
        }
    }
}
