//! Lists and results of operator actions, printed for people or as JSON.

use std::process::ExitCode;

use serde_json::Value;

use crate::exit::REFUSED;
use crate::output::time::rfc3339;
use crate::output::{line, note};

/// Prints one line for each item of `answer[name]`, and how to continue if more remain.
pub(crate) fn print_list(answer: &Value, name: &str, json: bool, as_line: impl Fn(&Value) -> String) {
    for item in answer[name].as_array().into_iter().flatten() {
        line(&if json { item.to_string() } else { as_line(item) });
    }
    if let Some(next) = answer["next"].as_str() {
        note(&format!("more remain: continue with --after '{next}'"));
    }
}

/// Prints one line for each key that an operator action reached; returns [`REFUSED`] if one was
/// refused.
pub(crate) fn print_action(answer: &Value, json: bool) -> ExitCode {
    let listed = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let (done, refused) = (listed("done"), listed("refused"));
    if json {
        line(&answer.to_string());
    } else {
        let (verb, dry_run) = (text(&answer["action"]), answer["dry_run"] == true);
        done.iter().for_each(|key| line(&format!("{verb} {}", text(key))));
        refused.iter().for_each(|one| line(&format!("refused {}: {}", text(&one["key"]), text(&one["error"]))));
        let nothing = if dry_run { "; this was a dry run: nothing was done" } else { "" };
        let more = if answer["more"] == true { "; more remain: run the command again" } else { "" };
        line(&format!("{verb}: {} done, {} refused{nothing}{more}", done.len(), refused.len()));
    }
    if refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) }
}

/// Returns a JSON string without its quotes, and any other value as JSON.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Returns the time of a field in milliseconds, or `otherwise` if the field has none.
pub(crate) fn time_or(at_ms: &Value, otherwise: &str) -> String {
    at_ms.as_u64().map_or_else(|| otherwise.to_owned(), rfc3339)
}
