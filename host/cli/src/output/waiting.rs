//! Says on standard error what `hapax run` waits for, when it seems to do nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hapax_core::{BreakerState, BreakerStatus, ConsumerStatus, IdempotentConsumer, Observer, Report};
use tokio::task::JoinHandle;

use crate::output::note;
use crate::output::run_printer::Printer;

/// Time without an outcome, or without a run, after which it is said.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// Looks within that time.
const LOOKS: u32 = 5;

/// Prints the outcomes of the messages of a source, and counts those that have none yet.
pub(crate) struct Waiting {
    printer: Arc<Printer>,
    taken: AtomicU64,
    ended: AtomicU64,
}

impl Waiting {
    pub(crate) fn new(printer: Arc<Printer>) -> Arc<Self> {
        Arc::new(Self { printer, taken: AtomicU64::new(0), ended: AtomicU64::new(0) })
    }

    /// Starts a task that says what is waited for; abort it at the end.
    pub(crate) fn start(self: &Arc<Self>, consumer: &IdempotentConsumer) -> JoinHandle<()> {
        tokio::spawn(watch(self.clone(), consumer.clone()))
    }

    /// Returns a line about the messages that have no outcome; `None` if all have.
    fn text(&self, status: &ConsumerStatus) -> Option<String> {
        let without = self.taken.load(Relaxed).saturating_sub(self.ended.load(Relaxed));
        let (parked, compensating) = self.printer.without_outcome();
        let mut parts = Vec::new();
        if without > 0 {
            let runs = status.runs_under_way;
            parts.push(format!(
                "{without} messages have no outcome yet; {runs} run, the others wait for their next attempt or their turn"
            ));
        }
        parts.extend((parked > 0).then(|| format!("{parked} are parked")));
        parts.extend((compensating > 0).then(|| format!("{compensating} are being compensated")));
        let is_open = |breaker: &BreakerStatus| matches!(breaker.state, BreakerState::Open { .. });
        if status.breaker.as_ref().is_some_and(is_open) {
            parts.push("the circuit breaker is open, since the processor fails too often".into());
        }
        (!parts.is_empty()).then(|| format!("waiting: {} ({} so far)", parts.join("; "), self.printer.counts()))
    }
}

impl Observer for Waiting {
    fn taken(&self) {
        self.taken.fetch_add(1, Relaxed);
    }

    fn ended(&self, report: Report<'_>) {
        if matches!(report, Report::Ended { .. }) {
            self.ended.fetch_add(1, Relaxed);
        }
        self.printer.ended(report);
    }
}

/// Says what is waited for whenever no message has ended, or none was running, for a while.
async fn watch(waiting: Arc<Waiting>, consumer: IdempotentConsumer) {
    let mut counts = String::new();
    let (mut without_outcome, mut without_run) = (0, 0);
    loop {
        tokio::time::sleep(SAID_AFTER / LOOKS).await;
        let (status, counts_now) = (consumer.status(), waiting.printer.counts());
        without_outcome = if counts_now == counts { without_outcome + 1 } else { 0 };
        without_run = if status.runs_under_way == 0 { without_run + 1 } else { 0 };
        counts = counts_now;
        if without_outcome.max(without_run) >= LOOKS {
            (without_outcome, without_run) = (0, 0);
            if let Some(text) = waiting.text(&status) {
                note(&text);
            }
        }
    }
}
