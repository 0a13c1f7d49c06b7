//! The pipeline: one message's straight line from accept to its ending. Owns the order of things; the decisions stand here,
//! the leaves (admission, overlay, committer, record) know nothing of each other.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::admission::{Admission, InFlight, Leading, Stored, TerminalCache, decide};
use crate::clock::Clock;
use crate::committer::{Committer, Pending, Room};
use crate::conclude::Conclusion;
use crate::context::{Context, Effects, ReadSet, StateView};
use crate::fault;
use crate::key::{Fingerprint, RecordKey, Scope};
use crate::lanes::{Lanes, Place, Turn};
use crate::message::Message;
use crate::metrics::IdempotencyMetrics;
use crate::options::{MismatchPolicy, Options};
use crate::overlay::{self, Overlay};
use crate::processor::{Failure, Invocation, MessageProcessor, Output};
use crate::record::{self, Event, Record};
use crate::running::{Noted, RunningNotes};
use crate::storage::{Commit, IdempotencyStorage, StoreError, Verdict};

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
    /// Settings.
    pub options: Options,
}

/// One processor's idempotent consumer.
///
/// Cloning shares it. All its futures may be dropped at any time: what was not committed did not happen, what was
/// committed is found again.
#[derive(Clone)]
pub struct IdempotentConsumer {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    lanes: Lanes,
    in_flight: InFlight,
    cache: TerminalCache,
    overlay: Arc<Overlay>,
    /// The state as runs see it: the overlay over the store.
    view: Arc<dyn StateView>,
    /// Digest of the processor, as records keep it.
    component: Arc<str>,
    effect_limits: Arc<crate::context::EffectLimits>,
    notes: Arc<dyn RunningNotes>,
    /// Held by a run of a message that the process has died over: one at a time, so that of several suspects only the
    /// guilty one is there at the next death.
    suspect: tokio::sync::Mutex<()>,
    stopping: watch::Sender<bool>,
}

/// How a delivery wants to be treated.
#[derive(Debug, Clone, Copy)]
pub struct Handling {
    /// A duplicate of a message in flight waits for its outcome; otherwise it ends as [`Ending::InFlight`] at once.
    pub wait_in_flight: bool,
    /// A retryable failure is run again here, after its backoff; otherwise it ends as [`Ending::Retry`] and the
    /// source delivers again.
    pub retry_here: bool,
}

impl Default for Handling {
    fn default() -> Self {
        Self { wait_in_flight: true, retry_here: true }
    }
}

/// A message in its place: accepted, its order fixed, nothing run yet.
pub struct Accepted {
    pub(crate) message: Arc<Message>,
    pub(crate) key: RecordKey,
    pub(crate) fingerprint: Fingerprint,
    place: Option<Place>,
    handling: Handling,
    since: Instant,
}

/// How a delivery of a message ended. Everything but `Retry` and `InFlight` is durable and may be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It ran, and its effects are durable.
    Completed {
        /// Its result.
        output: Output,
    },
    /// It had ended before: nothing ran.
    Duplicate(Stored),
    /// Its key was used with another body: nothing ran.
    Mismatch,
    /// It failed for good; the record keeps the message and the error.
    DeadLettered {
        /// What went wrong.
        error: String,
    },
    /// It is due again later.
    Retry {
        /// What went wrong.
        error: String,
        /// Due after this many milliseconds.
        after_ms: u64,
    },
    /// It is being run by somebody else.
    InFlight {
        /// Ask again after this many milliseconds.
        after_ms: u64,
    },
}

impl Ending {
    /// The outcome's name, as the command line, the API and the metrics print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Completed { .. } => "completed",
            Self::Duplicate(_) => "duplicate",
            Self::Mismatch => "mismatch",
            Self::DeadLettered { .. } => "dead-lettered",
            Self::Retry { .. } => "retry",
            Self::InFlight { .. } => "in-flight",
        }
    }
}

