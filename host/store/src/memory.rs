//! The store in memory: follows the rules of the redb store, and makes nothing durable. Serves
//! tests, and is the plainest reading of the contract.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use hapax_core::{
    Commit, Cursor, Entry, Feed, FeedEntry, FeedEvent, FeedEventKind, FeedPage, Group, HeldChange, HeldKey,
    HeldMessage, IdempotencyStorage, Inspect, Message, Outbox, OutboxPosition, OutboxRow, RangeRead, ReadSet, Record,
    RecordChange, RecordKey, Scope, StateView, StoreError, StoreFacts, Verdict, Version,
};
use parking_lot::Mutex;

/// Most events of the feed that are held.
const EVENTS_MAX: usize = 1_000_000;

/// The store in memory; cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
}

type State = BTreeMap<String, (Version, Bytes)>;

#[derive(Debug, Default)]
struct Inner {
    records: BTreeMap<RecordKey, Record>,
    state: BTreeMap<Scope, State>,
    outbox: BTreeMap<OutboxPosition, Message>,
    held_messages: BTreeMap<HeldKey, HeldMessage>,
    last: Version,
    feed: Events,
}

/// The feed: its latest events, and the cursors at both of its ends.
#[derive(Debug)]
struct Events {
    kept: VecDeque<(Cursor, FeedEntry)>,
    max: usize,
    /// Cursor of the last dropped event.
    dropped: Cursor,
    /// Number of the last group.
    sequence: u64,
}

impl Default for Events {
    fn default() -> Self {
        Self { kept: VecDeque::new(), max: EVENTS_MAX, dropped: Cursor::default(), sequence: 0 }
    }
}

impl Events {
    /// Adds the events of one group, and drops the oldest above `max`.
    fn group(&mut self, events: impl IntoIterator<Item = FeedEntry>) {
        self.sequence += 1;
        for (index, event) in (0..).zip(events) {
            self.kept.push_back((Cursor { sequence: self.sequence, index }, event));
        }
        while self.kept.len() > self.max {
            self.dropped = self.kept.pop_front().map_or(self.dropped, |(cursor, _)| cursor);
        }
    }
}

impl MemoryStore {
    /// Returns a store that holds at most `events_max` events of the feed.
    pub fn keeping(events_max: usize) -> Self {
        let feed = Events { max: events_max, ..Events::default() };
        Self { inner: Arc::new(Mutex::new(Inner { feed, ..Inner::default() })) }
    }
}

impl Inner {
    fn write(&mut self, commit: &Commit) -> Verdict {
        let found = self.records.get(&commit.key);
        if !commit.expected.holds(found.map(|record| record.epoch)) {
            return Verdict::EpochMismatch(found.cloned().map(Box::new));
        }
        let state = self.state.entry(commit.key.scope.clone()).or_default();
        if !reads_hold(state, &commit.reads) {
            return Verdict::Conflict;
        }
        if let Some(change) = &commit.shared {
            let shared = self.state.entry(commit.key.scope.shared()).or_default();
            let Ok(holds) = ReadSet::keys_hold::<Infallible>(&change.reads, |key| Ok(Some(version(shared, key))));
            if !holds {
                return Verdict::Conflict;
            }
            write_all(shared, &change.writes, commit.version);
        }
        write_all(self.state.entry(commit.key.scope.clone()).or_default(), &commit.effects.writes, commit.version);
        self.outbox.extend(commit.outbox_rows().map(|row| (row.position, row.message)));
        match &commit.record {
            RecordChange::Keep => {}
            RecordChange::Put(record) => drop(self.records.insert(commit.key.clone(), Record::clone(record))),
            RecordChange::Remove => drop(self.records.remove(&commit.key)),
        }
        match &commit.held_message {
            None => {}
            Some(HeldChange::Put(held_message)) => {
                drop(self.held_messages.insert(held_message.key(&commit.key), (**held_message).clone()))
            }
            Some(HeldChange::Remove(fingerprint)) => {
                self.held_messages.remove(&HeldKey { record: commit.key.clone(), fingerprint: fingerprint.digest });
            }
        }
        Verdict::Committed
    }
}

