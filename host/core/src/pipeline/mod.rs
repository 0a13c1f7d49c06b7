//! The pipeline: one message's straight line from accept to its ending. Owns the order of things; the decisions stand here,
//! the leaves (admission, overlay, committer, record) know nothing of each other.

pub(crate) mod admission;
pub(crate) mod batch;
pub(crate) mod claim;
pub(crate) mod commit_builder;
pub(crate) mod deferred;
pub(crate) mod delivery;
pub(crate) mod hold;
pub(crate) mod in_flight;
pub(crate) mod lanes;
pub(crate) mod options;
pub(crate) mod outcome;
pub(crate) mod permit;
pub(crate) mod run_result;
pub(crate) mod terminal_cache;

use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Semaphore, watch};

use crate::circuit_breaker::CircuitBreaker;
use crate::commit::committer::{Committer, Pending, Room};
use crate::commit::overlay;
use crate::commit::overlay::Overlay;
use crate::message::Message;
use crate::message::identity::Identity;
use crate::message::key::{RecordKey, Scope};
use crate::observe::metrics::IdempotencyMetrics;
use crate::pipeline::commit_builder::CommitBuilder;
use crate::pipeline::deferred::Deferred;
use crate::pipeline::delivery::{Accepted, Handling};
use crate::pipeline::in_flight::{InFlight, Leader};
use crate::pipeline::lanes::{Lanes, Turn};
use crate::pipeline::options::Options;
use crate::pipeline::outcome::Outcome;
use crate::pipeline::permit::RunPermit;
use crate::pipeline::run_result::RunResult;
use crate::pipeline::terminal_cache::TerminalCache;
use crate::record;
use crate::record::{Output, Record, RecordEvent};
use crate::run::checkpoint::CheckpointParts;
use crate::run::context::Context;
use crate::run::failure::Failure;
use crate::run::outbound::Outbound;
use crate::run::processor::{Invocation, MessageProcessor};
use crate::state::{Effects, ReadSet, StateView};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange, Verdict};
use crate::store::crash_tracker::{CrashTracker, RunMark};
use crate::support::clock::Clock;
use crate::support::error::StoreError;
use crate::support::fault;

/// What a consumer is made of.
pub struct Parts {
    /// Tenant and processor: whose state and records.
    pub scope: Scope,
    /// What processes the messages.
    pub processor: Arc<dyn MessageProcessor>,
    /// The store of record.
    pub storage: Arc<dyn IdempotencyStorage>,
    /// The committer of that store.
    pub committer: Arc<Committer>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Where counts go.
    pub metrics: Arc<dyn IdempotencyMetrics>,
    /// Who makes the processor's calls to the outside; `None`: it makes none.
    pub outbound: Option<Arc<dyn Outbound>>,
    /// Settings.
    pub options: Options,
}

/// One processor's idempotent consumer.
///
/// Cloning shares it. All its futures may be dropped at any time: what was not committed did not happen, what was
/// committed is found again.
#[derive(Clone)]
pub struct IdempotentConsumer {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) parts: Parts,
    lanes: Lanes,
    in_flight: InFlight,
    pub(crate) cache: TerminalCache,
    overlay: Arc<Overlay>,
    /// The state as runs see it: the overlay over the store.
    view: Arc<dyn StateView>,
    effect_limits: Arc<crate::state::EffectLimits>,
    notes: Arc<dyn CrashTracker>,
    /// What runs make durable before they end.
    pub(crate) early: Arc<CheckpointParts>,
    /// A place for each message that may be in flight: that runs, or whose commit is on its way.
    pub(crate) runs: Semaphore,
    /// Says when nothing is run, since too much fails.
    pub(crate) breaker: Option<CircuitBreaker>,
    /// Messages that the store keeps and this consumer is to run.
    pub(crate) kept: Deferred,
    /// Held by a run of a message that the process has died over: one at a time, so that of several suspects only the
    /// guilty one is there at the next death.
    suspect: tokio::sync::Mutex<()>,
    pub(crate) stopping: watch::Sender<bool>,
}

/// A message that may run: nobody else does, and its record allows it.
pub(crate) struct RunRight {
    /// Held until the ending is durable and in the cache.
    _leading: Leader,
    turn: Option<Turn>,
    /// The record as it was found, if its retention is not over.
    pub(crate) found: Option<Arc<Record>>,
    /// Epoch of the record that stands in the store.
    pub(crate) epoch: Option<u64>,
    /// Attempts made before this claim.
    pub(crate) attempts: u32,
    /// How many of them the process died over, and which no record has.
    deaths: u32,
    /// Due at this time, in milliseconds since the Unix epoch.
    not_before_ms: u64,
    /// When it was admitted, likewise.
    pub(crate) now_ms: u64,
    /// Whether an earlier run may have left something behind: steps, answers from outside.
    pub(crate) ran_before: bool,
    /// Whether the record says that it is claimed, and by this claim.
    pub(crate) is_own: bool,
}

