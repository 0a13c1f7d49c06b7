//! Sends the messages in the outbox, in order, and has them marked as sent. At least once, under a
//! stable id.

use std::sync::Arc;

use tokio::sync::watch;

use crate::circuit_breaker::CircuitBreaker;
use crate::circuit_breaker::state_machine::CallResult;
use crate::commit::committer::Committer;
use crate::message::Message;
use crate::store::Outbox;
use crate::store::commit::{OutboxPosition, OutboxRow};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::transport::{Publisher, TransportError};

/// Messages in one batch, at most. Publishers rely on it: only one batch can be sent and not yet
/// marked.
pub const BATCH_MESSAGES_MAX: usize = 1_024;

/// Longest wait between two tries of a publisher that is not available, in milliseconds.
const RETRY_MS_MAX: u64 = 30_000;

/// Reason why the relay stopped before its end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RelayError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The publisher needs an operator's help; unsent messages stay in the outbox.
    #[error("the outbox could not be sent: {0}")]
    Publisher(TransportError),
}

/// Moves one store's outbox to one publisher.
pub struct OutboxRelay {
    outbox: Arc<dyn Outbox>,
    committer: Arc<Committer>,
    publisher: Box<dyn Publisher>,
    clock: Arc<dyn Clock>,
    breaker: Option<Arc<CircuitBreaker>>,
    sent: u64,
}

impl OutboxRelay {
    /// Returns a relay from `outbox` to `publisher`.
    pub fn new(
        outbox: Arc<dyn Outbox>,
        committer: Arc<Committer>,
        publisher: Box<dyn Publisher>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { outbox, committer, publisher, clock, breaker: None, sent: 0 }
    }

    /// Guards the relay by the destination's circuit breaker: nothing is sent while the breaker is
    /// open.
    pub fn guarded_by(self, breaker: Option<Arc<CircuitBreaker>>) -> Self {
        Self { breaker, ..self }
    }

    /// Sends until `stop` turns true and the outbox is empty. Returns the number of messages sent.
    /// While the publisher is not available, stopping does not wait for it: the rest stays in the
    /// outbox.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<u64, RelayError> {
        loop {
            // Read before looking: a message that is written after an empty look wakes the wait
            // below.
            let stopping = *stop.borrow_and_update();
            let rows = self.outbox.pending(None, BATCH_MESSAGES_MAX).await?;
            if !rows.is_empty() {
                if !self.send(rows, &mut stop).await? {
                    return Ok(self.sent);
                }
            } else if stopping {
                return Ok(self.sent);
            } else {
                tokio::select! {
                    () = self.committer.outbox_written() => {}
                    changed = stop.changed() => if changed.is_err() { return Ok(self.sent) },
                }
            }
        }
    }

    /// Sends one batch and has it marked. Returns `false` if the relay was stopped while the
    /// publisher was not available.
    async fn send(&mut self, rows: Vec<OutboxRow>, stop: &mut watch::Receiver<bool>) -> Result<bool, RelayError> {
        let (positions, batch): (Vec<OutboxPosition>, Vec<Message>) =
            rows.into_iter().map(|row| (row.position, row.message)).unzip();
        let mut delay_ms = 100;
        while let Some(reason) = self.publish(&batch).await? {
            if *stop.borrow() {
                tracing::warn!("outbox: {reason}; {} messages stay in it", batch.len());
                return Ok(false);
            }
            tracing::warn!("outbox: {reason}; trying again");
            tokio::select! {
                () = self.until_next_try(delay_ms) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            delay_ms = (delay_ms * 2).min(RETRY_MS_MAX);
        }
        fault::point("outbox-sent");
        self.sent += batch.len() as u64;
        self.committer.mark_sent(positions).await?;
        fault::point("outbox-marked");
        Ok(true)
    }

    /// Publishes a batch. Returns the reason for a failure if a later try may succeed.
    async fn publish(&mut self, batch: &[Message]) -> Result<Option<Arc<str>>, RelayError> {
        let breaker = self.breaker.as_deref().filter(|_| !fault::mutated("relay-ignores-breaker"));
        let Ok(call) = breaker.map(CircuitBreaker::enter).transpose() else {
            return Ok(Some("the destination failed too often".into()));
        };
        let published = self.publisher.publish(batch).await;
        if let Some(call) = call {
            let went = if published.is_ok() { CallResult::Succeeded } else { CallResult::Failed };
            call.ended(went, self.clock.now_ms(), batch.len() as u64);
        }
        match published {
            Ok(()) => Ok(None),
            Err(TransportError::Unavailable(reason)) => Ok(Some(reason)),
            Err(broken) => Err(RelayError::Publisher(broken)),
        }
    }

    /// Waits for the end of the backoff or, if the circuit breaker is not closed, until it may let
    /// a call through.
    async fn until_next_try(&mut self, delay_ms: u64) {
        match &self.breaker {
            Some(breaker) if !breaker.is_closed() && !fault::mutated("relay-ignores-breaker") => {
                breaker.passable().await
            }
            _ => self.clock.sleep(delay_ms).await,
        }
    }
}
