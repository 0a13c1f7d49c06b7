//! Printing of `hapax run`: one line for each message, and the summary of all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use hapax_core::{Observer, Outcome, Output, Report, StoredOutcome};
use serde_json::{Value, json};

// Re-exported for the commands that still take it from here.
pub(crate) use crate::output::line;
use crate::output::note;

/// Prints and counts outcomes.
pub(crate) struct Printer {
    style: Style,
    since: Instant,
    completed: AtomicU64,
    duplicates: AtomicU64,
    mismatches: AtomicU64,
    stale: AtomicU64,
    /// Parked messages that have no outcome yet.
    parked: AtomicU64,
    dead_lettered: AtomicU64,
    /// Failed for good, with steps that are not all compensated yet.
    compensating: AtomicU64,
    compensated: AtomicU64,
    compensation_failed: AtomicU64,
    put_off: AtomicU64,
    invalid: AtomicU64,
}

/// Numbers of the outbox at the end of a run.
pub(crate) struct OutboxCounts {
    /// Messages that were delivered.
    pub(crate) sent: u64,
    /// Messages that are to be sent.
    pub(crate) pending: u64,
    /// Messages that their destination refused, now or before.
    pub(crate) refused: usize,
}

/// Form in which each message is printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Prints a JSON object.
    Json,
    /// Prints a line for people.
    Lines,
    /// Prints nothing.
    Quiet,
}

impl Printer {
    /// Makes a printer that has counted nothing.
    pub(crate) fn new(style: Style) -> Self {
        Self {
            style,
            since: Instant::now(),
            completed: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
            mismatches: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            parked: AtomicU64::new(0),
            dead_lettered: AtomicU64::new(0),
            compensating: AtomicU64::new(0),
            compensated: AtomicU64::new(0),
            compensation_failed: AtomicU64::new(0),
            put_off: AtomicU64::new(0),
            invalid: AtomicU64::new(0),
        }
    }

    /// Returns the number of lines of input that were not messages.
    pub(crate) fn invalid(&self) -> u64 {
        self.invalid.load(Relaxed)
    }

    /// Returns the counts so far, in short form.
    pub(crate) fn counts(&self) -> String {
        let [completed, duplicates] = [&self.completed, &self.duplicates].map(|count| count.load(Relaxed));
        let failed = [&self.mismatches, &self.dead_lettered, &self.invalid].map(|count| count.load(Relaxed));
        let failed = failed.iter().sum::<u64>() + self.of_sagas().iter().sum::<u64>();
        format!("{completed} completed, {duplicates} duplicates, {failed} failed")
    }

    /// Returns the counts of messages that are compensating, are compensated, or whose compensation
    /// failed.
    fn of_sagas(&self) -> [u64; 3] {
        [&self.compensating, &self.compensated, &self.compensation_failed].map(|count| count.load(Relaxed))
    }

    /// Returns the number of messages that are parked, and of those that are being compensated.
    pub(crate) fn without_outcome(&self) -> (u64, u64) {
        (self.parked.load(Relaxed), self.compensating.load(Relaxed))
    }

    /// Prints the last line: the counts of messages, and of sent and pending outbox messages.
    pub(crate) fn summary(&self, outbox: &OutboxCounts) {
        let OutboxCounts { sent, pending, refused } = outbox;
        let [completed, duplicates, mismatches, dead_lettered, put_off, invalid] =
            [&self.completed, &self.duplicates, &self.mismatches, &self.dead_lettered, &self.put_off, &self.invalid]
                .map(|count| count.load(Relaxed));
        let [compensating, compensated, compensation_failed] = self.of_sagas();
        let failed = mismatches + dead_lettered + invalid + compensating + compensated + compensation_failed;
        let [stale, parked] = [&self.stale, &self.parked].map(|count| count.load(Relaxed));
        let received = completed + duplicates + stale + parked + put_off + failed;
        let duplicate_rate = if received == 0 { 0.0 } else { duplicates as f64 / received as f64 };
        let elapsed_ms = self.since.elapsed().as_millis() as u64;
        if self.style == Style::Json {
            return line(
                &json!({ "summary": {
                "received": received, "completed": completed, "duplicates": duplicates, "failed": failed,
                "stale": stale, "parked": parked, "mismatches": mismatches, "dead_lettered": dead_lettered,
                "compensating": compensating, "compensated": compensated, "compensation_failed": compensation_failed, "retry": put_off, "invalid": invalid,
                "duplicate_rate": duplicate_rate, "outbox_sent": sent, "outbox_pending": pending, "outbox_refused": refused,
                "elapsed_ms": elapsed_ms,
            } })
                .to_string(),
            );
        }
        let some = |count: u64, what: &str| if count > 0 { format!("{count} {what}, ") } else { String::new() };
        let of_sagas = some(compensated, "compensated")
            + &some(compensating, "compensating")
            + &some(compensation_failed, "whose compensation failed");
        let refused = if *refused > 0 { format!(", {refused} refused (`hapax outbox list`)") } else { String::new() };
        let stale_and_parked = some(stale, "stale") + &some(parked, "parked");
        line(&format!(
            "{received} received: {completed} completed, {duplicates} duplicates skipped ({:.1} %), {stale_and_parked}{failed} failed \
             ({of_sagas}{dead_lettered} dead-lettered, {mismatches} mismatches, {invalid} invalid), {put_off} to be retried; \
             outbox: {sent} sent, {pending} pending{refused}; {elapsed_ms} ms",
            duplicate_rate * 100.0
        ));
        if duplicates > 0 && completed + dead_lettered + put_off == 0 {
            line("Nothing changed: no message was new.");
        }
    }