/// A message that may run: nobody else does, and its record allows it.
pub(crate) struct Claim {
    /// Held until the ending is durable and in the cache.
    _leading: Leading,
    turn: Option<Turn>,
    /// The record as it was found, if its retention is not over.
    pub(crate) found: Option<Arc<Record>>,
    /// Epoch of the record that stands in the store.
    pub(crate) epoch: Option<u64>,
    /// Attempts made before this claim.
    attempts: u32,
    /// How many of them the process died over, and which no record has.
    deaths: u32,
    /// Due at this time, in milliseconds since the Unix epoch.
    not_before_ms: u64,
    /// When it was admitted, likewise.
    pub(crate) now_ms: u64,
}

/// A run that ended, as it left its context.
pub(crate) struct Run {
    /// Attempts made, with this one.
    pub(crate) attempts: u32,
    pub(crate) result: Result<Output, Failure>,
    pub(crate) reads: ReadSet,
    pub(crate) effects: Effects,
}

enum Admitted {
    Run(Claim),
    Ended(Ending),
}

impl IdempotentConsumer {
    /// Joins the parts.
    pub fn new(parts: Parts) -> Self {
        let overlay = Arc::new(Overlay::default());
        let inner = Inner {
            view: overlay.over(parts.storage.view(&parts.scope)),
            component: parts.processor.digest().into(),
            lanes: Lanes::default(),
            in_flight: InFlight::default(),
            cache: TerminalCache::new(parts.options.cache_bytes),
            overlay,
            effect_limits: Arc::new(parts.options.effects.clone()),
            notes: parts.storage.running_notes(),
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

    /// Stops waiting for retries: messages that wait for their next attempt end as [`Ending::Retry`]. Runs under way
    /// go on to their end.
    pub fn stop(&self) {
        self.inner.stopping.send_replace(true);
    }

    /// Processes one message: `accept`, then `process`.
    pub async fn handle(&self, message: Message, handling: Handling) -> Result<Ending, StoreError> {
        self.process(self.accept(message, handling)).await
    }

    /// Derives key and fingerprint and takes the message's place in its lane: messages of one ordering key run in the
    /// order in which they were accepted.
    pub fn accept(&self, message: Message, handling: Handling) -> Accepted {
        let inner = &*self.inner;
        Accepted {
            key: RecordKey::by_message_id(&inner.parts.scope, &message),
            fingerprint: Fingerprint::of(&message),
            place: inner.parts.options.ordering.key(&message).map(|key| inner.lanes.enter(key)),
            message: Arc::new(message),
            handling,
            since: Instant::now(),
        }
    }

    /// The straight line. Returns when the ending is durable.
    pub async fn process(&self, accepted: Accepted) -> Result<Ending, StoreError> {
        let since = accepted.since;
        let ending = self.inner.process(accepted).await?;
        let elapsed_us = since.elapsed().as_micros() as u64;
        self.inner.parts.metrics.ended(&self.inner.parts.scope, ending.name(), elapsed_us);
        Ok(ending)
    }
}

impl Inner {
    async fn process(&self, mut message: Accepted) -> Result<Ending, StoreError> {
        loop {
            let claim = match self.admit(&mut message).await? {
                Admitted::Run(claim) => claim,
                Admitted::Ended(ending) => return Ok(ending),
            };
            if let Some(ending) = self.run_to_its_end(&message, claim).await? {
                return Ok(ending);
            }
            // Somebody else wrote the record meanwhile: see what it says now.
        }
    }

    /// Invoke, sequence, commit; again after a conflict, and after the backoff of a failure that may pass.
    async fn run_to_its_end(&self, message: &Accepted, mut claim: Claim) -> Result<Option<Ending>, StoreError> {
        loop {
            if let Some(ending) = self.wait_until_due(message, &claim).await {
                return Ok(Some(ending));
            }
            if fault::mutated("mark-before-run") {
                self.mark_first(message, &claim).await?;
            }
            let running = self.overlay.begin();
            let run = self.run_once(message, &claim).await;
            fault::point("invoked");
            let (commit, ending) = self.conclusion(message).of(&claim, run);
            let record = commit.record.clone().expect("a run always leaves a record");
            let room = self.parts.committer.room(&commit).await;
            let Ok(pending) = self.sequence(commit, room) else {
                self.parts.metrics.conflict(&self.parts.scope);
                continue;
            };
            drop(running);
            let retry = matches!(ending, Ending::Retry { .. });
            if !retry {
                // The next of the lane may go: it sees these effects in the overlay.
                claim.turn = None;
            }
            let verdict = pending.durable().await?;
            if claim.deaths > 0 && verdict == Verdict::Committed {
                // The record counts them from now on.
                self.notes.forget(&message.key);
                claim.deaths = 0;
            }
            match verdict {
                Verdict::Committed if retry && message.handling.retry_here => claim.next_attempt(record),
                Verdict::Committed => {
                    self.cache.insert(message.key.clone(), Arc::new(record));
                    return Ok(Some(ending));
                }
                Verdict::Conflict => self.parts.metrics.conflict(&self.parts.scope),
                Verdict::Taken(_) => return Ok(None),
            }
        }
    }

    /// Decides whether the message may run. Order of looking: cache of terminal records, in-flight table, store.
    async fn admit(&self, message: &mut Accepted) -> Result<Admitted, StoreError> {
        if !message.handling.wait_in_flight && self.in_flight.contains(&message.key) {
            return Ok(Admitted::Ended(Ending::InFlight { after_ms: 0 }));
        }
        let turn = match message.place.take() {
            Some(place) => Some(place.turn().await),
            None => None,
        };
        loop {
            let cached = self.cache.get(&message.key);
            self.parts.metrics.cache(&self.parts.scope, cached.is_some());
            if let Some(record) = cached
                && let Some(ending) = self.answer(message, &record).await?
            {
                return Ok(Admitted::Ended(ending));
            }
            let leading = match self.in_flight.enter(&message.key) {
                Ok(leading) => leading,
                Err(_) if !message.handling.wait_in_flight => {
                    return Ok(Admitted::Ended(Ending::InFlight { after_ms: 0 }));
                }
                Err(following) => {
                    following.ended().await;
                    continue;
                }
            };
            let found = self.parts.storage.admit(&message.key).await?.map(Arc::new);
            if let Some(record) = &found
                && let Some(ending) = self.answer(message, record).await?
            {
                self.cache.insert(message.key.clone(), record.clone());
                return Ok(Admitted::Ended(ending));
            }
            return Ok(Admitted::Run(self.claim(leading, turn, found)));
        }
    }

    /// The claim to a message that may run: there is no record, or one that allows it, or one whose retention is over.
    fn claim(&self, leading: Leading, turn: Option<Turn>, found: Option<Arc<Record>>) -> Claim {
        let now_ms = self.parts.clock.now_ms();
        let epoch = found.as_ref().map(|record| record.epoch);
        let found = found.filter(|record| !record.has_expired(now_ms));
        let not_before_ms = match found.as_ref().map(|record| &record.state) {
            Some(record::State::RetryDue { at_ms, .. }) => *at_ms,
            _ => 0,
        };
        let deaths = self.notes.deaths(&leading.key);
        let attempts = found.as_ref().map_or(0, |record| record.attempts) + deaths;
        Claim { _leading: leading, turn, found, epoch, attempts, deaths, not_before_ms, now_ms }
    }

    /// The ending of a message that must not run, by the record that says so; `None` if it may.
    async fn answer(&self, message: &Accepted, record: &Record) -> Result<Option<Ending>, StoreError> {
        Ok(match decide(Some(record), &message.fingerprint, self.parts.clock.now_ms()) {
            Admission::Replay(stored) => Some(Ending::Duplicate(stored)),
            Admission::InFlight { after_ms } => Some(Ending::InFlight { after_ms }),
            Admission::Mismatch => Some(self.mismatch(message, record).await?),
            Admission::Fresh => None,
        })
    }

    /// The key was used with another body. The record stays byte for byte as it is.
    async fn mismatch(&self, message: &Accepted, record: &Record) -> Result<Ending, StoreError> {
        let error = "the idempotency key was used before with another body; give the message a key of its own";
        tracing::error!(key = %message.key, "mismatch: {error}");
        if self.parts.options.mismatch == MismatchPolicy::DeadLetter {
            let commit = Commit {
                key: message.key.clone(),
                expected_epoch: Some(record.epoch),
                record: None,
                version: 0,
                reads: ReadSet::default(),
                effects: Effects::default(),
                dead_letter: Some(self.conclusion(message).dead_letter(error.to_owned(), 0)),
            };
            let pending = self.parts.committer.submit(commit);
            pending.durable().await?;
        }
        Ok(Ending::Mismatch)
    }

    /// Waits out the backoff; an ending if the message is to be put off instead.
    async fn wait_until_due(&self, message: &Accepted, claim: &Claim) -> Option<Ending> {
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
        Some(Ending::Retry { error, after_ms })
    }

    /// Runs the message, unless the process has died over it as often as it may be tried.
    async fn run_once(&self, message: &Accepted, claim: &Claim) -> Run {
        if claim.deaths == 0 {
            return self.invoke(message, claim).await;
        }
        if claim.attempts >= self.parts.options.attempts_max {
            let result = Err(Failure::retry(format!("the host died {} times while it ran this message", claim.deaths)));
            let (reads, effects) = (ReadSet::default(), Effects::default());
            return Run { attempts: claim.attempts, result, reads, effects };
        }
        let _alone = self.suspect.lock().await;
        self.invoke(message, claim).await
    }

    /// Runs the processor. No transaction is held, nothing is written.
    async fn invoke(&self, message: &Accepted, claim: &Claim) -> Run {
        let invocation = Invocation {
            message: message.message.clone(),
            idempotency_key: message.key.key.clone(),
            attempt: claim.attempts + 1,
            seed: message.key.seed(),
        };
        let noted = Noted::begin(&self.notes, &message.key);
        fault::point_of("running", &message.message.id);
        let mut context = Context::new(self.view.clone(), self.effect_limits.clone());
        let result = self.parts.processor.process(&invocation, &mut context).await;
        drop(noted);
        let (reads, effects) = context.finish();
        Run { attempts: claim.attempts + 1, result, reads, effects }
    }

    /// Checks that what the run read still stands (also when it failed: it may have failed on what is no longer so), and
    /// gives the commit its place in the order. No other commit of this processor is sequenced in between.
    fn sequence(&self, commit: Commit, room: Room) -> Result<Pending, overlay::Stale> {
        let mut turn = self.overlay.turn(&commit.reads)?;
        Ok(self.parts.committer.submit_in_turn(commit, room, &self.overlay, &mut turn))
    }

    /// Everything that decides what becomes of a message, at this moment.
    fn conclusion<'a>(&'a self, message: &'a Accepted) -> Conclusion<'a> {
        let (options, component) = (&self.parts.options, &self.component);
        Conclusion { options, component, message, now_ms: self.parts.clock.now_ms() }
    }

    /// The mutation "the record is marked before the guest runs".
    async fn mark_first(&self, message: &Accepted, claim: &Claim) -> Result<(), StoreError> {
        let record = self.conclusion(message).record(claim, 1, Event::Completed(Output::default()));
        let commit = Commit {
            key: message.key.clone(),
            expected_epoch: None,
            record: Some(record),
            version: 0,
            reads: ReadSet::default(),
            effects: Effects::default(),
            dead_letter: None,
        };
        let pending = self.parts.committer.submit(commit);
        pending.durable().await.map(drop)
    }
}

impl Claim {
    /// The claim to the attempt after the one that `record` tells of.
    fn next_attempt(&mut self, record: Record) {
        self.attempts = record.attempts;
        self.epoch = Some(record.epoch);
        self.not_before_ms = match &record.state {
            record::State::RetryDue { at_ms, .. } => *at_ms,
            _ => 0,
        };
        self.found = Some(Arc::new(record));
    }
}
