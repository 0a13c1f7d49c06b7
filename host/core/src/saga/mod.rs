//! A saga: steps that were taken outside the transaction, and their compensation. Holds the
//! append-only log of events and the state that the log adds up to. Pure functions: no clock, no
//! store.

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

/// Names a saga: the saga of one message by its record's key, a shared saga by the name that its
/// messages give.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SagaId(Arc<str>);

/// A text that cannot name a saga.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a saga's name has 1 to {SAGA_NAME_BYTES} bytes, not {0}")]
pub struct InvalidSagaName(usize);

impl SagaId {
    /// Returns the id of the saga of one message alone.
    pub fn of_message(message_key: &RecordKey) -> Self {
        Self(message_key.to_string().into())
    }

    /// Returns the id of the saga that messages join under `name`. In its text `%` and `/` are
    /// percent-encoded; the text of a message's own saga never looks like that.
    pub fn named(name: &str) -> Result<Self, InvalidSagaName> {
        if name.is_empty() || name.len() > SAGA_NAME_BYTES {
            return Err(InvalidSagaName(name.len()));
        }
        Ok(Self(escaped(name).into()))
    }

    /// Returns `true` if messages join the saga by name, `false` if it is one message's own.
    pub fn is_named(&self) -> bool {
        !self.0.contains('/')
    }

    /// Returns the text of the id.
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
    /// Record of the message.
    pub record: RecordKey,
    /// The message's own key: ids and seeds of its compensations are derived from it.
    pub message_key: RecordKey,
    /// The message, as received: compensations get it.
    pub message: Message,
    /// Digest of the component that registered the message's steps, and that compensates them.
    pub component: Arc<str>,
}

impl Member {
    /// Returns the member for the message with this record and own key, and the component at work.
    pub(crate) fn of(record: &RecordKey, message_key: &RecordKey, message: &Message, component: &Arc<str>) -> Self {
        let (record, message_key, message, component) =
            (record.clone(), message_key.clone(), message.clone(), component.clone());
        Self { record, message_key, message, component }
    }
}

/// Entry of a saga's log: one event and its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SagaLogEntry {
    /// The event.
    pub event: SagaEvent,
    /// Time of the event, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// Event that can happen to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SagaEvent {
    /// A message takes part in the saga; members are counted from 0.
    Joined(Box<Member>),
    /// A step is about to be taken; steps are counted from 0. Written by earlier versions of the
    /// host, which did not know the step's call.
    Registered {
        /// Member that takes the step.
        member: u32,
        /// Name of the step.
        step: String,
        /// Input of the step's compensation.
        payload: Bytes,
    },
    /// The saga passed its pivot: it cannot be compensated any more.
    PivotPassed {
        /// Member that passed the pivot.
        member: u32,
    },
    /// The saga completed: none of its steps is compensated.
    Completed,
    /// A message of the saga failed for good.
    CompensationStarted {
        /// Member that failed.
        member: u32,
        /// Error of that member.
        error: String,
    },
    /// A step is compensated.
    Compensated {
        /// Index of the step.
        step: u32,
    },
    /// A compensation failed and is due again.
    CompensationFailed {
        /// Index of the step.
        step: u32,
        /// Error of the compensation.
        error: String,
        /// Time at which the compensation is due again, in milliseconds since the Unix epoch.
        retry_at_ms: u64,
    },
    /// A compensation failed for good: an operator decides.
    Stuck {
        /// Index of the step.
        step: u32,
        /// Error of the compensation.
        error: String,
    },
    /// An operator runs the compensation of the step at which the saga is stuck again.
    Retried {
        /// Reason that the operator gave.
        reason: String,
    },
    /// An operator settled by hand the step at which the saga is stuck: compensation continues with
    /// the step before it.
    Skipped {
        /// Index of the step.
        step: u32,
        /// Reason that the operator gave.
        reason: String,
    },
    /// An operator settled by hand all steps that were left.
    Resolved {
        /// Reason that the operator gave.
        reason: String,
    },
    /// Every step is compensated, and the record of the message that failed says so.
    Ended,
    // Stores write the number of an event: new ones are added here, at the end.
    /// A step is about to be taken; steps are counted from 0.
    StepRegistered {
        /// Member that takes the step.
        member: u32,
        /// Name of the step.
        step: String,
        /// Input of the step's compensation.
        payload: Bytes,
        /// Index of the outbound call that takes the step: the first one after the registration.
        call: u32,
    },
    /// A run of the member has ended while its steps were being compensated: it may have taken
    /// them after their compensation. They are compensated once more.
    Reopened {
        /// Member that may have taken the steps.
        member: u32,
    },
}

impl SagaEvent {
    /// Returns the event's name, as the command line and the API print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Joined(_) => "joined",
            Self::Registered { .. } | Self::StepRegistered { .. } => "registered",
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
            Self::Reopened { .. } => "reopened",
        }
    }
}

/// State of a saga. Stores write its number, people and HTTP its name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SagaState {
    /// The saga's messages go forward.
    #[default]
    Open,
    /// The saga is past its pivot: its messages go forward only.
    Pivoted,
    /// The saga completed.
    Completed,
    /// The saga's steps are being compensated, the last one first.
    Compensating,
    /// A step could not be compensated: an operator decides.
    Stuck,
    /// Every step is compensated.
    Compensated,
    /// An operator settled by hand the steps that could not be compensated.
    Resolved,
}

impl SagaState {
    /// Every state, in the order of a saga's life.
    pub const ALL: [Self; 7] = [
        Self::Open,
        Self::Pivoted,
        Self::Completed,
        Self::Compensating,
        Self::Stuck,
        Self::Compensated,
        Self::Resolved,
    ];

    /// Returns the state's name, as the command line and the API print it.
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

