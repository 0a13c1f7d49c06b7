//! The pipeline: a message's way from its delivery to its outcome. It calls the steps in their
//! order and decides on the next one by the result of each. The steps know nothing of each other.
//!
//! ```text
//! accept > admit > permit > claim > invoke > sequence > commit > settle
//! ```

pub(crate) mod admission;
pub(crate) mod batch;
pub(crate) mod claim;
pub(crate) mod commit_builder;
pub(crate) mod compensate;
pub(crate) mod deferred;
pub(crate) mod delivery;
pub(crate) mod give_up;
pub(crate) mod hold;
pub(crate) mod in_flight;
pub(crate) mod invoke;
pub(crate) mod lanes;
pub(crate) mod options;
pub(crate) mod outcome;
pub(crate) mod permit;
pub(crate) mod run_result;
pub(crate) mod terminal_cache;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::commit::committer::{Committer, Pending};
use crate::commit::overlay::{NotNow, Overlay, Reservation};
use crate::message::Message;
use crate::message::identity::Identity;
use crate::message::key::{RecordKey, Scope};
use crate::observe::metrics::IdempotencyMetrics;
use crate::observe::status::ConsumerStatus;
use crate::pipeline::admission::{Admission, Admitted, NotRun, RecordHold};
use crate::pipeline::claim::{Claims, RunRight};
use crate::pipeline::commit_builder::{Built, CommitBuilder};
use crate::pipeline::deferred::Deferred;
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::hold::{Hold, Parked};
use crate::pipeline::invoke::{Invoked, Invoker};
use crate::pipeline::lanes::{LaneTicket, Lanes, Turn};
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::permit::{Permits, Permitted, RunPermit};
use crate::record::{Output, Record, RecordEvent};
use crate::run::outbound::Outbound;
use crate::run::processor::MessageProcessor;
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Expected, RecordChange, Verdict};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;

/// Longest wait before a record that another owner works on is read again, in milliseconds.
const POLL_INTERVAL_MS: u64 = 200;
/// Conflicts after which a run reserves the order, so that its reads cannot change again.
const CONFLICTS_MAX: u32 = 8;
/// Longest pause before a run that has had that many conflicts, in milliseconds. The order is that
/// of one processor: what several processors write, a reservation does not protect.
const CONFLICT_PAUSE_MS: u64 = 100;
/// Longest wait of a held message for its turn, in milliseconds: it has one of few places.
const HELD_TURN_MS: u64 = 5_000;
/// Delay before a held message that has not got its turn asks for it again, in milliseconds.
const HELD_AGAIN_MS: u64 = 1_000;

/// The parts of a consumer.
pub struct Parts {
    /// Tenant and processor, which own the state and the records.
    pub scope: Scope,
    /// Processes the messages.
    pub processor: Arc<dyn MessageProcessor>,
    /// The store of record.
    pub storage: Arc<dyn IdempotencyStorage>,
    /// The committer of that store.
    pub committer: Arc<Committer>,
    /// The source of time.
    pub clock: Arc<dyn Clock>,
    /// Takes the counts.
    pub metrics: Arc<dyn IdempotencyMetrics>,
    /// Makes the processor's outbound calls. `None` if it was granted none.
    pub outbound: Option<Arc<dyn Outbound>>,
    /// Settings.
    pub options: Options,
}

/// One processor's idempotent consumer.
///
/// Clones share one consumer. Any of its futures may be dropped at any time: effects that were not
/// committed did not happen, and those that were committed are found again.
#[derive(Clone)]
pub struct IdempotentConsumer {
    pub(crate) pipeline: Arc<Pipeline>,
}

/// The steps of one consumer, each with the state it needs.
pub(crate) struct Pipeline {
    pub(crate) parts: Arc<Parts>,
    lanes: Lanes,
    admission: Admission,
    pub(crate) permits: Permits,
    claims: Claims,
    invoker: Invoker,
    pub(crate) overlay: Arc<Overlay>,
    hold: Hold,
    stopping: watch::Sender<bool>,
}

/// End of a stretch of the pipeline.
enum Step {
    /// The message has this outcome.
    Ended(Outcome),
    /// The record has changed, or may soon: admit the message again.
    AdmitAgain,
}

