//! The deduplication record and its state machine: pure functions, no clock, no store.

pub(crate) mod history;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Position;
use crate::message::key::RecordKey;
use crate::support::fault;
use bytes::Bytes;

/// Difference between clocks that is taken for an ordinary one, in milliseconds. A time further
/// ahead was written by a clock that was wrong.
pub(crate) const CLOCK_SKEW_MS: u64 = 60_000;

/// Answer of a completed message; stored, and replayed byte for byte to duplicates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Media type of `data`.
    pub content_type: Option<String>,
    /// The answer's bytes.
    pub data: Bytes,
}

/// Deduplication record of one idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// State of the message.
    pub state: RecordState,
    /// Epoch, which grows with every claim and every attempt; only the owner of the current epoch
    /// may change the record.
    pub epoch: u64,
    /// Attempts made since the message was received, or redriven.
    pub attempts: u32,
    /// Fingerprint of the first delivery.
    pub fingerprint: Fingerprint,
    /// Position of the record's message, if messages have positions: the last one that was seen.
    pub position: Option<Position>,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// Saga that the record belongs to.
    pub saga: Option<String>,
    /// Time of first receipt, in milliseconds since the Unix epoch.
    pub received_ms: u64,
    /// Time of the last change, in milliseconds since the Unix epoch.
    pub changed_ms: u64,
    /// Time after which the record may be removed, in milliseconds since the Unix epoch; `None`:
    /// never.
    pub expires_ms: Option<u64>,
    /// Events of the record's message so far, oldest first, without its completion, which the state
    /// tells. See [`record_history`](crate::record_history).
    pub history: Vec<HistoryEntry>,
}

/// Entry of a record's history: one event, and the record's fields after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The event.
    pub event: RecordEvent,
    /// Time of the event, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Epoch of the record after the event.
    pub epoch: u64,
    /// Attempts of the record after the event.
    pub attempts: u32,
    /// Digest of the component that ran the message.
    pub component: Arc<str>,
    /// Time after which the record may be removed, in milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
}

/// States of a record; each says what a duplicate gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordState {
    /// Claimed; a duplicate waits. After the lease's end another owner may take it over.
    InProgress {
        /// Owner of the claim.
        owner: String,
        /// End of the lease, in milliseconds since the Unix epoch.
        lease_end_ms: u64,
    },
    /// Completed; a duplicate is acknowledged and gets the stored result.
    Completed {
        /// The stored result.
        output: Output,
    },
    /// Failed, and due again; a duplicate is deferred until then.
    RetryDue {
        /// The last error.
        error: String,
        /// Time at which the next attempt is due, in milliseconds since the Unix epoch.
        at_ms: u64,
    },
    /// Failed for good; a duplicate is acknowledged and gets the stored error.
    DeadLettered {
        /// The last error.
        error: String,
    },
    /// Being compensated; a duplicate waits, and the message never runs again.
    Compensating {
        /// Reason for the compensation.
        error: String,
    },
    /// Compensated; a duplicate is acknowledged and gets the failure.
    Compensated {
        /// Reason for the compensation.
        error: String,
    },
    /// Could not be compensated: an operator decides. Never expires.
    CompensationFailed {
        /// Reason for the compensation.
        error: String,
    },
}

/// Event that changes a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordEvent {
    /// An owner takes or extends its claim.
    Claimed {
        /// Owner of the claim.
        owner: String,
        /// Current time, in milliseconds since the Unix epoch.
        now_ms: u64,
        /// End of the new lease, in milliseconds since the Unix epoch.
        lease_end_ms: u64,
    },
    /// An attempt completed.
    Completed(Output),
    /// An attempt failed and another is due.
    Failed {
        /// Error of the attempt.
        error: String,
        /// Time at which the next attempt is due, in milliseconds since the Unix epoch.
        retry_at_ms: u64,
    },
    /// The message failed for good, with nothing to compensate.
    GivenUp {
        /// Error of the message.
        error: String,
    },
    /// The message failed for good, with steps to compensate.
    CompensationStarted {
        /// Error of the message.
        error: String,
    },
    /// Every step is compensated.
    CompensationDone,
    /// A step cannot be compensated.
    CompensationGivenUp,
    /// An operator runs a dead letter again.
    Redriven {
        /// Time at which it is due, in milliseconds since the Unix epoch.
        at_ms: u64,
    },
    /// An operator runs a failed compensation again.
    CompensationRetried,
    /// An operator settled a failed compensation by hand.
    CompensationResolved,
}

impl RecordEvent {
    /// Returns the event's name, as the command line and the API print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Claimed { .. } => "claimed",
            Self::Completed(_) => "completed",
            Self::Failed { .. } => "failed",
            Self::GivenUp { .. } => "dead-lettered",
            Self::CompensationStarted { .. } => "compensation-started",
            Self::CompensationDone => "compensated",
            Self::CompensationGivenUp => "compensation-failed",
            Self::Redriven { .. } => "redriven",
            Self::CompensationRetried => "compensation-retried",
            Self::CompensationResolved => "compensation-resolved",
        }
    }
}

/// The event cannot happen in this state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a record that is {state} cannot take {event:?}")]
pub struct IllegalRecordEvent {
    state: &'static str,
    event: RecordEvent,
}

impl Record {
    /// Returns `true` if this is the record of the message whose own key is `message_key`, and not
    /// of another message of the entity. `record` is the key of the record.
    pub(crate) fn is_of(&self, record: &RecordKey, message_key: &RecordKey) -> bool {
        fault::mutated("saga-touches-any-record")
            || match &self.position {
                None => record == message_key,
                Some(position) => position.message_key(record) == *message_key,
            }
    }