    /// Returns `true` if nothing happens to the saga any more: it may be forgotten after a while.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated | Self::Resolved)
    }

    /// Returns `true` if messages may still go forward in the saga.
    pub fn is_forward(self) -> bool {
        matches!(self, Self::Open | Self::Pivoted)
    }
}

/// A registered step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Member that registered the step.
    pub member: u32,
    /// Name of the step.
    pub name: String,
    /// Input of the step's compensation.
    pub payload: Bytes,
    /// Index of the outbound call that takes the step, if it is known.
    pub call: Option<u32>,
    /// State of the step.
    pub state: StepState,
    /// Number of times that the step was opened again after its compensation.
    pub reopened: u32,
    /// Failed attempts to compensate the step since its compensation was last requested.
    pub attempts: u32,
    /// Earliest time to compensate the step, in milliseconds since the Unix epoch.
    pub due_ms: u64,
    /// Error of the last compensation that failed.
    pub error: Option<String>,
}

impl Step {
    fn registered(member: u32, name: &str, payload: &Bytes, call: Option<u32>) -> Self {
        Self {
            member,
            name: name.to_owned(),
            payload: payload.clone(),
            call,
            state: StepState::Registered,
            reopened: 0,
            attempts: 0,
            due_ms: 0,
            error: None,
        }
    }
}

/// State of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepState {
    /// The step may have been taken.
    Registered,
    /// The step is compensated.
    Compensated,
    /// An operator settled the step by hand.
    Skipped,
}

impl StepState {
    /// Returns the state's name, as the command line and the API print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Compensated => "compensated",
            Self::Skipped => "skipped",
        }
    }
}

/// Saga as its log adds up to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saga {
    /// State of the saga.
    pub state: SagaState,
    /// Messages of the saga, in the order in which they joined.
    pub members: Vec<Member>,
    /// Steps of the saga, in the order in which they were registered.
    pub steps: Vec<Step>,
    /// Member that failed for good, and its error.
    pub failure: Option<(u32, String)>,
    /// Number of events in the saga's log.
    pub events: u32,
    /// Time of the last event, in milliseconds since the Unix epoch.
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
    /// Returns the saga that a log adds up to.
    pub fn replay<'a>(entries: impl IntoIterator<Item = &'a SagaLogEntry>) -> Result<Self, IllegalSagaEvent> {
        let mut saga = Self::default();
        for entry in entries {
            saga.apply(entry)?;
        }
        Ok(saga)
    }

    /// Applies one more event; the saga is unchanged if the event is illegal.
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
                self.steps.push(Step::registered(*member, step, payload, None));
                Open
            }
            (SagaEvent::StepRegistered { member, step, payload, call }, Open) if known(member) => {
                self.steps.push(Step::registered(*member, step, payload, Some(*call)));
                Open
            }
            (SagaEvent::Reopened { member }, Compensating | Stuck | Compensated | Resolved)
                if self.has_compensated(*member) =>
            {
                self.reopen(*member);
                if self.state == Stuck { Stuck } else { Compensating }
            }
            (SagaEvent::PivotPassed { member }, Open | Pivoted) if known(member) => Pivoted,
            (SagaEvent::Completed, Open | Pivoted) => Completed,
            (SagaEvent::CompensationStarted { member, error }, Open) if known(member) => {
                self.failure = Some((*member, error.clone()));
                Compensating
            }
            (SagaEvent::Compensated { step }, Compensating) if Some(*step) == next => {
                self.steps[*step as usize].state = StepState::Compensated;
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
            (SagaEvent::Retried { .. }, Stuck | Compensating) => {
                if let Some(step) = next.and_then(|step| self.steps.get_mut(step as usize)) {
                    (step.attempts, step.due_ms) = (0, 0);
                }
                Compensating
            }
            (SagaEvent::Skipped { step, .. }, Stuck | Compensating) if Some(*step) == next => {
                self.steps[*step as usize].state = StepState::Skipped;
                Compensating
            }
            (SagaEvent::Resolved { .. }, Stuck | Compensating) => Resolved,
            (SagaEvent::Ended, Compensating) if next.is_none() => Compensated,
            (event, state) => return Err(IllegalSagaEvent { state: state.name(), event: event.name() }),
        };
        self.state = state;
        self.events += 1;
        self.changed_ms = entry.at_ms;
        Ok(())
    }

    /// Returns the step to compensate next: the last one that is neither compensated nor settled.
    pub fn next_step(&self) -> Option<(u32, &Step)> {
        let mut open = (0..).zip(&self.steps).filter(|(_, step)| step.state == StepState::Registered);
        if fault::mutated("undo-in-forward-order") { open.next() } else { open.last() }
    }

    /// Returns `true` if a step of the member is compensated.
    pub(crate) fn has_compensated(&self, member: u32) -> bool {
        self.steps.iter().any(|step| step.member == member && step.state == StepState::Compensated)
    }

    fn reopen(&mut self, member: u32) {
        let compensated = |step: &&mut Step| step.member == member && step.state == StepState::Compensated;
        for step in self.steps.iter_mut().filter(compensated) {
            (step.state, step.attempts, step.due_ms) = (StepState::Registered, 0, 0);
            step.reopened += 1;
        }
    }

    /// Returns the index of the message `message_key` among the members.
    pub fn member(&self, message_key: &RecordKey) -> Option<u32> {
        self.members.iter().position(|member| member.message_key == *message_key).map(|index| index as u32)
    }

    /// Returns the member that failed for good.
    pub fn failed(&self) -> Option<&Member> {
        self.members.get(self.failure.as_ref()?.0 as usize)
    }

    /// Returns `true` if a failure of one of the saga's messages causes a compensation.
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
