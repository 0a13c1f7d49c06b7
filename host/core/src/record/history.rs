//! A record's history: an append-only stream of events from which the record can be rebuilt. Pure
//! functions.
//!
//! The stream is stored in the record's own row, so it is written, replaced and removed with the
//! row. The record's other fields tell that it was received and that it completed: a message that
//! completes at once pays nothing for its history.

use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Position;
use crate::record::{HistoryEntry, IllegalRecordEvent, Record, RecordEvent, RecordState, next_state};

/// Start of a record's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordOrigin {
    /// Time of receipt, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Fingerprint of the first delivery.
    pub fingerprint: Fingerprint,
    /// Position of the record's message, if messages have positions.
    pub position: Option<Position>,
    /// Saga that the record belongs to.
    pub saga: Option<String>,
}

/// Whole event stream of a record.
pub fn record_history(record: &Record) -> (RecordOrigin, Vec<HistoryEntry>) {
    let received = RecordOrigin {
        at_ms: record.received_ms,
        fingerprint: record.fingerprint,
        position: record.position.clone(),
        saga: record.saga.clone(),
    };
    let mut entries = record.history.clone();
    if let RecordState::Completed { output } = &record.state {
        entries.push(HistoryEntry {
            event: RecordEvent::Completed(output.clone()),
            at_ms: record.changed_ms,
            epoch: record.epoch,
            attempts: record.attempts,
            component: record.component.clone(),
            expires_ms: record.expires_ms,
        });
    }
    (received, entries)
}

/// Returns the record after a stream of events; `None` if nothing has happened yet.
pub fn rebuild_record(received: &RecordOrigin, entries: &[HistoryEntry]) -> Result<Option<Record>, IllegalRecordEvent> {
    let mut record: Option<Record> = None;
    for entry in entries {
        let state = next_state(record.as_ref().map(|record| &record.state), entry.event.clone())?;
        let history = record.map(|record| record.history).unwrap_or_default();
        record = Some(append(received, history, state, entry));
    }
    Ok(record)
}

/// Length to which an event's error is cut once the record no longer shows it, in bytes: each
/// attempt writes the whole row again.
const PAST_ERROR_BYTES: usize = 256;

fn shorten(event: &mut RecordEvent) {
    if let RecordEvent::Failed { error, .. }
    | RecordEvent::GivenUp { error }
    | RecordEvent::CompensationStarted { error } = event
    {
        error.truncate(error.floor_char_boundary(PAST_ERROR_BYTES));
    }
}

/// Returns the error that an event carries.
fn error_of(event: &RecordEvent) -> Option<&str> {
    match event {
        RecordEvent::Failed { error, .. }
        | RecordEvent::GivenUp { error }
        | RecordEvent::CompensationStarted { error } => Some(error),
        _ => None,
    }
}

/// Returns `true` if a claim only continues: a heartbeat replaces the one before it.
fn renews(last: Option<&HistoryEntry>, entry: &HistoryEntry) -> bool {
    match (last.map(|last| &last.event), &entry.event) {
        (Some(RecordEvent::Claimed { owner: was, .. }), RecordEvent::Claimed { owner, .. }) => was == owner,
        _ => false,
    }
}

impl Record {
    /// Returns the record after `entry`, which becomes the last of its history.
    pub(crate) fn after(&self, entry: &HistoryEntry) -> Result<Self, IllegalRecordEvent> {
        let state = next_state(Some(&self.state), entry.event.clone())?;
        let (origin, history) = record_history(self);
        Ok(append(&origin, history, state, entry))
    }

    /// Returns the record after `event` at `now_ms`, with its component and its attempts. A record
    /// whose life ends with `event` is retained for `life_ms` milliseconds.
    pub(crate) fn after_event(
        &self,
        event: RecordEvent,
        now_ms: u64,
        life_ms: u64,
    ) -> Result<Self, IllegalRecordEvent> {
        let state = next_state(Some(&self.state), event.clone())?;
        let entry = HistoryEntry {
            event,
            at_ms: now_ms,
            epoch: self.epoch + 1,
            attempts: self.attempts,
            component: self.component.clone(),
            expires_ms: state.is_terminal().then(|| now_ms.saturating_add(life_ms)),
        };
        let (origin, history) = record_history(self);
        Ok(append(&origin, history, state, &entry))
    }
}

