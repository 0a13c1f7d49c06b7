//! The real binary: commands, HTTP, batches; and the documents, which run.
#![expect(clippy::unwrap_used, reason = "tests")]

mod batches;
mod build;
mod commands;
mod docs;
mod http;
mod outbox;
mod promises;