/// A record that no message gets at.
pub(crate) struct RecordHold {
    _leading: Leader,
}

pub(crate) enum Admitted {
    Run(RunRight),
    Park { awaits: u64 },
    Mismatch,
    Ended(Outcome),
}

impl IdempotentConsumer {
    /// Joins the parts.
    pub fn new(parts: Parts) -> Self {
        let overlay = Arc::new(Overlay::default());
        let inner = Inner {
            view: overlay.over(parts.storage.view(&parts.scope)),
            lanes: Lanes::default(),
            in_flight: InFlight::default(),
            cache: TerminalCache::new(parts.options.cache_bytes),
            overlay,
            effect_limits: Arc::new(parts.options.effects.clone()),
            early: Arc::new(parts.early()),
            notes: parts.storage.crash_tracker(),
            breaker: parts.breaker(),
            runs: Semaphore::new(parts.options.runs_max.clamp(1, Semaphore::MAX_PERMITS)),
            kept: Deferred::new(parts.options.held_max),
            suspect: tokio::sync::Mutex::default(),
            stopping: watch::channel(false).0,
            parts,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The processor's scope.
    pub fn scope(&self) -> &Scope {
        &self.inner.parts.scope
    }

    /// Stops waiting for retries: messages that wait for their next attempt end as [`Outcome::Retry`]. Runs under way
    /// go on to their end.
    pub fn stop(&self) {
        self.inner.stopping.send_replace(true);
    }

    /// Processes one message: `accept`, at once, then `process`.
    pub fn handle(
        &self,
        message: Message,
        handling: Handling,
    ) -> impl Future<Output = Result<Outcome, StoreError>> + Send + '_ {
        self.process(self.accept(message, handling))
    }

    /// Derives key and fingerprint and takes the message's place in its lane: messages of one ordering key run in the
    /// order in which they were accepted.
    pub fn accept(&self, message: Message, handling: Handling) -> Accepted {
        let inner = &*self.inner;
        let (scope, options) = (&inner.parts.scope, &inner.parts.options);
        let (identity, refused) = match options.strategy.identify(scope, &message, &*inner.parts.clock) {
            Ok(identity) => (identity, None),
            Err(refused) => (Identity::by_message_id(scope, &message), Some(refused)),
        };
        Accepted {
            identity,
            refused,
            kept: false,
            past_gap: false,
            place: options.ordering.key(&message).map(|key| inner.lanes.enter(key)),
            message: Arc::new(message),
            handling,
            since: Instant::now(),
        }
    }

    /// Keeps every message off a record, until what is answered is dropped; what the record says is read again then.
    pub(crate) async fn hold(&self, key: &RecordKey) -> RecordHold {
        loop {
            match self.inner.in_flight.enter(key) {
                Ok(leading) => {
                    // Now, not at the end: what is written meanwhile is seen before the hold is over, and whoever sees it must
                    // not be answered by what was there before. Only who leads puts a record in the cache.
                    if !fault::mutated("cache-outlives-redrive") {
                        self.inner.cache.remove(key);
                    }
                    return RecordHold { _leading: leading };
                }
                Err(following) => following.ended().await,
            }
        }
    }

    /// Digest of the processor at work.
    pub fn component(&self) -> &str {
        self.inner.component()
    }

    /// The settings.
    pub fn options(&self) -> &Options {
        &self.inner.parts.options
    }

    /// Where time comes from.
    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.inner.parts.clock
    }

    /// The straight line. Returns when the ending is durable.
    ///
    /// What few messages need is in a box, here and below: a future is as large as all that it may ever wait for, and is moved as a whole.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` has room for each argument twice")]
    pub fn process(&self, mut accepted: Accepted) -> impl Future<Output = Result<Outcome, StoreError>> + Send + '_ {
        async move {
            let outcome = self.inner.process(&mut accepted).await?;
            let elapsed_us = accepted.since.elapsed().as_micros() as u64;
            self.inner.parts.metrics.ended(&self.inner.parts.scope, outcome.name(), elapsed_us);
            Ok(outcome)
        }
    }
}

