//! A circuit breaker at work: callers share it, and refused callers wait for it. Its state is
//! written to the store when it opens and closes, so that a restarted host does not begin by
//! calling what was just given up. The rules for opening and closing are in `state_machine.rs`.

pub(crate) mod state_machine;

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tokio::sync::Notify;

use crate::circuit_breaker::state_machine::{BreakerPolicy, CallOutcome, CallResult, Refused, StateMachine};
use crate::commit::committer::Committer;
use crate::message::key::{RecordKey, Scope};
use crate::observe::metrics::IdempotencyMetrics;
use crate::observe::status::{BreakerState, BreakerStatus};
use crate::state::Effects;
use crate::state::RESERVED;
use crate::store::IdempotencyStorage;
use crate::store::commit::Commit;
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;

/// Retry delay of a refused caller, in milliseconds, where the time of closing is not known.
const RETRY_AFTER_MS: u64 = 1_000;

/// Parts of a circuit breaker.
pub struct CircuitBreakerParts {
    /// Name, unique in the host. Status and metrics use it, and the state is stored under it.
    pub name: String,
    /// Rules for opening and closing.
    pub policy: BreakerPolicy,
    /// Committer of the store that holds the state.
    pub committer: Arc<Committer>,
    /// Source of time.
    pub clock: Arc<dyn Clock>,
    /// Metrics that are notified of changes.
    pub metrics: Arc<dyn IdempotencyMetrics>,
}

/// A circuit breaker.
pub struct CircuitBreaker {
    parts: CircuitBreakerParts,
    machine: Mutex<StateMachine>,
    /// Generation of the machine while it is closed, else 0. While it is closed, a call begins
    /// without the lock.
    closed: AtomicU64,
    opened: AtomicU64,
    /// Woken when a call may be let through that was refused before.
    changed: Notify,
    /// Number of callers that wait in line for the breaker. When it falls to 0, `line_is_empty`
    /// wakes the task that brings more calls.
    in_line: AtomicUsize,
    line_is_empty: Notify,
}

/// A place in the line of the callers that wait for a breaker.
pub(crate) struct InLine<'a>(&'a CircuitBreaker);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if self.0.in_line.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.line_is_empty.notify_one();
        }
    }
}

/// A call under way. Dropping it ends the call without a result.
pub(crate) struct BreakerPermit<'a> {
    breaker: &'a CircuitBreaker,
    /// Generation in which the call began; `None` once it has ended.
    generation: Option<u64>,
    began_ms: u64,
}

impl CircuitBreaker {
    /// Returns a closed breaker.
    pub fn new(parts: CircuitBreakerParts) -> Self {
        let machine = StateMachine::new(parts.policy.clone());
        let closed = AtomicU64::new(machine.generation());
        Self {
            parts,
            machine: machine.into(),
            closed,
            opened: AtomicU64::new(0),
            changed: Notify::new(),
            in_line: AtomicUsize::new(0),
            line_is_empty: Notify::new(),
        }
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// Restores the state that an earlier process has left. A breaker that was open stays open
    /// until its time is over.
    pub async fn restore(&self, store: &dyn IdempotencyStorage) -> Result<(), StoreError> {
        let (_, stored) = store.view(&host_scope()).get(&self.state_key()).await?;
        let Some(stored) = stored else { return Ok(()) };
        match serde_json::from_slice(&stored) {
            Ok(state) => {
                let mut machine = self.machine.lock();
                machine.restore(state);
                self.publish(&machine);
            }
            // A closed start costs a few calls to find the state out again.
            Err(error) => tracing::warn!("{}: its stored state cannot be read, it starts closed: {error}", self.name()),
        }
        Ok(())
    }

    /// Begins a call, if it is let through.
    pub(crate) fn enter(&self) -> Result<BreakerPermit<'_>, Refused> {
        let began_ms = self.parts.clock.now_ms();
        let call = |generation| BreakerPermit { breaker: self, generation: Some(generation), began_ms };
        match self.closed.load(Ordering::Acquire) {
            0 => self.change(|machine| machine.enter(began_ms)).map(call),
            generation => Ok(call(generation)),
        }
    }

