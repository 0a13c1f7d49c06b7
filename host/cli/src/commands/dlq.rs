//! `hapax dlq`: messages that failed for good, and those that wait. Asks and prints; what may be done is core's to say.

use std::process::ExitCode;

use hapax_transport::{HeldFilter, OperatorRequest, Selection, StandingName};
use serde_json::Value;

use crate::commands::audit_args::AuditArgs;
use crate::commands::records;
use crate::commands::target::Target;
use crate::exit::Failed;
use crate::output::line;
use crate::output::list::{print_action, print_list, text, time_or};
use crate::output::time::rfc3339;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List kept messages in the order of their keys.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<String>,
        #[command(flatten)]
        place: Target,
    },
    /// Show one: body, attributes, error, attempts, history, what it waits for and what it blocks.
    Show {
        /// The key: tenant/processor/source/key#fingerprint, as `list` prints it.
        key: String,
        #[command(flatten)]
        place: Target,
    },
    /// Run dead letters again, with all their attempts before them: at once where the host runs, else when it is started.
    Redrive(OrderArgs),
    /// Forget kept messages. Their records stay: a duplicate still gets the stored error.
    Discard(OrderArgs),
}

#[derive(clap::Args)]
pub(crate) struct Filter {
    /// Only this processor's.
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// Only of this type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only from this source.
    #[arg(long)]
    source: Option<String>,
    /// Only those whose error contains this text.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only those kept since then: RFC 3339, or how long ago, such as 2h.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only those kept before then, likewise.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only those that wait for this.
    #[arg(long = "standing")]
    hold_reason: Option<HoldReason>,
    /// So many, at most: 1000 are listed, 10000 redriven or discarded, unless told otherwise.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum HoldReason {
    /// They failed for good and wait for an operator.
    Dead,
    /// They wait for the message before them.
    Parked,
    /// They are to run again.
    Redriven,
}

#[derive(clap::Args)]
pub(crate) struct OrderArgs {
    /// The key of one, as `list` prints it.
    #[arg(conflicts_with = "all")]
    key: Option<String>,
    /// All that the filters find; without `--standing`, only those that are dead.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    audit: AuditArgs,
    #[command(flatten)]
    place: Target,
}

impl From<Filter> for HeldFilter {
    fn from(filter: Filter) -> Self {
        let hold_reason = filter.hold_reason.map(|hold_reason| match hold_reason {
            HoldReason::Dead => StandingName::Dead,
            HoldReason::Parked => StandingName::Parked,
            HoldReason::Redriven => StandingName::Redriven,
        });
        let Filter { processor, kind, source, error, since, until, limit, .. } = filter;
        Self { processor, kind, source, error, since, until, hold_reason, limit, after: None }
    }
}

impl OrderArgs {
    fn chosen(self) -> anyhow::Result<(Target, Selection)> {
        let filter = HeldFilter::from(self.filter);
        if self.key.is_none() && !self.all {
            return Err(Failed::usage("name one message by its KEY, or say --all, with filters or without"));
        }
        if self.key.is_some() && filter != HeldFilter::default() {
            return Err(Failed::usage("a KEY names one message: give filters with --all only"));
        }
        let chosen = self.audit.select(self.key.into_iter().collect());
        Ok((self.place, Selection { filter: self.all.then_some(filter), ..chosen }))
    }
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { filter, after, place } => {
            let answer = place.ask(OperatorRequest::Letters(HeldFilter { after, ..filter.into() }))?;
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
        Command::Show { key, place } => {
            let held_message = place.ask(OperatorRequest::Letter(key))?;
            if json {
                line(&held_message.to_string())
            } else {
                print(&held_message)
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Redrive(action) => {
            let (place, chosen) = action.chosen()?;
            Ok(print_action(&place.ask(OperatorRequest::Redrive(chosen))?, json))
        }
        Command::Discard(action) => {
            let (place, chosen) = action.chosen()?;
            Ok(print_action(&place.ask(OperatorRequest::Discard(chosen))?, json))
        }
    }
}

/// One kept message, for people.
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
    show("kept", time_or(&held_message["at_ms"], "?"));
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
