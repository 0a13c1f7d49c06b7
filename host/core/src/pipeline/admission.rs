//! Admission: decides whether a message runs, and gives the outcome of one that does not. The
//! decision by the record is a pure function; around it are the table of messages in flight and the
//! cache of terminal records.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::{Identity, Position};
use crate::message::key::RecordKey;
use crate::message::older_fingerprint::was_exact;
use crate::message::strategy::Gaps;
use crate::pipeline::Parts;
use crate::pipeline::claim::RunRight;
use crate::pipeline::delivery::Accepted;
use crate::pipeline::in_flight::{InFlight, Leader};
use crate::pipeline::options::Options;
use crate::pipeline::outcome::{Outcome, StoredOutcome};
use crate::pipeline::terminal_cache::TerminalCache;
use crate::record::{Output, Record, RecordState};
use crate::state::{RESERVED, StateView};
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
    /// The processor's state in the store.
    state: Arc<dyn StateView>,
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
        let state = parts.storage.view(&parts.scope);
        Self { parts, in_flight: InFlight::default(), cache, crash_tracker, state }
    }

    /// Returns whether a run of the message's record is under way here.
    pub(super) fn is_in_flight(&self, message: &Accepted) -> bool {
        self.in_flight.contains(&message.identity.record)
    }

    /// Decides whether the message may run. Order of looking: cache of terminal records, table of
    /// messages in flight, store.
    pub(super) async fn admit(&self, message: &Accepted) -> Result<Admitted, StoreError> {
        let key = &message.identity.record;
        loop {
            // A later message of its entity may be on its way: a cached record would be of an
            // earlier one.
            let behind = message.identity.position.is_some() && self.in_flight.contains(key);
            let cached = if behind { None } else { self.cache.get(key) };
            self.parts.metrics.cache(&self.parts.scope, cached.is_some());
            if let Some(record) = cached
                && self.tells_the_last(&record)
                && let Some(not_run) = self.answer(message, Some(&record), None)
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
            let last = self.last_version(key, found.as_deref()).await?;
            if let Some(not_run) = self.answer(message, found.as_deref(), last) {
                if let Some(record) = found {
                    self.cache.insert(key.clone(), record);
                }
                return Ok(Admitted::NotRun(not_run));
            }
            return Ok(Admitted::Run(self.right(message, leader, found)));
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

    /// Keeps every message off a record until the returned hold is dropped. Returns `None` if a run
    /// is under way.
    pub(super) fn try_hold_record(&self, key: &RecordKey) -> Option<RecordHold> {
        let leader = self.in_flight.enter(key).ok()?;
        self.cache.remove(key);
        Some(RecordHold { _leader: leader })
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
        let decision = self.decision(found.as_ref(), identity, self.parts.options.strategy.gaps()).await?;
        Ok(matches!(decision, Decision::Gap { .. }))
    }

    /// Decides on a message by a record.
    pub(super) async fn decision(
        &self,
        record: Option<&Record>,
        identity: &Identity,
        gaps: Option<&Gaps>,
    ) -> Result<Decision, StoreError> {
        let last = self.last_version(&identity.record, record).await?;
        Ok(decide(record, identity, gaps, &self.rules(last)))
    }

    fn rules(&self, last_version: Option<u64>) -> Rules<'_> {
        let Options { owner, lease_ms, .. } = &self.parts.options;
        Rules { owner, lease_ms: *lease_ms, now_ms: self.parts.clock.now_ms(), last_version }
    }

    /// Returns the last version of an entity whose record is gone, where versions have no gaps: the
    /// version outlives the record.
    async fn last_version(&self, key: &RecordKey, record: Option<&Record>) -> Result<Option<u64>, StoreError> {
        if self.parts.options.strategy.gaps().is_none() || record.is_some_and(|record| self.tells_the_last(record)) {
            return Ok(None);
        }
        let (_, version) = self.state.get(&last_version_key(key)).await?;
        Ok(version.and_then(|version| Some(u64::from_le_bytes(*version.first_chunk()?))))
    }

    /// Returns whether a record tells the last version of its entity: it has not expired, or the
    /// order of versions does not matter.
    fn tells_the_last(&self, record: &Record) -> bool {
        self.parts.options.strategy.gaps().is_none() || !record.has_expired(self.parts.clock.now_ms())
    }

    /// Returns the identity of a message as the version of the host had computed it that wrote the
    /// record. A body that the rule of that version could not tell from others keeps its present
    /// fingerprint, and so is a mismatch, unless it is the one that was held under that record.
    pub(super) fn identity_as_of<'a>(&self, record: Option<&Record>, message: &'a Accepted) -> Cow<'a, Identity> {
        let identity = &message.identity;
        match record.map(|record| record.fingerprint.version) {
            None | Some(Fingerprint::VERSION) => Cow::Borrowed(identity),
            Some(_) if fault::mutated("older-fingerprint-forgotten") => Cow::Borrowed(identity),
            Some(_) if !(message.is_held || was_exact(&message.message)) => Cow::Borrowed(identity),
            Some(version) => {
                let strategy = &self.parts.options.strategy;
                let older = strategy.older_fingerprint(&message.message, identity.position.as_ref(), version);
                older.map_or(Cow::Borrowed(identity), |fingerprint| {
                    Cow::Owned(Identity { fingerprint, ..identity.clone() })
                })
            }
        }
    }

    /// Answers a message by its record (`None`: there is none), and the last version of its entity
    /// if the record does not tell it. Returns `None` if the message may run.
    fn answer(&self, message: &Accepted, record: Option<&Record>, last_version: Option<u64>) -> Option<NotRun> {
        let gaps = self.parts.options.strategy.gaps().filter(|_| !message.past_gap);
        let rules = self.rules(last_version);
        let now_ms = rules.now_ms;
        let identity = self.identity_as_of(record, message);
        let outcome = match decide(record, &identity, gaps, &rules) {
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
    fn right(&self, message: &Accepted, leader: Leader, found: Option<Arc<Record>>) -> RunRight {
        let now_ms = self.parts.clock.now_ms();
        let epoch = found.as_ref().map(|record| record.epoch);
        let may_expire = found.as_ref().is_some_and(|record| record.state.is_terminal());
        // The record of an earlier message of the entity says nothing of this one.
        let is_its_own =
            |record: &Arc<Record>| !record.has_expired(now_ms) && record.position == message.identity.position;
        let found = found.filter(is_its_own);
        let deaths = self.crash_tracker.deaths(&message.identity.message_key);
        let counted = found.as_ref().map_or(0, |record| record.attempts);
        let counted = if fault::mutated("attempts-forgotten") { 0 } else { counted };
        RunRight {
            _leader: leader,
            epoch,
            may_expire,
            attempts: counted + deaths,
            deaths,
            due_ms: found.as_ref().map_or(0, |record| record.due_ms(now_ms, self.parts.options.longest_delay_ms())),
            admitted_ms: now_ms,
            ran_before: found.is_some() || deaths > 0,
            is_claimed: false,
            conflicts: 0,
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

/// Everything that decides on a message, except the message, its record and the gaps.
pub(crate) struct Rules<'a> {
    /// Name of this owner. A message that it has claimed itself may run: the table of messages in
    /// flight says whether it already does.
    owner: &'a str,
    /// Duration of a claim, in milliseconds.
    lease_ms: u64,
    /// Now, in milliseconds since the Unix epoch.
    now_ms: u64,
    /// Last version of the entity, if its record is gone.
    last_version: Option<u64>,
}

/// Returns the state key of an entity's last version. It is written where versions have no gaps.
pub(crate) fn last_version_key(record: &RecordKey) -> String {
    format!("{RESERVED}last-version/{:032x}", record.digest())
}

/// Decides by the record (`None`: there is none), with the table of states in `record/mod.rs`.
pub(crate) fn decide(record: Option<&Record>, identity: &Identity, gaps: Option<&Gaps>, rules: &Rules<'_>) -> Decision {
    // Past its retention a record counts as absent, swept or not.
    let record = record.filter(|record| !record.has_expired(rules.now_ms));
    match (record, &identity.position) {
        (None, None) => Decision::Fresh,
        (None, Some(position)) => first(position, gaps, rules.last_version),
        (Some(record), position) if record.position == *position => same(record, &identity.fingerprint, rules),
        (Some(record), Some(position)) if record.position.as_ref() < Some(position) => {
            later(record, position, gaps, rules)
        }
        (Some(_), Some(_)) if fault::mutated("older-position-runs") => Decision::Fresh,
        // Earlier than the last one, or the record was made under another strategy.
        (Some(_), _) => Decision::Stale,
    }
}

/// Decides on a message of an entity that has no record: the first one, or the first one since the
/// record has expired.
fn first(position: &Position, gaps: Option<&Gaps>, last_version: Option<u64>) -> Decision {
    let last_version = last_version.filter(|_| !fault::mutated("version-goes-with-its-record"));
    if let (Position::Version(version), Some(last)) = (position, last_version)
        && *version <= last
    {
        return Decision::Stale;
    }
    let (Position::Version(version), Some(gaps)) = (position, gaps) else { return Decision::Fresh };
    let awaits = last_version.map_or(gaps.first, |last| last.saturating_add(1));
    match version.cmp(&awaits) {
        Ordering::Less => Decision::Stale,
        Ordering::Equal => Decision::Fresh,
        Ordering::Greater => Decision::Gap { awaits },
    }
}

/// Decides on the message that the record is of.
fn same(record: &Record, fingerprint: &Fingerprint, rules: &Rules<'_>) -> Decision {
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
        RecordState::InProgress { .. } | RecordState::Compensating { .. } => {
            in_progress(record, rules).unwrap_or(Decision::Fresh)
        }
    }
}

/// Decides on a later message of the entity.
fn later(record: &Record, position: &Position, gaps: Option<&Gaps>, rules: &Rules<'_>) -> Decision {
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
    in_progress(record, rules).unwrap_or(Decision::Fresh)
}

/// Decides on a record that another owner works on. Returns `None` if no other owner does.
fn in_progress(record: &Record, rules: &Rules<'_>) -> Option<Decision> {
    if let RecordState::Compensating { .. } = record.state {
        return Some(Decision::InFlight { after_ms: RETRY_AFTER_MS });
    }
    let after_ms = record.claimed_by_another_ms(rules.owner, rules.now_ms, rules.lease_ms)?;
    Some(Decision::InFlight { after_ms })
}
