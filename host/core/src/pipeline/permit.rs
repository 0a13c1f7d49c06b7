//! Leave to run: a place among the runs, and the circuit breaker's. A message that waits for either holds neither, and loses no
//! attempt. What a run does is the pipeline's.

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::circuit_breaker::{BreakerPermit, CircuitBreaker, CircuitBreakerParts};
use crate::message::key::Scope;
use crate::observe::status::ConsumerStatus;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::{IdempotentConsumer, Inner, Parts, RunRight};
use crate::support::error::StoreError;
use crate::support::fault;

/// What a run holds while it is under way.
pub(crate) struct RunPermit<'a> {
    pub(crate) place: SemaphorePermit<'a>,
    pub(crate) call: Option<BreakerPermit<'a>>,
}

impl IdempotentConsumer {
    /// Takes up where an earlier process has left the circuit breaker. Call it before the first message.
    pub async fn restore(&self) -> Result<(), StoreError> {
        match &self.inner.breaker {
            Some(breaker) => breaker.restore(&*self.inner.parts.storage).await,
            None => Ok(()),
        }
    }

    /// Completes when there is use for another message: when a place is free, and the circuit breaker is not open, or lets a
    /// few through and there are no messages that wait for that.
    pub async fn wants_messages(&self) {
        if let Some(breaker) = &self.inner.breaker {
            breaker.wants_more().await;
        }
        if fault::mutated("source-drained-ahead") {
            return;
        }
        // Given back at once: the message may have to wait for something else first. What is taken beyond the places would
        // only queue for them.
        drop(self.inner.runs.acquire().await.expect("the semaphore is never closed"));
    }

    /// How it is doing.
    pub fn status(&self) -> ConsumerStatus {
        let inner = &*self.inner;
        let runs_max = inner.runs_max();
        ConsumerStatus {
            runs_under_way: runs_max.saturating_sub(inner.runs.available_permits()),
            runs_max,
            waiting: inner.kept.len(),
            breaker: inner.breaker.as_ref().map(CircuitBreaker::status),
        }
    }
}

impl Parts {
    pub(crate) fn breaker(&self) -> Option<CircuitBreaker> {
        let Scope { tenant, processor } = &self.scope;
        Some(CircuitBreaker::new(CircuitBreakerParts {
            name: format!("processor/{tenant}/{processor}"),
            policy: self.options.breaker.clone()?,
            committer: self.committer.clone(),
            clock: self.clock.clone(),
            metrics: self.metrics.clone(),
        }))
    }
}

impl Inner {
    /// Waits for leave to run: a place, and the circuit breaker's. An ending if the message is put off instead; it has lost no
    /// attempt then.
    pub(crate) async fn leave(&self, message: &Accepted, claim: &mut RunRight) -> Result<RunPermit<'_>, Outcome> {
        let mut in_line = None;
        loop {
            let place = self.runs.acquire().await.expect("the semaphore is never closed");
            let Some(breaker) = &self.breaker else { return Ok(RunPermit { place, call: None }) };
            let refused = match breaker.enter() {
                Ok(call) => return Ok(RunPermit { place, call: Some(call) }),
                Err(refused) => refused,
            };
            // Others may need it: what waits holds no place.
            drop(place);
            if fault::mutated("breaker-open-counts-attempts") {
                claim.attempts += 1;
            }
            in_line.get_or_insert_with(|| breaker.stand_in_line());
            if !message.handling.retry_here || Box::pin(self.passable_or_stop(breaker)).await {
                return Err(Outcome::Paused { after_ms: refused.come_again_ms() });
            }
        }
    }

    /// Waits until the circuit breaker might let a run through; whether it was told to stop meanwhile.
    async fn passable_or_stop(&self, breaker: &CircuitBreaker) -> bool {
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            () = breaker.passable() => false,
            _ = stopping.wait_for(|stop| *stop) => true,
        }
    }

    fn runs_max(&self) -> usize {
        self.parts.options.runs_max.clamp(1, Semaphore::MAX_PERMITS)
    }
}
