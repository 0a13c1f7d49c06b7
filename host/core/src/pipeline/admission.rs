//! Admission: decides whether a message runs, and gives the outcome of one that does not. The
//! decision by the record is a pure function; around it are the table of messages in flight and the
//! cache of terminal records.

use std::sync::Arc;

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::{Identity, Position};
use crate::message::key::RecordKey;
use crate::message::strategy::Gaps;
use crate::pipeline::Parts;
use crate::pipeline::claim::RunRight;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::in_flight::{InFlight, Leader};
use crate::pipeline::lanes::Turn;
use crate::pipeline::outcome::{Outcome, StoredOutcome};
use crate::pipeline::terminal_cache::TerminalCache;
use crate::record::{Output, Record, RecordState};
use crate::store::crash_tracker::CrashTracker;
use crate::store::feed::FeedEventKind;
use crate::support::error::StoreError;
use crate::support::fault;

/// Retry delay of a duplicate whose message is being compensated, in milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;

/// Admits the messages of one consumer.
pub(super) struct Admission {
    parts: Arc<Parts>,
    in_flight: InFlight,
    cache: TerminalCache,
    pub(super) crash_tracker: Arc<dyn CrashTracker>,
}

/// The answer to a message that asks to run.
pub(super) enum Admitted {
    /// The message may run.
    Run(RunRight),
    /// The message does not run.
    NotRun(NotRun),
}

/// Reason why a message does not run.
pub(super) enum NotRun {
    /// The message waits for the version `awaits` of its entity.
    Park { awaits: u64 },
    /// The key of the message was used with another body.
    Mismatch,
    /// The record, or another run of the message, gives this outcome.
    Answered(Outcome),
}

/// Exclusive hold on a record: no message on it is admitted until this is dropped.
pub(crate) struct RecordHold {
    _leader: Leader,
}

impl Admission {
    pub(super) fn new(parts: Arc<Parts>) -> Self {
        let cache = TerminalCache::new(parts.options.cache_bytes);
        let crash_tracker = parts.storage.crash_tracker();
        Self { parts, in_flight: InFlight::default(), cache, crash_tracker }
    }

    /// Returns whether a run of the message's record is under way here.
    pub(super) fn is_in_flight(&self, message: &Accepted) -> bool {
        self.in_flight.contains(&message.identity.record)
    }

    /// Decides whether the message may run. Order of looking: cache of terminal records, table of
    /// messages in flight, store.
    pub(super) async fn admit(&self, message: &Accepted, turn: Option<Turn>) -> Result<Admitted, StoreError> {
        let key = &message.identity.record;
        loop {
            // A later message of its entity may be on its way: a cached record would be of an
            // earlier one.
            let behind = message.identity.position.is_some() && self.in_flight.contains(key);
            let cached = if behind { None } else { self.cache.get(key) };
            self.parts.metrics.cache(&self.parts.scope, cached.is_some());
            if let Some(record) = cached
                && let Some(not_run) = self.answer(message, Some(&record))
            {
                return Ok(Admitted::NotRun(not_run));
            }
            let leader = match self.in_flight.enter(key) {
                Ok(leader) => leader,
                Err(_) if !message.handling.wait_in_flight => {
                    return Ok(Admitted::NotRun(NotRun::Answered(Outcome::InFlight { after_ms: 0 })));
                }
                Err(follower) => {
                    follower.ended().await;
                    continue;
                }
            };
            let found = self.parts.storage.record(key).await?.map(Arc::new);
            if let Some(not_run) = self.answer(message, found.as_deref()) {
                if let Some(record) = found {
                    self.cache.insert(key.clone(), record);
                }
                return Ok(Admitted::NotRun(not_run));
            }
            return Ok(Admitted::Run(self.right(message, leader, turn, found)));
        }
    }

