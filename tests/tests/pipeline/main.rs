//! The pipeline over every store: deliveries, strategies, retries, retention, feed, event streams.
#![expect(clippy::unwrap_used, reason = "tests")]

mod circuit_breaker;
mod deliveries;
mod event_streams;
mod feed;
mod identity;
mod order;
mod outbox;
mod retention;
mod retry;
mod stores;
mod strategies;
mod transport_conformance;
