//! Leave to run: a place among the runs, and the circuit breaker's. A message that waits for either holds neither, and loses no
//! attempt. What a run does is the pipeline's.

use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::circuit_breaker::state_machine::Went;
use crate::pipeline::{Accepted, Claim, IdempotentConsumer, Inner, Parts, Run};
use crate::pipeline::outcome::Ending;
use crate::support::fault;
use crate::circuit_breaker::{Breaker, BreakerParts, BreakerStatus, Call};
use crate::message::key::Scope;
use crate::run::processor::Failure;
use crate::store::StoreError;

/// What a run holds while it is under way.
pub(crate) struct Leave<'a> {
    pub(crate) place: SemaphorePermit<'a>,
    pub(crate) call: Option<Call<'a>>,
}

/// A consumer as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsumerStatus {
    /// Messages that run, or whose commit is on its way.
    pub runs_under_way: usize,
    /// At most.
    pub runs_max: usize,
    /// Messages that are parked or redriven.
    pub waiting: usize,
    /// The circuit breaker, where there is one.
    pub breaker: Option<BreakerStatus>,
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
            breaker: inner.breaker.as_ref().map(Breaker::status),
        }
    }
}

impl Parts {
    pub(crate) fn breaker(&self) -> Option<Breaker> {
        let Scope { tenant, processor } = &self.scope;
        Some(Breaker::new(BreakerParts {
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
    pub(crate) async fn leave(&self, message: &Accepted, claim: &mut Claim) -> Result<Leave<'_>, Ending> {
        let mut in_line = None;
        loop {
            let place = self.runs.acquire().await.expect("the semaphore is never closed");
            let Some(breaker) = &self.breaker else { return Ok(Leave { place, call: None }) };
            let refused = match breaker.enter() {
                Ok(call) => return Ok(Leave { place, call: Some(call) }),
                Err(refused) => refused,
            };
            // Others may need it: what waits holds no place.
            drop(place);
            if fault::mutated("breaker-open-counts-attempts") {
                claim.attempts += 1;
            }
            in_line.get_or_insert_with(|| breaker.stand_in_line());
            if !message.handling.retry_here || Box::pin(self.passable_or_stop(breaker)).await {
                return Err(Ending::Paused { after_ms: refused.come_again_ms() });
            }
        }
    }

    /// Waits until the circuit breaker might let a run through; whether it was told to stop meanwhile.
    async fn passable_or_stop(&self, breaker: &Breaker) -> bool {
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

impl Run {
    /// How it went, for the circuit breaker. What a processor refuses is an answer; `None`: it was not called at all.
    pub(crate) fn went(&self, claim: &Claim) -> Option<Went> {
        let failed = match &self.result {
            Ok(_) => false,
            Err(Failure::Retry { .. }) => true,
            Err(Failure::Reject(_) | Failure::Invalid(_)) => fault::mutated("breaker-counts-what-is-refused"),
        };
        (self.attempts > claim.attempts).then_some(if failed { Went::Badly } else { Went::Well })
    }
}
