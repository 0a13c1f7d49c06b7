//! Append-only event streams of a processor, stored under state keys that are the host's own. An
//! append commits with its message or not at all. Reads of a stream are checked as all other reads
//! of a run are. Decides nothing about messages.

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::run::context::Context;
use crate::run::failure::ContextError;
use crate::state::{RESERVED, StateView};
use crate::support::error::StoreError;
use crate::support::fault;

/// Prefix of the keys of all streams.
const PREFIX: &str = "events/";
/// Bytes before the event's data in an event's value: its id, and the length of its type.
const HEADER_BYTES: usize = 16 + 4;

/// An event to append; its id and version are the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// Type of the event.
    pub kind: String,
    /// Data of the event.
    pub data: Bytes,
}

/// An event as it is stored in its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEvent {
    /// Stable id: derived from the key of the message that appended it and from its position there.
    /// 32 hex digits.
    pub id: String,
    /// Position in the stream: 1 for the first event.
    pub version: u64,
    /// Type of the event.
    pub kind: String,
    /// Data of the event.
    pub data: Bytes,
}

/// The stream is at another version than the append expected; nothing was appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendConflict {
    /// Current version of the stream.
    pub actual_version: u64,
}

impl Context {
    /// Appends `events` to `stream` if that is at version `expected` (`None`: at any version).
    /// Returns the stream's new version. An empty stream is at 0.
    pub async fn append(
        &mut self,
        stream: &str,
        expected: Option<u64>,
        events: Vec<NewEvent>,
    ) -> Result<Result<u64, AppendConflict>, ContextError> {
        self.check("events of an append", events.len(), self.limits().append_events)?;
        let actual_version = self.stream_version(stream).await?;
        if expected.is_some_and(|expected| expected != actual_version) {
            return Ok(Err(AppendConflict { actual_version }));
        }
        let mut version = actual_version;
        let keys = Keys::of(stream);
        for event in events {
            if event.kind.is_empty() {
                return Err(ContextError::NoEvent("an event has no type"));
            }
            version += 1;
            let value = encode(self.next_event_id(), &event);
            self.write_any(&keys.event(version), Some(value))?;
        }
        if version > actual_version {
            self.write_any(&keys.head(), Some(Bytes::copy_from_slice(&version.to_le_bytes())))?;
        }
        Ok(Ok(version))
    }

    /// Returns up to `limit` events of `stream` after version `after`, oldest first, as this run
    /// left them.
    pub async fn events(&mut self, stream: &str, after: u64, limit: usize) -> Result<Vec<StreamEvent>, ContextError> {
        self.check_stream(stream)?;
        let (start, end) = Keys::of(stream).after(after);
        let entries = self.scan_any(&start, &end, limit).await?;
        Ok(entries.into_iter().map(|(key, value)| decode(&key, &value)).collect::<Result<_, _>>()?)
    }

    /// Returns the version of `stream`: that of its last event, 0 if it has none.
    pub async fn stream_version(&mut self, stream: &str) -> Result<u64, ContextError> {
        self.check_stream(stream)?;
        let key = Keys::of(stream).head();
        if fault::mutated("stream-version-unchecked") {
            let head = self.again().get_any(&key).await?;
            return Ok(version_of(head.as_ref())?);
        }
        let head = self.get_any(&key).await?;
        Ok(version_of(head.as_ref())?)
    }

    fn check_stream(&self, stream: &str) -> Result<(), ContextError> {
        if stream.is_empty() {
            return Err(ContextError::NoEvent("an event stream has no name"));
        }
        self.check("bytes of an event stream's name", stream.len(), self.limits().stream_name_bytes)
    }

    fn next_event_id(&mut self) -> [u8; 16] {
        let position = self.appended;
        self.appended += 1;
        // A context belongs to no message only in tests.
        self.message_key().map_or([0; 16], |message_key| message_key.event_id(position))
    }
}

/// Returns up to `limit` events of `stream` after version `after`, oldest first: for people.
pub async fn read_stream(
    view: &dyn StateView,
    stream: &str,
    after: u64,
    limit: usize,
) -> Result<Vec<StreamEvent>, StoreError> {
    let (start, end) = Keys::of(stream).after(after);
    let entries = view.scan(&start, Some(&end), limit).await?;
    entries.iter().map(|(key, _, value)| decode(key, value)).collect()
}

