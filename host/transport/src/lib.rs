//! Sources and publishers: files of CloudEvents, HTTP. The only user of wire formats; decides
//! nothing about messages.

pub mod cloudevents;
mod http;
mod operator;
pub mod outbound;
mod publisher;
mod source;

pub use http::ingress::{HttpLimits, Ingress, router};
pub use http::operator::operator_router;
pub use http::response::Answer;
pub use http::status::{StatusSource, get, status_router};
pub use operator::client::{AskError, OperatorClient};
pub use operator::request::{
    AuditFilter, EntryFilter, FeedPage, HeldFilter, Operations, OperatorRequest, RecordFilter, RequestError,
    SagaFilter, Selection,
};
pub use publisher::http::{HttpAnswer, HttpPublisher};
pub use publisher::jsonl::{JsonlPublisher, Reopen};
pub use source::jsonl::JsonlSource;
