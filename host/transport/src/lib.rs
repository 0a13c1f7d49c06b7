//! Sources and publishers: files of CloudEvents. The only user of wire formats; decides nothing about messages.

pub mod cloudevents;
mod jsonl;
mod publish_jsonl;

pub use jsonl::JsonlSource;
pub use publish_jsonl::JsonlPublisher;