/// Returns the record in `state` that `entry` leaves after `history`.
pub(crate) fn append(
    received: &RecordOrigin,
    mut history: Vec<HistoryEntry>,
    state: RecordState,
    entry: &HistoryEntry,
) -> Record {
    // An error that the record still shows is not cut.
    if matches!(state, RecordState::Completed { .. }) || error_of(&entry.event).is_some() {
        history.iter_mut().for_each(|past| shorten(&mut past.event));
    }
    if renews(history.last(), entry) {
        history.pop();
    }
    if !matches!(entry.event, RecordEvent::Completed(_)) {
        history.push(entry.clone());
    }
    Record {
        state,
        epoch: entry.epoch,
        attempts: entry.attempts,
        fingerprint: received.fingerprint,
        position: received.position.clone(),
        component: entry.component.clone(),
        saga: received.saga.clone(),
        received_ms: received.at_ms,
        changed_ms: entry.at_ms,
        expires_ms: entry.expires_ms,
        history,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Output;

    fn entry(epoch: u64, attempts: u32, event: RecordEvent) -> HistoryEntry {
        let ended = matches!(event, RecordEvent::Completed(_) | RecordEvent::GivenUp { .. });
        let expires_ms = ended.then_some(9_000 + epoch);
        HistoryEntry { event, at_ms: 1_000 + epoch, epoch, attempts, component: format!("c{epoch}").into(), expires_ms }
    }

    fn received() -> RecordOrigin {
        let position = Some(Position::Version(3));
        RecordOrigin { at_ms: 1_000, fingerprint: Fingerprint { version: 1, digest: [7; 16] }, position, saga: None }
    }

    /// Failed, given up, redriven, failed again, completed.
    fn life() -> Vec<HistoryEntry> {
        let error = |bytes: usize| "\u{e9}".repeat(bytes / 2);
        vec![
            entry(1, 1, RecordEvent::Failed { error: error(300), retry_at_ms: 5 }),
            entry(2, 2, RecordEvent::GivenUp { error: error(300) }),
            entry(3, 0, RecordEvent::Redriven { at_ms: 6 }),
            entry(4, 1, RecordEvent::Failed { error: error(10), retry_at_ms: 7 }),
            entry(5, 2, RecordEvent::Completed(Output { content_type: None, data: "done".into() })),
        ]
    }

    #[test]
    fn a_record_is_rebuilt_from_its_history_at_every_moment() {
        let life = life();
        for count in 1..=life.len() {
            let record = rebuild_record(&received(), &life[..count]).expect("a life").expect("something happened");
            let (began, entries) = record_history(&record);
            assert_eq!(began, received());
            assert_eq!(entries.len(), count);
            assert_eq!(rebuild_record(&began, &entries), Ok(Some(record)), "after {count}");
        }
    }

    #[test]
    fn the_last_error_is_whole_and_those_behind_it_are_short() {
        let life = life();
        let record = rebuild_record(&received(), &life[..2]).expect("a life").expect("something happened");
        assert_eq!(record.state.error().map(str::len), Some(300));
        let texts = record.history.iter().map(|entry| error_of(&entry.event).map_or(0, str::len));
        assert_eq!(texts.collect::<Vec<_>>(), [PAST_ERROR_BYTES, 300]);
    }

    #[test]
    fn what_cannot_happen_is_not_rebuilt() {
        let twice =
            [entry(1, 1, RecordEvent::Completed(Output::default())), entry(2, 2, RecordEvent::CompensationDone)];
        assert!(rebuild_record(&received(), &twice).is_err());
    }
}
