//! The audit trail: one entry an operator action, written in the commit of the action.

use serde::{Deserialize, Serialize};

/// One line of the audit trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Who.
    pub actor: String,
    /// What was done: `redrive`, `discard`, `evict`, `saga-retry`, `saga-skip`, `saga-resolve`.
    pub action: String,
    /// Key of the kept message, of the record, or of the saga.
    pub key: String,
    /// Why.
    pub reason: String,
}