    fn count(&self, outcome: &Outcome) {
        let counter = match outcome {
            Outcome::Completed { .. } => &self.completed,
            Outcome::Duplicate(_) => &self.duplicates,
            Outcome::Mismatch => &self.mismatches,
            Outcome::Stale => &self.stale,
            Outcome::Parked { .. } => &self.parked,
            Outcome::DeadLettered { .. } => &self.dead_lettered,
            Outcome::Compensating { .. } => &self.compensating,
            Outcome::Compensated { .. } => &self.compensated,
            Outcome::CompensationFailed { .. } => &self.compensation_failed,
            Outcome::Retry { .. } | Outcome::InFlight { .. } | Outcome::Paused { .. } => &self.put_off,
        };
        counter.fetch_add(1, Relaxed);
    }
}

impl Observer for Printer {
    fn ended(&self, report: Report<'_>) {
        match &report {
            Report::Ended { outcome, .. } => self.count(outcome),
            Report::Invalid { .. } => drop(self.invalid.fetch_add(1, Relaxed)),
        }
        match (self.style, &report) {
            (Style::Json, report) => line(&as_json(report).to_string()),
            (Style::Lines, Report::Ended { message, outcome }) => {
                line(&format!("{:<13} {} from {}{}", outcome.name(), message.id, message.source, detail(outcome)));
            }
            (_, Report::Invalid { position, reason }) => {
                let text = format!("{:<13} {position}: {reason}", "invalid");
                if self.style == Style::Lines {
                    line(&text);
                } else {
                    note(&text);
                }
            }
            (Style::Quiet, _) => {}
        }
    }
}

/// Prints the outcomes of held messages: they no longer count as parked.
pub(crate) struct HeldPrinter(pub(crate) Arc<Printer>);

impl Observer for HeldPrinter {
    fn ended(&self, report: Report<'_>) {
        let _ = self.0.parked.fetch_update(Relaxed, Relaxed, |parked| parked.checked_sub(1));
        self.0.ended(report);
    }
}

/// Prints messages whose compensation has ended: they no longer count as compensating.
pub(crate) struct CompensatedPrinter(pub(crate) Arc<Printer>);

impl Observer for CompensatedPrinter {
    fn ended(&self, report: Report<'_>) {
        let _ = self.0.compensating.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
        self.0.ended(report);
    }
}

fn detail(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Completed { output } if output.data.is_empty() => String::new(),
        Outcome::Completed { output } => format!(": {}", String::from_utf8_lossy(&output.data)),
        Outcome::Duplicate(StoredOutcome::Completed(_)) => ": completed before, skipped".into(),
        Outcome::Duplicate(StoredOutcome::Failed(error)) => format!(": failed before ({error}), skipped"),
        Outcome::Mismatch => ": its key was used before with another body; it was not run".into(),
        Outcome::Stale => ": a later one was seen before, skipped".into(),
        Outcome::Parked { awaits, .. } => format!(": waits for version {awaits}"),
        Outcome::DeadLettered { error } => format!(": {error}"),
        Outcome::Compensating { error } => format!(": {error}; its steps are being compensated"),
        Outcome::Compensated { error } => format!(": {error}; its steps are compensated"),
        Outcome::CompensationFailed { error } => {
            format!(": {error}; a compensation failed: see `hapax saga list --state stuck`")
        }
        Outcome::Retry { error, after_ms } => format!(": due again in {after_ms} ms ({error})"),
        Outcome::InFlight { .. } => ": is being processed".into(),
        Outcome::Paused { after_ms } => format!(": its processor fails too often; due again in {after_ms} ms"),
    }
}

fn as_json(report: &Report<'_>) -> Value {
    let (message, outcome) = match report {
        Report::Invalid { position, reason } => {
            return json!({ "id": null, "source": null, "outcome": "invalid", "position": position, "error": reason });
        }
        Report::Ended { message, outcome } => (message, outcome),
    };
    let mut line = json!({ "id": message.id, "source": message.source, "outcome": outcome.name() });
    match outcome {
        Outcome::Completed { output } | Outcome::Duplicate(StoredOutcome::Completed(output)) => {
            line["result"] = result(output)
        }
        Outcome::Duplicate(StoredOutcome::Failed(error)) | Outcome::DeadLettered { error } => {
            line["error"] = json!(error)
        }
        Outcome::Compensating { error } | Outcome::Compensated { error } | Outcome::CompensationFailed { error } => {
            line["error"] = json!(error);
        }
        Outcome::Stale => {}
        Outcome::Parked { awaits, until_ms } => {
            line["awaits"] = json!(awaits);
            line["until_ms"] = json!(until_ms);
        }
        Outcome::Mismatch => line["error"] = json!("the idempotency key was used before with another body"),
        Outcome::Retry { error, after_ms } => {
            line["error"] = json!(error);
            line["after_ms"] = json!(after_ms);
        }
        Outcome::InFlight { after_ms } | Outcome::Paused { after_ms } => line["after_ms"] = json!(after_ms),
    }
    line
}

/// Returns a stored result: as JSON if it is JSON, as text if it is UTF-8, or its size.
pub(crate) fn result(output: &Output) -> Value {
    if output.data.is_empty() {
        return Value::Null;
    }
    match std::str::from_utf8(&output.data) {
        Ok(text) => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        Err(_) => json!({ "bytes": output.data.len() }),
    }
}
