//! The host dies at every moment, by signal, by power loss, by a message that kills it; and what is
//! there afterwards.
#![expect(clippy::unwrap_used, reason = "tests")]

mod damage;
mod deaths;
mod kill;
mod power;
mod recovery;
mod suspects;
