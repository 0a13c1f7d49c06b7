//! The audit trail: one entry an operator action, written in the commit of the action.

use serde::{Deserialize, Serialize};

/// One line of the audit trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Time of the action, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Name of the operator.
    pub actor: String,
    /// Name of the action: `redrive`, `discard`, `evict`, `saga-retry`, `saga-skip`,
    /// `saga-resolve`.
    pub action: String,
    /// Key of the held message, of the record, or of the saga.
    pub key: String,
    /// Reason that the operator gave.
    pub reason: String,
}
