//! A held message: one that the store keeps because it failed for good, or waits to run.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Identity;
use crate::message::identity::{HeldKey, Position};
use crate::message::key::RecordKey;

/// A message that the store keeps: it failed for good and an operator decides, or it waits to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldMessage {
    /// The message, as received.
    pub message: Message,
    /// Its fingerprint: with the record's key this names the letter, so a mismatch keeps both bodies.
    pub fingerprint: Fingerprint,
    /// Where the message stands among those of its record.
    pub position: Option<Position>,
    /// What it waits for.
    pub hold_reason: HoldReason,
    /// What went wrong.
    pub error: String,
    /// Attempts made.
    pub attempts: u32,
    /// Digest of the component that made the last attempt.
    pub component: Arc<str>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// What a kept message waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HoldReason {
    /// An operator: it failed for good.
    Dead,
    /// The host runs it again.
    Redriven,
    /// The message before it.
    Parked {
        /// The version that is awaited.
        awaits: u64,
        /// When the wait is over, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
}

impl HeldMessage {
    /// What the store knows it by, under `record`.
    pub fn key(&self, record: &RecordKey) -> HeldKey {
        HeldKey { record: record.clone(), fingerprint: self.fingerprint.digest }
    }

    /// Returns the identity of the message as far as its place goes: its own key is taken to be that of its record.
    pub(crate) fn identity(&self, key: &HeldKey) -> Identity {
        let record = key.record.clone();
        Identity { message_key: record.clone(), record, fingerprint: self.fingerprint, position: self.position.clone() }
    }
}
