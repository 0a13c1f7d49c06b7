//! The test kit's world: what a processor can see and change. A message gets a copy that knows what
//! it began with, so that its changes, and nothing else, go back. Decides nothing.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::host::{Entry, Host};
use crate::http::{HttpError, Request, Response};
use crate::{Event, Level, NewEvent, Outgoing};

/// State, streams, outbox, log and configuration. Clones are the same world.
#[derive(Clone, Default)]
pub(crate) struct World {
    /// As it was when the message began; empty for the world that stays.
    before: Rc<Facts>,
    now: Rc<RefCell<Facts>>,
    read: Rc<RefCell<Reads>>,
    config: BTreeMap<String, String>,
    /// Responder to outbound calls; `None` if the processor is granted none.
    outside: Option<Rc<Outside>>,
    /// Effects that the message cannot take back.
    early: Rc<RefCell<Early>>,
}

type Outside = dyn Fn(&Request) -> Result<Response, HttpError>;

/// Effects that are durable at once, apart from the message.
#[derive(Clone, Default)]
pub(crate) struct Early {
    /// Steps of the message that is being handled, or of its saga.
    pub(crate) steps: Vec<(String, Vec<u8>)>,
    /// The saga that the message has joined.
    pub(crate) saga: Option<String>,
    pub(crate) pivoted: bool,
    pub(crate) completes: bool,
    calls: Vec<Request>,
    /// Locks by name, with their last fence, and whether they are held.
    locks: BTreeMap<String, (u64, bool)>,
}

impl Early {
    /// Begins a message that has joined `saga`, or none.
    pub(crate) fn begin(&mut self, saga: Option<&str>) {
        self.steps.clear();
        self.saga = saga.map(str::to_owned);
        (self.pivoted, self.completes) = (false, false);
    }
}

#[derive(Clone, Default)]
struct Facts {
    state: BTreeMap<String, Vec<u8>>,
    streams: BTreeMap<String, Vec<Event>>,
    sent: Vec<Outgoing>,
    logs: Vec<(Level, String)>,
}

/// Reads of a message.
#[derive(Default)]
struct Reads {
    keys: BTreeSet<String>,
    ranges: Vec<(String, Option<String>)>,
    streams: BTreeSet<String>,
}

impl World {
    /// A copy for one message.
    pub(crate) fn separate(&self) -> Self {
        let facts = self.now.borrow().clone();
        Self {
            before: Rc::new(facts.clone()),
            now: Rc::new(RefCell::new(facts)),
            read: Rc::default(),
            config: self.config.clone(),
            outside: self.outside.clone(),
            early: self.early.clone(),
        }
    }

    pub(crate) fn answer_by(&mut self, outside: Rc<Outside>) {
        self.outside = Some(outside);
    }

    /// Returns the effects that are durable at once, for a change.
    pub(crate) fn early(&self) -> std::cell::RefMut<'_, Early> {
        self.early.borrow_mut()
    }

    pub(crate) fn calls(&self) -> Vec<Request> {
        self.early.borrow().calls.clone()
    }

    /// Gives back all locks that a message has held.
    pub(crate) fn release_all(&self) {
        self.early.borrow_mut().locks.values_mut().for_each(|(_, held)| *held = false);
    }

    pub(crate) fn configure(&mut self, key: &str, value: &str) {
        self.config.insert(key.to_owned(), value.to_owned());
    }

    pub(crate) fn sent(&self) -> Vec<Outgoing> {
        self.now.borrow().sent.clone()
    }

    pub(crate) fn logs(&self) -> Vec<(Level, String)> {
        self.now.borrow().logs.clone()
    }

    /// Returns true if everything that this message read is unchanged in `world`.
    pub(crate) fn stands(&self, world: &Self) -> bool {
        let (before, now, read) = (&*self.before, world.now.borrow(), self.read.borrow());
        read.keys.iter().all(|key| before.state.get(key) == now.state.get(key))
            && read
                .ranges
                .iter()
                .all(|(start, end)| before.scan(start, end.as_deref()).eq(now.scan(start, end.as_deref())))
            && read.streams.iter().all(|stream| before.streams.get(stream) == now.streams.get(stream))
    }

    /// Makes true here what `after`, a copy for one message, has changed.
    pub(crate) fn take_over(&mut self, after: &Self) {
        self.take_logs(after);
        let (before, after, mut now) = (&*after.before, after.now.borrow(), self.now.borrow_mut());
        for (key, value) in after.state.iter().filter(|(key, value)| before.state.get(*key) != Some(value)) {
            now.state.insert(key.clone(), value.clone());
        }
        for key in before.state.keys().filter(|key| !after.state.contains_key(*key)) {
            now.state.remove(key);
        }
        for (stream, events) in after.streams.iter().filter(|(name, events)| before.streams.get(*name) != Some(events))
        {
            now.streams.insert(stream.clone(), events.clone());
        }
        now.sent.extend_from_slice(&after.sent[before.sent.len()..]);
    }

    /// The lines that `after`, a copy for one message, has logged.
    pub(crate) fn take_logs(&mut self, after: &Self) {
        let lines = &after.now.borrow().logs[after.before.logs.len()..];
        self.now.borrow_mut().logs.extend_from_slice(lines);
    }
}

