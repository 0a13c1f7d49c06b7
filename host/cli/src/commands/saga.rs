//! `hapax saga`: lists sagas, shows their steps, and resumes stuck ones. Core decides which actions
//! are legal.

use std::process::ExitCode;

use hapax_core::{SagaAction, SagaState};
use hapax_transport::{OperatorRequest, SagaFilter};
use serde_json::Value;

use crate::commands::audit_args::AuditArgs;
use crate::commands::one_of;
use crate::commands::target::Target;
use crate::output::line;
use crate::output::list::{print_action, print_list, text};
use crate::output::time::rfc3339;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List sagas in the order of their ids.
    List {
        /// List only sagas in this state; `stuck` ones wait for an operator.
        #[arg(long, value_parser = one_of(SagaState::ALL, SagaState::name))]
        state: Option<SagaState>,
        /// Start after this id.
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// List at most this many sagas.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: usize,
        #[command(flatten)]
        target: Target,
    },
    /// Show one saga: its messages, its steps, its log.
    Show {
        /// Id of the saga, as `hapax saga list` prints it.
        id: String,
        #[command(flatten)]
        target: Target,
    },
    /// Compensate the step at which a saga is stuck again, with all its attempts.
    Retry(Stuck),
    /// Treat the step at which a saga is stuck as compensated by hand; continue with the step
    /// before it.
    Skip(Stuck),
    /// Treat all remaining steps of a stuck saga as compensated by hand; its message becomes
    /// `compensated`.
    Resolve(Stuck),
}

#[derive(clap::Args)]
pub(crate) struct Stuck {
    /// Id of the saga, as `hapax saga list` prints it.
    id: String,
    #[command(flatten)]
    audit: AuditArgs,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    let resume = |verb, Stuck { id, audit, target }: Stuck| {
        let answer = target.ask(OperatorRequest::ResumeSaga(verb, audit.select(vec![id])))?;
        Ok(print_action(&answer, json))
    };
    match command {
        Command::List { state, after, limit, target } => {
            let filter = SagaFilter { state, after, limit: Some(limit) };
            print_list(&target.ask(OperatorRequest::Sagas(filter))?, "sagas", json, |saga| {
                format!("{:<12} {:<24} {}", text(&saga["state"]), at(&saga["changed_ms"]), text(&saga["id"]))
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { id, target } => {
            let saga = target.ask(OperatorRequest::Saga(id))?;
            if json {
                line(&saga.to_string());
            } else {
                print(&saga);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Retry(stuck) => resume(SagaAction::Retry, stuck),
        Command::Skip(stuck) => resume(SagaAction::Skip, stuck),
        Command::Resolve(stuck) => resume(SagaAction::Resolve, stuck),
    }
}

fn at(at_ms: &Value) -> String {
    rfc3339(at_ms.as_u64().unwrap_or(0))
}

/// Prints one saga for people.
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
        let error = step["error"].as_str().map_or_else(String::new, |error| {
            format!(", not compensated after {} attempts: {error}", step["attempts"])
        });
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
