//! HTTP: the ingress for messages, and the routes for operators.

pub(crate) mod batch;
pub(crate) mod ingress;
pub(crate) mod operator;
pub(crate) mod response;
pub(crate) mod status;
