//! Sagas: steps, compensations, claims, locks, outbound calls.
#![expect(clippy::unwrap_used, reason = "tests")]

mod abandoned;
mod claims;
mod crash;
mod guests;
mod in_flight;
mod locks;
mod operator;
mod outbound;
mod steps;
