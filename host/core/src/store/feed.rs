//! The feed: events of all processors' records, in the order in which they became durable. Decides
//! which entry a commit adds and how a position in the feed is named; the store decides where
//! entries are stored.

use std::fmt;
use std::str::FromStr;

use futures_util::future::BoxFuture;

use crate::message::key::RecordKey;
use crate::record::{Record, RecordEvent, RecordState};
use crate::store::commit::{Commit, Expected, HeldChange, RecordChange};
use crate::store::held_message::HoldReason;
use crate::support::error::StoreError;

/// Kind of a feed entry. The numbers are stored: they never change, and new kinds get new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FeedEventKind {
    /// A message completed.
    Completed = 1,
    /// An attempt failed, and another is due.
    Failed = 2,
    /// A message failed for good, or could never run, and is held as a dead letter.
    DeadLettered = 3,
    /// A message waits for its predecessor.
    Parked = 4,
    /// An operator ran a dead letter again.
    Redriven = 5,
    /// A held message was removed and its record stayed as it was: an operator removed it, or it
    /// was a duplicate or stale.
    Discarded = 6,
    /// An operator removed a record.
    Evicted = 7,
    /// Duplicates were answered from the record; see [`FeedEntry::times`].
    Replayed = 8,
    /// Messages arrived that were older than the last one of their entity; see
    /// [`FeedEntry::times`].
    Stale = 9,
    /// Expired records were removed; see [`FeedEntry::times`].
    Swept = 10,
    /// A message was claimed durably before its run.
    Claimed = 11,
    /// A message is being compensated.
    CompensationStarted = 12,
    /// A message was compensated.
    Compensated = 13,
    /// A message could not be compensated.
    CompensationFailed = 14,
    /// An operator ran a failed compensation again.
    CompensationRetried = 15,
    /// An operator settled a failed compensation by hand.
    CompensationResolved = 16,
}

/// Content of one feed entry, without its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedEntry {
    /// Kind of the entry.
    pub kind: FeedEventKind,
    /// Digest of the record's key; 0 where it is about many records.
    pub digest: u128,
    /// Time of the event, in milliseconds since the Unix epoch; the last time, where it happened
    /// several times.
    pub at_ms: u64,
    /// Attempts made so far; 0 where none was counted.
    pub attempts: u32,
    /// The record's epoch; 0 where it did not matter.
    pub epoch: u64,
    /// Number of times it happened, or of records that it concerns; mostly 1.
    pub times: u64,
}

/// Position in the feed: number of the group that became durable, and index in the group. Its text
/// form is `12-3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cursor {
    /// Number of the group; the first is 1.
    pub sequence: u64,
    /// Index among the group's entries, from 0.
    pub index: u32,
}

/// Feed entry with its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedEvent {
    /// Position of the entry.
    pub cursor: Cursor,
    /// Key of the record; `None` where no record is under it now, or where the entry is about many
    /// records.
    pub key: Option<RecordKey>,
    /// Content of the entry.
    pub entry: FeedEntry,
}

/// Part of the feed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FeedPage {
    /// Entries, in order.
    pub events: Vec<FeedEvent>,
    /// Set if entries after the requested position are no longer stored, or if the feed has not
    /// reached that position yet, since the position is of another store or of a journal that was
    /// cut. The reader of the feed has missed entries.
    pub truncated: bool,
}

/// Feed of a store, for people and for programs that follow it.
pub trait Feed: Send + Sync + 'static {
    /// Returns up to `limit` entries after the position `after` (`None`: from the oldest one
    /// stored), in order; only those of the record with the digest `of`, if given. Returned entries
    /// are durable, and their positions never change.
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

    /// Returns the kind of a stored number.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }

    /// Returns the kind's name, as the command line and the API print it.
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

    /// Returns the last event of a record. The record's history tells it, except for a completion,
    /// which the state tells.
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
    /// Returns the feed entry of this commit, once it is durable: one entry, or none if the commit
    /// touches neither the record nor a held message.
    pub fn told(&self) -> Option<FeedEntry> {
        let expected = match self.expected {
            Expected::Epoch(epoch) | Expected::EpochOrAbsent(epoch) => epoch,
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
    /// Returns an entry that is about `records` records at once.
    pub fn of_many(kind: FeedEventKind, records: u64, at_ms: u64) -> Self {
        Self { kind, digest: 0, at_ms, attempts: 0, epoch: 0, times: records }
    }
}

impl FeedPage {
    /// Returns the position to continue from: after the last entry here, or after the same position
    /// again.
    pub fn next(&self, after: Option<Cursor>) -> Option<Cursor> {
        self.events.last().map(|event| event.cursor).or(after)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.sequence, self.index)
    }
}

/// Error: the text is not a position in the feed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a cursor of the feed: take the one that came with the last events, such as 12-3, or none to begin"
)]
pub struct ParseCursorError(String);

impl FromStr for Cursor {
    type Err = ParseCursorError;

    fn from_str(text: &str) -> Result<Self, ParseCursorError> {
        // `parse` would accept a sign.
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