/// End of one attempt to run a message.
enum Attempt {
    Ended(Outcome),
    /// Another owner wrote the record: admit the message again.
    RecordChanged,
    /// The reads of the run have changed, or its retry is due here: run the message again.
    RunAgain,
}

/// A commit that has its place in the order.
pub(crate) struct Sequenced {
    pub(crate) pending: Pending,
    /// The store may still refuse the commit, and send its message back to the start.
    may_be_refused: bool,
}

impl IdempotentConsumer {
    /// Joins the parts.
    pub fn new(parts: Parts) -> Self {
        let parts = Arc::new(parts);
        let overlay = Arc::new(Overlay::default());
        let admission = Admission::new(parts.clone());
        let claims = Claims::new(parts.clone());
        let pipeline = Pipeline {
            lanes: Lanes::default(),
            permits: Permits::new(parts.clone()),
            invoker: Invoker::new(parts.clone(), &overlay, admission.crash_tracker.clone()),
            hold: Hold::new(parts.clone(), claims.checkpoints.component.clone()),
            admission,
            claims,
            overlay,
            stopping: watch::channel(false).0,
            parts,
        };
        Self { pipeline: Arc::new(pipeline) }
    }

    /// Returns the processor's scope.
    pub fn scope(&self) -> &Scope {
        &self.pipeline.parts.scope
    }

    /// Returns the digest of the component at work.
    pub fn component(&self) -> &str {
        self.pipeline.component()
    }

    /// Returns the settings.
    pub fn options(&self) -> &Options {
        &self.pipeline.parts.options
    }

    /// Returns the consumer's load and the state of its circuit breaker.
    pub fn status(&self) -> ConsumerStatus {
        self.pipeline.permits.status(self.pipeline.hold.deferred.len())
    }

    /// Takes up the state in which an earlier process left the circuit breaker. Call it before the
    /// first message.
    pub async fn restore(&self) -> Result<(), StoreError> {
        self.pipeline.permits.restore().await
    }

    /// Completes when another message could run: a slot is free, and the circuit breaker is closed,
    /// or lets a few through and no message waits for that.
    pub async fn wants_messages(&self) {
        self.pipeline.permits.wants_messages().await;
    }

    /// Stops waiting: messages that wait for their next attempt, their turn or a slot end as
    /// [`Outcome::Retry`]. Runs under way go on to their end, and so do messages whose delivery
    /// does not wait here ([`Handling::retry_here`]).
    pub fn stop(&self) {
        self.pipeline.stopping.send_replace(true);
    }

    /// Processes one message: [`accept`](Self::accept), at once, then [`process`](Self::process).
    pub fn handle(
        &self,
        message: Message,
        handling: Handling,
    ) -> impl Future<Output = Result<Outcome, StoreError>> + Send + '_ {
        self.process(self.accept(message, handling))
    }

    /// Derives the message's identity and takes its place in its lane: messages of one ordering key
    /// run in the order in which they were accepted.
    pub fn accept(&self, message: Message, handling: Handling) -> Accepted {
        let Parts { scope, options, clock, .. } = &*self.pipeline.parts;
        let (identity, unidentified) = match options.strategy.identify(scope, &message, &**clock) {
            Ok(identity) => (identity, None),
            Err(unidentified) => (Identity::by_message_id(scope, &message), Some(unidentified)),
        };
        Accepted {
            identity,
            unidentified,
            is_held: false,
            past_gap: false,
            ticket: options.ordering.key(&message).map(|key| self.pipeline.lanes.enter(key)),
            message: Arc::new(message),
            handling,
            since: Instant::now(),
        }
    }

    /// Brings an accepted message to its outcome. Returns when the outcome is durable.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` has room for each argument twice")]
    pub fn process(&self, mut accepted: Accepted) -> impl Future<Output = Result<Outcome, StoreError>> + Send + '_ {
        async move {
            let outcome = self.pipeline.process(&mut accepted).await?;
            let elapsed_us = accepted.since.elapsed().as_micros() as u64;
            self.pipeline.parts.metrics.ended(&self.pipeline.parts.scope, outcome.name(), elapsed_us);
            Ok(outcome)
        }
    }

    /// Keeps every message off a record until the returned hold is dropped.
    pub(crate) async fn hold_record(&self, key: &RecordKey) -> RecordHold {
        self.pipeline.admission.hold_record(key).await
    }

    /// Returns the held messages that this consumer is to run.
    pub(crate) fn deferred(&self) -> &Deferred {
        &self.pipeline.hold.deferred
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.pipeline.parts.clock
    }
}

