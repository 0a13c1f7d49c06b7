//! A held message: the store holds it because it failed for good, or because it waits to run.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Identity;
use crate::message::identity::{HeldKey, Position};
use crate::message::key::RecordKey;

/// Message that the store holds: it failed for good and an operator decides, or it waits to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldMessage {
    /// The message, as received.
    pub message: Message,
    /// Fingerprint of the message: with the record's key it names the held message, so that a
    /// mismatch keeps both bodies.
    pub fingerprint: Fingerprint,
    /// Position of the message among those of its record.
    pub position: Option<Position>,
    /// Reason why the message is held.
    pub hold_reason: HoldReason,
    /// Last error of the message.
    pub error: String,
    /// Attempts made.
    pub attempts: u32,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// Time at which it was held, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// Reason why a message is held: what it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HoldReason {
    /// Waits for an operator: it failed for good.
    Dead,
    /// Waits for the host to run it again.
    Redriven,
    /// Waits for its predecessor.
    Parked {
        /// Awaited version.
        awaits: u64,
        /// End of the wait, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
}

/// Kind of a hold reason, by name: what lists are filtered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HoldKind {
    /// See [`HoldReason::Dead`].
    Dead,
    /// See [`HoldReason::Parked`].
    Parked,
    /// See [`HoldReason::Redriven`].
    Redriven,
}

impl HoldKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Dead, Self::Parked, Self::Redriven];

    /// Returns the kind's name, as the command line and the API print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Parked => "parked",
            Self::Redriven => "redriven",
        }
    }
}

impl HoldReason {
    /// Returns the reason's kind.
    pub fn kind(&self) -> HoldKind {
        match self {
            Self::Dead => HoldKind::Dead,
            Self::Parked { .. } => HoldKind::Parked,
            Self::Redriven => HoldKind::Redriven,
        }
    }
}

impl HeldMessage {
    /// Returns the key under which the store holds the message of `record`.
    pub fn key(&self, record: &RecordKey) -> HeldKey {
        HeldKey { record: record.clone(), fingerprint: self.fingerprint.digest }
    }

    /// Returns the message's identity as far as its position goes: the key of its record is taken
    /// as its own key.
    pub(crate) fn identity(&self, key: &HeldKey) -> Identity {
        let record = key.record.clone();
        Identity { message_key: record.clone(), record, fingerprint: self.fingerprint, position: self.position.clone() }
    }
}
