//! One run of a message: the processor, its context, and what it makes durable before it ends.

pub(crate) mod answer_journal;
pub(crate) mod checkpoint;
pub(crate) mod context;
pub(crate) mod event_stream;
pub(crate) mod failure;
pub(crate) mod lock;
pub(crate) mod outbound;
pub(crate) mod outbound_call;
pub(crate) mod processor;
pub(crate) mod saga_steps;
