//! Requests of operators to a host, and a client that sends them.

pub(crate) mod client;
pub(crate) mod request;
