//! What becomes of a message by what its run did: record, effects, kept message, ending. Pure functions; they write nothing.

use std::sync::Arc;

use crate::pipeline::{Accepted, Claim, Run};
use crate::run::context::Effects;
use crate::run::checkpoint::Taken;
use crate::pipeline::outcome::Ending;
use crate::support::fault;
use crate::record::history;
use crate::pipeline::options::Options;
use crate::run::processor::{Failure, Output};
use crate::record::{self, Event, Moment, Record};
use crate::saga::{Member, SagaEvent, SagaMoment, SagaState};
use crate::saga::log::ReadSaga;
use crate::store::{Commit, DeadLetter, Expected, LetterChange, RecordChange, SharedChange, Standing};
use crate::message::strategy::Identity;

/// Everything that decides, but the run itself.
pub(crate) struct Conclusion<'a> {
    pub(crate) options: &'a Options,
    /// Digest of the processor.
    pub(crate) component: &'a Arc<str>,
    pub(crate) message: &'a Accepted,
    /// Now, in milliseconds since the Unix epoch.
    pub(crate) now_ms: u64,
}

impl Conclusion<'_> {
    /// What a run makes of its message, to be committed; and how the message ends then.
    pub(crate) fn of(&self, claim: &Claim, run: Run) -> (Box<Commit>, Ending) {
        let Run { attempts, result, reads, effects, taken } = run;
        let (result, saga) = match &taken {
            Some(taken) => (taken.judged(result), taken.saga.as_ref()),
            None => (result, None),
        };
        let (event, ending) = self.judge(attempts, result, saga);
        let completed = matches!(ending, Ending::Completed { .. });
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
            letter: self.letter(claim, &ending, attempts),
            ..self.commit()
        });
        if let Some(taken) = taken {
            self.take_along(&mut commit, *taken, &ending);
        }
        (commit, ending)
    }

    /// A commit of the message that changes nothing yet.
    pub(crate) fn commit(&self) -> Commit {
        let identity = &self.message.identity;
        Commit { own: identity.own.clone(), at_ms: self.now_ms, ..Commit::of(&identity.record) }
    }

    /// What a run's result means: completed, once more, or failed for good.
    fn judge(&self, attempts: u32, result: Result<Output, Failure>, saga: Option<&ReadSaga>) -> (Event, Ending) {
        match result {
            Ok(output) => (Event::Completed(output.clone()), Ending::Completed { output }),
            Err(Failure::Retry { reason, after_ms })
                if attempts < self.options.attempts_max && !fault::mutated("failure-is-final") =>
            {
                let own = &self.message.identity.own;
                let asked_ms = after_ms.map(|after_ms| after_ms.min(self.options.retry_after_max_ms));
                let after_ms = asked_ms.unwrap_or_else(|| self.options.backoff_ms(own, attempts));
                let event = Event::Failed { error: reason.clone(), retry_at_ms: self.now_ms.saturating_add(after_ms) };
                (event, Ending::Retry { error: reason, after_ms })
            }
            Err(failure) => {
                let error = match failure {
                    Failure::Retry { reason, .. } => format!("failed {attempts} times, the last time: {reason}"),
                    for_good => for_good.to_string(),
                };
                match saga {
                    Some(read) if read.saga.can_be_undone() => {
                        (Event::CompensationStarted { error: error.clone() }, Ending::Compensating { error })
                    }
                    _ => (Event::GivenUp { error: error.clone() }, Ending::DeadLettered { error }),
                }
            }
        }
    }

    /// The record after `event`.
    pub(crate) fn record(&self, claim: &Claim, attempts: u32, saga: Option<&str>, event: Event) -> Record {
        let found = claim.found.as_deref();
        let state = record::next(found.map(|record| &record.state), event.clone())
            .expect("a claim is only given where a run may end");
        let life_ms = self.options.record_life_ms();
        let moment = Moment {
            event,
            at_ms: self.now_ms,
            epoch: claim.epoch.unwrap_or(0) + u64::from(!fault::mutated("epoch-stands-still")),
            attempts,
            component: self.component.clone(),
            expires_ms: state.is_terminal().then(|| self.now_ms.saturating_add(life_ms)),
        };
        let received = history::Received {
            at_ms: found.map_or(claim.now_ms, |record| record.received_ms),
            fingerprint: self.message.identity.fingerprint,
            position: self.message.identity.position.clone(),
            saga: saga.map(str::to_owned).or_else(|| found.and_then(|record| record.saga.clone())),
        };
        history::after(&received, found.map_or_else(Vec::new, |record| record.history.clone()), state, &moment)
    }

    /// Takes along what the run has made durable before: it ends with the message, or goes on to its next run.
    fn take_along(&self, commit: &mut Commit, taken: Taken, ending: &Ending) {
        let mut shared = self.saga_change(&taken, ending).unwrap_or_default();
        for lock in &taken.held {
            lock.given_back(&mut shared);
        }
        if shared != SharedChange::default() {
            commit.shared = Some(Box::new(shared));
        }
        let forgotten = match ending {
            Ending::Retry { .. } => taken.refused,
            _ => taken.journal,
        };
        commit.effects.writes.extend(forgotten.into_iter().map(|key| (key, None)));
    }

    /// What becomes of the saga that the message has a part in.
    fn saga_change(&self, taken: &Taken, ending: &Ending) -> Option<SharedChange> {
        let read = taken.saga.as_ref()?;
        let expires_ms = self.now_ms.saturating_add(self.options.record_life_ms());
        let moment = |event| SagaMoment { event, at_ms: self.now_ms };
        let append = |events: Vec<SagaEvent>| {
            let moments: Vec<SagaMoment> = events.into_iter().map(moment).collect();
            Some(read.append(&moments, expires_ms).expect("the ending was judged by this saga").0)
        };
        let failed = |error: &String| {
            let member = read.saga.member(&self.message.identity.own);
            let joined = member.is_none().then(|| SagaEvent::Joined(Box::new(self.member())));
            let member = member.unwrap_or(read.saga.members.len() as u32);
            joined.into_iter().chain([SagaEvent::UndoStarted { member, error: error.clone() }])
        };
        match ending {
            Ending::Completed { .. } if !read.id.is_named() => Some(read.forget(None)),
            Ending::Completed { .. } if taken.completes_saga => append(vec![SagaEvent::Completed]),
            Ending::Completed { .. } => Some(read.unchanged()),
            Ending::Compensating { error } => append(failed(error).collect()),
            // Nothing to undo, but nothing joins it any more.
            Ending::DeadLettered { error } if read.id.is_named() && read.saga.state == SagaState::Open => {
                append(failed(error).chain([SagaEvent::Ended]).collect())
            }
            Ending::DeadLettered { .. } if !read.id.is_named() && read.saga.state == SagaState::Open => {
                Some(read.forget(None))
            }
            _ => None,
        }
    }

    /// The message, as a member of a saga.
    fn member(&self) -> Member {
        let Identity { record, own, .. } = &self.message.identity;
        Member::of(record, own, &self.message.message, self.component)
    }

    /// What becomes of the saga of a message that will never run again, since a later one was seen. One that several messages share goes on
    /// without it.
    pub(crate) fn superseded(&self, taken: &Taken) -> Option<SharedChange> {
        let read = taken.saga.as_ref().filter(|read| !read.id.is_named() && read.saga.state.is_forward())?;
        let member = read.saga.member(&self.message.identity.own).filter(|_| read.saga.can_be_undone());
        let Some(member) = member else { return Some(read.forget(None)) };
        let error = "a later message was seen before this one had ended".to_owned();
        let started = SagaMoment { event: SagaEvent::UndoStarted { member, error }, at_ms: self.now_ms };
        Some(read.append(&[started], u64::MAX).expect("it can be undone").0)
    }

    /// What becomes of the message among those that are kept. One that ended well goes, wherever it may be there.
    fn letter(&self, claim: &Claim, ending: &Ending, attempts: u32) -> Option<LetterChange> {
        match ending {
            Ending::DeadLettered { error } => {
                Some(LetterChange::Put(Box::new(self.keep(Standing::Dead, error.clone(), attempts))))
            }
            Ending::Retry { .. } => None,
            _ => self.may_be_kept(claim).then_some(LetterChange::Remove(self.message.identity.fingerprint)),
        }
    }

    fn may_be_kept(&self, claim: &Claim) -> bool {
        claim.found.is_some() || self.message.kept || self.options.strategy.gaps().is_some()
    }

    /// The message, to be kept.
    pub(crate) fn keep(&self, standing: Standing, error: String, attempts: u32) -> DeadLetter {
        let identity = &self.message.identity;
        DeadLetter {
            message: (*self.message.message).clone(),
            fingerprint: identity.fingerprint,
            position: identity.position.clone(),
            standing,
            error,
            attempts,
            component: self.component.clone(),
            at_ms: self.now_ms,
        }
    }
}