// Rare paths are boxed, here and in the steps: a future is as large as its largest await, and it is
// moved by value.
impl Pipeline {
    async fn process(&self, message: &mut Accepted) -> Result<Outcome, StoreError> {
        if let Some(unidentified) = message.unidentified.take() {
            return Box::pin(self.hold.refuse(message, unidentified.to_string())).await;
        }
        // Kept until nothing can send the message back to the start: it would run behind its
        // successors.
        let mut turn = None;
        loop {
            if fault::mutated("turn-lost-while-waiting") {
                turn = None;
            }
            let step = match self.admit(message, &mut turn).await? {
                Admitted::Run(mut right) => self.run(message, &mut right, &mut turn).await?,
                Admitted::NotRun(NotRun::Answered(outcome)) => self.answer(message, outcome).await?,
                Admitted::NotRun(NotRun::Mismatch) => Step::Ended(Box::pin(self.hold.mismatch(message)).await?),
                Admitted::NotRun(NotRun::Park { awaits }) => {
                    match Box::pin(self.hold.park(&self.admission, message, awaits)).await? {
                        Parked::Ended(outcome) => Step::Ended(outcome),
                        Parked::MayRun => Step::AdmitAgain,
                    }
                }
            };
            if let Step::Ended(outcome) = step {
                return Ok(outcome);
            }
        }
    }

    /// Waits for the message's turn in its lane, then asks whether it may run.
    async fn admit(&self, message: &mut Accepted, turn: &mut Option<Turn>) -> Result<Admitted, StoreError> {
        if !message.handling.wait_in_flight && self.admission.is_in_flight(message) {
            return Ok(Admitted::NotRun(NotRun::Answered(Outcome::InFlight { after_ms: 0 })));
        }
        if let Some(ticket) = message.ticket.take() {
            let in_a_slot = fault::mutated("turn-waited-for-in-a-place");
            let _slot = if in_a_slot { Some(self.permits.slot().await) } else { None };
            *turn = if message.is_held && !fault::mutated("held-message-waits-for-its-turn") {
                Box::pin(self.turn_of_held(ticket)).await
            } else {
                Some(ticket.turn().await)
            };
            if turn.is_none() {
                return Ok(Admitted::NotRun(NotRun::Answered(Outcome::InFlight { after_ms: HELD_AGAIN_MS })));
            }
        }
        self.admission.admit(message).await
    }

    /// Waits for the turn of a held message, but not for long.
    async fn turn_of_held(&self, ticket: LaneTicket) -> Option<Turn> {
        tokio::select! {
            biased;
            turn = ticket.turn() => Some(turn),
            // Evaluated only when it is waited for: with a clock that a test turns, a sleep ends at
            // once.
            () = async { self.parts.clock.sleep(HELD_TURN_MS).await } => None,
        }
    }

    /// Ends a message with the outcome that its record, or its run elsewhere, gives it.
    async fn answer(&self, message: &Accepted, outcome: Outcome) -> Result<Step, StoreError> {
        if let Outcome::InFlight { after_ms } = outcome
            && Box::pin(self.wait_elsewhere(message, after_ms)).await
        {
            return Ok(Step::AdmitAgain);
        }
        if self.hold.may_hold(message, &outcome) {
            Box::pin(self.hold.release(&self.admission, message)).await?;
        }
        if outcome == Outcome::Stale && !fault::mutated("stale-left-as-it-is") {
            Box::pin(self.claims.abandon(self.builder(message))).await?;
        }
        Ok(Step::Ended(outcome))
    }

    /// Waits for a message that another owner runs, or that is being compensated. Returns `false`
    /// if the delivery is put off instead.
    async fn wait_elsewhere(&self, message: &Accepted, after_ms: u64) -> bool {
        let Handling { wait_in_flight, retry_here } = message.handling;
        if !(wait_in_flight && retry_here) || *self.stopping.borrow() {
            return false;
        }
        self.sleep_or_stop(after_ms.clamp(1, POLL_INTERVAL_MS)).await
    }

