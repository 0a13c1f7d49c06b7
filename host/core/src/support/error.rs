//! The failure of a store. It stands at the bottom, since whatever reads or writes can meet it.

use std::sync::Arc;

/// A store failed. None of these is about one message: the host stops taking deliveries.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing failed; whether the last group is durable is not known.
    #[error("the store failed: {0}")]
    Io(Arc<str>),
    /// No room left.
    #[error("the store's disk is full: {0}. Free some space and start again; nothing acknowledged is lost")]
    Full(Arc<str>),
    /// What was read is not what was written.
    #[error("the store is damaged: {0}")]
    Damaged(Arc<str>),
    /// An earlier failure closed the store; start again to go on.
    #[error("the store was closed by an earlier failure: {0}")]
    Closed(Arc<str>),
}
