//! Who may run: the cache of terminal records, the table of messages in flight, and the decision by the record. Decides;
//! runs and writes nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::oneshot;

use crate::support::fault;
use crate::message::key::{Fingerprint, Hashed, RecordKey};
use crate::run::processor::Output;
use crate::record::{Record, State};
use crate::message::strategy::{Gaps, Identity, Position};
use crate::support::sync::Mutex;

/// What a record says about a message that arrives now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Run it, when it is due.
    Fresh,
    /// Its life has ended: this is the stored outcome.
    Replay(Stored),
    /// Somebody else runs it, or undoes it; ask again after this many milliseconds.
    InFlight {
        /// When to ask again.
        after_ms: u64,
    },
    /// The key was used with another body.
    Mismatch,
    /// A later message of its entity was seen before.
    Stale,
    /// It must wait for another message of its entity.
    Gap {
        /// The version that is awaited.
        awaits: u64,
    },
}

/// The stored outcome of a message whose life has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// It completed with this result.
    Completed(Output),
    /// It failed for good with this error.
    Failed(String),
}

/// How long a duplicate of something another owner does should wait before asking again.
const ASK_AGAIN_MS: u64 = 1_000;

/// Decides by the record (`None`: there is none). A pure function: the table of states in `record.rs`.
///
/// `owner` is who asks: what it has claimed itself it may run. That it does not already is the in-flight table's to say.
pub fn decide(
    record: Option<&Record>,
    identity: &Identity,
    gaps: Option<&Gaps>,
    owner: &str,
    now_ms: u64,
) -> Admission {
    // Past its retention a record says nothing any more, whether or not it was swept already.
    let record = record.filter(|record| !record.has_expired(now_ms));
    match (record, &identity.position) {
        (None, None) => Admission::Fresh,
        (None, Some(position)) => first(position, gaps),
        (Some(record), position) if record.position == *position => same(record, &identity.fingerprint, owner, now_ms),
        (Some(record), Some(position)) if record.position.as_ref() < Some(position) => {
            later(record, position, gaps, owner, now_ms)
        }
        (Some(_), Some(_)) if fault::mutated("older-position-runs") => Admission::Fresh,
        // Earlier than the last, or the processor's strategy was another one when the record was made.
        (Some(_), _) => Admission::Stale,
    }
}

/// The first message of an entity.
fn first(position: &Position, gaps: Option<&Gaps>) -> Admission {
    match (position, gaps) {
        (Position::Version(version), Some(gaps)) if *version < gaps.first => Admission::Stale,
        (Position::Version(version), Some(gaps)) if *version > gaps.first => Admission::Gap { awaits: gaps.first },
        _ => Admission::Fresh,
    }
}

/// The message that the record is of.
fn same(record: &Record, fingerprint: &Fingerprint, owner: &str, now_ms: u64) -> Admission {
    if record.fingerprint != *fingerprint && !fault::mutated("fingerprint-unchecked") {
        return Admission::Mismatch;
    }
    match &record.state {
        State::Completed { output } if fault::mutated("replay-cut-short") => {
            let data = output.data.slice(..output.data.len() / 2);
            Admission::Replay(Stored::Completed(Output { data, ..output.clone() }))
        }
        State::Completed { output } => Admission::Replay(Stored::Completed(output.clone())),
        State::DeadLettered { error } | State::Compensated { error } | State::CompensationFailed { error } => {
            Admission::Replay(Stored::Failed(error.clone()))
        }
        State::RetryDue { .. } => Admission::Fresh,
        state => in_progress(state, owner, now_ms).unwrap_or(Admission::Fresh),
    }
}

/// A message after the one that the record is of.
fn later(record: &Record, position: &Position, gaps: Option<&Gaps>, owner: &str, now_ms: u64) -> Admission {
    if let (Some(_), Some(Position::Version(last)), Position::Version(version)) = (gaps, &record.position, position) {
        if *version > last + 1 && !fault::mutated("gap-runs") {
            return Admission::Gap { awaits: last + 1 };
        }
        if matches!(record.state, State::RetryDue { .. } | State::InProgress { .. }) && !fault::mutated("gap-runs") {
            // The one before it has not ended.
            return Admission::Gap { awaits: *last };
        }
    }
    in_progress(&record.state, owner, now_ms).unwrap_or(Admission::Fresh)
}