impl Inner {
    async fn process(&self, message: &mut Accepted) -> Result<Outcome, StoreError> {
        if let Some(refused) = message.refused.take() {
            return Box::pin(self.refuse(message, refused.to_string())).await;
        }
        loop {
            let mut claim = match self.admit(message).await? {
                Admitted::Run(claim) => claim,
                Admitted::Park { awaits } => match Box::pin(self.park(message, awaits)).await? {
                    Some(outcome) => return Ok(outcome),
                    None => continue,
                },
                Admitted::Mismatch => return Box::pin(self.mismatch(message)).await,
                Admitted::Ended(Outcome::InFlight { after_ms })
                    if Box::pin(self.waits_elsewhere(message, after_ms)).await =>
                {
                    continue;
                }
                Admitted::Ended(outcome) => {
                    if self.may_be_kept(message, &outcome) {
                        Box::pin(self.keep_no_longer(message)).await?;
                    }
                    if outcome == Outcome::Stale && !fault::mutated("stale-left-as-it-is") {
                        Box::pin(self.leave_nothing_of(message)).await?;
                    }
                    return Ok(outcome);
                }
            };
            if let Some(outcome) = self.run_to_its_end(message, &mut claim).await? {
                return Ok(outcome);
            }
            // Somebody else wrote the record meanwhile: see what it says now.
        }
    }

    /// Invoke, sequence, commit; again after a conflict, and after the backoff of a failure that may pass.
    async fn run_to_its_end(&self, message: &Accepted, claim: &mut RunRight) -> Result<Option<Outcome>, StoreError> {
        loop {
            if claim.not_before_ms > 0
                && let Some(outcome) = Box::pin(self.wait_until_due(message, claim)).await
            {
                return Ok(Some(outcome));
            }
            if fault::mutated("mark-before-run") {
                Box::pin(self.mark_first(message, claim)).await?;
            }
            let RunPermit { place, call } = match self.leave(message, claim).await {
                Ok(leave) => leave,
                Err(put_off) => return Ok(Some(put_off)),
            };
            if self.claims() && !Box::pin(self.take_claim(message, claim)).await? {
                return Ok(None);
            }
            let running = self.overlay.begin();
            let Some(run) = self.run_once(message, claim).await? else { return Ok(None) };
            fault::point("invoked");
            let builder = self.builder(message);
            let (went, ended_ms) = (run.went(claim), builder.now_ms);
            let (mut commit, outcome) = builder.of(claim, run);
            self.stamp(&mut commit);
            let record = commit.record.put().expect("a run always leaves a record").clone();
            let room = self.parts.committer.room(&commit).await;
            let Ok(pending) = self.sequence(commit, room) else {
                self.parts.metrics.conflict(&self.parts.scope);
                claim.ran_before = true;
                continue;
            };
            drop(running);
            // Only now: a run that rested on what is no longer so says nothing.
            if let (Some(call), Some(went)) = (call, went) {
                call.ended(went, ended_ms, 1);
            }
            let retry = matches!(outcome, Outcome::Retry { .. });
            if !retry || fault::mutated("turn-passed-at-a-retry") {
                // The next of the lane may go: it sees these effects in the overlay.
                claim.turn = None;
            }
            let verdict = pending.durable().await?;
            if retry && fault::mutated("retry-holds-place") {
                std::mem::forget(place);
            } else {
                drop(place);
            }
            if claim.deaths > 0 && verdict == Verdict::Committed {
                // The record counts them from now on.
                self.notes.forget(&message.identity.message_key);
                claim.deaths = 0;
            }
            if retry {
                // What is in there is the record of an earlier message.
                self.cache.remove(&message.identity.record);
            }
            match verdict {
                Verdict::Committed if retry && message.handling.retry_here => claim.next_attempt(record),
                Verdict::Committed => {
                    let key = &message.identity.record;
                    self.cache.insert(key.clone(), record);
                    if matches!(outcome, Outcome::Compensating { .. }) {
                        self.parts.committer.undo();
                    }
                    if !retry && self.parts.options.strategy.gaps().is_some() {
                        self.kept.settled(&message.identity);
                    }
                    return Ok(Some(outcome));
                }
                Verdict::Conflict => {
                    self.parts.metrics.conflict(&self.parts.scope);
                    claim.ran_before = true;
                }
                Verdict::Taken(_) => return Ok(None),
            }
        }
    }

