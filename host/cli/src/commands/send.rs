//! `hapax send`: sends messages to a running host over HTTP.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::{Message, Received, Source as _};
use hapax_transport::{HttpPublisher, JsonlSource};
use serde_json::{Value, json};

use crate::config;
use crate::exit::{Failed, INVALID_INPUT, SUCCESS};
use crate::host;
use crate::output::{line, note};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    processor: String,
    /// Address of the running host.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    host: String,
    /// File of messages to send instead of one message, one CloudEvent in JSON on each line; `-` is
    /// standard input.
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["id", "data"])]
    input: Option<PathBuf>,
    /// Id of the message.
    #[arg(long, required_unless_present = "input")]
    id: Option<String>,
    /// Source of the message.
    #[arg(long, default_value = "/hapax-send")]
    source: String,
    /// Type of the message.
    #[arg(long = "type", default_value = "message")]
    kind: String,
    /// Payload of the message, JSON.
    #[arg(long, default_value = "null")]
    data: String,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    host::block_on(send(args, json))
}

async fn send(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let url = format!("{}/v1/processors/{}/messages", args.host.trim_end_matches('/'), args.processor);
    let publisher = HttpPublisher::new(&url).map_err(|error| Failed::usage(error.to_string()))?;
    let mut refused = false;
    let Some(input) = &args.input else {
        serde_json::from_str::<Value>(&args.data)
            .map_err(|error| Failed::usage(format!("--data is not JSON: {error}")))?;
        let message = Message::new(args.id.clone().unwrap_or_default(), &*args.source, &*args.kind)
            .with_data("application/json", args.data.clone());
        let accepted = post(&publisher, &message, json).await?;
        return Ok(ExitCode::from(if accepted { SUCCESS } else { INVALID_INPUT }));
    };
    let mut source = JsonlSource::open(input, config::default_max_message_bytes())
        .map_err(|error| Failed::usage(format!("cannot read the input {}: {error}", input.display())))?;
    while let Some(received) = source.recv().await? {
        refused |= match received {
            Received::Delivery(delivery) => !post(&publisher, delivery.message(), json).await?,
            Received::Invalid { position, reason } => {
                note(&format!("{position}: {reason}"));
                true
            }
        };
    }
    Ok(ExitCode::from(if refused { INVALID_INPUT } else { SUCCESS }))
}

/// Posts one message and prints the answer. Returns true if the host accepted the message.
async fn post(publisher: &HttpPublisher, message: &Message, json: bool) -> anyhow::Result<bool> {
    let answer = publisher.post(message).await.map_err(Failed::no_answer)?;
    let body = String::from_utf8_lossy(&answer.body);
    if json {
        let body: Value = serde_json::from_str(&body).unwrap_or_else(|_| json!(body));
        let line_of = json!({ "id": message.id, "status": answer.status, "replayed": answer.replayed, "body": body });
        line(&line_of.to_string());
    } else {
        line(&format!("{} {}{} {body}", message.id, answer.status, if answer.replayed { " replayed" } else { "" }));
    }
    Ok((200..300).contains(&answer.status))
}