    /// Keeps every message off a record until the returned hold is dropped. Waits for the run that
    /// is under way.
    pub(super) async fn hold_record(&self, key: &RecordKey) -> RecordHold {
        loop {
            match self.in_flight.enter(key) {
                Ok(leader) => {
                    // Removed now, not when the hold ends: a reader that sees the changed record in
                    // the store must not be answered by the cached one. Only a leader fills the
                    // cache, so no other task does so meanwhile.
                    if !fault::mutated("cache-outlives-redrive") {
                        self.cache.remove(key);
                    }
                    return RecordHold { _leader: leader };
                }
                Err(follower) => follower.ended().await,
            }
        }
    }

    /// Remembers a record, if it is terminal.
    pub(super) fn remember(&self, key: &RecordKey, record: Arc<Record>) {
        self.cache.insert(key.clone(), record);
    }

    /// Forgets what is cached of a record that has changed.
    pub(super) fn forget(&self, key: &RecordKey) {
        self.cache.remove(key);
    }

    /// Returns whether a message must wait for another one, by the record as it is now.
    pub(super) async fn awaits_another(&self, identity: &Identity) -> Result<bool, StoreError> {
        let found = self.parts.storage.record(&identity.record).await?;
        let decision = self.decision(found.as_ref(), identity, self.parts.options.strategy.gaps());
        Ok(matches!(decision, Decision::Gap { .. }))
    }

    /// Decides on a message by a record.
    pub(super) fn decision(&self, record: Option<&Record>, identity: &Identity, gaps: Option<&Gaps>) -> Decision {
        decide(record, identity, gaps, &self.parts.options.owner, self.parts.clock.now_ms())
    }

    /// Answers a message by its record (`None`: there is none). Returns `None` if the message may
    /// run.
    fn answer(&self, message: &Accepted, record: Option<&Record>) -> Option<NotRun> {
        let gaps = self.parts.options.strategy.gaps().filter(|_| !message.past_gap);
        let now_ms = self.parts.clock.now_ms();
        let outcome = match decide(record, &message.identity, gaps, &self.parts.options.owner, now_ms) {
            Decision::Fresh => return None,
            Decision::Gap { awaits } => return Some(NotRun::Park { awaits }),
            Decision::Mismatch => return Some(NotRun::Mismatch),
            Decision::Replay(stored) => {
                self.notify_feed(message, FeedEventKind::Replayed, now_ms);
                Outcome::Duplicate(stored)
            }
            Decision::InFlight { after_ms } => Outcome::InFlight { after_ms },
            Decision::Stale => {
                self.notify_feed(message, FeedEventKind::Stale, now_ms);
                Outcome::Stale
            }
        };
        Some(NotRun::Answered(outcome))
    }

    /// Counts a message in the feed that leaves nothing behind. Nothing waits for the count, and no
    /// record is touched.
    fn notify_feed(&self, message: &Accepted, kind: FeedEventKind, now_ms: u64) {
        if !fault::mutated("replay-not-noted") {
            self.parts.committer.notify_feed(kind, &message.identity.record, now_ms);
        }
    }

    /// Gives the right to run to a message whose record (`found`) allows it, has expired, or does
    /// not exist.
    fn right(&self, message: &Accepted, leader: Leader, turn: Option<Turn>, found: Option<Arc<Record>>) -> RunRight {
        let now_ms = self.parts.clock.now_ms();
        let epoch = found.as_ref().map(|record| record.epoch);
        // The record of an earlier message of the entity says nothing of this one.
        let is_its_own =
            |record: &Arc<Record>| !record.has_expired(now_ms) && record.position == message.identity.position;
        let found = found.filter(is_its_own);
        let deaths = self.crash_tracker.deaths(&message.identity.message_key);
        let counted = found.as_ref().map_or(0, |record| record.attempts);
        let counted = if fault::mutated("attempts-forgotten") { 0 } else { counted };
        RunRight {
            _leader: leader,
            turn,
            epoch,
            attempts: counted + deaths,
            deaths,
            due_ms: found.as_ref().map_or(0, |record| record.state.due_ms()),
            admitted_ms: now_ms,
            ran_before: found.is_some() || deaths > 0,
            is_claimed: false,
            found,
        }
    }
}

