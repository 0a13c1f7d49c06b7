//! The failure of a store. It is in the lowest folder, since all code that reads or writes can meet
//! it.

use std::sync::Arc;

/// Failure of a store. None of these is about one message: the host stops taking deliveries.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing failed; it is unknown if the last group is durable.
    #[error("the store failed: {0}")]
    Io(Arc<str>),
    /// No room left.
    #[error("the store's disk is full: {0}. Free some space and start again; nothing acknowledged is lost")]
    Full(Arc<str>),
    /// The store read other bytes than it wrote.
    #[error("the store is damaged: {0}")]
    Damaged(Arc<str>),
    /// An earlier failure closed the store; restart the host to continue.
    #[error("the store was closed by an earlier failure: {0}")]
    Closed(Arc<str>),
}
