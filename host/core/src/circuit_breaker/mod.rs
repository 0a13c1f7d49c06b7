//! A circuit breaker at work: shared by those who call, waited for by those who may not, written to the store when it opens and
//! closes, so that a host that is started again does not begin by calling what was just given up. When is `breaker.rs`.

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

/// After so many milliseconds who is put off may come again, where nobody knows when it closes.
const RETRY_AFTER_MS: u64 = 1_000;

/// What a breaker is made of.
pub struct CircuitBreakerParts {
    /// Its name among all of the host: what status and metrics call it, and what its state is stored under.
    pub name: String,
    /// When it opens and closes.
    pub policy: BreakerPolicy,
    /// The committer of the store that keeps its state.
    pub committer: Arc<Committer>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Who is told of its changes.
    pub metrics: Arc<dyn IdempotencyMetrics>,
}

/// A circuit breaker.
pub struct CircuitBreaker {
    parts: CircuitBreakerParts,
    machine: Mutex<StateMachine>,
    /// The machine's generation while it is closed, else 0: who calls then needs no lock to begin.
    closed: AtomicU64,
    opened: AtomicU64,
    /// Woken when a call might be let through that was not before.
    changed: Notify,
    /// How many stand in line for it, and who is woken when nobody does any more: the one who would bring more.
    in_line: AtomicUsize,
    line_is_empty: Notify,
}

/// A place in the line of those who wait for a breaker.
pub(crate) struct InLine<'a>(&'a CircuitBreaker);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if self.0.in_line.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.line_is_empty.notify_one();
        }
    }
}

/// A call under way. Dropped, it says nothing of how it went.
pub(crate) struct BreakerPermit<'a> {
    breaker: &'a CircuitBreaker,
    /// `None` once it has ended.
    generation: Option<u64>,
    began_ms: u64,
}

impl CircuitBreaker {
    /// A closed breaker.
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

    /// Its name.
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// Takes up the state that an earlier process has left: one that was open stays so until its time is over.
    pub async fn restore(&self, store: &dyn IdempotencyStorage) -> Result<(), StoreError> {
        let (_, stored) = store.view(&host_scope()).get(&self.state_key()).await?;
        let Some(stored) = stored else { return Ok(()) };
        match serde_json::from_slice(&stored) {
            Ok(state) => {
                let mut machine = self.machine.lock();
                machine.restore(state);
                self.publish(&machine);
            }
            // It costs a few calls to find out again.
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

    /// Whether calls are let through without being counted one by one.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) != 0
    }

    /// Completes when a call might be let through; at once while it is closed. Somebody else may be quicker then.
    pub async fn passable(&self) {
        while !self.is_closed() {
            // Before looking: a change in between wakes it.
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

    /// Notes that somebody waits for it, until what is answered is dropped.
    pub(crate) fn stand_in_line(&self) -> InLine<'_> {
        self.in_line.fetch_add(1, Ordering::SeqCst);
        InLine(self)
    }

    /// Completes when a call might be let through that nobody waits for. For one who brings more, not for many.
    pub(crate) async fn wants_more(&self) {
        while !self.is_closed() {
            if self.in_line.load(Ordering::SeqCst) > 0 {
                self.line_is_empty.notified().await;
                continue;
            }
            self.passable().await;
            if self.in_line.load(Ordering::SeqCst) == 0 {
                // What was brought before may not have come as far as the line yet.
                return tokio::task::yield_now().await;
            }
        }
    }

    /// How it stands.
    pub fn status(&self) -> BreakerStatus {
        let machine = self.machine.lock();
        let (calls, failed, slow) = machine.counts();
        BreakerStatus { state: machine.state(), calls, failed, slow, opened: self.opened.load(Ordering::Relaxed) }
    }

    /// Changes the machine, and tells everybody if its state is another one then.
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

    /// Has the state written; nobody waits for it. Half-open is not: it is what open becomes when its time is over.
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

/// Whose state it is: the host's own.
fn host_scope() -> Scope {
    Scope { tenant: "host".into(), processor: "host".into() }
}

impl BreakerPermit<'_> {
    /// It has ended, at `now_ms` since the Unix epoch, and was `parts` calls in one: each took its part of the time.
    pub(crate) fn ended(mut self, went: CallResult, now_ms: u64, parts: u64) {
        let elapsed_ms = now_ms.saturating_sub(self.began_ms) / parts.max(1);
        self.leave(Some(CallOutcome { went, elapsed_ms }), now_ms);
    }

    fn leave(&mut self, outcome: Option<CallOutcome>, now_ms: u64) {
        let Some(generation) = self.generation.take() else { return };
        self.breaker.change(|machine| machine.leave(generation, outcome, now_ms));
        if !self.breaker.is_closed() {
            // The place of a probe may be free.
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
    /// When to come again, in milliseconds from now.
    pub(crate) fn retry_after_ms(self) -> u64 {
        self.after_ms.unwrap_or(RETRY_AFTER_MS)
    }
}
