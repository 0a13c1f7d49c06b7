//! A saga: steps that were taken outside the transaction, and the way back. An append-only log of events, and what the log
//! comes to. Pure functions: no clock, no store.

pub(crate) mod log;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::key::{RecordKey, escaped};
use crate::support::fault;

/// Longest name of a saga that a message joins, in bytes.
pub const SAGA_NAME_BYTES: usize = 256;

/// Names a saga: that of one message by its record's key, one that messages join by the name they give.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SagaId(Arc<str>);

/// A text that cannot name a saga.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a saga's name has 1 to {SAGA_NAME_BYTES} bytes, not {0}")]
pub struct InvalidSagaName(usize);

impl SagaId {
    /// The saga of one message alone.
    pub fn of_message(message_key: &RecordKey) -> Self {
        Self(message_key.to_string().into())
    }

    /// The saga that messages join under `name`. In its text `%` and `/` are percent-encoded, which no message's own saga
    /// looks like.
    pub fn named(name: &str) -> Result<Self, InvalidSagaName> {
        if name.is_empty() || name.len() > SAGA_NAME_BYTES {
            return Err(InvalidSagaName(name.len()));
        }
        Ok(Self(escaped(name).into()))
    }

    /// Whether messages join it by name; if not, it is one message's own.
    pub fn is_named(&self) -> bool {
        !self.0.contains('/')
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SagaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SagaId {
    type Err = InvalidSagaName;

    /// Takes the text that a saga is listed under.
    fn from_str(text: &str) -> Result<Self, InvalidSagaName> {
        if text.is_empty() { Err(InvalidSagaName(0)) } else { Ok(Self(text.into())) }
    }
}

/// A message that has a part in a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its record.
    pub record: RecordKey,
    /// Its own key: ids and seeds of its compensations are derived from it.
    pub message_key: RecordKey,
    /// The message, as received: compensations are given it.
    pub message: Message,
    /// Digest of the component that registered its steps, and that undoes them.
    pub component: Arc<str>,
}

impl Member {
    /// The message whose record and own key these are, with the component at work.
    pub(crate) fn of(record: &RecordKey, message_key: &RecordKey, message: &Message, component: &Arc<str>) -> Self {
        let (record, message_key, message, component) =
            (record.clone(), message_key.clone(), message.clone(), component.clone());
        Self { record, message_key, message, component }
    }
}

/// One thing that happened to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SagaLogEntry {
    /// What.
    pub event: SagaEvent,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// What can happen to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SagaEvent {
    /// A message has a part in it; members are counted from 0.
    Joined(Box<Member>),
    /// A step is about to be taken; steps are counted from 0.
    Registered {
        /// Whose step.
        member: u32,
        /// Its name.
        step: String,
        /// What its compensation is given.
        payload: Bytes,
    },
    /// There is no way back any more.
    PivotPassed {
        /// Who passed it.
        member: u32,
    },
    /// It ended well: nothing of it is undone.
    Completed,
    /// A message of it failed for good.
    CompensationStarted {
        /// Which.
        member: u32,
        /// What went wrong.
        error: String,
    },
    /// A step is undone.
    Compensated {
        /// Which.
        step: u32,
    },
    /// A compensation failed and is due again.
    CompensationFailed {
        /// Of which step.
        step: u32,
        /// What went wrong.
        error: String,
        /// When it is due again, in milliseconds since the Unix epoch.
        retry_at_ms: u64,
    },
    /// A compensation failed for good: an operator decides.
    Stuck {
        /// Of which step.
        step: u32,
        /// What went wrong.
        error: String,
    },
    /// An operator has the step that halted it tried again.
    Retried {
        /// Why.
        reason: String,
    },
    /// An operator has seen to the step that halted it: it goes on with the one before.
    Skipped {
        /// Which.
        step: u32,
        /// Why.
        reason: String,
    },
    /// An operator has seen to all that was left.
    Resolved {
        /// Why.
        reason: String,
    },
    /// Every step is undone, and the record of the message that failed says so.
    Ended,
}