    /// Returns whether calls are let through without being counted one by one.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) != 0
    }

    /// Completes when a call may be let through; at once while the breaker is closed. Another
    /// caller may be quicker then.
    pub async fn passable(&self) {
        while !self.is_closed() {
            // Registered before the check: a change in between wakes it.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let refused = self.machine.lock().peek(self.parts.clock.now_ms());
            match refused {
                Ok(()) => return,
                Err(Refused { after_ms: None }) => changed.await,
                Err(Refused { after_ms: Some(after_ms) }) => {
                    tokio::select! { () = self.parts.clock.sleep(after_ms) => {}, () = changed => {} }
                }
            }
        }
    }

    /// Marks a caller as waiting for the breaker, until the returned place is dropped.
    pub(crate) fn stand_in_line(&self) -> InLine<'_> {
        self.in_line.fetch_add(1, Ordering::SeqCst);
        InLine(self)
    }

    /// Completes when a call may be let through for which no caller waits. For one task that brings
    /// more calls, not for many.
    pub(crate) async fn wants_more(&self) {
        while !self.is_closed() {
            if self.in_line.load(Ordering::SeqCst) > 0 {
                self.line_is_empty.notified().await;
                continue;
            }
            self.passable().await;
            if self.in_line.load(Ordering::SeqCst) == 0 {
                // Calls that were brought before may not have reached the line yet.
                return tokio::task::yield_now().await;
            }
        }
    }

    /// Returns the state and the counts.
    pub fn status(&self) -> BreakerStatus {
        let machine = self.machine.lock();
        let (calls, failed, slow) = machine.counts();
        BreakerStatus { state: machine.state(), calls, failed, slow, opened: self.opened.load(Ordering::Relaxed) }
    }

    /// Changes the machine, and notifies all observers if its state has changed.
    fn change<T>(&self, change: impl FnOnce(&mut StateMachine) -> T) -> T {
        let mut machine = self.machine.lock();
        let generation = machine.generation();
        let answer = change(&mut machine);
        if machine.generation() != generation {
            self.tell(&machine);
        }
        answer
    }

    fn tell(&self, machine: &MutexGuard<'_, StateMachine>) {
        let (name, state) = (self.name(), machine.state());
        match state {
            BreakerState::Open { .. } => {
                self.opened.fetch_add(1, Ordering::Relaxed);
                let open_ms = self.parts.policy.open_ms;
                tracing::warn!("{name}: too many failures or slow calls; nothing is tried for {open_ms} ms");
            }
            BreakerState::HalfOpen => tracing::info!("{name}: trying whether it goes well again"),
            BreakerState::Closed => tracing::warn!("{name}: it goes well again"),
        }
        self.publish(machine);
        self.store(state);
    }

    fn publish(&self, machine: &MutexGuard<'_, StateMachine>) {
        let state = machine.state();
        let closed = if state == BreakerState::Closed { machine.generation() } else { 0 };
        self.closed.store(closed, Ordering::Release);
        self.parts.metrics.breaker(self.name(), state);
        self.changed.notify_waiters();
    }

    /// Submits the state for writing; nothing waits for the commit. Half-open is not written: an
    /// open breaker becomes half-open when its time is over.
    fn store(&self, state: BreakerState) {
        if state == BreakerState::HalfOpen || fault::mutated("breaker-not-stored") {
            return;
        }
        let key = RecordKey::new(host_scope(), "/breaker".into(), self.name().into());
        let value = serde_json::to_vec(&state).expect("a name and a number");
        let effects = Effects { writes: [(self.state_key(), Some(value.into()))].into(), ..Effects::default() };
        drop(self.parts.committer.submit(Commit { effects, ..Commit::of(&key) }));
    }

    fn state_key(&self) -> String {
        format!("{RESERVED}breaker/{}", self.name())
    }
}

/// Returns the scope of the stored state: the host's own.
fn host_scope() -> Scope {
    Scope { tenant: "host".into(), processor: "host".into() }
}

impl BreakerPermit<'_> {
    /// Ends the call at `now_ms` since the Unix epoch. The call was `parts` calls in one, and each
    /// took its part of the time.
    pub(crate) fn ended(mut self, went: CallResult, now_ms: u64, parts: u64) {
        let elapsed_ms = now_ms.saturating_sub(self.began_ms) / parts.max(1);
        self.leave(Some(CallOutcome { went, elapsed_ms }), now_ms);
    }

    fn leave(&mut self, outcome: Option<CallOutcome>, now_ms: u64) {
        let Some(generation) = self.generation.take() else { return };
        self.breaker.change(|machine| machine.leave(generation, outcome, now_ms));
        if !self.breaker.is_closed() {
            // The slot of a probe may be free.
            self.breaker.changed.notify_waiters();
        }
    }
}

impl Drop for BreakerPermit<'_> {
    fn drop(&mut self) {
        self.leave(None, self.began_ms);
    }
}

impl Refused {
    /// Returns the retry delay, in milliseconds.
    pub(crate) fn retry_after_ms(self) -> u64 {
        self.after_ms.unwrap_or(RETRY_AFTER_MS)
    }
}
