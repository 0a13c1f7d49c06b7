//! Sagas: steps, compensations, claims, locks, outbound calls.
#![expect(clippy::unwrap_used, reason = "tests")]

mod claims;
mod crash;
mod guests;
mod locks;
mod operator;
mod outbound;
mod steps;
