//! Sources and publishers: files of CloudEvents, HTTP. The only user of wire formats; decides nothing about messages.

pub mod binary;
pub mod cloudevents;
mod http_answer;
mod http_batch;
mod http_server;
mod jsonl;
mod publish_http;
mod publish_jsonl;

pub use http_answer::Answer;
pub use http_server::{HttpLimits, Ingress, router};
pub use jsonl::JsonlSource;
pub use publish_http::{HttpAnswer, HttpPublisher};
pub use publish_jsonl::JsonlPublisher;
