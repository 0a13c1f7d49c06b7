//! `hapax outbox`: lists, redrives and discards outgoing messages that their destination refused.
//! Core decides which actions are legal.

use std::process::ExitCode;

use hapax_transport::{HeldFilter, OperatorRequest, Selection};
use serde_json::Value;

use crate::commands::audit_args::AuditArgs;
use crate::commands::target::Target;
use crate::exit::Failed;
use crate::output::line;
use crate::output::list::{print_action, print_list, text, time_or};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List refused messages in the order of their ids.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Start after this id.
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Show one refused message: body, attributes, the answer of its destination.
    Show {
        /// Id of the message, as `hapax outbox list` prints it.
        id: String,
        #[command(flatten)]
        target: Target,
    },
    /// Put refused messages back into the outbox, under the same ids: they are sent again at once
    /// if a host runs, or at its next start.
    Redrive(OrderArgs),
    /// Remove refused messages: they are never sent.
    Discard(OrderArgs),
}

#[derive(clap::Args)]
pub(crate) struct Filter {
    /// Select messages that this processor sent.
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// Select messages of this CloudEvents type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Select messages whose refusal contains this text.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Select messages refused since this time: RFC 3339, or a time span before now, such as 2h.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Select messages refused before this time, written like --since.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Select at most this many messages [default: 1000 to list, 10000 to redrive or discard]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(clap::Args)]
pub(crate) struct OrderArgs {
    /// Id of one message, as `hapax outbox list` prints it.
    #[arg(conflicts_with = "all")]
    id: Option<String>,
    /// Take all messages that the filters select.
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
        let Filter { processor, kind, error, since, until, limit } = filter;
        Self { processor, kind, error, since, until, limit, ..Self::default() }
    }
}

impl OrderArgs {
    fn chosen(self) -> anyhow::Result<(Target, Selection)> {
        let filter = HeldFilter::from(self.filter);
        if self.id.is_none() && !self.all {
            return Err(Failed::usage("name one message by its ID, or give --all, with or without filters"));
        }
        if self.id.is_some() && filter != HeldFilter::default() {
            return Err(Failed::usage("an ID names one message: give filters with --all only"));
        }
        let chosen = self.audit.select(self.id.into_iter().collect());
        Ok((self.target, Selection { filter: self.all.then_some(filter), ..chosen }))
    }
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { filter, after, target } => {
            let answer = target.ask(OperatorRequest::RefusedMessages(HeldFilter { after, ..filter.into() }))?;
            print_list(&answer, "messages", json, |message| {
                let at = time_or(&message["at_ms"], "?");
                format!(
                    "{} {at:<24} {}: {}",
                    text(&message["id"]),
                    text(&message["processor"]),
                    text(&message["error"])
                )
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { id, target } => {
            let message = target.ask(OperatorRequest::RefusedMessage(id))?;
            if json {
                line(&message.to_string());
            } else {
                print(&message);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Redrive(action) => {
            let (target, chosen) = action.chosen()?;
            Ok(print_action(&target.ask(OperatorRequest::RedriveOutgoing(chosen))?, json))
        }
        Command::Discard(action) => {
            let (target, chosen) = action.chosen()?;
            Ok(print_action(&target.ask(OperatorRequest::DiscardOutgoing(chosen))?, json))
        }
    }
}

/// Prints one refused message for people.
fn print(message: &Value) {
    let show = |name: &str, value: String| line(&format!("{:<13} {value}", format!("{name}:")));
    show("id", text(&message["id"]));
    show("processor", text(&message["processor"]));
    show("destination", text(&message["destination"]));
    if !message["status"].is_null() {
        show("status", text(&message["status"]));
    }
    show("refusal", text(&message["error"]));
    show("refused at", time_or(&message["at_ms"], "?"));
    if !message["ordering_key"].is_null() {
        show("ordering key", text(&message["ordering_key"]));
    }
    let others = |(name, _): &(&String, &Value)| *name != "id";
    for (name, value) in message["attributes"].as_object().into_iter().flatten().filter(others) {
        show(name, text(value));
    }
    for name in ["data", "data_base64"].iter().filter(|name| !message[**name].is_null()) {
        show(name, text(&message[*name]));
    }
}