impl Facts {
    fn scan<'a>(&'a self, start: &str, end: Option<&'a str>) -> impl Iterator<Item = (&'a String, &'a Vec<u8>)> {
        self.state.range(start.to_owned()..).take_while(move |(key, _)| end.is_none_or(|end| key.as_str() < end))
    }
}

impl Host for World {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.read.borrow_mut().keys.insert(key.to_owned());
        self.now.borrow().state.get(key).cloned()
    }

    fn set(&self, key: &str, value: &[u8]) {
        self.now.borrow_mut().state.insert(key.to_owned(), value.to_owned());
    }

    fn delete(&self, key: &str) {
        self.now.borrow_mut().state.remove(key);
    }

    fn compare_and_set(&self, key: &str, expected: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        if self.get(key).as_deref() != expected {
            return false;
        }
        match value {
            Some(value) => self.set(key, value),
            None => self.delete(key),
        }
        true
    }

    fn scan(&self, start: &str, end: Option<&str>, limit: u32) -> Vec<Entry> {
        self.read.borrow_mut().ranges.push((start.to_owned(), end.map(str::to_owned)));
        let now = self.now.borrow();
        now.scan(start, end).take(limit as usize).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    fn append(&self, stream: &str, expected: Option<u64>, events: &[NewEvent]) -> Result<u64, u64> {
        let mut version = self.version(stream);
        if expected.is_some_and(|expected| expected != version) {
            return Err(version);
        }
        let mut now = self.now.borrow_mut();
        let appended = now.streams.entry(stream.to_owned()).or_default();
        for NewEvent { kind, data } in events.iter().cloned() {
            version += 1;
            // The host's ids come from the message; here they are told apart, and no more.
            appended.push(Event { id: format!("{stream}/{version}"), version, kind, data });
        }
        Ok(version)
    }

    fn events(&self, stream: &str, after: u64, limit: u32) -> Vec<Event> {
        self.read.borrow_mut().streams.insert(stream.to_owned());
        let now = self.now.borrow();
        let events = now.streams.get(stream).into_iter().flatten();
        events.filter(|event| event.version > after).take(limit as usize).cloned().collect()
    }

    fn version(&self, stream: &str) -> u64 {
        self.read.borrow_mut().streams.insert(stream.to_owned());
        self.now.borrow().streams.get(stream).map_or(0, |events| events.len() as u64)
    }

    fn send(&self, message: Outgoing) {
        self.now.borrow_mut().sent.push(message);
    }

    fn step(&self, name: &str, payload: &[u8]) {
        let mut early = self.early.borrow_mut();
        assert!(!early.pivoted, "the step `{name}` comes behind the pivot: it could never be undone");
        early.steps.push((name.to_owned(), payload.to_owned()));
    }

    fn pivot(&self) {
        self.early.borrow_mut().pivoted = true;
    }

    fn join(&self, saga: &str) {
        self.early.borrow_mut().saga = Some(saga.to_owned());
    }

    fn complete(&self) {
        self.early.borrow_mut().completes = true;
    }

    fn acquire(&self, name: &str, _: u64) -> Result<u64, u64> {
        let mut early = self.early.borrow_mut();
        let (fence, held) = early.locks.entry(name.to_owned()).or_default();
        (*fence, *held) = (*fence + 1, true);
        Ok(*fence)
    }

    fn extend(&self, name: &str, fence: u64, _: u64) -> bool {
        self.early.borrow().locks.get(name) == Some(&(fence, true))
    }

    fn release(&self, name: &str, fence: u64) {
        if let Some((_, held)) = self.early.borrow_mut().locks.get_mut(name).filter(|(of, _)| *of == fence) {
            *held = false;
        }
    }

    fn call(&self, request: &Request) -> Result<Response, HttpError> {
        self.early.borrow_mut().calls.push(request.clone());
        self.outside.as_ref().ok_or(HttpError::Denied)?(request)
    }

    fn log(&self, level: Level, text: &str) {
        self.now.borrow_mut().logs.push((level, text.to_owned()));
    }

    fn config(&self, key: &str) -> Option<String> {
        self.config.get(key).cloned()
    }
}