    /// Runs the message until it has an outcome: again after a conflict, and after the delay of a
    /// retry.
    async fn run(&self, message: &Accepted, right: &mut RunRight, turn: &mut Option<Turn>) -> Result<Step, StoreError> {
        loop {
            match self.attempt(message, right, turn).await? {
                Attempt::Ended(outcome) => return Ok(Step::Ended(outcome)),
                Attempt::RecordChanged => return Ok(Step::AdmitAgain),
                Attempt::RunAgain => {}
            }
        }
    }

    /// Makes one attempt: permit, claim, invoke, sequence, commit, settle.
    async fn attempt(
        &self,
        message: &Accepted,
        right: &mut RunRight,
        turn: &mut Option<Turn>,
    ) -> Result<Attempt, StoreError> {
        if right.due_ms > 0
            && let Some(put_off) = Box::pin(self.wait_until_due(message, right)).await
        {
            return Ok(Attempt::Ended(put_off));
        }
        if fault::mutated("mark-before-run") {
            Box::pin(self.mark_before_run(message, right)).await?;
        }
        let permit = match self.permits.acquire(message, right, &self.stopping).await {
            Permitted::Run(permit) => permit,
            Permitted::PutOff(outcome) => return Ok(Attempt::Ended(outcome)),
        };
        // Before the claim: a suspect may wait for longer than a claim lasts.
        let _alone = if right.deaths > 0 { Some(Box::pin(self.invoker.suspects()).await) } else { None };
        if self.claims.are_needed() && !Box::pin(self.claims.take(message, right)).await? {
            return Ok(Attempt::RecordChanged);
        }
        let reservation = if right.conflicts >= CONFLICTS_MAX { Box::pin(self.reserve(message)).await } else { None };
        let reading = self.overlay.begin();
        let Invoked::Run(run) = self.invoker.invoke(&self.claims, message, right).await? else {
            return Ok(Attempt::RecordChanged);
        };
        fault::point("invoked");
        let builder = self.builder(message);
        let (call_result, ended_ms) = (run.call_result(right), builder.now_ms);
        let Built { mut commit, outcome } = builder.build(right, run);
        self.hold.stamp(&mut commit);
        let record = commit.record.put().expect("a run always leaves a record").clone();
        let Some(sequenced) = self.sequence(commit, right.is_claimed, reservation.as_ref()).await else {
            return Ok(self.conflict(right));
        };
        drop((reading, reservation));
        let RunPermit { slot, breaker } = permit;
        // Only now: a run whose reads were stale says nothing about the processor.
        if let (Some(breaker), Some(call_result)) = (breaker, call_result) {
            breaker.ended(call_result, ended_ms, 1);
        }
        let is_retry = matches!(outcome, Outcome::Retry { .. });
        let comes_back = sequenced.may_be_refused && !fault::mutated("turn-passed-before-the-verdict");
        if !(is_retry || comes_back) || fault::mutated("turn-passed-at-a-retry") {
            // The next message of the lane may run: it sees these effects in the overlay.
            *turn = None;
        }
        let verdict = sequenced.pending.durable().await?;
        if is_retry && fault::mutated("retry-holds-place") {
            std::mem::forget(slot);
        } else {
            drop(slot);
        }
        Ok(self.settle(message, right, verdict, record, outcome))
    }

    /// Waits until the retry of a message is due. Returns an outcome if the message is put off
    /// instead.
    async fn wait_until_due(&self, message: &Accepted, right: &RunRight) -> Option<Outcome> {
        let after_ms = right.due_ms.saturating_sub(self.parts.clock.now_ms());
        if after_ms == 0 || (message.handling.retry_here && self.sleep_or_stop(after_ms).await) {
            return None;
        }
        let error = right.found.as_ref().and_then(|record| record.state.error()).unwrap_or_default().to_owned();
        Some(Outcome::Retry { error, after_ms })
    }