/// Returns up to `limit` streams in the order of their keys, after the one named `after`, each with
/// its version: for people.
pub async fn list_streams(
    view: &dyn StateView,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<(String, u64)>, StoreError> {
    let (mut start, end) = (format!("{RESERVED}{PREFIX}"), format!("{RESERVED}events0"));
    if let Some(after) = after {
        start = Keys::of(after).past();
    }
    let mut found = Vec::new();
    while found.len() < limit {
        // Steps from one stream to the next, past all events of the one.
        let Some((key, ..)) = view.scan(&start, Some(&end), 1).await?.into_iter().next() else { break };
        let keys = Keys::in_key(&key).ok_or_else(|| damaged(&key))?;
        let (_, head) = view.get(&keys.head()).await?;
        found.push((keys.stream(), version_of(head.as_ref())?));
        start = keys.past();
    }
    Ok(found)
}

/// The keys of one stream: its name, with `/` inside as `%2F`, so that no stream lies among the
/// events of another.
struct Keys(String);

impl Keys {
    fn of(stream: &str) -> Self {
        Self(format!("{RESERVED}{PREFIX}{}/", stream.replace('%', "%25").replace('/', "%2F")))
    }

    /// Returns the keys of the stream that `key` belongs to.
    fn in_key(key: &str) -> Option<Self> {
        let (stream, _) = key.rsplit_once('/')?;
        Some(Self(format!("{stream}/")))
    }

    fn stream(&self) -> String {
        let name = self.0.strip_prefix(RESERVED).and_then(|key| key.strip_prefix(PREFIX)).unwrap_or(&self.0);
        name.trim_end_matches('/').replace("%2F", "/").replace("%25", "%")
    }

    /// Returns the key of the stream's version.
    fn head(&self) -> String {
        format!("{}head", self.0)
    }

    /// Returns the key of an event. The number of digits is fixed, so that the order of the keys is
    /// that of the versions.
    fn event(&self, version: u64) -> String {
        format!("{}{version:016x}", self.0)
    }

    /// Returns the range of events after a version; the head comes after all of them.
    fn after(&self, version: u64) -> (String, String) {
        match version.checked_add(1) {
            Some(first) => (self.event(first), self.head()),
            None => (self.head(), self.head()),
        }
    }

    /// Returns the first key after all keys of the stream.
    fn past(&self) -> String {
        format!("{}0", self.0.trim_end_matches('/'))
    }
}

fn encode(id: [u8; 16], event: &NewEvent) -> Bytes {
    let mut value = BytesMut::with_capacity(HEADER_BYTES + event.kind.len() + event.data.len());
    value.put_slice(&id);
    value.put_u32_le(event.kind.len() as u32);
    value.put_slice(event.kind.as_bytes());
    value.put_slice(&event.data);
    value.freeze()
}

fn decode(key: &str, value: &Bytes) -> Result<StreamEvent, StoreError> {
    let read = || {
        let version = u64::from_str_radix(key.rsplit_once('/')?.1, 16).ok()?;
        let (id, rest) = value.split_first_chunk::<16>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let kind = std::str::from_utf8(rest.get(..length)?).ok()?.to_owned();
        let id = format!("{:032x}", u128::from_be_bytes(*id));
        Some(StreamEvent { id, version, kind, data: value.slice(HEADER_BYTES + length..) })
    };
    read().ok_or_else(|| damaged(key))
}

fn version_of(head: Option<&Bytes>) -> Result<u64, StoreError> {
    let Some(head) = head else { return Ok(0) };
    head.as_ref().try_into().map(u64::from_le_bytes).map_err(|_| damaged("an event stream's version"))
}

fn damaged(key: &str) -> StoreError {
    StoreError::Damaged(format!("{} is no event stream", key.trim_start_matches(RESERVED)).into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use futures_util::future::BoxFuture;

    use super::*;
    use crate::message::key::{RecordKey, Scope};
    use crate::state::{EffectLimits, Entry, Version};

    #[derive(Clone, Default)]
    struct Kept(BTreeMap<String, Bytes>);

    impl StateView for Kept {
        fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
            Box::pin(async move { Ok(self.0.get(key).map_or((0, None), |value| (1, Some(value.clone())))) })
        }

        fn scan<'a>(
            &'a self,
            start: &'a str,
            end: Option<&'a str>,
            limit: usize,
        ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
            let inside = move |key: &str| key >= start && end.is_none_or(|end| key < end);
            let entries = self.0.iter().filter(move |(key, _)| inside(key)).take(limit);
            let entries = entries.map(|(key, value)| (key.clone(), 1, value.clone())).collect();
            Box::pin(async move { Ok(entries) })
        }
    }

    fn context(kept: &Kept) -> Context {
        let message_key = RecordKey::new(Scope::of("p"), "/s".into(), "m".into());
        Context::new(Arc::new(kept.clone()), Arc::new(EffectLimits::default())).of(&message_key)
    }

    fn new(kind: &str) -> NewEvent {
        NewEvent { kind: kind.into(), data: Bytes::from(format!("data of {kind}")) }
    }

    fn kinds(events: &[StreamEvent]) -> Vec<(u64, &str)> {
        events.iter().map(|event| (event.version, event.kind.as_str())).collect()
    }

    /// One message that appends `kinds` to `stream`, committed.
    async fn appended(kept: &mut Kept, stream: &str, kinds: &[&str]) {
        let mut context = context(kept);
        let events = kinds.iter().map(|kind| new(kind)).collect();
        context.append(stream, None, events).await.expect("appended").expect("nothing expected");
        let writes = context.finish().1.writes;
        kept.0.extend(writes.into_iter().filter_map(|(key, value)| Some((key, value?))));
    }

    #[tokio::test]
    async fn a_run_reads_what_it_appended_behind_what_was_there() {
        let mut kept = Kept::default();
        appended(&mut kept, "a", &["one", "two"]).await;
        let mut context = context(&kept);
        assert_eq!(context.stream_version("a").await.expect("a version"), 2);
        let appended = context.append("a", Some(2), vec![new("three")]).await.expect("appended");
        assert_eq!(appended, Ok(3));
        assert_eq!(context.append("a", Some(3), vec![new("four")]).await.expect("appended"), Ok(4));
        let all = context.events("a", 0, 10).await.expect("events");
        assert_eq!(kinds(&all), [(1, "one"), (2, "two"), (3, "three"), (4, "four")]);
        assert_eq!(all[3].data, "data of four");
        assert_eq!(kinds(&context.events("a", 1, 2).await.expect("events")), [(2, "two"), (3, "three")]);
        assert_eq!(context.events("a", u64::MAX, 9).await.expect("events"), []);
    }

    #[tokio::test]
    async fn another_version_than_expected_appends_nothing() {
        let mut kept = Kept::default();
        appended(&mut kept, "a", &["one"]).await;
        let mut context = context(&kept);
        for expected in [0, 2] {
            let refused = context.append("a", Some(expected), vec![new("x")]).await.expect("an answer");
            assert_eq!(refused, Err(AppendConflict { actual_version: 1 }));
        }
        assert_eq!(context.append("a", Some(1), vec![]).await.expect("nothing to append"), Ok(1));
        let (reads, effects) = context.finish();
        assert!(effects.writes.is_empty());
        assert_eq!(reads.keys.len(), 1, "the run rests on the version it was refused by");
    }

    #[tokio::test]
    async fn ids_come_from_the_message_and_the_place_of_the_append() {
        let ids = async || {
            let mut context = context(&Kept::default());
            context.append("a", None, vec![new("x"), new("x")]).await.expect("appended").expect("empty");
            context.append("b", None, vec![new("x")]).await.expect("appended").expect("empty");
            let mut events = context.events("a", 0, 9).await.expect("events");
            events.extend(context.events("b", 0, 9).await.expect("events"));
            events.into_iter().map(|event| event.id).collect::<Vec<_>>()
        };
        let first = ids().await;
        assert_eq!(first, ids().await);
        assert!(first[0] != first[1] && first[1] != first[2] && first[0].len() == 32, "{first:?}");
    }

    #[tokio::test]
    async fn no_stream_lies_among_the_events_of_another() {
        let mut kept = Kept::default();
        let names = ["a", "a/0000000000000001", "a%2F", "a/", "a-", "ab", "head", "events/x"];
        for name in names {
            appended(&mut kept, name, &[name, "second"]).await;
        }
        for name in names {
            assert_eq!(kinds(&read_stream(&kept, name, 0, 99).await.expect("events")), [(1, name), (2, "second")]);
        }
        let listed = list_streams(&kept, None, 99).await.expect("streams");
        let mut sorted: Vec<_> = listed.iter().map(|(name, version)| (name.as_str(), *version)).collect();
        let after = list_streams(&kept, Some(&listed[2].0), 2).await.expect("streams");
        assert_eq!(after, listed[3..5]);
        sorted.sort_unstable();
        let mut expected = names.map(|name| (name, 2));
        expected.sort_unstable();
        assert_eq!(sorted, expected);
    }

    #[tokio::test]
    async fn what_is_no_event_is_refused_and_guests_do_not_see_where_events_stand() {
        let mut context = context(&Kept::default());
        assert!(matches!(context.append("", None, vec![]).await, Err(ContextError::NoEvent(_))));
        assert!(matches!(context.append("a", None, vec![new("")]).await, Err(ContextError::NoEvent(_))));
        assert!(matches!(context.events(&"a".repeat(257), 0, 1).await, Err(ContextError::Limit { .. })));
        let many = std::iter::repeat_n(new("x"), 1_001).collect();
        assert!(matches!(context.append("a", None, many).await, Err(ContextError::Limit { .. })));
        context.append("a", None, vec![new("x")]).await.expect("appended").expect("empty");
        let head = Keys::of("a").head();
        assert!(matches!(context.get(&head).await, Err(ContextError::Reserved)));
        assert!(matches!(context.set(&head, "0"), Err(ContextError::Reserved)));
        assert_eq!(context.scan("", None, 9).await.expect("a scan"), []);
    }
}