impl SagaEvent {
    /// Its name, as the command line and the API print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Joined(_) => "joined",
            Self::Registered { .. } => "registered",
            Self::PivotPassed { .. } => "pivot-passed",
            Self::Completed => "completed",
            Self::CompensationStarted { .. } => "compensation-started",
            Self::Compensated { .. } => "compensated",
            Self::CompensationFailed { .. } => "compensation-failed",
            Self::Stuck { .. } => "stuck",
            Self::Retried { .. } => "retried",
            Self::Skipped { .. } => "skipped",
            Self::Resolved { .. } => "resolved",
            Self::Ended => "ended",
        }
    }
}

/// Where a saga stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SagaState {
    /// Its messages go forward.
    #[default]
    Open,
    /// Past its pivot: its messages go forward only.
    Pivoted,
    /// It ended well.
    Completed,
    /// Its steps are being undone, the last one first.
    Compensating,
    /// A step could not be undone: an operator decides.
    Stuck,
    /// Every step is undone.
    Compensated,
    /// An operator has seen to what could not be undone.
    Resolved,
}

impl SagaState {
    /// Its name, as the command line and the API print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Pivoted => "pivoted",
            Self::Completed => "completed",
            Self::Compensating => "compensating",
            Self::Stuck => "stuck",
            Self::Compensated => "compensated",
            Self::Resolved => "resolved",
        }
    }

    /// Whether nothing happens to it any more: it may be forgotten after a while.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated | Self::Resolved)
    }

    /// Whether messages may still go forward in it.
    pub fn is_forward(self) -> bool {
        matches!(self, Self::Open | Self::Pivoted)
    }
}

/// A registered step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Whose.
    pub member: u32,
    /// Its name.
    pub name: String,
    /// What its compensation is given.
    pub payload: Bytes,
    /// How it stands.
    pub hold_reason: StepState,
    /// Attempts to undo it that failed since it was last asked for.
    pub attempts: u32,
    /// When it is to be undone at the earliest, in milliseconds since the Unix epoch.
    pub due_ms: u64,
    /// Why it could not be undone the last time.
    pub error: Option<String>,
}

/// How a step stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepState {
    /// It may have been taken.
    Registered,
    /// It is undone.
    Compensated,
    /// An operator has seen to it.
    Skipped,
}

impl StepState {
    /// Its name, as the command line and the API print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Compensated => "compensated",
            Self::Skipped => "skipped",
        }
    }
}

/// What the log of a saga comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saga {
    /// Where it stands.
    pub state: SagaState,
    /// Its messages, in the order in which they joined.
    pub members: Vec<Member>,
    /// Its steps, in the order in which they were registered.
    pub steps: Vec<Step>,
    /// The member that failed for good, and with what.
    pub failure: Option<(u32, String)>,
    /// Events of its log.
    pub events: u32,
    /// When the last of them happened, in milliseconds since the Unix epoch.
    pub changed_ms: u64,
}

/// The event cannot happen to this saga.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a saga that is {state} cannot take `{event}`")]
pub struct IllegalSagaEvent {
    state: &'static str,
    event: &'static str,
}