/// Returns the version of `key`; 0 if the key is absent.
fn version(state: &State, key: &str) -> Version {
    state.get(key).map_or(0, |(version, _)| *version)
}

fn reads_hold(state: &State, reads: &ReadSet) -> bool {
    let range = |read: &RangeRead| {
        let now = scan(state, &read.start, read.end.as_deref(), read.limit);
        Ok(read.matches(now.iter().map(|(key, version, _)| (key.as_str(), *version))))
    };
    let Ok(holds) = reads.holds::<Infallible>(|key| Ok(Some(version(state, key))), range);
    holds
}

fn write_all(state: &mut State, writes: &BTreeMap<String, Option<Bytes>>, version: Version) {
    for (key, value) in writes {
        match value {
            Some(value) => drop(state.insert(key.clone(), (version, value.clone()))),
            None => drop(state.remove(key)),
        }
    }
}

/// Returns true if a commit makes anything durable.
fn writes(commit: &Commit) -> bool {
    let effects = &commit.effects;
    let shared = commit.shared.as_ref().is_some_and(|shared| !shared.writes.is_empty());
    commit.told().is_some() || shared || !(effects.writes.is_empty() && effects.outgoing.is_empty())
}

fn scan(state: &State, start: &str, end: Option<&str>, limit: usize) -> Vec<Entry> {
    if end.is_some_and(|end| end <= start) {
        return Vec::new();
    }
    let range = (Bound::Included(start), end.map_or(Bound::Unbounded, Bound::Excluded));
    let entries = state.range::<str, _>(range).take(limit);
    entries.map(|(key, (version, value))| (key.clone(), *version, value.clone())).collect()
}

impl IdempotencyStorage for MemoryStore {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(ready(Ok(self.inner.lock().records.get(key).cloned())))
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        let mut inner = self.inner.lock();
        for sent in &group.sent {
            inner.outbox.remove(sent);
        }
        if let Some(last) = group.commits.last() {
            inner.last = last.version;
        }
        let verdicts: Vec<Verdict> = group.commits.iter().map(|commit| inner.write(commit)).collect();
        let made = group.commits.iter().zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Committed);
        let made: Vec<&Commit> = made.map(|(commit, _)| commit).collect();
        let events = made.iter().filter_map(|commit| commit.told()).chain(group.feed_entries.iter().copied());
        if made.iter().any(|commit| writes(commit)) || !(group.sent.is_empty() && group.feed_entries.is_empty()) {
            inner.feed.group(events);
        }
        Box::pin(ready(Ok(verdicts)))
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        Arc::new(MemoryView { store: self.clone(), scope: scope.clone() })
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        Box::pin(ready(Ok(self.inner.lock().last)))
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        let mut inner = self.inner.lock();
        let old = |record: &Record| record.state.is_terminal() && record.changed_ms < older_than_ms;
        let keys: Vec<_> =
            inner.records.iter().filter(|(_, r)| old(r)).map(|(key, _)| key.clone()).take(limit).collect();
        for key in &keys {
            inner.records.remove(key);
        }
        Box::pin(ready(Ok(keys.len())))
    }

    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        let mut inner = self.inner.lock();
        let before = inner.records.len();
        inner.records.retain(|_, record| !record.has_expired(now_ms));
        let gone = (before - inner.records.len()) as u64;
        if gone > 0 {
            inner.feed.group([FeedEntry::of_many(FeedEventKind::Swept, gone, now_ms)]);
        }
        Box::pin(ready(Ok(gone)))
    }
}

impl Outbox for MemoryStore {
    fn outbox_len(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(ready(Ok(self.inner.lock().outbox.len() as u64)))
    }

