//! Publishers: where outbox messages go.

pub(crate) mod http;
pub(crate) mod jsonl;
