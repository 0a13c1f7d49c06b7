//! `hapax dlq`: lists, redrives and discards held messages. Core decides which actions are legal.

use std::process::ExitCode;

use hapax_core::HoldKind;
use hapax_transport::{HeldFilter, OperatorRequest, Selection};
use serde_json::Value;

use crate::commands::audit_args::AuditArgs;
use crate::commands::one_of;
use crate::commands::records;
use crate::commands::target::Target;
use crate::exit::Failed;
use crate::output::line;
use crate::output::list::{print_action, print_list, text, time_or};
use crate::output::time::rfc3339;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List held messages in the order of their keys.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Show one held message: body, attributes, error, attempts, history, and the messages that it
    /// waits for or blocks.
    Show {
        /// Key of the message, as `hapax dlq list` prints it:
        /// tenant/processor/source/key#fingerprint.
        key: String,
        #[command(flatten)]
        target: Target,
    },
    /// Run dead letters again, with all their attempts: at once if a host runs, or at its next
    /// start.
    Redrive(OrderArgs),
    /// Remove held messages. Their records stay: a duplicate still gets the stored error.
    Discard(OrderArgs),
}

#[derive(clap::Args)]
pub(crate) struct Filter {
    /// Select messages of this processor.
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// Select messages of this CloudEvents type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Select messages of this CloudEvents source.
    #[arg(long)]
    source: Option<String>,
    /// Select messages whose error contains this text.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Select messages held since this time: RFC 3339, or a time span before now, such as 2h.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Select messages held before this time, written like --since.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Select messages with this hold reason: `dead` ones wait for an operator, `parked` ones for
    /// the message before them, `redriven` ones run again.
    #[arg(long = "standing", value_name = "REASON", value_parser = one_of(HoldKind::ALL, HoldKind::name))]
    hold_reason: Option<HoldKind>,
    /// Select at most this many messages [default: 1000 to list, 10000 to redrive or discard]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(clap::Args)]
pub(crate) struct OrderArgs {
    /// Key of one message, as `hapax dlq list` prints it.
    #[arg(conflicts_with = "all")]
    key: Option<String>,
    /// Take all messages that the filters select; without `--standing`, only dead ones.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    audit: AuditArgs,
    #[command(flatten)]
    target: Target,
}

impl From<Filter> for HeldFilter {
    fn from(filter: Filter) -> Self {
        let Filter { processor, kind, source, error, since, until, hold_reason, limit } = filter;
        Self { processor, kind, source, error, since, until, hold_reason, limit, after: None }
    }
}

impl OrderArgs {
    fn chosen(self) -> anyhow::Result<(Target, Selection)> {
        let filter = HeldFilter::from(self.filter);
        if self.key.is_none() && !self.all {
            return Err(Failed::usage("name one message by its KEY, or give --all, with or without filters"));
        }
        if self.key.is_some() && filter != HeldFilter::default() {
            return Err(Failed::usage("a KEY names one message: give filters with --all only"));
        }
        let chosen = self.audit.select(self.key.into_iter().collect());
        Ok((self.target, Selection { filter: self.all.then_some(filter), ..chosen }))
    }
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { filter, after, target } => {
            let answer = target.ask(OperatorRequest::Letters(HeldFilter { after, ..filter.into() }))?;
            print_list(&answer, "letters", json, |held_message| {
                let waits = held_message["awaits"].as_u64().map_or_else(String::new, |version| {
                    format!(" (until {})", time_or(&held_message["until_ms"], &format!("version {version}")))
                });
                let (hold_reason, at) =
                    (text(&held_message["standing"]), rfc3339(held_message["at_ms"].as_u64().unwrap_or(0)));
                format!(
                    "{hold_reason:<8} {at:<24} {}: {}{waits}",
                    text(&held_message["key"]),
                    text(&held_message["error"])
                )
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { key, target } => {
            let held_message = target.ask(OperatorRequest::Letter(key))?;
            if json {
                line(&held_message.to_string())
            } else {
                print(&held_message)
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Redrive(action) => {
            let (target, chosen) = action.chosen()?;
            Ok(print_action(&target.ask(OperatorRequest::Redrive(chosen))?, json))
        }
        Command::Discard(action) => {
            let (target, chosen) = action.chosen()?;
            Ok(print_action(&target.ask(OperatorRequest::Discard(chosen))?, json))
        }
    }
}

/// Prints one held message for people.
fn print(held_message: &Value) {
    let show = |name: &str, value: String| line(&format!("{:<12} {value}", format!("{name}:")));
    show("key", text(&held_message["key"]));
    show("standing", text(&held_message["standing"]));
    show("error", text(&held_message["error"]));
    if held_message["awaits"].is_u64() {
        show(
            "waits for",
            format!("version {}, until {}", held_message["awaits"], time_or(&held_message["until_ms"], "?")),
        );
    }
    for (index, behind) in held_message["blocks"].as_array().into_iter().flatten().enumerate() {
        show(if index == 0 { "blocks" } else { "" }, text(behind));
    }
    show("attempts", text(&held_message["attempts"]));
    show("component", text(&held_message["component"]));
    show("held since", time_or(&held_message["at_ms"], "?"));
    for name in ["position", "idempotency_key", "headers"].iter().filter(|name| !held_message[**name].is_null()) {
        show(name, text(&held_message[*name]));
    }
    for (name, value) in held_message["attributes"].as_object().into_iter().flatten() {
        show(name, text(value));
    }
    for name in ["data", "data_base64"].iter().filter(|name| !held_message[**name].is_null()) {
        show(name, text(&held_message[*name]));
    }
    match held_message["state"].as_str() {
        Some(state) => show("record", format!("{state}, {}", text(&held_message["record"]))),
        None => show("record", "none".to_owned()),
    }
    held_message["history"].as_array().into_iter().flatten().for_each(|event| line(&records::event_line(event)));
}