/// The decision on a message that arrives now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The message runs when it is due.
    Fresh,
    /// The message has ended with this stored outcome.
    Replay(StoredOutcome),
    /// Another owner runs the message, or it is being compensated.
    InFlight {
        /// Retry delay, in milliseconds.
        after_ms: u64,
    },
    /// The key was used with another body.
    Mismatch,
    /// A later message of its entity was seen before.
    Stale,
    /// The message must wait for another message of its entity.
    Gap {
        /// The version that is awaited.
        awaits: u64,
    },
}

/// Decides by the record (`None`: there is none), with the table of states in `record/mod.rs`.
///
/// A message that `owner` has claimed itself may run: the table of messages in flight says whether
/// it already does.
pub(crate) fn decide(
    record: Option<&Record>,
    identity: &Identity,
    gaps: Option<&Gaps>,
    owner: &str,
    now_ms: u64,
) -> Decision {
    // Past its retention a record counts as absent, swept or not.
    let record = record.filter(|record| !record.has_expired(now_ms));
    match (record, &identity.position) {
        (None, None) => Decision::Fresh,
        (None, Some(position)) => first(position, gaps),
        (Some(record), position) if record.position == *position => same(record, &identity.fingerprint, owner, now_ms),
        (Some(record), Some(position)) if record.position.as_ref() < Some(position) => {
            later(record, position, gaps, owner, now_ms)
        }
        (Some(_), Some(_)) if fault::mutated("older-position-runs") => Decision::Fresh,
        // Earlier than the last one, or the record was made under another strategy.
        (Some(_), _) => Decision::Stale,
    }
}

/// Decides on the first message of an entity.
fn first(position: &Position, gaps: Option<&Gaps>) -> Decision {
    match (position, gaps) {
        (Position::Version(version), Some(gaps)) if *version < gaps.first => Decision::Stale,
        (Position::Version(version), Some(gaps)) if *version > gaps.first => Decision::Gap { awaits: gaps.first },
        _ => Decision::Fresh,
    }
}

/// Decides on the message that the record is of.
fn same(record: &Record, fingerprint: &Fingerprint, owner: &str, now_ms: u64) -> Decision {
    if record.fingerprint != *fingerprint && !fault::mutated("fingerprint-unchecked") {
        return Decision::Mismatch;
    }
    match &record.state {
        RecordState::Completed { output } if fault::mutated("replay-cut-short") => {
            let data = output.data.slice(..output.data.len() / 2);
            Decision::Replay(StoredOutcome::Completed(Output { data, ..output.clone() }))
        }
        RecordState::Completed { output } => Decision::Replay(StoredOutcome::Completed(output.clone())),
        RecordState::DeadLettered { error }
        | RecordState::Compensated { error }
        | RecordState::CompensationFailed { error } => Decision::Replay(StoredOutcome::Failed(error.clone())),
        RecordState::RetryDue { .. } => Decision::Fresh,
        state => in_progress(state, owner, now_ms).unwrap_or(Decision::Fresh),
    }
}

/// Decides on a later message of the entity.
fn later(record: &Record, position: &Position, gaps: Option<&Gaps>, owner: &str, now_ms: u64) -> Decision {
    if let (Some(_), Some(Position::Version(last)), Position::Version(version)) = (gaps, &record.position, position) {
        if *version > last + 1 && !fault::mutated("gap-runs") {
            return Decision::Gap { awaits: last + 1 };
        }
        if matches!(record.state, RecordState::RetryDue { .. } | RecordState::InProgress { .. })
            && !fault::mutated("gap-runs")
        {
            // The message before it has not ended.
            return Decision::Gap { awaits: *last };
        }
    }
    in_progress(&record.state, owner, now_ms).unwrap_or(Decision::Fresh)
}

/// Decides on a record that another owner works on. Returns `None` if no other owner does.
fn in_progress(state: &RecordState, owner: &str, now_ms: u64) -> Option<Decision> {
    match state {
        RecordState::InProgress { owner: holder, lease_end_ms } if holder != owner && *lease_end_ms > now_ms => {
            Some(Decision::InFlight { after_ms: lease_end_ms - now_ms })
        }
        RecordState::Compensating { .. } => Some(Decision::InFlight { after_ms: RETRY_AFTER_MS }),
        _ => None,
    }
}