    /// Decides whether the message may run. Order of looking: cache of terminal records, in-flight table, store.
    async fn admit(&self, message: &mut Accepted) -> Result<Admitted, StoreError> {
        if !message.handling.wait_in_flight && self.in_flight.contains(&message.identity.record) {
            return Ok(Admitted::Ended(Outcome::InFlight { after_ms: 0 }));
        }
        let turn = match message.place.take() {
            Some(place) => {
                let in_a_place = fault::mutated("turn-waited-for-in-a-place");
                let _held = if in_a_place { self.runs.acquire().await.ok() } else { None };
                Some(place.turn().await)
            }
            None => None,
        };
        loop {
            // A later message of its entity may be on its way: what is remembered is then of an earlier one.
            let behind = message.identity.position.is_some() && self.in_flight.contains(&message.identity.record);
            let cached = if behind { None } else { self.cache.get(&message.identity.record) };
            self.parts.metrics.cache(&self.parts.scope, cached.is_some());
            if let Some(record) = cached
                && let Some(admitted) = self.answer(message, Some(&record))
            {
                return Ok(admitted);
            }
            let leading = match self.in_flight.enter(&message.identity.record) {
                Ok(leading) => leading,
                Err(_) if !message.handling.wait_in_flight => {
                    return Ok(Admitted::Ended(Outcome::InFlight { after_ms: 0 }));
                }
                Err(following) => {
                    following.ended().await;
                    continue;
                }
            };
            let found = self.parts.storage.admit(&message.identity.record).await?.map(Arc::new);
            if let Some(admitted) = self.answer(message, found.as_deref()) {
                if let Some(record) = found {
                    self.cache.insert(message.identity.record.clone(), record);
                }
                return Ok(admitted);
            }
            return Ok(Admitted::Run(self.claim(message, leading, turn, found)));
        }
    }

    /// The claim to a message that may run: there is no record, or one that allows it, or one whose retention is over.
    fn claim(&self, message: &Accepted, leading: Leader, turn: Option<Turn>, found: Option<Arc<Record>>) -> RunRight {
        let now_ms = self.parts.clock.now_ms();
        let epoch = found.as_ref().map(|record| record.epoch);
        // A record of the message before it says nothing of this one.
        let of_it = |record: &Arc<Record>| !record.has_expired(now_ms) && record.position == message.identity.position;
        let found = found.filter(of_it);
        let not_before_ms = match found.as_ref().map(|record| &record.state) {
            Some(record::RecordState::RetryDue { at_ms, .. }) => *at_ms,
            _ => 0,
        };
        let deaths = self.notes.deaths(&message.identity.message_key);
        let found_attempts =
            if fault::mutated("attempts-forgotten") { 0 } else { found.as_ref().map_or(0, |record| record.attempts) };
        let attempts = found_attempts + deaths;
        let ran_before = found.is_some() || deaths > 0;
        RunRight {
            _leading: leading,
            turn,
            found,
            epoch,
            attempts,
            deaths,
            not_before_ms,
            now_ms,
            ran_before,
            is_own: false,
        }
    }

    /// Waits out the backoff; an ending if the message is to be put off instead.
    async fn wait_until_due(&self, message: &Accepted, claim: &RunRight) -> Option<Outcome> {
        let after_ms = claim.not_before_ms.saturating_sub(self.parts.clock.now_ms());
        if after_ms == 0 {
            return None;
        }
        let mut stopping = self.stopping.subscribe();
        let stop = message.handling.retry_here && {
            tokio::select! {
                () = self.parts.clock.sleep(after_ms) => false,
                _ = stopping.wait_for(|stop| *stop) => true,
            }
        };
        if message.handling.retry_here && !stop {
            return None;
        }
        let error = claim.found.as_ref().and_then(|record| record.state.error()).unwrap_or_default().to_owned();
        Some(Outcome::Retry { error, after_ms })
    }

    /// Runs the message, unless the process has died over it as often as it may be tried.
    ///
    /// `None` if the claim was lost meanwhile.
    async fn run_once(&self, message: &Accepted, claim: &mut RunRight) -> Result<Option<RunResult>, StoreError> {
        if claim.deaths > 0 && claim.attempts >= self.parts.options.attempts_max {
            return Box::pin(self.give_up(message, claim)).await.map(Some);
        }
        let _alone = if claim.deaths > 0 { Some(Box::pin(self.suspect.lock()).await) } else { None };
        self.invoke(message, claim).await
    }