/// Whether somebody is at work on the record.
fn in_progress(state: &State, owner: &str, now_ms: u64) -> Option<Admission> {
    match state {
        State::InProgress { owner: holder, lease_end_ms } if holder != owner && *lease_end_ms > now_ms => {
            Some(Admission::InFlight { after_ms: lease_end_ms - now_ms })
        }
        State::Compensating { .. } => Some(Admission::InFlight { after_ms: ASK_AGAIN_MS }),
        _ => None,
    }
}

/// Terminal records in memory, bounded in bytes. Never holds "there is no record": only the store may say so.
pub(crate) struct TerminalCache(Cache<RecordKey, Arc<Record>, Bytes>);

#[derive(Clone)]
struct Bytes;

impl Weighter<RecordKey, Arc<Record>> for Bytes {
    fn weight(&self, key: &RecordKey, record: &Arc<Record>) -> u64 {
        let body = match &record.state {
            State::Completed { output } => output.data.len(),
            other => other.error().map_or(0, str::len),
        };
        (size_of::<(RecordKey, Record)>() + key.source.len() + key.key.len() + body) as u64
    }
}

impl TerminalCache {
    pub(crate) fn new(bytes: u64) -> Self {
        // A guess of how many entries fit; it only sizes the cache's own tables.
        let entries = (bytes / 512).max(16) as usize;
        Self(Cache::with_weighter(entries, bytes, Bytes))
    }

    pub(crate) fn get(&self, key: &RecordKey) -> Option<Arc<Record>> {
        self.0.get(key)
    }

    pub(crate) fn remove(&self, key: &RecordKey) {
        self.0.remove(key);
    }

    pub(crate) fn insert(&self, key: RecordKey, record: Arc<Record>) {
        if record.state.is_terminal() {
            self.0.insert(key, record);
        }
    }
}

type Followers = HashMap<RecordKey, Vec<oneshot::Sender<()>>, BuildHasherDefault<Hashed>>;

/// Messages that are being run here, by record key, each with those who wait for its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct InFlight {
    table: Arc<Mutex<Followers>>,
}

/// The right to run a message; dropping it wakes everyone who waits for its end.
#[derive(Debug)]
pub(crate) struct Leading {
    table: InFlight,
    pub(crate) key: RecordKey,
}

/// Waits for the end of a message that somebody else runs.
pub(crate) struct Following(oneshot::Receiver<()>);

impl InFlight {
    /// Leads, if nobody does; else follows.
    pub(crate) fn enter(&self, key: &RecordKey) -> Result<Leading, Following> {
        if fault::mutated("in-flight-entered-in-two-steps") && !self.contains(key) {
            self.table.lock().insert(key.clone(), Vec::new());
            return Ok(Leading { table: self.clone(), key: key.clone() });
        }
        match self.table.lock().entry(key.clone()) {
            Entry::Occupied(mut followers) => {
                let (sender, ended) = oneshot::channel();
                followers.get_mut().push(sender);
                Err(Following(ended))
            }
            Entry::Vacant(place) => {
                place.insert(Vec::new());
                Ok(Leading { table: self.clone(), key: key.clone() })
            }
        }
    }

    /// Whether somebody runs `key`.
    pub(crate) fn contains(&self, key: &RecordKey) -> bool {
        self.table.lock().contains_key(key)
    }
}

impl Following {
    /// Completes when the leader has ended, in whatever way: look again.
    pub(crate) async fn ended(self) {
        // Nothing is ever sent: an error, the sender's end, is the signal.
        let _ = self.0.await;
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        // Out of the table first: who wakes does not find it again.
        let followers = self.table.table.lock().remove(&self.key);
        drop(followers);
    }
}
