//! `hapax records`: lists deduplication records, shows their history, and evicts them.

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
        /// List only records of this processor.
        #[arg(long, value_name = "NAME")]
        processor: Option<String>,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<String>,
        /// List only unfinished messages whose time is over, the oldest first: a retry that is due,
        /// or a claim that has ended, and no delivery has come since.
        #[arg(long, conflicts_with = "after")]
        overdue: bool,
        /// List at most this many records.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: usize,
        #[command(flatten)]
        target: Target,
    },
    /// Show one record, with its held messages.
    Show(One),
    /// Show the events of a record, oldest first, and check that the record follows from them.
    History(One),
    /// Give up an unfinished message that will not be delivered again: its steps are compensated,
    /// or it becomes a dead letter.
    GiveUp {
        /// Key of the record, as `hapax records list --overdue` prints it.
        key: String,
        #[command(flatten)]
        audit: AuditArgs,
        #[command(flatten)]
        target: Target,
    },
    /// Remove a record before it expires: a message under its key then counts as new, and runs
    /// again.
    Evict {
        /// Key of the record, as `hapax records list` prints it.
        key: String,
        #[command(flatten)]
        audit: AuditArgs,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(clap::Args)]
pub(crate) struct One {
    /// Key of the record: tenant/processor/source/key, with `/` inside a part as %2F.
    key: String,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { processor, after, overdue, limit, target } => {
            let filter = RecordFilter { processor, after, overdue, limit: Some(limit) };
            let answer = target.ask(OperatorRequest::Records(filter))?;
            let as_line = |record: &Value| format!("{:<13} {}", text(&record["state"]), text(&record["key"]));
            print_list(&answer, "records", json, as_line);
            Ok(ExitCode::SUCCESS)
        }
        Command::Show(One { key, target }) => {
            let record = target.ask(OperatorRequest::Record(key))?;
            if json {
                line(&record.to_string());
            } else {
                serde_json::to_string_pretty(&record)?.lines().for_each(line);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::History(One { key, target }) => Ok(print_history(&target.ask(OperatorRequest::History(key))?, json)),
        Command::GiveUp { key, audit, target } => {
            Ok(print_action(&target.ask(OperatorRequest::GiveUp(audit.select(vec![key])))?, json))
        }
        Command::Evict { key, audit, target } => {
            Ok(print_action(&target.ask(OperatorRequest::Evict(audit.select(vec![key])))?, json))
        }
    }
}

/// Prints the events; returns [`DAMAGED`] if the stored record does not follow from them.
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

/// Returns one event of a record's history as a line.
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
