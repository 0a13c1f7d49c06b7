//! Feeds a consumer from a source: pulls, keeps the number in flight bounded, settles each delivery
//! by its outcome.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinError, JoinSet};

use crate::message::Message;
use crate::pipeline::IdempotentConsumer;
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::outcome::Outcome;
use crate::support::error::StoreError;
use crate::support::fault;
use crate::transport::{Delivery, Received, Source, TransportError};

/// Reason why a run stopped before the end of its input.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// The store failed; nothing that was acknowledged is lost.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source failed.
    #[error("the source failed: {0}")]
    Source(#[from] TransportError),
}

/// Report on one piece of input.
#[derive(Debug)]
pub enum Report<'a> {
    /// A message has its outcome.
    Ended {
        /// The message.
        message: &'a Message,
        /// Outcome of the message.
        outcome: &'a Outcome,
    },
    /// The input is not a message.
    Invalid {
        /// Position in the source.
        position: &'a str,
        /// Reason why it is not a message.
        reason: &'a str,
    },
}

/// Observer of outcomes. Notified of every outcome, before the delivery is settled and after the
/// outcome is durable. Must not block for long.
pub trait Observer: Send + Sync + 'static {
    /// Takes note that a message was taken from the source. Its outcome is reported later, if it
    /// gets one.
    fn taken(&self) {}

    /// Takes the report on one piece of input.
    fn ended(&self, report: Report<'_>);
}

/// Runs `source` to its end, or until `stop` turns true; then waits for the messages in flight. Of
/// those, once `stop` is true, only the ones that run are brought to their outcome: the others are
/// given back to the source.
///
/// At most `taken_max` messages are taken and not yet settled; the consumer decides how many of
/// them run at once. Messages that wait behind another or for their next attempt are among them, so
/// `taken_max` should be a good deal more. Must be called inside a tokio runtime. After a store
/// failure nothing more is pulled, and deliveries that were not durable are left unsettled.
pub async fn run_source(
    consumer: &IdempotentConsumer,
    source: &mut dyn Source,
    observer: Arc<dyn Observer>,
    taken_max: usize,
    mut stop: watch::Receiver<bool>,
) -> Result<(), SourceError> {
    let slots = Arc::new(Semaphore::new(taken_max.max(1)));
    let mut tasks: JoinSet<Result<(), SourceError>> = JoinSet::new();
    let pulled = loop {
        let received = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop), if !fault::mutated("stop-waits-for-room") => break Ok(()),
            received = next(consumer, source, &slots, &mut tasks) => received,
        };
        match received {
            Err(error) => break Err(error),
            Ok((_, None)) => break Ok(()),
            Ok((_, Some(Received::Invalid { position, reason }))) => {
                observer.ended(Report::Invalid { position: &position, reason: &reason });
            }
            Ok((slot, Some(Received::Delivery(delivery)))) => {
                observer.taken();
                // Accepted here, in the order received: that order is the order inside each lane.
                let accepted = consumer.accept(delivery.message().clone(), Handling::default());
                let (consumer, observer) = (consumer.clone(), observer.clone());
                tasks.spawn(async move {
                    let _slot = slot;
                    settle(&consumer, accepted, delivery, &*observer).await
                });
            }
        }
    };
    let drained = drain(consumer, tasks, stop).await;
    pulled.and(drained)
}

/// Returns the next message, and its slot among those that are taken. While the consumer's circuit
/// breaker is open, nothing is pulled from the source; nor is it once a task has failed.
async fn next(
    consumer: &IdempotentConsumer,
    source: &mut dyn Source,
    slots: &Arc<Semaphore>,
    tasks: &mut JoinSet<Result<(), SourceError>>,
) -> Result<(OwnedSemaphorePermit, Option<Received>), SourceError> {
    let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
    if let Some(failed) = first_failure(tasks) {
        return Err(failed);
    }
    if !fault::mutated("breaker-open-pulls") {
        consumer.wants_messages().await;
    }
    Ok((slot, source.recv().await?))
}

/// Waits for the messages in flight. Those that wait for their turn, for a slot or for their next
/// attempt are put off when `stop` turns true.
async fn drain(
    consumer: &IdempotentConsumer,
    mut tasks: JoinSet<Result<(), SourceError>>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), SourceError> {
    let mut result = Ok(());
    let mut stopped = false;
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => return result,
                Some(ended) => result = result.and(joined(ended)),
            },
            Ok(_) = stop.wait_for(|stop| *stop), if !stopped => {
                stopped = true;
                consumer.stop();
            }
        }
    }
}

async fn settle(
    consumer: &IdempotentConsumer,
    accepted: Accepted,
    delivery: Box<dyn Delivery>,
    observer: &dyn Observer,
) -> Result<(), SourceError> {
    let outcome = consumer.process(accepted).await?;
    observer.ended(Report::Ended { message: delivery.message(), outcome: &outcome });
    fault::point("before-ack");
    match &outcome {
        Outcome::Completed { .. } | Outcome::Duplicate(_) | Outcome::Stale | Outcome::Parked { .. } => {
            delivery.ack().await?
        }
        Outcome::DeadLettered { error }
        | Outcome::Compensating { error }
        | Outcome::Compensated { error }
        | Outcome::CompensationFailed { error } => delivery.dead_letter(error).await?,
        Outcome::Mismatch => delivery.dead_letter("the idempotency key was used before with another body").await?,
        Outcome::Retry { after_ms, .. } | Outcome::InFlight { after_ms } | Outcome::Paused { after_ms } => {
            delivery.nack(*after_ms).await?
        }
    }
    fault::point("acked");
    Ok(())
}

fn first_failure(tasks: &mut JoinSet<Result<(), SourceError>>) -> Option<SourceError> {
    while let Some(ended) = tasks.try_join_next() {
        if let Err(error) = joined(ended) {
            return Some(error);
        }
    }
    None
}

/// Returns the result of a task. A panic goes on here; a task that was cancelled has no failure to
/// report.
pub(super) fn joined<E>(ended: Result<Result<(), E>, JoinError>) -> Result<(), E> {
    match ended {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Ok(()),
    }
}
