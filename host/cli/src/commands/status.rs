//! `hapax status`: prints the status of a running host.

use std::process::ExitCode;

use serde_json::Value;

use crate::exit::Failed;
use crate::host;
use crate::output::line;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address of the running host.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    host: String,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let status = host::block_on(ask(&args.host))?;
    if json {
        line(&status.to_string());
    } else {
        for text in lines(&status) {
            line(&text);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(url: &str) -> anyhow::Result<Value> {
    let answer =
        hapax_transport::get(&format!("{}/v1/status", url.trim_end_matches('/'))).await.map_err(Failed::no_answer)?;
    let body = String::from_utf8_lossy(&answer.body);
    let status = serde_json::from_slice::<Value>(&answer.body);
    match (answer.status, status) {
        (200, Ok(status)) if status["processors"].is_object() => Ok(status),
        (code, _) => Err(Failed::unreachable(format!("{url} answered {code}, which is no host's status: {body}"))),
    }
}

/// Returns the status as lines for people.
fn lines(status: &Value) -> Vec<String> {
    let now_ms = status["now_ms"].as_u64().unwrap_or_default();
    let mut lines = Vec::new();
    for (name, of) in status["processors"].as_object().into_iter().flatten() {
        lines.push(format!("{name}: {}", outcomes(&of["outcomes"])));
        lines.push(format!(
            "  {} of {} runs under way, {} messages parked or redriven, {} runs repeated after a conflict",
            of["runs_under_way"], of["runs_max"], of["waiting"], of["conflicts"]
        ));
        let percent = of["cache_hit_rate"].as_f64().unwrap_or_default() * 100.0;
        lines.push(format!("  cache: {} hits, {} misses ({percent:.1} %)", of["cache_hits"], of["cache_misses"]));
        lines.push(format!("  circuit breaker: {}", breaker(&of["breaker"], now_ms)));
    }
    let (outbox, store) = (&status["outbox"], &status["store"]);
    lines.push(format!("outbox: {} to be sent{}", outbox["pending"], refused(outbox)));
    lines.extend(trouble(&outbox["trouble"], now_ms));
    lines.push(format!("  circuit breaker: {}", breaker(&outbox["breaker"], now_ms)));
    lines.push(format!(
        "store: {} dead letters, {} buckets, {} bytes not yet in the tables",
        store["dead_letters"], store["buckets"], store["unapplied_bytes"]
    ));
    lines.push(sagas_line(&status["sagas"]));
    if let Some(count) = status["overdue"].as_u64().filter(|count| *count > 0) {
        lines.push(format!(
            "overdue: {count} messages have begun and were not delivered again: see `hapax records list --overdue`"
        ));
    }
    lines.extend(store["failure"].as_str().map(|failure| format!("  it has failed: {failure}")));
    if status["stopping"] == true {
        lines.push("the host is stopping".into());
    }
    lines
}

fn refused(outbox: &Value) -> String {
    match outbox["refused"].as_u64() {
        None | Some(0) => String::new(),
        Some(count) => format!(", {count} REFUSED: see `hapax outbox list`"),
    }
}

fn trouble(trouble: &Value, now_ms: u64) -> Option<String> {
    let reason = trouble["reason"].as_str()?;
    let seconds = now_ms.saturating_sub(trouble["since_ms"].as_u64().unwrap_or(now_ms)) / 1_000;
    let what = if trouble["is_misconfigured"] == true { "NOT SENT, to be repaired" } else { "not sent" };
    Some(format!("  {what}, for {seconds} s, {} tries: {reason}", trouble["failures"]))
}

fn sagas_line(sagas: &Value) -> String {
    let stuck = match sagas["stuck"].as_u64() {
        None | Some(0) => "none is stuck".to_owned(),
        Some(count) => format!("{count} STUCK: see `hapax saga list --state stuck`"),
    };
    format!("sagas: {} compensating, {stuck}", sagas["compensating"])
}

/// Returns the outcomes that have occurred, with their counts.
fn outcomes(outcomes: &Value) -> String {
    let there_are = outcomes.as_object().into_iter().flatten().filter(|(_, count)| count.as_u64() != Some(0));
    let named: Vec<_> = there_are.map(|(name, count)| format!("{count} {name}")).collect();
    if named.is_empty() { "no message has ended yet".into() } else { named.join(", ") }
}

fn breaker(breaker: &Value, now_ms: u64) -> String {
    let opened = match breaker["opened"].as_u64() {
        None => return "none".into(),
        Some(0) => String::new(),
        Some(times) => format!("; has opened {times} times"),
    };
    let state = breaker["state"].as_str().unwrap_or_default();
    let detail = match breaker["until_ms"].as_u64() {
        Some(until_ms) => format!(" for {} ms more", until_ms.saturating_sub(now_ms)),
        None if state == "closed" => {
            format!(", {} of {} calls failed, {} were slow", breaker["failed"], breaker["calls"], breaker["slow"])
        }
        None => String::new(),
    };
    format!("{state}{detail}{opened}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_status_reads_as_lines() {
        let status = json!({
            "now_ms": 1_000,
            "processors": { "orders": {
                "outcomes": { "completed": 3, "retry": 0, "duplicate": 1 }, "conflicts": 2, "waiting": 5,
                "runs_under_way": 1, "runs_max": 256, "cache_hits": 1, "cache_misses": 3, "cache_hit_rate": 0.25,
                "breaker": { "state": "open", "until_ms": 1_500, "calls": 0, "failed": 0, "slow": 0, "opened": 2 },
            } },
            "outbox": { "pending": 7, "refused": 2, "breaker": null, "trouble": {
                "reason": "nobody there", "is_misconfigured": false, "since_ms": 0, "failures": 3,
            } },
            "store": { "dead_letters": 1, "buckets": 2, "unapplied_bytes": 99, "failure": null },
            "sagas": { "compensating": 2, "stuck": 1 },
        });
        let expected = [
            "orders: 3 completed, 1 duplicate",
            "  1 of 256 runs under way, 5 messages parked or redriven, 2 runs repeated after a conflict",
            "  cache: 1 hits, 3 misses (25.0 %)",
            "  circuit breaker: open for 500 ms more; has opened 2 times",
            "outbox: 7 to be sent, 2 REFUSED: see `hapax outbox list`",
            "  not sent, for 1 s, 3 tries: nobody there",
            "  circuit breaker: none",
            "store: 1 dead letters, 2 buckets, 99 bytes not yet in the tables",
            "sagas: 2 compensating, 1 STUCK: see `hapax saga list --state stuck`",
        ];
        assert_eq!(lines(&status), expected);
    }
}