    /// Sleeps for `after_ms`. Returns `false` if the consumer was told to stop meanwhile.
    async fn sleep_or_stop(&self, after_ms: u64) -> bool {
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            () = self.parts.clock.sleep(after_ms) => true,
            _ = stopping.wait_for(|stop| *stop) => false,
        }
    }

    /// Reserves the order for a run that has had too many conflicts.
    async fn reserve(&self, message: &Accepted) -> Option<Reservation> {
        if fault::mutated("conflicts-without-end") {
            return None;
        }
        let pause_ms = message.identity.message_key.seed() % CONFLICT_PAUSE_MS;
        self.parts.clock.sleep(pause_ms).await;
        Some(self.overlay.reserve().await)
    }

    /// Waits for room, checks that the reads of the run still hold, and gives the commit its place
    /// in the order; returns `None` if the reads have changed. A failed run is checked, too: the
    /// data on which it failed may have changed since. No other commit of this processor is
    /// sequenced in between. `is_fenced`: another owner may take the record over meanwhile.
    pub(crate) async fn sequence(
        &self,
        commit: Box<Commit>,
        is_fenced: bool,
        reservation: Option<&Reservation>,
    ) -> Option<Sequenced> {
        loop {
            let room = self.parts.committer.room(&commit).await;
            match self.overlay.turn(&commit.reads, is_fenced || commit.may_be_refused(), reservation) {
                Ok(mut turn) => {
                    let may_be_refused = turn.may_be_refused;
                    let pending = self.parts.committer.submit_in_turn(commit, room, &self.overlay, &mut turn);
                    return Some(Sequenced { pending, may_be_refused });
                }
                Err(NotNow::StaleReads) => return None,
                Err(NotNow::Reserved) => {}
            }
            // Without the room: the run that has reserved the order needs some, too.
            drop(room);
            Box::pin(self.overlay.unreserved()).await;
        }
    }

    /// Ends an attempt whose commit has its verdict.
    fn settle(
        &self,
        message: &Accepted,
        right: &mut RunRight,
        verdict: Verdict,
        record: Arc<Record>,
        outcome: Outcome,
    ) -> Attempt {
        let Identity { record: key, message_key, .. } = &message.identity;
        if right.deaths > 0 && verdict == Verdict::Committed {
            // From now on the record counts the deaths.
            self.admission.crash_tracker.forget(message_key);
            right.deaths = 0;
        }
        let is_retry = matches!(outcome, Outcome::Retry { .. });
        if is_retry {
            // The cached record is that of an earlier message of the entity.
            self.admission.forget(key);
        }
        match verdict {
            Verdict::Committed if is_retry && message.handling.retry_here => {
                let due_ms = record.due_ms(self.parts.clock.now_ms(), self.parts.options.longest_delay_ms());
                right.next_attempt(record, due_ms);
                Attempt::RunAgain
            }
            Verdict::Committed => {
                self.admission.remember(key, record);
                if matches!(outcome, Outcome::Compensating { .. }) {
                    self.parts.committer.wake_compensator();
                }
                if !is_retry && self.parts.options.strategy.gaps().is_some() {
                    self.hold.deferred.settled(&message.identity);
                }
                Attempt::Ended(outcome)
            }
            Verdict::Conflict => self.conflict(right),
            Verdict::EpochMismatch(_) => Attempt::RecordChanged,
        }
    }

    /// Runs a message again, since the reads of its run have changed.
    fn conflict(&self, right: &mut RunRight) -> Attempt {
        self.parts.metrics.conflict(&self.parts.scope);
        right.ran_before = true;
        right.conflicts += 1;
        Attempt::RunAgain
    }

    /// Injects the fault "the record is marked before the guest runs".
    async fn mark_before_run(&self, message: &Accepted, right: &RunRight) -> Result<(), StoreError> {
        let builder = self.builder(message);
        let record = builder.record(right, 1, None, RecordEvent::Completed(Output::default()));
        let commit =
            Commit { expected: Expected::Absent, record: RecordChange::Put(record.into()), ..builder.empty_commit() };
        self.parts.committer.submit(commit).durable().await.map(drop)
    }

    /// Returns the builder of a message's commit at this moment.
    fn builder<'a>(&'a self, message: &'a Accepted) -> CommitBuilder<'a> {
        CommitBuilder::new(&self.parts, self.component(), message)
    }

    /// Returns the digest of the component.
    pub(crate) fn component(&self) -> &Arc<str> {
        &self.claims.checkpoints.component
    }
}
