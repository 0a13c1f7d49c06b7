//! Publishers: where outbox messages go.

mod file_end;
pub(crate) mod http;
pub(crate) mod jsonl;
