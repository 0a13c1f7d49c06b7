//! Operators: held messages, redrives, records, audit, status.
#![expect(clippy::unwrap_used, reason = "tests")]

mod reads;
mod redrive;
mod redriven;
mod requests;
mod status;
