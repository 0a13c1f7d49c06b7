//! The processor's event streams: typed events as JSON, or bytes. Caches nothing: the host does.

use std::collections::VecDeque;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;
use crate::host::{Backend, Host as _};

/// Number of events that one call of the host returns.
const PAGE_EVENTS: u32 = 128;

/// The processor's own event streams, part of the message's transaction.
///
/// If another message appends to a stream that this message has read, the host throws the run away
/// and runs the message again: what a processor decides by a stream is never older than its append.
#[derive(Clone, Copy)]
pub struct Events<'a> {
    pub(crate) backend: &'a Backend,
}

/// An event to append. Its id and version are the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub(crate) kind: String,
    pub(crate) data: Vec<u8>,
}

/// An event in its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub(crate) id: String,
    pub(crate) version: u64,
    pub(crate) kind: String,
    pub(crate) data: Vec<u8>,
}

/// The stream is at another version than was expected; nothing was appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// The version it is at.
    pub actual_version: u64,
}

impl<'a> Events<'a> {
    /// Appends `events` to `stream` if that is at version `expected` (`None`: whatever it is at);
    /// answers its new version, which is that of its last event. An empty stream is at 0.
    pub fn append(self, stream: &str, expected: Option<u64>, events: &[NewEvent]) -> Result<u64, Conflict> {
        self.backend.append(stream, expected, events).map_err(|actual_version| Conflict { actual_version })
    }

    /// All events of `stream`, oldest first, fetched page by page.
    pub fn read(self, stream: &str) -> Read<'a> {
        self.read_after(stream, 0)
    }

    /// The events of `stream` after version `after`, oldest first, fetched page by page.
    pub fn read_after(self, stream: &str, after: u64) -> Read<'a> {
        Read { events: self, stream: stream.to_owned(), after: Some(after), page: VecDeque::new() }
    }

    /// The version of `stream`: that of its last event, 0 if it has none.
    pub fn version(self, stream: &str) -> u64 {
        self.backend.version(stream)
    }
}

impl NewEvent {
    /// An event of type `kind`, without data.
    pub fn new(kind: impl Into<String>) -> Self {
        Self { kind: kind.into(), data: Vec::new() }
    }

    /// `value` as JSON.
    pub fn json<T: Serialize + ?Sized>(self, value: &T) -> Result<Self, Failure> {
        Ok(self.data(serde_json::to_vec(value)?))
    }

    /// Any bytes.
    #[must_use]
    pub fn data(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.data = data.into();
        self
    }
}

impl Event {
    /// Its id: derived from the message that appended it, and the same on every run of that.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its place in the stream: 1 for the first.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Its type.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Its data.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Its data as `T`. What is no `T` fails the message for good.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        let value = serde_json::from_slice(&self.data);
        value.map_err(|error| Failure::reject(format!("event {} of type {}: {error}", self.version, self.kind)))
    }
}

/// As a failure it may pass: another run reads the stream as it is then.
impl From<Conflict> for Failure {
    fn from(conflict: Conflict) -> Self {
        Self::retry(format!("the stream is at version {}", conflict.actual_version))
    }
}

/// Events of a stream, oldest first.
pub struct Read<'a> {
    events: Events<'a>,
    stream: String,
    /// The version after which the next page starts; `None` after the last.
    after: Option<u64>,
    page: VecDeque<Event>,
}

impl Iterator for Read<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.page.is_empty() {
            let after = self.after.take()?;
            let page = self.events.backend.events(&self.stream, after, PAGE_EVENTS);
            if page.len() == PAGE_EVENTS as usize {
                self.after = page.last().map(|event| event.version);
            }
            self.page = page.into();
        }
        self.page.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, message};
    use crate::{Context, Message, Outcome};

    fn keep(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
        let events = ctx.events();
        let before = events.read("all").count();
        let many: Vec<_> =
            (0..message.json::<u32>()?).map(|n| NewEvent::new("n").json(&n)).collect::<Result<_, _>>()?;
        events.append("all", Some(before as u64), &many)?;
        let numbers: Vec<u32> =
            events.read_after("all", before as u64).map(|event| event.json()).collect::<Result<_, _>>()?;
        assert_eq!(numbers, (0..many.len() as u32).collect::<Vec<_>>(), "a read sees the message's own appends");
        Outcome::json(&events.version("all"))
    }

    #[test]
    fn streams_are_read_page_by_page() {
        let mut harness = Harness::new(keep);
        assert_eq!(harness.deliver(message("t").json(&300)).map(|outcome| outcome.data), Ok(b"300".to_vec()));
        assert_eq!(harness.deliver(message("t").json(&1)).map(|outcome| outcome.data), Ok(b"301".to_vec()));
        let events = harness.events("all");
        assert_eq!((events.len(), events[300].version(), events[300].kind()), (301, 301, "n"));
    }

    #[test]
    fn another_version_than_expected_appends_nothing() {
        let append =
            |_: Message, ctx: &mut Context| Ok(Outcome::text(format!("{:?}", ctx.events().append("s", Some(1), &[]))));
        let outcome = Harness::new(append).deliver(message("t")).expect("an answer");
        assert_eq!(outcome, Outcome::text("Err(Conflict { actual_version: 0 })"));
    }
}
