//! A record's history: an append-only stream of events from which the record can be rebuilt. Pure functions.
//!
//! The stream stands in the record's own row, so it is written, replaced and forgotten with it. That it was received, and
//! that it completed, is told by the record's other fields: a message that completes at once pays nothing for its history.

use crate::message::key::Fingerprint;
use crate::record::{self, Event, Illegal, Moment, Record, State};
use crate::message::strategy::Position;

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

/// An event whose error the record shows no more keeps so much of it, in bytes: a row is written anew with each attempt.
const PAST_ERROR_BYTES: usize = 256;

fn shorten(event: &mut Event) {
    if let Event::Failed { error, .. } | Event::GivenUp { error } | Event::CompensationStarted { error } = event {
        error.truncate(error.floor_char_boundary(PAST_ERROR_BYTES));
    }
}

/// The error that an event brings.
fn error_of(event: &Event) -> Option<&str> {
    match event {
        Event::Failed { error, .. } | Event::GivenUp { error } | Event::CompensationStarted { error } => Some(error),
        _ => None,
    }
}

/// Whether a claim only goes on: a heartbeat stands in the place of the one before it.
fn renews(last: Option<&Moment>, moment: &Moment) -> bool {
    match (last.map(|last| &last.event), &moment.event) {
        (Some(Event::Claimed { owner: was, .. }), Event::Claimed { owner, .. }) => was == owner,
        _ => false,
    }
}

/// The record that `moment` leaves, behind those of `history`.
pub(crate) fn after(received: &Received, mut history: Vec<Moment>, state: State, moment: &Moment) -> Record {
    // An error that the record still shows stays whole.
    if matches!(state, State::Completed { .. }) || error_of(&moment.event).is_some() {
        history.iter_mut().for_each(|past| shorten(&mut past.event));
    }
    if renews(history.last(), moment) {
        history.pop();
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::processor::Output;

    fn moment(epoch: u64, attempts: u32, event: Event) -> Moment {
        let ended = matches!(event, Event::Completed(_) | Event::GivenUp { .. });
        let expires_ms = ended.then_some(9_000 + epoch);
        Moment { event, at_ms: 1_000 + epoch, epoch, attempts, component: format!("c{epoch}").into(), expires_ms }
    }

    fn received() -> Received {
        let position = Some(Position::Version(3));
        Received { at_ms: 1_000, fingerprint: Fingerprint { version: 1, digest: [7; 16] }, position, saga: None }
    }

    /// Failed, given up, redriven, failed again, completed.
    fn life() -> Vec<Moment> {
        let error = |bytes: usize| "\u{e9}".repeat(bytes / 2);
        vec![
            moment(1, 1, Event::Failed { error: error(300), retry_at_ms: 5 }),
            moment(2, 2, Event::GivenUp { error: error(300) }),
            moment(3, 0, Event::Redriven { at_ms: 6 }),
            moment(4, 1, Event::Failed { error: error(10), retry_at_ms: 7 }),
            moment(5, 2, Event::Completed(Output { content_type: None, data: "done".into() })),
        ]
    }

    #[test]
    fn a_record_is_rebuilt_from_its_history_at_every_moment() {
        let life = life();
        for count in 1..=life.len() {
            let record = rebuild(&received(), &life[..count]).expect("a life").expect("something happened");
            let (began, moments) = of(&record);
            assert_eq!(began, received());
            assert_eq!(moments.len(), count);
            assert_eq!(rebuild(&began, &moments), Ok(Some(record)), "after {count}");
        }
    }

    #[test]
    fn the_last_error_is_whole_and_those_behind_it_are_short() {
        let life = life();
        let record = rebuild(&received(), &life[..2]).expect("a life").expect("something happened");
        assert_eq!(record.state.error().map(str::len), Some(300));
        let texts = record.history.iter().map(|moment| error_of(&moment.event).map_or(0, str::len));
        assert_eq!(texts.collect::<Vec<_>>(), [PAST_ERROR_BYTES, 300]);
    }

    #[test]
    fn what_cannot_happen_is_not_rebuilt() {
        let twice = [moment(1, 1, Event::Completed(Output::default())), moment(2, 2, Event::CompensationDone)];
        assert!(rebuild(&received(), &twice).is_err());
    }
}
