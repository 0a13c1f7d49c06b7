//! What an operator can ask of a host: the request, and a client that sends it.

pub(crate) mod client;
pub(crate) mod request;
