//! Tasks beside the pipeline: the source loop, deferred messages, compensations, the outbox relay,
//! retention.

pub(crate) mod abandoned;
pub(crate) mod compensator;
pub(crate) mod deferred;
pub(crate) mod outbox_relay;
pub(crate) mod source;
pub(crate) mod sweeper;