    /// What stands for a run of a message that the process has died over too often.
    async fn give_up(&self, message: &Accepted, claim: &RunRight) -> Result<RunResult, StoreError> {
        let result = Err(Failure::retry(format!("the host died {} times while it ran this message", claim.deaths)));
        let (reads, effects) = (ReadSet::default(), Effects::default());
        let early = self.unmade_early(message, claim.claimed()).make();
        let taken = Some(Box::new(early.take(true).await?));
        Ok(RunResult { attempts: claim.attempts, result, reads, effects, taken })
    }

    /// Runs the processor. No transaction is held; nothing is written but what `early.rs` writes, and the claim's renewals.
    async fn invoke(&self, message: &Accepted, claim: &mut RunRight) -> Result<Option<RunResult>, StoreError> {
        let invocation = Invocation {
            message: message.message.clone(),
            idempotency_key: message.identity.message_key.key.clone(),
            attempt: claim.attempts + 1,
            seed: message.identity.message_key.seed(),
        };
        let noted = RunMark::begin(&self.notes, &message.identity.message_key);
        fault::point_of("running", &message.message.id);
        let lazy = self.unmade_early(message, claim.claimed());
        let mut context = self.context(&message.identity.message_key).with_unmade_early(lazy);
        let result = if self.claims() {
            // In a box, as all that few messages need: what most of them carry along stays small.
            let early = context.made_early().expect("it was just given").clone();
            let running = self.parts.processor.process(&invocation, &mut context);
            match Box::pin(self.while_claimed(message, claim, &early, running)).await? {
                Some(result) => result,
                None => return Ok(None),
            }
        } else {
            self.parts.processor.process(&invocation, &mut context).await
        };
        drop(noted);
        // A message that names its saga has a part in it, whether or not its run has asked for that.
        let named = message.message.extensions.contains_key("saga");
        let early = if named { context.made_early().cloned() } else { context.take_early() };
        let taken = match early {
            Some(early) => Some(Box::new(Box::pin(early.take(claim.ran_before)).await?)),
            None => None,
        };
        let (reads, effects) = context.finish();
        Ok(Some(RunResult { attempts: claim.attempts + 1, result, reads, effects, taken }))
    }

    /// A context with nothing read or written yet.
    pub(crate) fn context(&self, message_key: &RecordKey) -> Context {
        Context::new(self.view.clone(), self.effect_limits.clone()).of(message_key)
    }

    /// Checks that what the run read still stands (also when it failed: it may have failed on what is no longer so), and
    /// gives the commit its place in the order. No other commit of this processor is sequenced in between.
    pub(crate) fn sequence(&self, commit: Box<Commit>, room: Room) -> Result<Pending, overlay::StaleReads> {
        let mut turn = self.overlay.turn(&commit.reads)?;
        Ok(self.parts.committer.submit_in_turn(commit, room, &self.overlay, &mut turn))
    }

    /// Digest of the processor.
    pub(crate) fn component(&self) -> &Arc<str> {
        &self.early.component
    }

    /// A run is about to begin whose effects are checked in the end.
    pub(crate) fn begin_run(&self) -> overlay::Running {
        self.overlay.begin()
    }

    /// Everything that decides what becomes of a message, at this moment.
    pub(crate) fn builder<'a>(&'a self, message: &'a Accepted) -> CommitBuilder<'a> {
        let (options, component) = (&self.parts.options, self.component());
        CommitBuilder { options, component, message, now_ms: self.parts.clock.now_ms() }
    }

    /// Gives a message that is to be kept its time.
    pub(crate) fn stamp(&self, commit: &mut Commit) {
        if let Some(HeldChange::Put(held_message)) = &mut commit.held_message {
            held_message.at_ms = self.kept.time(held_message.at_ms);
        }
    }

    /// The mutation "the record is marked before the guest runs".
    async fn mark_first(&self, message: &Accepted, claim: &RunRight) -> Result<(), StoreError> {
        let builder = self.builder(message);
        let record = builder.record(claim, 1, None, RecordEvent::Completed(Output::default()));
        let commit =
            Commit { expected: Expected::Absent, record: RecordChange::Put(record.into()), ..builder.commit() };
        let pending = self.parts.committer.submit(commit);
        pending.durable().await.map(drop)
    }
}

impl RunRight {
    /// The claim to the attempt after the one that `record` tells of.
    fn next_attempt(&mut self, record: Arc<Record>) {
        self.attempts = record.attempts;
        self.epoch = Some(record.epoch);
        self.not_before_ms = match &record.state {
            record::RecordState::RetryDue { at_ms, .. } => *at_ms,
            _ => 0,
        };
        self.found = Some(record);
        (self.ran_before, self.is_own) = (true, false);
    }
}
