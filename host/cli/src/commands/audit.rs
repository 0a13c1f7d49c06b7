//! `hapax audit`: prints the actions of operators.

use std::process::ExitCode;

use hapax_transport::{AuditFilter, OperatorRequest};

use crate::commands::target::Target;
use crate::output::list::{print_list, text};
use crate::output::note;
use crate::output::time::rfc3339;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    #[arg(long, value_name = "NAME")]
    processor: String,
    /// Print actions from this time on: RFC 3339, or a time span before now, such as 2h.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Print at most this many actions.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn command(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    let Args { processor, since, limit, target } = args;
    let answer = target.ask(OperatorRequest::Audit(AuditFilter { processor, since, limit }))?;
    print_list(&answer, "actions", json, |action| {
        let at = rfc3339(action["at_ms"].as_u64().unwrap_or(0));
        let [actor, name, key, reason] = ["actor", "action", "key", "reason"].map(|name| text(&action[name]));
        format!("{at:<24} {actor} {name} {key}{}", if reason.is_empty() { reason } else { format!(": {reason}") })
    });
    if answer["more"] == true {
        note("more remain: give the time of the last one to --since, or raise --limit");
    }
    Ok(ExitCode::SUCCESS)
}
