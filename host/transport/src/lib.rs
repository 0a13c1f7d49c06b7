//! Sources and publishers: files of CloudEvents, HTTP. The only user of wire formats; decides nothing about messages.

pub mod binary;
pub mod cloudevents;
mod http_answer;
mod http_batch;
mod http_operator;
mod http_server;
mod http_status;
mod jsonl;
mod operations;
mod operator_client;
pub mod outside;
mod publish_http;
mod publish_jsonl;

pub use http_answer::Answer;
pub use http_operator::operator_router;
pub use http_server::{HttpLimits, Ingress, router};
pub use http_status::{StatusSource, get, status_router};
pub use jsonl::JsonlSource;
pub use operations::{
    Ask, AuditFilter, Chosen, FeedPage, LetterFilter, Operations, RecordFilter, Refusal, SagaFilter, SagaStateName,
    SagaVerb, StandingName,
};
pub use operator_client::{AskError, OperatorClient};
pub use publish_http::{HttpAnswer, HttpPublisher};
pub use publish_jsonl::JsonlPublisher;
