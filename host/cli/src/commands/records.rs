//! `hapax records`: deduplication records, for people. Asks and prints.

use std::process::ExitCode;

use hapax_transport::{OperatorRequest, RecordFilter};
use serde_json::Value;

use crate::commands::audit_args::AuditArgs;
use crate::commands::target::Target;
use crate::exit::DAMAGED;
use crate::output::line;
use crate::output::list::{print_action, print_list, text};
use crate::output::time::rfc3339;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List records in the order of their keys.
    List {
        /// Only this processor's.
        #[arg(long, value_name = "NAME")]
        processor: Option<String>,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<String>,
        /// Records to list, at most.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: usize,
        #[command(flatten)]
        place: Target,
    },
    /// Show one record, and its dead letters.
    Show(One),
    /// What happened to a record, oldest first, and whether it can be made again from that.
    History(One),
    /// Forget a record before its time: a message under its key counts as new, and runs again.
    Evict {
        /// The key, as `list` prints it.
        key: String,
        #[command(flatten)]
        audit: AuditArgs,
        #[command(flatten)]
        place: Target,
    },
}

#[derive(clap::Args)]
pub(crate) struct One {
    /// The key: tenant/processor/source/key, with `/` inside a part as %2F.
    key: String,
    #[command(flatten)]
    place: Target,
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { processor, after, limit, place } => {
            let answer = place.ask(OperatorRequest::Records(RecordFilter { processor, after, limit: Some(limit) }))?;
            let as_line = |record: &Value| format!("{:<13} {}", text(&record["state"]), text(&record["key"]));
            print_list(&answer, "records", json, as_line);
            Ok(ExitCode::SUCCESS)
        }
        Command::Show(One { key, place }) => {
            let record = place.ask(OperatorRequest::Record(key))?;
            line(&if json { record.to_string() } else { serde_json::to_string_pretty(&record)? });
            Ok(ExitCode::SUCCESS)
        }
        Command::History(One { key, place }) => Ok(print_history(&place.ask(OperatorRequest::History(key))?, json)),
        Command::Evict { key, audit, place } => {
            Ok(print_action(&place.ask(OperatorRequest::Evict(audit.select(vec![key])))?, json))
        }
    }
}

/// The events, and whether they make the record; fails if they do not.
fn print_history(answer: &Value, json: bool) -> ExitCode {
    let rebuilt = answer["rebuilt"].as_bool();
    if json {
        line(&answer.to_string());
    } else {
        answer["events"].as_array().into_iter().flatten().for_each(|event| line(&event_line(event)));
        line(match rebuilt {
            Some(true) => "rebuilt from these events, the record is the one that is stored",
            Some(false) => "DAMAGED: rebuilt from these events, the record is another one than is stored",
            None => "there is no record any more",
        });
    }
    if rebuilt == Some(false) { ExitCode::from(DAMAGED) } else { ExitCode::SUCCESS }
}

/// One event of a record's history.
pub(crate) fn event_line(event: &Value) -> String {
    let at = rfc3339(event["at_ms"].as_u64().unwrap_or(0));
    let mut said = format!("{at:<24} {}", text(&event["event"]));
    if let Some(attempts) = event["attempts"].as_u64().filter(|attempts| *attempts > 0) {
        said += &format!(", attempt {attempts}");
    }
    for name in ["position", "error", "result"].iter().filter(|name| !event[**name].is_null()) {
        said += &format!(", {name}: {}", text(&event[*name]));
    }
    if let Some(retry_at_ms) = event["retry_at_ms"].as_u64() {
        said += &format!(", due again {}", rfc3339(retry_at_ms));
    }
    said
}