impl Saga {
    /// What a log comes to.
    pub fn replay<'a>(entries: impl IntoIterator<Item = &'a SagaLogEntry>) -> Result<Self, IllegalSagaEvent> {
        let mut saga = Self::default();
        for entry in entries {
            saga.apply(entry)?;
        }
        Ok(saga)
    }

    /// Takes one more event; unchanged if it is illegal.
    pub fn apply(&mut self, entry: &SagaLogEntry) -> Result<(), IllegalSagaEvent> {
        use SagaState::{Compensated, Compensating, Completed, Open, Pivoted, Resolved, Stuck};
        let next = self.next_step().map(|(index, _)| index);
        let known = |member: &u32| (*member as usize) < self.members.len();
        let state = match (&entry.event, self.state) {
            (SagaEvent::Joined(member), Open | Pivoted) => {
                self.members.push((**member).clone());
                self.state
            }
            (SagaEvent::Registered { member, step, payload }, Open) if known(member) => {
                self.steps.push(Step {
                    member: *member,
                    name: step.clone(),
                    payload: payload.clone(),
                    hold_reason: StepState::Registered,
                    attempts: 0,
                    due_ms: 0,
                    error: None,
                });
                Open
            }
            (SagaEvent::PivotPassed { member }, Open | Pivoted) if known(member) => Pivoted,
            (SagaEvent::Completed, Open | Pivoted) => Completed,
            (SagaEvent::CompensationStarted { member, error }, Open) if known(member) => {
                self.failure = Some((*member, error.clone()));
                Compensating
            }
            (SagaEvent::Compensated { step }, Compensating) if Some(*step) == next => {
                self.steps[*step as usize].hold_reason = StepState::Compensated;
                Compensating
            }
            (SagaEvent::CompensationFailed { step, error, retry_at_ms }, Compensating) if Some(*step) == next => {
                let step = &mut self.steps[*step as usize];
                (step.attempts, step.due_ms, step.error) = (step.attempts + 1, *retry_at_ms, Some(error.clone()));
                Compensating
            }
            (SagaEvent::Stuck { step, error }, Compensating) if Some(*step) == next => {
                let step = &mut self.steps[*step as usize];
                (step.attempts, step.error) = (step.attempts + 1, Some(error.clone()));
                Stuck
            }
            (SagaEvent::Retried { .. }, Stuck) => {
                if let Some(step) = next.and_then(|step| self.steps.get_mut(step as usize)) {
                    (step.attempts, step.due_ms) = (0, 0);
                }
                Compensating
            }
            (SagaEvent::Skipped { step, .. }, Stuck) if Some(*step) == next => {
                self.steps[*step as usize].hold_reason = StepState::Skipped;
                Compensating
            }
            (SagaEvent::Resolved { .. }, Stuck) => Resolved,
            (SagaEvent::Ended, Compensating) if next.is_none() => Compensated,
            (event, state) => return Err(IllegalSagaEvent { state: state.name(), event: event.name() }),
        };
        self.state = state;
        self.events += 1;
        self.changed_ms = entry.at_ms;
        Ok(())
    }

    /// The step that is to be undone next: the last one that was registered and is not seen to.
    pub fn next_step(&self) -> Option<(u32, &Step)> {
        let mut open = (0..).zip(&self.steps).filter(|(_, step)| step.hold_reason == StepState::Registered);
        if fault::mutated("undo-in-forward-order") { open.next() } else { open.last() }
    }

    /// The place of the message `own` among the members.
    pub fn member(&self, message_key: &RecordKey) -> Option<u32> {
        self.members.iter().position(|member| member.message_key == *message_key).map(|index| index as u32)
    }

    /// The member that failed for good.
    pub fn failed(&self) -> Option<&Member> {
        self.members.get(self.failure.as_ref()?.0 as usize)
    }

    /// Whether a failure of one of its messages undoes something.
    pub fn can_compensate(&self) -> bool {
        self.state == SagaState::Open && self.next_step().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::key::Scope;

    fn key(number: u32) -> RecordKey {
        RecordKey::new(Scope::of("p"), "/s".into(), number.to_string().into())
    }

    fn joined(number: u32) -> SagaEvent {
        let message = Message::new(number.to_string(), "/s", "t");
        SagaEvent::Joined(Box::new(Member {
            record: key(number),
            message_key: key(number),
            message,
            component: "c".into(),
        }))
    }

    fn registered(member: u32, step: &str) -> SagaEvent {
        SagaEvent::Registered { member, step: step.into(), payload: Bytes::new() }
    }

    fn replayed(events: impl IntoIterator<Item = SagaEvent>) -> Result<Saga, IllegalSagaEvent> {
        let entries: Vec<_> = events.into_iter().map(|event| SagaLogEntry { event, at_ms: 1 }).collect();
        Saga::replay(&entries)
    }

    #[test]
    fn steps_of_all_members_are_undone_the_last_one_first() {
        let begun = [joined(0), registered(0, "a"), joined(1), registered(1, "b"), registered(0, "c")];
        let mut log = begun.to_vec();
        log.push(SagaEvent::CompensationStarted { member: 1, error: "no".into() });
        let mut order = Vec::new();
        while let Some((step, name)) =
            replayed(log.clone()).expect("legal").next_step().map(|(index, step)| (index, step.name.clone()))
        {
            order.push(name);
            log.push(SagaEvent::Compensated { step });
        }
        assert_eq!(order, ["c", "b", "a"]);
        log.push(SagaEvent::Ended);
        let saga = replayed(log).expect("legal");
        assert_eq!(
            (saga.state, saga.failed().map(|member| &member.message_key)),
            (SagaState::Compensated, Some(&key(1)))
        );
    }

    #[test]
    fn what_would_undo_twice_out_of_order_or_behind_the_pivot_is_illegal() {
        let begun = || vec![joined(0), registered(0, "a"), registered(0, "b")];
        let with = |more: Vec<SagaEvent>| replayed(begun().into_iter().chain(more));
        let failed = || SagaEvent::CompensationStarted { member: 0, error: "no".into() };
        assert!(with(vec![failed(), SagaEvent::Compensated { step: 0 }]).is_err(), "out of order");
        assert!(
            with(vec![failed(), SagaEvent::Compensated { step: 1 }, SagaEvent::Compensated { step: 1 }]).is_err(),
            "twice"
        );
        assert!(with(vec![SagaEvent::Compensated { step: 1 }]).is_err(), "nothing has failed");
        assert!(with(vec![SagaEvent::PivotPassed { member: 0 }, failed()]).is_err(), "behind the pivot");
        assert!(with(vec![SagaEvent::PivotPassed { member: 0 }, registered(0, "c")]).is_err(), "never to be undone");
        assert!(with(vec![failed(), registered(0, "c")]).is_err(), "forward while it is undone");
        assert!(with(vec![failed(), failed()]).is_err(), "failed twice");
        assert!(with(vec![SagaEvent::Completed, failed()]).is_err(), "completed");
        assert!(with(vec![failed(), SagaEvent::Ended]).is_err(), "steps are left");
        assert!(replayed([registered(0, "a")]).is_err(), "of nobody");
    }

    #[test]
    fn a_halted_saga_waits_for_an_operator() {
        let halted = || {
            let error = || "no".to_owned();
            vec![
                joined(0),
                registered(0, "a"),
                registered(0, "b"),
                SagaEvent::CompensationStarted { member: 0, error: error() },
                SagaEvent::CompensationFailed { step: 1, error: error(), retry_at_ms: 9 },
                SagaEvent::Stuck { step: 1, error: error() },
            ]
        };
        let with = |event| replayed(halted().into_iter().chain([event])).expect("legal");
        let reason = || "seen to".to_owned();
        assert_eq!(replayed(halted()).expect("legal").steps[1].attempts, 2);
        assert!(replayed(halted().into_iter().chain([SagaEvent::Compensated { step: 1 }])).is_err());
        let retried = with(SagaEvent::Retried { reason: reason() });
        assert_eq!(
            (retried.state, retried.steps[1].attempts, retried.steps[1].due_ms),
            (SagaState::Compensating, 0, 0)
        );
        let skipped = with(SagaEvent::Skipped { step: 1, reason: reason() });
        assert_eq!(skipped.next_step().map(|(index, _)| index), Some(0));
        assert_eq!(with(SagaEvent::Resolved { reason: reason() }).state, SagaState::Resolved);
    }

    #[test]
    fn a_named_saga_is_never_taken_for_one_of_a_message() {
        let named = SagaId::named(&key(1).to_string()).expect("a name");
        assert!(named.is_named() && named != SagaId::of_message(&key(1)));
        assert!(!SagaId::of_message(&key(1)).is_named());
        assert_eq!(named.to_string().parse(), Ok(named));
        assert!(SagaId::named("").is_err() && SagaId::named(&"x".repeat(257)).is_err());
    }
}
