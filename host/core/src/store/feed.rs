//! The feed: what happened to records, of all processors, in the order in which it became durable. Decides what a commit
//! tells and how a place in the feed is named; where events are kept is the store's.

use std::fmt;
use std::str::FromStr;

use futures_util::future::BoxFuture;

use crate::message::key::RecordKey;
use crate::record::{Record, RecordEvent, RecordState};
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange};
use crate::store::held_message::HoldReason;
use crate::support::error::StoreError;

/// What happened. The numbers are stored: they never change, and new kinds get new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FeedEventKind {
    /// A message completed.
    Completed = 1,
    /// An attempt failed, and another is due.
    Failed = 2,
    /// A message failed for good, or could never run, and is kept as a dead letter.
    DeadLettered = 3,
    /// A message waits for the one before it.
    Parked = 4,
    /// An operator had a dead letter run again.
    Redriven = 5,
    /// A kept message is kept no longer and its record stayed as it was: an operator's wish, or it was a duplicate or stale.
    Discarded = 6,
    /// An operator had a record forgotten.
    Evicted = 7,
    /// Duplicates were answered from the record; see [`FeedEntry::times`].
    Replayed = 8,
    /// Messages came that were older than the last one of their entity; see [`FeedEntry::times`].
    Stale = 9,
    /// Records had expired and are gone; see [`FeedEntry::times`].
    Swept = 10,
    /// A message was claimed durably before its run.
    Claimed = 11,
    /// A message is being undone.
    CompensationStarted = 12,
    /// A message was undone.
    Compensated = 13,
    /// A message could not be undone.
    CompensationFailed = 14,
    /// An operator had the undoing tried again.
    CompensationRetried = 15,
    /// An operator settled by hand what could not be undone.
    CompensationResolved = 16,
}

/// What one event of the feed tells, but for its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedEntry {
    /// What happened.
    pub kind: FeedEventKind,
    /// Digest of the record's key; 0 where it is about many records.
    pub digest: u128,
    /// When, in milliseconds since the Unix epoch; the last time, where it happened several times.
    pub at_ms: u64,
    /// Attempts made so far; 0 where none was counted.
    pub attempts: u32,
    /// The record's epoch; 0 where it did not matter.
    pub epoch: u64,
    /// How often it happened, or to how many records; mostly 1.
    pub times: u64,
}

/// A place in the feed: number of the group that became durable, and place in the group. Its text form is `12-3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cursor {
    /// Number of the group; the first is 1.
    pub sequence: u64,
    /// Place among the group's events, from 0.
    pub index: u32,
}

/// An event in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedEvent {
    /// Its place.
    pub cursor: Cursor,
    /// The record's key; `None` where there is no record under it now, or where it is about many records.
    pub key: Option<RecordKey>,
    /// What it tells.
    pub entry: FeedEntry,
}

/// Part of the feed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FeedPage {
    /// In order.
    pub events: Vec<FeedEvent>,
    /// Events that came after the place asked for are not kept any more; or the feed has not come so far yet, since the
    /// place is of another store or of a journal that was cut. Whoever follows the feed has missed something.
    pub truncated: bool,
}

/// The feed of a store, for people and for whoever follows along.
pub trait Feed: Send + Sync + 'static {
    /// Up to `limit` events after the place `after` (`None`: from the oldest that is kept), in order; only those of the
    /// record with the digest `of`, if given. What is answered is durable, and its place never changes.
    fn events(
        &self,
        of: Option<u128>,
        after: Option<Cursor>,
        limit: usize,
    ) -> BoxFuture<'_, Result<FeedPage, StoreError>>;
}

impl FeedEventKind {
    const ALL: [Self; 16] = [
        Self::Completed,
        Self::Failed,
        Self::DeadLettered,
        Self::Parked,
        Self::Redriven,
        Self::Discarded,
        Self::Evicted,
        Self::Replayed,
        Self::Stale,
        Self::Swept,
        Self::Claimed,
        Self::CompensationStarted,
        Self::Compensated,
        Self::CompensationFailed,
        Self::CompensationRetried,
        Self::CompensationResolved,
    ];

    /// The kind of a stored number.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }

