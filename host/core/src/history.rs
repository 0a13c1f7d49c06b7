//! A record's history: an append-only stream of events from which the record can be rebuilt. Pure functions.
//!
//! The stream stands in the record's own row, so it is written, replaced and forgotten with it. That it was received, and
//! that it completed, is told by the record's other fields: a message that completes at once pays nothing for its history.

use crate::key::Fingerprint;
use crate::record::{self, Event, Illegal, Moment, Record, State};
use crate::strategy::Position;

/// How a record's life began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What the first delivery carried.
    pub fingerprint: Fingerprint,
    /// Where its message stands, if messages have positions.
    pub position: Option<Position>,
    /// The saga it belongs to.
    pub saga: Option<String>,
}

/// The whole stream of a record.
pub fn of(record: &Record) -> (Received, Vec<Moment>) {
    let received = Received {
        at_ms: record.received_ms,
        fingerprint: record.fingerprint,
        position: record.position.clone(),
        saga: record.saga.clone(),
    };
    let mut moments = record.history.clone();
    if let State::Completed { output } = &record.state {
        moments.push(Moment {
            event: Event::Completed(output.clone()),
            at_ms: record.changed_ms,
            epoch: record.epoch,
            attempts: record.attempts,
            component: record.component.clone(),
            expires_ms: record.expires_ms,
        });
    }
    (received, moments)
}

/// The record after a stream of events; `None` if nothing has happened yet.
pub fn rebuild(received: &Received, moments: &[Moment]) -> Result<Option<Record>, Illegal> {
    let mut record: Option<Record> = None;
    for moment in moments {
        let state = record::next(record.as_ref().map(|record| &record.state), moment.event.clone())?;
        let history = record.map(|record| record.history).unwrap_or_default();
        record = Some(after(received, history, state, moment));
    }
    Ok(record)
}

/// The record that `moment` leaves, behind those of `history`.
pub(crate) fn after(received: &Received, mut history: Vec<Moment>, state: State, moment: &Moment) -> Record {
    if !matches!(moment.event, Event::Completed(_)) {
        history.push(moment.clone());
    }
    Record {
        state,
        epoch: moment.epoch,
        attempts: moment.attempts,
        fingerprint: received.fingerprint,
        position: received.position.clone(),
        component: moment.component.clone(),
        saga: received.saga.clone(),
        received_ms: received.at_ms,
        changed_ms: moment.at_ms,
        expires_ms: moment.expires_ms,
        history,
    }
}
