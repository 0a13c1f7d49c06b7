//! Calls to the outside, for one processor: what it was granted, where the granted names lead, and
//! the call itself. Keeps no answer and repeats nothing: both are the pipeline's.

mod address;
mod client;
mod grant;
mod secrets;

pub use client::{HttpOutside, OutsideLimits, Resolve, SystemResolver};
pub use grant::{Grant, NotAGrant};
pub use secrets::{Secret, Secrets};