    /// The kind's name, as the command line and the API print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::DeadLettered => "dead-lettered",
            Self::Parked => "parked",
            Self::Redriven => "redriven",
            Self::Discarded => "discarded",
            Self::Evicted => "evicted",
            Self::Replayed => "replayed",
            Self::Stale => "stale",
            Self::Swept => "swept",
            Self::Claimed => "claimed",
            Self::CompensationStarted => "compensation-started",
            Self::Compensated => "compensated",
            Self::CompensationFailed => "compensation-failed",
            Self::CompensationRetried => "compensation-retried",
            Self::CompensationResolved => "compensation-resolved",
        }
    }

    /// The last thing that happened to a record. Its history tells, but for a completion, which stands in the state.
    fn last_of(record: &Record) -> Self {
        if let RecordState::Completed { .. } = record.state {
            return Self::Completed;
        }
        match record.history.last().map(|entry| &entry.event) {
            Some(event) => Self::of_event(event),
            None => Self::of_state(&record.state),
        }
    }

    fn of_event(event: &RecordEvent) -> Self {
        match event {
            RecordEvent::Claimed { .. } => Self::Claimed,
            RecordEvent::Completed(_) => Self::Completed,
            RecordEvent::Failed { .. } => Self::Failed,
            RecordEvent::GivenUp { .. } => Self::DeadLettered,
            RecordEvent::CompensationStarted { .. } => Self::CompensationStarted,
            RecordEvent::CompensationDone => Self::Compensated,
            RecordEvent::CompensationGivenUp => Self::CompensationFailed,
            RecordEvent::Redriven { .. } => Self::Redriven,
            RecordEvent::CompensationRetried => Self::CompensationRetried,
            RecordEvent::CompensationResolved => Self::CompensationResolved,
        }
    }

    fn of_state(state: &RecordState) -> Self {
        match state {
            RecordState::InProgress { .. } => Self::Claimed,
            RecordState::Completed { .. } => Self::Completed,
            RecordState::RetryDue { .. } => Self::Failed,
            RecordState::DeadLettered { .. } => Self::DeadLettered,
            RecordState::Compensating { .. } => Self::CompensationStarted,
            RecordState::Compensated { .. } => Self::Compensated,
            RecordState::CompensationFailed { .. } => Self::CompensationFailed,
        }
    }
}

impl Commit {
    /// What the feed tells of this commit, once it is durable: one event, or none if it touches neither the record nor a
    /// kept message.
    pub fn told(&self) -> Option<FeedEntry> {
        let expected = match self.expected {
            Expected::Epoch(epoch) => epoch,
            Expected::Absent | Expected::Anything => 0,
        };
        let entry = |kind, at_ms, attempts, epoch| {
            Some(FeedEntry { kind, digest: self.key.digest(), at_ms, attempts, epoch, times: 1 })
        };
        match (&self.record, &self.held_message) {
            (RecordChange::Put(record), _) => {
                entry(FeedEventKind::last_of(record), record.changed_ms, record.attempts, record.epoch)
            }
            (RecordChange::Remove, _) => entry(FeedEventKind::Evicted, self.at_ms, 0, expected),
            (RecordChange::Keep, Some(HeldChange::Put(held_message))) => {
                let kind = match held_message.hold_reason {
                    HoldReason::Dead => FeedEventKind::DeadLettered,
                    HoldReason::Redriven => FeedEventKind::Redriven,
                    HoldReason::Parked { .. } => FeedEventKind::Parked,
                };
                entry(kind, self.at_ms, held_message.attempts, expected)
            }
            (RecordChange::Keep, Some(HeldChange::Remove(_))) => {
                entry(FeedEventKind::Discarded, self.at_ms, 0, expected)
            }
            (RecordChange::Keep, None) => None,
        }
    }
}

impl FeedEntry {
    /// Something that is about `records` records at once.
    pub fn of_many(kind: FeedEventKind, records: u64, at_ms: u64) -> Self {
        Self { kind, digest: 0, at_ms, attempts: 0, epoch: 0, times: records }
    }
}

impl FeedPage {
    /// Where to go on: after the last event here, or after the same place again.
    pub fn next(&self, after: Option<Cursor>) -> Option<Cursor> {
        self.events.last().map(|event| event.cursor).or(after)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.sequence, self.index)
    }
}

/// A text that is not a place in the feed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a cursor of the feed: take the one that came with the last events, such as 12-3, or none to begin"
)]
pub struct ParseCursorError(String);

impl FromStr for Cursor {
    type Err = ParseCursorError;

    fn from_str(text: &str) -> Result<Self, ParseCursorError> {
        // `parse` would take a sign.
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let parse = || {
            let (sequence, index) = text.split_once('-').filter(|(one, other)| digits(one) && digits(other))?;
            Some(Self { sequence: sequence.parse().ok()?, index: index.parse().ok()? })
        };
        parse().ok_or_else(|| ParseCursorError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_come_back_from_their_text_and_nothing_else_does() {
        for cursor in
            [Cursor::default(), Cursor { sequence: u64::MAX, index: u32::MAX }, Cursor { sequence: 12, index: 3 }]
        {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        for text in ["", "12", "12-", "-3", "+12-3", "12-3-4", "12-4294967296", "a-b", "12 - 3"] {
            assert_eq!(text.parse::<Cursor>(), Err(ParseCursorError(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn kinds_come_back_from_their_numbers() {
        for (number, kind) in (1..).zip(FeedEventKind::ALL) {
            assert_eq!((kind as u8, FeedEventKind::of_number(number)), (number, Some(kind)));
        }
        assert_eq!((FeedEventKind::of_number(0), FeedEventKind::of_number(17)), (None, None));
    }
}
