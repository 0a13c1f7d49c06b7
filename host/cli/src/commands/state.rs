//! `hapax state`: prints a processor's state, from a store or from a running host.

use std::process::ExitCode;

use hapax_transport::{EntryFilter, OperatorRequest};
use serde_json::Value;

use crate::commands::target::Target;
use crate::output::{columns, line};

/// Entries asked for at one time.
const PAGE: usize = 1_000;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List a processor's keys and values in the order of the keys.
    List(Args),
    /// Print the value of a key; without a key, list all keys and values.
    Get(Args),
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    processor: String,
    /// Key of the value; for `list`, the prefix of the keys.
    key: Option<String>,
    /// List at most this many entries.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    limit: usize,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    let (args, get) = match command {
        Command::List(args) => (args, false),
        Command::Get(args) => (args, true),
    };
    match &args.key {
        Some(key) if get => {
            let entry = args.target.ask(OperatorRequest::StateValue(args.processor.clone(), key.clone()))?;
            line(&if json { entry.to_string() } else { text(&entry["value"]) });
        }
        prefix => list(&args, prefix.clone(), json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(args: &Args, prefix: Option<String>, json: bool) -> anyhow::Result<()> {
    let mut filter = EntryFilter { prefix, ..EntryFilter::default() };
    let mut left = args.limit;
    while left > 0 {
        filter.limit = Some(left.min(PAGE));
        let page = args.target.ask(OperatorRequest::State(args.processor.clone(), filter.clone()))?;
        let entries = page["entries"].as_array().map(Vec::as_slice).unwrap_or_default();
        for entry in entries {
            let key = entry["key"].as_str().unwrap_or_default();
            if json {
                line(&entry.to_string());
            } else {
                columns(&[key, &text(&entry["value"])]);
            }
        }
        left -= entries.len().min(left);
        let Some(next) = page["next"].as_str() else { break };
        filter.after = Some(next.to_owned());
    }
    Ok(())
}

/// Returns a value as text. A value that is not UTF-8 comes as its bytes.
fn text(value: &Value) -> String {
    match value {
        Value::Array(bytes) => {
            let bytes: Vec<u8> = bytes.iter().filter_map(|byte| byte.as_u64()?.try_into().ok()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
        text => text.as_str().unwrap_or_default().to_owned(),
    }
}
