//! `hapax saga`: what was done outside, and the way back. Asks and prints; what may be done is core's to say.

use std::process::ExitCode;

use hapax_transport::{OperatorRequest, SagaFilter, SagaStateName, SagaVerb};
use serde_json::Value;

use crate::commands::dlq::{AuditEntry, print_deed, print_list, text};
use crate::commands::target::Target;
use crate::output::run_printer::line;
use crate::output::time::rfc3339;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List sagas in the order of their ids.
    List {
        /// Only those that stand so; `halted` ones wait for you.
        #[arg(long)]
        state: Option<State>,
        /// Start after this one.
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// Sagas to list, at most.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: usize,
        #[command(flatten)]
        place: Target,
    },
    /// Show one: its messages, its steps, its log.
    Show {
        /// Its id, as `list` prints it.
        id: String,
        #[command(flatten)]
        place: Target,
    },
    /// Try the step that halted a saga again, with all its attempts before it.
    Retry(Stuck),
    /// You have seen to the step that halted a saga: go on with the one before it.
    Skip(Stuck),
    /// You have seen to all that was left of a halted saga: its message counts as undone.
    Resolve(Stuck),
}

#[derive(clap::Args)]
pub(crate) struct Stuck {
    /// Its id, as `list` prints it.
    id: String,
    #[command(flatten)]
    audit: AuditEntry,
    #[command(flatten)]
    place: Target,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum State {
    /// Its messages go forward.
    Open,
    /// There is no way back any more.
    Pivoted,
    /// It ended well.
    Completed,
    /// Its steps are being undone.
    Compensating,
    /// A step could not be undone.
    Stuck,
    /// Every step is undone.
    Compensated,
    /// An operator has seen to what could not be undone.
    Resolved,
}

impl From<State> for SagaStateName {
    fn from(state: State) -> Self {
        match state {
            State::Open => Self::Open,
            State::Pivoted => Self::Pivoted,
            State::Completed => Self::Completed,
            State::Compensating => Self::Compensating,
            State::Stuck => Self::Stuck,
            State::Compensated => Self::Compensated,
            State::Resolved => Self::Resolved,
        }
    }
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    let go_on = |verb, Stuck { id, audit, place }: Stuck| {
        let answer = place.ask(OperatorRequest::ResumeSaga(verb, audit.to(vec![id])))?;
        Ok(print_deed(&answer, json))
    };
    match command {
        Command::List { state, after, limit, place } => {
            let filter = SagaFilter { state: state.map(Into::into), after, limit: Some(limit) };
            print_list(&place.ask(OperatorRequest::Sagas(filter))?, "sagas", json, |saga| {
                format!("{:<9} {:<24} {}", text(&saga["state"]), at(&saga["changed_ms"]), text(&saga["id"]))
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { id, place } => {
            let saga = place.ask(OperatorRequest::Saga(id))?;
            if json {
                line(&saga.to_string());
            } else {
                print(&saga);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Retry(halted) => go_on(SagaVerb::Retry, halted),
        Command::Skip(halted) => go_on(SagaVerb::Skip, halted),
        Command::Resolve(halted) => go_on(SagaVerb::Resolve, halted),
    }
}

fn at(at_ms: &Value) -> String {
    rfc3339(at_ms.as_u64().unwrap_or(0))
}

/// One saga, for people.
fn print(saga: &Value) {
    let show = |name: &str, value: String| line(&format!("{:<9} {value}", format!("{name}:")));
    let listed = |name: &str| saga[name].as_array().into_iter().flatten().enumerate();
    show("saga", text(&saga["id"]));
    show("state", text(&saga["state"]));
    if saga["failure"].is_object() {
        show("failed", format!("message {}: {}", saga["failure"]["member"], text(&saga["failure"]["error"])));
    }
    for (index, member) in listed("members") {
        show("message", format!("{index}: {}", text(&member["record"])));
    }
    for (index, step) in listed("steps") {
        let error = step["error"]
            .as_str()
            .map_or_else(String::new, |error| format!(", not undone after {} attempts: {error}", step["attempts"]));
        let (name, hold_reason) = (text(&step["name"]), text(&step["standing"]));
        show("step", format!("{index}: {name} of message {}, {hold_reason}{error}", step["member"]));
    }
    for (_, event) in listed("log") {
        let mut said = format!("{:<24} {}", at(&event["at_ms"]), text(&event["event"]));
        for name in ["member", "step", "name", "record", "error", "reason"] {
            if !event[name].is_null() {
                said += &format!(", {name}: {}", text(&event[name]));
            }
        }
        line(&said);
    }
}