    /// Returns the time at which the next attempt is due, in milliseconds since the Unix epoch; 0
    /// if none is awaited. `longest_ms`: the longest delay by the policy. A time that was written
    /// by a clock that was ahead, or under another policy, does not hold the message up.
    pub(crate) fn due_ms(&self, now_ms: u64, longest_ms: u64) -> u64 {
        match &self.state {
            RecordState::RetryDue { at_ms, .. } if fault::mutated("due-times-believed") => *at_ms,
            RecordState::RetryDue { .. } if self.is_from_the_future(now_ms) => 0,
            RecordState::RetryDue { at_ms, .. } => (*at_ms).min(self.changed_ms.saturating_add(longest_ms)),
            _ => 0,
        }
    }

    /// Returns the time for which an owner other than `owner` holds a live claim, in milliseconds.
    /// `lease_ms`: the duration of a claim.
    pub(crate) fn claimed_by_another_ms(&self, owner: &str, now_ms: u64, lease_ms: u64) -> Option<u64> {
        let RecordState::InProgress { owner: holder, lease_end_ms } = &self.state else { return None };
        let ahead = self.changed_ms > now_ms.saturating_add(lease_ms.saturating_add(CLOCK_SKEW_MS));
        let ahead = ahead && !fault::mutated("due-times-believed");
        (holder != owner && *lease_end_ms > now_ms && !ahead).then(|| lease_end_ms - now_ms)
    }

    /// Returns whether the record was written by a clock that was ahead of today's.
    fn is_from_the_future(&self, now_ms: u64) -> bool {
        self.changed_ms > now_ms.saturating_add(CLOCK_SKEW_MS)
    }

    /// Returns `true` if its retention is over: a message under its key counts as new.
    pub fn has_expired(&self, now_ms: u64) -> bool {
        let over = |expires_ms| expires_ms <= now_ms || fault::mutated("record-expires-at-once");
        self.state.is_terminal() && self.expires_ms.is_some_and(over)
    }
}

impl RecordState {
    /// Returns the state's name, as the command line and the API print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InProgress { .. } => "in-progress",
            Self::Completed { .. } => "completed",
            Self::RetryDue { .. } => "retry-due",
            Self::DeadLettered { .. } => "dead-lettered",
            Self::Compensating { .. } => "compensating",
            Self::Compensated { .. } => "compensated",
            Self::CompensationFailed { .. } => "compensation-failed",
        }
    }

    /// Returns `true` if no run of the message follows: it has ended, or is being compensated.
    pub(crate) fn has_ended(&self) -> bool {
        !matches!(self, Self::InProgress { .. } | Self::RetryDue { .. })
    }

    /// Returns `true` if the message has ended: its record may be cached, and it may expire.
    pub fn is_terminal(&self) -> bool {
        let open = matches!(self, Self::RetryDue { .. }) && fault::mutated("open-counts-as-ended");
        open || matches!(self, Self::Completed { .. } | Self::DeadLettered { .. } | Self::Compensated { .. })
    }

    /// Returns the error of a message that failed.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::RetryDue { error, .. }
            | Self::DeadLettered { error }
            | Self::Compensating { error }
            | Self::Compensated { error }
            | Self::CompensationFailed { error } => Some(error),
            Self::InProgress { .. } | Self::Completed { .. } => None,
        }
    }
}

/// Returns the state after `event`; `state` is `None` where there is no record yet.
///
/// The table is that of the design; an event that is not in it is illegal.
pub fn next_state(state: Option<&RecordState>, event: RecordEvent) -> Result<RecordState, IllegalRecordEvent> {
    use RecordState::{Compensated, Compensating, CompensationFailed, Completed, DeadLettered, InProgress, RetryDue};
    // An attempt may end where no claim is durable: a purely transactional processor needs one
    // commit only.
    let running = matches!(state, None | Some(InProgress { .. } | RetryDue { .. }));
    let next = match (state, &event) {
        (None | Some(RetryDue { .. }), RecordEvent::Claimed { owner, lease_end_ms, .. }) => {
            InProgress { owner: owner.clone(), lease_end_ms: *lease_end_ms }
        }
        (
            Some(InProgress { owner: current, lease_end_ms: end }),
            RecordEvent::Claimed { owner, now_ms, lease_end_ms },
        ) if current == owner || end <= now_ms => InProgress { owner: owner.clone(), lease_end_ms: *lease_end_ms },
        (_, RecordEvent::Completed(output)) if running => Completed { output: output.clone() },
        (_, RecordEvent::Failed { error, retry_at_ms }) if running => {
            RetryDue { error: error.clone(), at_ms: *retry_at_ms }
        }
        (_, RecordEvent::GivenUp { error }) if running => DeadLettered { error: error.clone() },
        (_, RecordEvent::CompensationStarted { error }) if running => Compensating { error: error.clone() },
        (Some(Compensating { error }), RecordEvent::CompensationDone) => Compensated { error: error.clone() },
        (Some(Compensating { error }), RecordEvent::CompensationGivenUp) => CompensationFailed { error: error.clone() },
        (Some(DeadLettered { error }), RecordEvent::Redriven { at_ms }) => {
            RetryDue { error: error.clone(), at_ms: *at_ms }
        }
        (Some(CompensationFailed { error }), RecordEvent::CompensationRetried) => Compensating { error: error.clone() },
        (Some(CompensationFailed { error }), RecordEvent::CompensationResolved) => Compensated { error: error.clone() },
        _ => return Err(IllegalRecordEvent { state: state.map_or("absent", RecordState::name), event }),
    };
    Ok(next)
}
