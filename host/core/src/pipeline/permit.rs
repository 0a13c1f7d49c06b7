//! Permits to run: a slot among the runs, and the circuit breaker's consent. A message that waits
//! for either holds neither, and loses no attempt.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit, watch};

use crate::circuit_breaker::{BreakerPermit, CircuitBreaker, CircuitBreakerParts};
use crate::message::key::Scope;
use crate::observe::status::ConsumerStatus;
use crate::pipeline::Parts;
use crate::pipeline::claim::RunRight;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::outcome::Outcome;
use crate::support::error::StoreError;
use crate::support::fault;

/// Slots and circuit breaker of one consumer.
pub(crate) struct Permits {
    parts: Arc<Parts>,
    /// A slot for each message that runs or whose commit is on its way.
    slots: Semaphore,
    breaker: Option<CircuitBreaker>,
}

/// Held by a run while it is under way.
pub(super) struct RunPermit<'a> {
    pub(super) slot: SemaphorePermit<'a>,
    pub(super) breaker: Option<BreakerPermit<'a>>,
}

/// The answer to a message that asks for a permit.
pub(super) enum Permitted<'a> {
    Run(RunPermit<'a>),
    /// The message is put off with this outcome. It has lost no attempt.
    PutOff(Outcome),
}

impl Permits {
    pub(super) fn new(parts: Arc<Parts>) -> Self {
        let Scope { tenant, processor } = &parts.scope;
        let breaker = parts.options.breaker.clone().map(|policy| {
            CircuitBreaker::new(CircuitBreakerParts {
                name: format!("processor/{tenant}/{processor}"),
                policy,
                committer: parts.committer.clone(),
                clock: parts.clock.clone(),
                metrics: parts.metrics.clone(),
            })
        });
        let slots = Semaphore::new(parts.options.runs_max.clamp(1, Semaphore::MAX_PERMITS));
        Self { parts, slots, breaker }
    }

    /// Waits for a permit to run `message`.
    pub(super) async fn acquire(
        &self,
        message: &Accepted,
        right: &mut RunRight,
        stopping: &watch::Sender<bool>,
    ) -> Permitted<'_> {
        let mut in_line = None;
        loop {
            let Some(slot) = self.slot_or_stop(message, stopping).await else {
                let error = "the host is stopping, and the message has not run".to_owned();
                return Permitted::PutOff(Outcome::Retry { error, after_ms: 0 });
            };
            let Some(breaker) = &self.breaker else { return Permitted::Run(RunPermit { slot, breaker: None }) };
            let refused = match breaker.enter() {
                Ok(permit) => return Permitted::Run(RunPermit { slot, breaker: Some(permit) }),
                Err(refused) => refused,
            };
            // Others may need the slot: a message that waits holds none.
            drop(slot);
            if fault::mutated("breaker-open-counts-attempts") {
                right.attempts += 1;
            }
            in_line.get_or_insert_with(|| breaker.stand_in_line());
            if !message.handling.retry_here || Box::pin(passable_or_stop(breaker, stopping)).await {
                return Permitted::PutOff(Outcome::Paused { after_ms: refused.retry_after_ms() });
            }
        }
    }

    /// Waits for a slot. Returns `None` if the consumer was told to stop, and the message is one of
    /// a source that waits here: as many as may be taken wait with it, longer than a stop may take.
    async fn slot_or_stop(&self, message: &Accepted, stopping: &watch::Sender<bool>) -> Option<SemaphorePermit<'_>> {
        if !message.handling.retry_here || message.is_held || fault::mutated("stop-runs-what-waits") {
            return Some(self.slot().await);
        }
        let slot = match self.slots.try_acquire() {
            Ok(slot) => slot,
            Err(_) => Box::pin(slot_before(self.slot(), stopping)).await?,
        };
        (!*stopping.borrow()).then_some(slot)
    }

    /// Waits for a slot alone. Compensations take one: the circuit breaker does not hold them up.
    pub(crate) async fn slot(&self) -> SemaphorePermit<'_> {
        self.slots.acquire().await.expect("the semaphore is never closed")
    }

    /// Completes when another message could run: a slot is free, and the circuit breaker is closed,
    /// or lets a few through and no message waits for that.
    pub(super) async fn wants_messages(&self) {
        if let Some(breaker) = &self.breaker {
            breaker.wants_more().await;
        }
        if fault::mutated("source-drained-ahead") {
            return;
        }
        // Given back at once: the message may have to wait for something else first. Messages taken
        // beyond the slots would only queue for them.
        drop(self.slot().await);
    }

    /// Takes up the state in which an earlier process left the circuit breaker.
    pub(super) async fn restore(&self) -> Result<(), StoreError> {
        match &self.breaker {
            Some(breaker) => breaker.restore(&*self.parts.storage).await,
            None => Ok(()),
        }
    }

    pub(super) fn status(&self, waiting: usize) -> ConsumerStatus {
        let runs_max = self.parts.options.runs_max.clamp(1, Semaphore::MAX_PERMITS);
        ConsumerStatus {
            runs_under_way: runs_max.saturating_sub(self.slots.available_permits()),
            runs_max,
            waiting,
            breaker: self.breaker.as_ref().map(CircuitBreaker::status),
        }
    }
}

/// Waits for a slot, or until the consumer is told to stop: then it returns `None`.
async fn slot_before<S>(slot: impl Future<Output = S>, stopping: &watch::Sender<bool>) -> Option<S> {
    let mut stopping = stopping.subscribe();
    tokio::select! {
        biased;
        _ = stopping.wait_for(|stop| *stop) => None,
        slot = slot => Some(slot),
    }
}

/// Waits until the circuit breaker might let a run through. Returns whether the consumer was told
/// to stop meanwhile.
async fn passable_or_stop(breaker: &CircuitBreaker, stopping: &watch::Sender<bool>) -> bool {
    let mut stopping = stopping.subscribe();
    tokio::select! {
        () = breaker.passable() => false,
        _ = stopping.wait_for(|stop| *stop) => true,
    }
}
