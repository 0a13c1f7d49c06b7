//! Who may run: the cache of terminal records, the table of messages in flight, and the decision by the record. Decides;
//! runs and writes nothing.

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::{Identity, Position};
use crate::message::strategy::Gaps;
use crate::pipeline::outcome::StoredOutcome;
use crate::record::{Output, Record, RecordState};
use crate::support::fault;

/// What a record says about a message that arrives now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Run it, when it is due.
    Fresh,
    /// Its life has ended: this is the stored outcome.
    Replay(StoredOutcome),
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

/// How long a duplicate of something another owner does should wait before asking again.
const ASK_AGAIN_MS: u64 = 1_000;

/// Decides by the record (`None`: there is none). A pure function: the table of states in `record.rs`.
///
/// `owner` is who asks: what it has claimed itself it may run. That it does not already is the in-flight table's to say.
pub(crate) fn decide(
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
        RecordState::Completed { output } if fault::mutated("replay-cut-short") => {
            let data = output.data.slice(..output.data.len() / 2);
            Admission::Replay(StoredOutcome::Completed(Output { data, ..output.clone() }))
        }
        RecordState::Completed { output } => Admission::Replay(StoredOutcome::Completed(output.clone())),
        RecordState::DeadLettered { error }
        | RecordState::Compensated { error }
        | RecordState::CompensationFailed { error } => Admission::Replay(StoredOutcome::Failed(error.clone())),
        RecordState::RetryDue { .. } => Admission::Fresh,
        state => in_progress(state, owner, now_ms).unwrap_or(Admission::Fresh),
    }
}

/// A message after the one that the record is of.
fn later(record: &Record, position: &Position, gaps: Option<&Gaps>, owner: &str, now_ms: u64) -> Admission {
    if let (Some(_), Some(Position::Version(last)), Position::Version(version)) = (gaps, &record.position, position) {
        if *version > last + 1 && !fault::mutated("gap-runs") {
            return Admission::Gap { awaits: last + 1 };
        }
        if matches!(record.state, RecordState::RetryDue { .. } | RecordState::InProgress { .. })
            && !fault::mutated("gap-runs")
        {
            // The one before it has not ended.
            return Admission::Gap { awaits: *last };
        }
    }
    in_progress(&record.state, owner, now_ms).unwrap_or(Admission::Fresh)
}

/// Whether somebody is at work on the record.
fn in_progress(state: &RecordState, owner: &str, now_ms: u64) -> Option<Admission> {
    match state {
        RecordState::InProgress { owner: holder, lease_end_ms } if holder != owner && *lease_end_ms > now_ms => {
            Some(Admission::InFlight { after_ms: lease_end_ms - now_ms })
        }
        RecordState::Compensating { .. } => Some(Admission::InFlight { after_ms: ASK_AGAIN_MS }),
        _ => None,
    }
}