    fn pending_within(
        &self,
        after: Option<OutboxPosition>,
        limit: usize,
        bytes_max: usize,
    ) -> BoxFuture<'_, Result<Vec<OutboxRow>, StoreError>> {
        let inner = self.inner.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut rows, mut bytes) = (Vec::new(), 0_usize);
        for (position, message) in inner.outbox.range((start, Bound::Unbounded)).take(limit) {
            bytes = bytes.saturating_add(message.id.len() + message.data.len());
            if bytes > bytes_max && !rows.is_empty() {
                break;
            }
            rows.push(OutboxRow { position: *position, message: message.clone() });
        }
        Box::pin(ready(Ok(rows)))
    }
}

impl Inspect for MemoryStore {
    fn facts(&self) -> BoxFuture<'_, Result<StoreFacts, StoreError>> {
        let inner = self.inner.lock();
        let (outbox_pending, held_messages) = (inner.outbox.len() as u64, inner.held_messages.len() as u64);
        Box::pin(ready(Ok(StoreFacts { outbox_pending, held_messages, ..StoreFacts::default() })))
    }

    fn records<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a RecordKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(RecordKey, Record)>, StoreError>> {
        let inner = self.inner.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rows = inner.records.range((start, Bound::Unbounded));
        let rows = rows.filter(|(key, _)| processor.is_none_or(|name| *key.scope.processor == *name));
        Box::pin(ready(Ok(rows.take(limit).map(|(key, record)| (key.clone(), record.clone())).collect())))
    }

    fn held_under<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Vec<HeldMessage>, StoreError>> {
        let inner = self.inner.lock();
        let held_messages = inner.held_messages.iter().filter(|(of, _)| of.record == *key);
        Box::pin(ready(Ok(held_messages.map(|(_, held_message)| held_message.clone()).collect())))
    }

    fn held_messages<'a>(
        &'a self,
        processor: Option<&'a str>,
        after: Option<&'a HeldKey>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<(HeldKey, HeldMessage)>, StoreError>> {
        let inner = self.inner.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let held_messages = inner.held_messages.range((start, Bound::Unbounded));
        let held_messages =
            held_messages.filter(|(key, _)| processor.is_none_or(|name| *key.record.scope.processor == *name));
        Box::pin(ready(Ok(held_messages
            .take(limit)
            .map(|(key, held_message)| (key.clone(), held_message.clone()))
            .collect())))
    }
}

impl Feed for MemoryStore {
    fn events(
        &self,
        of: Option<u128>,
        after: Option<Cursor>,
        limit: usize,
    ) -> BoxFuture<'_, Result<FeedPage, StoreError>> {
        let inner = self.inner.lock();
        let after = after.unwrap_or_default();
        let wanted =
            |(cursor, entry): &&(Cursor, FeedEntry)| *cursor > after && of.is_none_or(|digest| entry.digest == digest);
        let key = |digest| inner.records.keys().find(|key| key.digest() == digest).cloned();
        let events = inner.feed.kept.iter().filter(wanted).take(limit);
        let events = events.map(|(cursor, entry)| FeedEvent { cursor: *cursor, key: key(entry.digest), entry: *entry });
        let truncated = after < inner.feed.dropped || after.sequence > inner.feed.sequence;
        Box::pin(ready(Ok(FeedPage { events: events.collect(), truncated })))
    }
}

struct MemoryView {
    store: MemoryStore,
    scope: Scope,
}

impl StateView for MemoryView {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        let inner = self.store.inner.lock();
        let entry = inner.state.get(&self.scope).and_then(|state| state.get(key));
        let answer = entry.map_or((0, None), |(version, value)| (*version, Some(value.clone())));
        Box::pin(ready(Ok(answer)))
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        let inner = self.store.inner.lock();
        let entries = inner.state.get(&self.scope).map(|state| scan(state, start, end, limit));
        Box::pin(ready(Ok(entries.unwrap_or_default())))
    }
}
