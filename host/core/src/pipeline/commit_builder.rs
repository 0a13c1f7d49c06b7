//! What becomes of a message by what its run did: record, effects, kept message, ending. Pure functions; they write nothing.

use std::sync::Arc;

use crate::message::identity::Identity;
use crate::pipeline::RunRight;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::run_result::RunResult;
use crate::record;
use crate::record::history::{self, RecordOrigin};
use crate::record::{HistoryEntry, Output, Record, RecordEvent};
use crate::run::checkpoint::PriorEffects;
use crate::run::failure::Failure;
use crate::saga::log::ReadSaga;
use crate::saga::{Member, SagaEvent, SagaLogEntry, SagaState};
use crate::state::Effects;
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange, SharedChange};
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::support::fault;

/// Everything that decides, but the run itself.
pub(crate) struct CommitBuilder<'a> {
    pub(crate) options: &'a Options,
    /// Digest of the processor.
    pub(crate) component: &'a Arc<str>,
    pub(crate) message: &'a Accepted,
    /// Now, in milliseconds since the Unix epoch.
    pub(crate) now_ms: u64,
}

impl CommitBuilder<'_> {
    /// What a run makes of its message, to be committed; and how the message ends then.
    pub(crate) fn of(&self, claim: &RunRight, run: RunResult) -> (Box<Commit>, Outcome) {
        let RunResult { attempts, result, reads, effects, taken } = run;
        let (result, saga) = match &taken {
            Some(taken) => (taken.judged(result), taken.saga.as_ref()),
            None => (result, None),
        };
        let (event, outcome) = self.judge(attempts, result, saga);
        let completed = matches!(outcome, Outcome::Completed { .. });
        let expected = match Expected::of(claim.epoch) {
            Expected::Absent if fault::mutated("mark-before-run") => Expected::Epoch(1),
            found => found,
        };
        let saga_name = taken.as_ref().and_then(|taken| taken.saga_name());
        let mut commit = Box::new(Commit {
            expected,
            record: RecordChange::Put(self.record(claim, attempts, saga_name, event).into()),
            reads,
            effects: if completed || fault::mutated("failed-run-keeps-its-effects") {
                effects
            } else {
                Effects::default()
            },
            held_message: self.held_message(claim, &outcome, attempts),
            ..self.commit()
        });
        if let Some(taken) = taken {
            self.take_along(&mut commit, *taken, &outcome);
        }
        (commit, outcome)
    }

    /// A commit of the message that changes nothing yet.
    pub(crate) fn commit(&self) -> Commit {
        let identity = &self.message.identity;
        Commit { message_key: identity.message_key.clone(), at_ms: self.now_ms, ..Commit::of(&identity.record) }
    }

    /// What a run's result means: completed, once more, or failed for good.
    fn judge(&self, attempts: u32, result: Result<Output, Failure>, saga: Option<&ReadSaga>) -> (RecordEvent, Outcome) {
        match result {
            Ok(output) => (RecordEvent::Completed(output.clone()), Outcome::Completed { output }),
            Err(Failure::Retry { reason, after_ms })
                if attempts < self.options.attempts_max && !fault::mutated("failure-is-final") =>
            {
                let message_key = &self.message.identity.message_key;
                let asked_ms = after_ms.map(|after_ms| after_ms.min(self.options.retry_after_max_ms));
                let after_ms = asked_ms.unwrap_or_else(|| self.options.backoff_ms(message_key, attempts));
                let event =
                    RecordEvent::Failed { error: reason.clone(), retry_at_ms: self.now_ms.saturating_add(after_ms) };
                (event, Outcome::Retry { error: reason, after_ms })
            }
            Err(failure) => {
                let error = match failure {
                    Failure::Retry { reason, .. } => format!("failed {attempts} times, the last time: {reason}"),
                    for_good => for_good.to_string(),
                };
                match saga {
                    Some(read) if read.saga.can_compensate() => {
                        (RecordEvent::CompensationStarted { error: error.clone() }, Outcome::Compensating { error })
                    }
                    _ => (RecordEvent::GivenUp { error: error.clone() }, Outcome::DeadLettered { error }),
                }
            }
        }
    }

    /// The record after `event`.
    pub(crate) fn record(&self, claim: &RunRight, attempts: u32, saga: Option<&str>, event: RecordEvent) -> Record {
        let found = claim.found.as_deref();
        let state = record::next_state(found.map(|record| &record.state), event.clone())
            .expect("a claim is only given where a run may end");
        let life_ms = self.options.record_life_ms();
        let entry = HistoryEntry {
            event,
            at_ms: self.now_ms,
            epoch: claim.epoch.unwrap_or(0) + u64::from(!fault::mutated("epoch-stands-still")),
            attempts,
            component: self.component.clone(),
            expires_ms: state.is_terminal().then(|| self.now_ms.saturating_add(life_ms)),
        };
        let received = RecordOrigin {
            at_ms: found.map_or(claim.now_ms, |record| record.received_ms),
            fingerprint: self.message.identity.fingerprint,
            position: self.message.identity.position.clone(),
            saga: saga.map(str::to_owned).or_else(|| found.and_then(|record| record.saga.clone())),
        };
        history::append(&received, found.map_or_else(Vec::new, |record| record.history.clone()), state, &entry)
    }

    /// Takes along what the run has made durable before: it ends with the message, or goes on to its next run.
    fn take_along(&self, commit: &mut Commit, taken: PriorEffects, outcome: &Outcome) {
        let mut shared = self.saga_change(&taken, outcome).unwrap_or_default();
        for lock in &taken.held {
            lock.given_back(&mut shared);
        }
        if shared != SharedChange::default() {
            commit.shared = Some(Box::new(shared));
        }
        let forgotten = match outcome {
            Outcome::Retry { .. } => taken.refused,
            _ => taken.journal,
        };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
    }

    /// What becomes of the saga that the message has a part in.
    fn saga_change(&self, taken: &PriorEffects, outcome: &Outcome) -> Option<SharedChange> {
        let read = taken.saga.as_ref()?;
        let expires_ms = self.now_ms.saturating_add(self.options.record_life_ms());
        let entry = |event| SagaLogEntry { event, at_ms: self.now_ms };
        let append = |events: Vec<SagaEvent>| {
            let entries: Vec<SagaLogEntry> = events.into_iter().map(entry).collect();
            Some(read.append(&entries, expires_ms).expect("the ending was judged by this saga").0)
        };
        let failed = |error: &String| {
            let member = read.saga.member(&self.message.identity.message_key);
            let joined = member.is_none().then(|| SagaEvent::Joined(Box::new(self.member())));
            let member = member.unwrap_or(read.saga.members.len() as u32);
            joined.into_iter().chain([SagaEvent::CompensationStarted { member, error: error.clone() }])
        };
        match outcome {
            Outcome::Completed { .. } if !read.id.is_named() => Some(read.forget(None)),
            Outcome::Completed { .. } if taken.completes_saga => append(vec![SagaEvent::Completed]),
            Outcome::Completed { .. } => Some(read.unchanged()),
            Outcome::Compensating { error } => append(failed(error).collect()),
            // Nothing to undo, but nothing joins it any more.
            Outcome::DeadLettered { error } if read.id.is_named() && read.saga.state == SagaState::Open => {
                append(failed(error).chain([SagaEvent::Ended]).collect())
            }
            Outcome::DeadLettered { .. } if !read.id.is_named() && read.saga.state == SagaState::Open => {
                Some(read.forget(None))
            }
            _ => None,
        }
    }

    /// The message, as a member of a saga.
    fn member(&self) -> Member {
        let Identity { record, message_key, .. } = &self.message.identity;
        Member::of(record, message_key, &self.message.message, self.component)
    }

    /// What becomes of the saga of a message that will never run again, since a later one was seen. One that several messages share goes on
    /// without it.
    pub(crate) fn superseded(&self, taken: &PriorEffects) -> Option<SharedChange> {
        let read = taken.saga.as_ref().filter(|read| !read.id.is_named() && read.saga.state.is_forward())?;
        let member = read.saga.member(&self.message.identity.message_key).filter(|_| read.saga.can_compensate());
        let Some(member) = member else { return Some(read.forget(None)) };
        let error = "a later message was seen before this one had ended".to_owned();
        let started = SagaLogEntry { event: SagaEvent::CompensationStarted { member, error }, at_ms: self.now_ms };
        Some(read.append(&[started], u64::MAX).expect("it can be undone").0)
    }

    /// What becomes of the message among those that are kept. One that ended well goes, wherever it may be there.
    fn held_message(&self, claim: &RunRight, outcome: &Outcome, attempts: u32) -> Option<HeldChange> {
        match outcome {
            Outcome::DeadLettered { error } => {
                Some(HeldChange::Put(Box::new(self.keep(HoldReason::Dead, error.clone(), attempts))))
            }
            Outcome::Retry { .. } => None,
            _ => self.may_be_kept(claim).then_some(HeldChange::Remove(self.message.identity.fingerprint)),
        }
    }

    fn may_be_kept(&self, claim: &RunRight) -> bool {
        claim.found.is_some() || self.message.kept || self.options.strategy.gaps().is_some()
    }

    /// The message, to be kept.
    pub(crate) fn keep(&self, hold_reason: HoldReason, error: String, attempts: u32) -> HeldMessage {
        let identity = &self.message.identity;
        HeldMessage {
            message: (*self.message.message).clone(),
            fingerprint: identity.fingerprint,
            position: identity.position.clone(),
            hold_reason,
            error,
            attempts,
            component: self.component.clone(),
            at_ms: self.now_ms,
        }
    }
}
