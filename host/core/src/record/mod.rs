//! The deduplication record and its state machine: pure functions, no clock, no store.

pub(crate) mod history;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Position;
use crate::support::fault;
use bytes::Bytes;

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
    /// Grows with every claim and every attempt; only the owner of the current epoch may change the record.
    pub epoch: u64,
    /// Attempts made since it was received, or redriven.
    pub attempts: u32,
    /// Fingerprint of the first delivery.
    pub fingerprint: Fingerprint,
    /// Where its message stands, if messages have positions: the last one that was seen.
    pub position: Option<Position>,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// The saga it belongs to.
    pub saga: Option<String>,
    /// First received, in milliseconds since the Unix epoch.
    pub received_ms: u64,
    /// Last changed, in milliseconds since the Unix epoch.
    pub changed_ms: u64,
    /// May be forgotten after this time, in milliseconds since the Unix epoch; `None`: never.
    pub expires_ms: Option<u64>,
    /// What happened to its message so far, oldest first; but for its completion, which the state tells. See
    /// [`crate::record::history`].
    pub history: Vec<HistoryEntry>,
}

/// One thing that happened to a record, with what it left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// What happened.
    pub event: RecordEvent,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The record's epoch from then on.
    pub epoch: u64,
    /// Its attempts.
    pub attempts: u32,
    /// Digest of the component that was at work.
    pub component: Arc<str>,
    /// When it may be forgotten, in milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
}

/// States of a record; each says what a duplicate gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordState {
    /// Claimed; a duplicate waits. After the lease's end another owner may take it over.
    InProgress {
        /// Who claimed it.
        owner: String,
        /// End of the lease, in milliseconds since the Unix epoch.
        lease_end_ms: u64,
    },
    /// Done; a duplicate is acknowledged and gets the stored result.
    Completed {
        /// The stored result.
        output: Output,
    },
    /// Failed, and due again; a duplicate is put off until then.
    RetryDue {
        /// The last error.
        error: String,
        /// When it is due, in milliseconds since the Unix epoch.
        at_ms: u64,
    },
    /// Failed for good; a duplicate is acknowledged and gets the stored error.
    DeadLettered {
        /// The last error.
        error: String,
    },
    /// Being compensated; a duplicate waits, and the message never runs again.
    Compensating {
        /// Why it is undone.
        error: String,
    },
    /// Compensated; a duplicate is acknowledged and gets the failure.
    Compensated {
        /// Why it was undone.
        error: String,
    },
    /// Could not be compensated: an operator decides. Never expires.
    CompensationFailed {
        /// Why it was to be undone.
        error: String,
    },
}

/// Event that changes a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordEvent {
    /// An owner takes or extends its claim.
    Claimed {
        /// Who.
        owner: String,
        /// Now, in milliseconds since the Unix epoch.
        now_ms: u64,
        /// End of the new lease, likewise.
        lease_end_ms: u64,
    },
    /// An attempt ended well.
    Completed(Output),
    /// An attempt failed and another is due.
    Failed {
        /// What went wrong.
        error: String,
        /// When the next attempt is due, in milliseconds since the Unix epoch.
        retry_at_ms: u64,
    },
    /// It failed for good, with nothing to compensate.
    GivenUp {
        /// What went wrong.
        error: String,
    },
    /// It failed for good, with steps to compensate.
    CompensationStarted {
        /// What went wrong.
        error: String,
    },
    /// Every step is compensated.
    CompensationDone,
    /// A step cannot be compensated.
    CompensationGivenUp,
    /// An operator runs a dead letter again.
    Redriven {
        /// When it is due, in milliseconds since the Unix epoch.
        at_ms: u64,
    },
    /// An operator runs a failed compensation again.
    CompensationRetried,
    /// An operator settled a failed compensation by hand.
    CompensationResolved,
}

impl RecordEvent {
    /// The event's name, as the command line and the API print it.
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
    /// Returns `true` if its retention is over: a message under its key counts as new.
    pub fn has_expired(&self, now_ms: u64) -> bool {
        let over = |expires_ms| expires_ms <= now_ms || fault::mutated("record-expires-at-once");
        self.state.is_terminal() && self.expires_ms.is_some_and(over)
    }
}

impl RecordState {
    /// The state's name, as the command line and the API print it.
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

    /// Returns `true` if the message has ended: its record may be cached, and it may expire.
    pub fn is_terminal(&self) -> bool {
        let open = matches!(self, Self::RetryDue { .. }) && fault::mutated("open-counts-as-ended");
        open || matches!(self, Self::Completed { .. } | Self::DeadLettered { .. } | Self::Compensated { .. })
    }

    /// Returns when the next attempt is due, in milliseconds since the Unix epoch; 0 if none is awaited.
    pub(crate) fn due_ms(&self) -> u64 {
        match self {
            Self::RetryDue { at_ms, .. } => *at_ms,
            _ => 0,
        }
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

/// The state after `event`; `state` is `None` where there is no record yet.
///
/// The table is DESIGN's; what is not in it is illegal.
pub fn next_state(state: Option<&RecordState>, event: RecordEvent) -> Result<RecordState, IllegalRecordEvent> {
    use RecordState::{Compensated, Compensating, CompensationFailed, Completed, DeadLettered, InProgress, RetryDue};
    // An attempt may end where none is claimed durably: a purely transactional processor needs one commit only.
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
