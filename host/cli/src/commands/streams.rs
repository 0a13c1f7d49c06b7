//! `hapax streams`: prints a processor's event streams, from a store or from a running host.

use std::process::ExitCode;

use hapax_transport::{EntryFilter, OperatorRequest};
use serde_json::Value;

use crate::commands::target::Target;
use crate::output::{columns, line};

/// Events and streams asked for at one time.
const PAGE: usize = 1_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    #[arg(long, value_name = "NAME")]
    processor: String,
    /// Name of the stream; without it, list the processor's streams with their versions.
    stream: Option<String>,
    /// Start after this version of the stream.
    #[arg(long, value_name = "VERSION", default_value_t = 0)]
    after: u64,
    /// List at most this many events or streams.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    limit: usize,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn command(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    let mut filter = EntryFilter::default();
    if args.stream.is_some() && args.after > 0 {
        filter.after = Some(args.after.to_string());
    }
    let mut left = args.limit;
    while left > 0 {
        filter.limit = Some(left.min(PAGE));
        let (processor, filter_now) = (args.processor.clone(), filter.clone());
        let (request, member) = match &args.stream {
            Some(stream) => (OperatorRequest::StreamEvents(processor, stream.clone(), filter_now), "events"),
            None => (OperatorRequest::Streams(processor, filter_now), "streams"),
        };
        let page = args.target.ask(request)?;
        let items = page[member].as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().for_each(|item| if json { line(&item.to_string()) } else { print(item) });
        left -= items.len().min(left);
        let Some(next) = page["next"].as_str() else { break };
        filter.after = Some(next.to_owned());
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a stream, or an event of one, for people.
fn print(item: &Value) {
    let text = |name: &&str| match &item[*name] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let names: &[&str] =
        if item.get("stream").is_some() { &["stream", "version"] } else { &["version", "id", "type", "data"] };
    let texts: Vec<_> = names.iter().map(text).collect();
    columns(&texts.iter().map(String::as_str).collect::<Vec<_>>());
}
