//! Deferred messages: the held messages that a consumer is to run, with those that may run now. In
//! memory only: the store has all of them, and is read at the start. Runs nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::message::identity::{HeldKey, Identity, Position};
use crate::message::key::RecordKey;
use crate::pipeline::outcome::Outcome;
use crate::store::held_message::{HeldMessage, HoldReason};
use crate::support::fault;

/// Retry delay of a message that is not held because too many are, in milliseconds.
pub(crate) const RETRY_AFTER_MS: u64 = 1_000;

/// The deferred messages of one consumer.
#[derive(Debug)]
pub(crate) struct Deferred {
    max: usize,
    /// A message was deferred at some time. If not, no lookup takes the lock.
    used: AtomicBool,
    waiting: Mutex<Waiting>,
    /// Woken when something may have become due.
    pub(crate) changed: Notify,
    /// Time of the message that was held last, in milliseconds since the Unix epoch.
    last_ms: AtomicU64,
    /// Longest wait for a retry, and for another message, in milliseconds.
    longest_ms: (u64, u64),
}

#[derive(Debug, Default)]
struct Waiting {
    entries: BTreeMap<HeldKey, Entry>,
    /// Messages that may run once they are due: those that are not running, and of each lane only
    /// the first.
    order: BTreeSet<Slot>,
    /// The slot in `order` of each message that has one.
    slots: HashMap<HeldKey, Slot>,
    /// The redriven messages of each ordering key, in the order in which they were held.
    lanes: HashMap<String, BTreeSet<(u64, HeldKey)>>,
    /// Time of the last look, in milliseconds since the Unix epoch; the latest one if times were
    /// read from the store since.
    looked_ms: u64,
}

/// Due at, held at (milliseconds since the Unix epoch), and the message; `None` sorts before all.
type Slot = (u64, u64, Option<HeldKey>);

#[derive(Debug, Clone)]
struct Entry {
    position: Option<Position>,
    /// Time from which it may run, in milliseconds since the Unix epoch; `None` until the message
    /// before it has ended.
    ready_ms: Option<u64>,
    /// End of its wait, if it is parked, in milliseconds since the Unix epoch.
    until_ms: Option<u64>,
    running: bool,
    /// An operator redrove it while it was running.
    again: bool,
    /// Time at which it was held, in milliseconds since the Unix epoch. Messages of one lane run in
    /// this order.
    at_ms: u64,
    /// Ordering key of a redriven message, which waits for those of its lane that were held before
    /// it.
    lane: Option<String>,
}

/// A deferred message that may run now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) key: HeldKey,
    /// The message before it has not ended, but its own wait is over, or that of one behind it.
    pub(crate) timed_out: bool,
}

/// A message that was found in the store.
pub(crate) struct DeferredMessage<'a> {
    pub(crate) key: HeldKey,
    pub(crate) held_message: &'a HeldMessage,
    /// Ordering key of the message.
    pub(crate) lane: Option<String>,
    /// Set if the message must still wait for another one.
    pub(crate) awaits_another: bool,
}

impl Deferred {
    /// Returns the deferred messages of a consumer: at most `max`. No wait is longer than
    /// `retry_ms` and `park_ms`, for a retry and for another message.
    pub(crate) fn new(max: usize, retry_ms: u64, park_ms: u64) -> Self {
        Self {
            max,
            longest_ms: (retry_ms.max(RETRY_AFTER_MS), park_ms),
            used: AtomicBool::new(false),
            waiting: Mutex::default(),
            changed: Notify::new(),
            last_ms: AtomicU64::new(0),
        }
    }

    /// Returns the time for a message that is held at `now_ms`: later than that of every one
    /// before, so that times tell the order.
    pub(crate) fn time(&self, now_ms: u64) -> u64 {
        let next = |last_ms: u64| now_ms.max(last_ms + 1);
        let before = self.last_ms.fetch_update(Relaxed, Relaxed, |last_ms| Some(next(last_ms)));
        next(before.unwrap_or_else(|last_ms| last_ms))
    }

    /// Enters a message that is about to be parked until `until_ms`. Returns the end of its wait,
    /// which is as before if it is parked already, or an outcome if there is no room.
    pub(crate) fn park(&self, message: &Identity, now_ms: u64, until_ms: u64) -> Result<u64, Outcome> {
        let mut waiting = self.to_keep();
        let key = message.held_key();
        let known = waiting.take(&key);
        if known.is_none() && waiting.entries.len() >= self.max {
            let error = format!("{} messages are parked or redriven already, which is the most", self.max);
            return Err(Outcome::Retry { error, after_ms: RETRY_AFTER_MS });
        }
        let before_ms = known.as_ref().and_then(|entry| entry.until_ms).unwrap_or(u64::MAX);
        let until_ms = before_ms.min(until_ms);
        let entry = Entry {
            position: message.position.clone(),
            ready_ms: None,
            until_ms: Some(until_ms),
            running: known.as_ref().is_some_and(|entry| entry.running),
            again: known.as_ref().is_some_and(|entry| entry.again),
            at_ms: known.map_or(now_ms, |entry| entry.at_ms),
            lane: None,
        };
        waiting.put(key, entry);
        self.changed.notify_one();
        Ok(until_ms)
    }

    /// Lets the next message of an entity run, since `message` has ended. Those that it has
    /// overtaken run, too, and end as stale.
    pub(crate) fn settled(&self, message: &Identity) {
        let mut waiting = self.waiting.lock();
        let behind = waiting.of(&message.record).filter_map(|(_, entry)| entry.position.as_ref());
        let next = behind.filter(|position| Some(*position) > message.position.as_ref()).min().cloned();
        let next = next.filter(|_| !fault::mutated("nobody-is-woken"));
        let last = next.or_else(|| message.position.clone());
        let may_go = waiting.of(&message.record).filter(|(_, entry)| entry.position <= last);
        for key in may_go.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            waiting.change(&key, |entry| entry.ready_ms = Some(0));
            self.changed.notify_one();
        }
    }

    /// Locks the messages, for adding some.
    fn to_keep(&self) -> MutexGuard<'_, Waiting> {
        self.used.store(true, Relaxed);
        self.waiting.lock()
    }

    /// Returns whether the message is deferred.
    pub(crate) fn holds(&self, message: &Identity) -> bool {
        self.used.load(Relaxed) && self.waiting.lock().entries.contains_key(&message.held_key())
    }

    /// Returns the number of deferred messages.
    pub(crate) fn len(&self) -> usize {
        self.waiting.lock().entries.len()
    }

    /// Adds messages that an operator has redriven. They run at once, and once more if they are
    /// running.
    pub(crate) fn redriven<'a>(&self, held_messages: impl IntoIterator<Item = DeferredMessage<'a>>) {
        let mut waiting = self.to_keep();
        for DeferredMessage { key, held_message, lane, .. } in held_messages {
            self.last_ms.fetch_max(held_message.at_ms, Relaxed);
            match waiting.entries.get_mut(&key).filter(|entry| entry.running) {
                Some(entry) => entry.again = true,
                None => waiting.put(key, Entry::of(held_message, Some(0), None, lane)),
            }
        }
        self.changed.notify_one();
    }

    /// Adds messages that the store holds and that are not known here yet. A parked message that
    /// awaits no other any more may run at once: the one that it waited for ended before this
    /// consumer knew of it.
    pub(crate) fn found<'a>(&self, found: impl IntoIterator<Item = DeferredMessage<'a>>) {
        let mut waiting = self.to_keep();
        for DeferredMessage { key, held_message, lane, awaits_another } in found {
            self.last_ms.fetch_max(held_message.at_ms, Relaxed);
            let entry = match held_message.hold_reason {
                HoldReason::Dead => continue,
                HoldReason::Parked { .. } if fault::mutated("parked-forgotten-at-a-restart") => continue,
                HoldReason::Redriven => Entry::of(held_message, Some(0), None, lane),
                HoldReason::Parked { until_ms, .. } => {
                    Entry::of(held_message, (!awaits_another).then_some(0), Some(until_ms), None)
                }
            };
            if !waiting.entries.contains_key(&key) {
                waiting.put(key, entry);
            }
        }
        waiting.looked_ms = u64::MAX;
        self.changed.notify_one();
    }

    /// Takes up to `room` messages that may run now, which are running from then on. Returns them,
    /// and the time at which the next one may run, in milliseconds since the Unix epoch.
    pub(crate) fn due(&self, now_ms: u64, room: usize) -> (Vec<Due>, Option<u64>) {
        let mut waiting = self.waiting.lock();
        if now_ms < waiting.looked_ms && !fault::mutated("due-times-believed") {
            waiting.shorten(now_ms, self.longest_ms);
        }
        waiting.looked_ms = now_ms;
        let due = waiting.due(now_ms, room);
        for due in &due {
            waiting.change(&due.key, |entry| entry.running = true);
        }
        // A message that is due and waits for another one runs when that one has ended.
        let later = waiting.order.range((now_ms.saturating_add(1), 0, None)..).next();
        (due, later.map(|(due_ms, ..)| *due_ms))
    }

    /// Puts a message that was running back to wait for another one.
    pub(crate) fn waits(&self, key: &HeldKey) {
        self.waiting.lock().change(key, |entry| entry.running = false);
        self.changed.notify_one();
    }

    /// Removes a message that was running, or has it run again at `again_ms`.
    pub(crate) fn ended(&self, key: &HeldKey, again_ms: Option<u64>) {
        let mut waiting = self.waiting.lock();
        let again = waiting.entries.get(key).is_some_and(|entry| entry.again);
        match again_ms.or(again.then_some(0)) {
            None => drop(waiting.take(key)),
            // From now on the message waits for its next attempt, not for another message.
            ready_ms => waiting.change(key, |entry| {
                *entry = Entry { ready_ms, until_ms: None, running: false, again: false, ..entry.clone() };
            }),
        }
        self.changed.notify_one();
    }
}

impl Entry {
    fn of(held_message: &HeldMessage, ready_ms: Option<u64>, until_ms: Option<u64>, lane: Option<String>) -> Self {
        let at_ms =
            if fault::mutated("redrive-out-of-order") { u64::MAX - held_message.at_ms } else { held_message.at_ms };
        Self { position: held_message.position.clone(), ready_ms, until_ms, running: false, again: false, at_ms, lane }
    }

    /// Returns the time at which the message is due: ready to run, or at the end of its wait.
    fn due_ms(&self) -> u64 {
        self.ready_ms.into_iter().chain(self.until_ms).min().unwrap_or(u64::MAX)
    }

    fn is_ready(&self, now_ms: u64) -> bool {
        self.ready_ms.is_some_and(|ready_ms| ready_ms <= now_ms)
    }

    fn slot(&self, key: &HeldKey) -> Slot {
        (self.due_ms(), self.at_ms, Some(key.clone()))
    }
}

impl Waiting {
    /// Adds a message, in place of its earlier entry.
    fn put(&mut self, key: HeldKey, entry: Entry) {
        self.take(&key);
        let first = entry.lane.as_ref().and_then(|lane| self.first_of(lane));
        if let Some(lane) = &entry.lane {
            self.lanes.entry(lane.clone()).or_default().insert((entry.at_ms, key.clone()));
        }
        self.entries.insert(key.clone(), entry);
        self.reindex(&key);
        // The new message may be before the one that was the first of the lane.
        first.iter().for_each(|first| self.reindex(first));
    }

    /// Removes a message. The next one of its lane is the first then.
    fn take(&mut self, key: &HeldKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.reindex(key);
        if let Some(lane) = &entry.lane {
            self.leave_lane(lane, &(entry.at_ms, key.clone()));
        }
        Some(entry)
    }

    /// Changes the entry of a message, but not its lane and its place there.
    fn change(&mut self, key: &HeldKey, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries.get_mut(key) {
            change(entry);
            self.reindex(key);
        }
    }

    /// Brings `order` up to date with the entry of a message.
    fn reindex(&mut self, key: &HeldKey) {
        if let Some(slot) = self.slots.remove(key) {
            self.order.remove(&slot);
        }
        if let Some(entry) = self.entries.get(key).filter(|entry| !entry.running && self.is_first(key, entry)) {
            let slot = entry.slot(key);
            self.order.insert(slot.clone());
            self.slots.insert(key.clone(), slot);
        }
    }

    fn leave_lane(&mut self, lane: &str, member: &(u64, HeldKey)) {
        if let Some(members) = self.lanes.get_mut(lane) {
            members.remove(member);
        }
        match self.first_of(lane) {
            Some(first) => self.reindex(&first),
            None => drop(self.lanes.remove(lane)),
        }
    }

    /// Returns the first message of a lane.
    fn first_of(&self, lane: &str) -> Option<HeldKey> {
        self.lanes.get(lane)?.first().map(|(_, first)| first.clone())
    }

    /// Returns whether no other message goes before this one: it is in no lane, or the first of its
    /// lane.
    fn is_first(&self, key: &HeldKey, entry: &Entry) -> bool {
        let Some(lane) = entry.lane.as_ref().and_then(|lane| self.lanes.get(lane)) else { return true };
        lane.first().is_some_and(|(_, first)| first == key)
    }

    /// Cuts waits that are longer than any wait may be: their times were set by a clock that was
    /// ahead.
    fn shorten(&mut self, now_ms: u64, (retry_ms, park_ms): (u64, u64)) {
        let latest = |longest_ms: u64| move |time_ms: u64| time_ms.min(now_ms.saturating_add(longest_ms));
        for key in self.entries.keys().cloned().collect::<Vec<_>>() {
            self.change(&key, |entry| {
                entry.ready_ms = entry.ready_ms.map(latest(retry_ms));
                entry.until_ms = entry.until_ms.map(latest(park_ms));
            });
        }
    }

    /// Returns up to `room` messages that may run now: the first of each record of which none is
    /// running. So no message makes one before it stale, even if its own wait is over first.
    fn due(&self, now_ms: u64, room: usize) -> Vec<Due> {
        let mut due = Vec::new();
        let mut records = HashSet::new();
        let slots = self.order.iter().take_while(|(due_ms, ..)| *due_ms <= now_ms);
        for record in slots.filter_map(|(.., key)| Some(&key.as_ref()?.record)) {
            if due.len() == room {
                break;
            }
            if records.insert(record) {
                due.extend(self.first_due(record, now_ms));
            }
        }
        due
    }

    fn first_due(&self, record: &RecordKey, now_ms: u64) -> Option<Due> {
        if self.of(record).any(|(_, entry)| entry.running) {
            return None;
        }
        // The message must be the first of its lane, too.
        let may_be_first = self.of(record).filter(|(key, entry)| self.is_first(key, entry));
        let (key, first) = may_be_first.min_by(|(_, one), (_, other)| one.position.cmp(&other.position))?;
        // A message that waits for its next attempt holds up those behind it, and is not taken
        // before its time.
        let over = |entry: &Entry| entry.until_ms.is_some_and(|until_ms| until_ms <= now_ms);
        let timed_out = || first.until_ms.is_some() && self.of(record).any(|(_, entry)| over(entry));
        let is_ready = first.is_ready(now_ms);
        (is_ready || timed_out()).then(|| Due { key: key.clone(), timed_out: !is_ready })
    }

    /// Returns the messages of a record.
    fn of<'a>(&'a self, record: &'a RecordKey) -> impl Iterator<Item = (&'a HeldKey, &'a Entry)> {
        let from = HeldKey { record: record.clone(), fingerprint: [0; 16] };
        let entries = self.entries.range((Bound::Included(from), Bound::Unbounded));
        entries.take_while(move |(key, _)| key.record == *record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Message;
    use crate::message::fingerprint::Fingerprint;
    use crate::message::key::Scope;

    fn record(key: &str) -> RecordKey {
        RecordKey::new(Scope::of("p"), "/source".into(), key.into())
    }

    fn at(key: &str, version: u64) -> Identity {
        let fingerprint = Fingerprint { version: 1, digest: [version as u8; 16] };
        Identity {
            record: record(key),
            message_key: record(key),
            fingerprint,
            position: Some(Position::Version(version)),
        }
    }

    fn held_message(message: &Identity, hold_reason: HoldReason, at_ms: u64) -> HeldMessage {
        HeldMessage {
            message: Message::new("id", "/source", "kind"),
            fingerprint: message.fingerprint,
            position: message.position.clone(),
            hold_reason,
            error: String::new(),
            attempts: 0,
            component: "native".into(),
            at_ms,
        }
    }

    /// Parks three versions of `a`, each with the end of its wait.
    fn parked(kept: &Deferred, waits: &[(u64, u64)]) {
        for (version, until_ms) in waits {
            assert_eq!(kept.park(&at("a", *version), 0, *until_ms), Ok(*until_ms));
        }
    }

    fn due(kept: &Deferred, now_ms: u64) -> Vec<(HeldKey, bool)> {
        kept.due(now_ms, 9).0.into_iter().map(|due| (due.key, due.timed_out)).collect()
    }

    #[test]
    fn the_first_of_an_entity_goes_first_whosever_time_is_over() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        parked(&kept, &[(3, 100), (2, 200)]);
        assert_eq!(kept.due(99, 9), (vec![], Some(100)));
        assert_eq!(due(&kept, 100), [(at("a", 2).held_key(), true)]);
        assert_eq!(kept.due(100, 9), (vec![], None), "the other one goes when this one has ended");
        kept.ended(&at("a", 2).held_key(), None);
        assert_eq!(due(&kept, 100), [(at("a", 3).held_key(), true)]);
    }

    #[test]
    fn who_waits_behind_goes_once_the_one_before_has_ended() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        parked(&kept, &[(2, 100), (3, 100)]);
        kept.park(&at("b", 2), 0, 100).expect("there is room");
        kept.settled(&at("a", 1));
        assert_eq!(due(&kept, 1), [(at("a", 2).held_key(), false)]);
        // The message ends while its entry is still there: the one behind it is next, not itself.
        kept.settled(&at("a", 2));
        kept.ended(&at("a", 2).held_key(), None);
        assert_eq!(due(&kept, 1), [(at("a", 3).held_key(), false)]);
    }

    #[test]
    fn what_is_left_behind_may_learn_that_it_is_too_late() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        parked(&kept, &[(2, 100), (9, 100)]);
        kept.settled(&at("a", 5));
        assert_eq!(due(&kept, 1), [(at("a", 2).held_key(), false)]);
        assert_eq!(due(&kept, 1), [], "one of a record at a time");
        kept.ended(&at("a", 2).held_key(), None);
        assert_eq!(due(&kept, 1), [(at("a", 9).held_key(), false)]);
    }

    #[test]
    fn what_is_put_off_is_not_taken_early_and_holds_up_those_behind_it() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        parked(&kept, &[(2, 100), (3, 100)]);
        assert_eq!(due(&kept, 100), [(at("a", 2).held_key(), true)]);
        kept.ended(&at("a", 2).held_key(), Some(500));
        assert_eq!(kept.due(100, 9), (vec![], Some(500)));
        assert_eq!(due(&kept, 500)[0], (at("a", 2).held_key(), false));
    }

    #[test]
    fn what_is_found_at_the_start_goes_unless_it_is_early() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        let hold_reason = HoldReason::Parked { awaits: 1, until_ms: 100 };
        let held_messages =
            [(2, false), (3, true)].map(|(version, early)| (held_message(&at("a", version), hold_reason, 7), early));
        kept.found(held_messages.iter().map(|(held_message, early)| DeferredMessage {
            key: held_message.key(&record("a")),
            held_message,
            lane: None,
            awaits_another: *early,
        }));
        assert_eq!(due(&kept, 1), [(at("a", 2).held_key(), false)]);
        assert_eq!(kept.park(&at("a", 2), 0, 900), Ok(100), "and waits as long as before, if it must");
        kept.settled(&at("a", 1));
        assert_eq!(kept.due(1, 9).0, [], "it is on its way still");
        kept.waits(&at("a", 2).held_key());
        assert_eq!(due(&kept, 1), [(at("a", 2).held_key(), false)]);
    }

    #[test]
    fn parking_again_does_not_prolong_the_wait_and_too_many_are_put_off() {
        let kept = Deferred::new(1, u64::MAX, u64::MAX);
        assert_eq!(kept.park(&at("a", 2), 0, 100), Ok(100));
        assert_eq!(kept.park(&at("a", 2), 0, 900), Ok(100));
        assert!(matches!(kept.park(&at("a", 3), 0, 100), Err(Outcome::Retry { .. })));
    }

    /// Returns keys and held messages of redriven messages, each held at its time.
    fn redriven(names: &[(&str, u64)]) -> Vec<(HeldKey, HeldMessage)> {
        let redriven = |(name, at_ms): &(&str, u64)| {
            let message = Identity { position: None, ..at(name, 1) };
            (message.held_key(), held_message(&message, HoldReason::Redriven, *at_ms))
        };
        names.iter().map(redriven).collect()
    }

    fn found(kept: &Deferred, held_messages: &[(HeldKey, HeldMessage)], lane: Option<&str>) {
        kept.found(held_messages.iter().map(|(key, held_message)| in_lane(key, held_message, lane)));
    }

    fn in_lane<'a>(key: &HeldKey, held_message: &'a HeldMessage, lane: Option<&str>) -> DeferredMessage<'a> {
        DeferredMessage { key: key.clone(), held_message, lane: lane.map(str::to_owned), awaits_another: false }
    }

    #[test]
    fn the_redriven_of_a_lane_go_one_by_one_in_the_order_they_were_kept() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        let lane = redriven(&[("b", 3), ("c", 1), ("a", 2)]);
        found(&kept, &lane[..2], Some("lane"));
        found(&kept, &redriven(&[("x", 9)]), None);
        let keys: Vec<_> = due(&kept, 1).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, [lane[1].0.clone(), redriven(&[("x", 9)])[0].0.clone()], "one in no lane waits for none");
        // A message that was held before another of the lane may be found after it.
        found(&kept, &lane[2..], Some("lane"));
        for key in [&lane[1].0, &lane[2].0, &lane[0].0] {
            kept.ended(key, None);
            assert!(!due(&kept, 1).iter().any(|(due, _)| due == key));
        }
        assert_eq!(kept.len(), 1);
    }

    #[test]
    fn what_is_redriven_while_it_is_on_its_way_runs_again() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        let one = redriven(&[("a", 1)]);
        let redrive = || kept.redriven(one.iter().map(|(key, held_message)| in_lane(key, held_message, Some("lane"))));
        redrive();
        assert_eq!(due(&kept, 1).len(), 1);
        redrive();
        assert_eq!(due(&kept, 1), []);
        kept.ended(&one[0].0, None);
        assert_eq!(due(&kept, 1).len(), 1);
    }

    #[test]
    fn a_clock_that_was_ahead_holds_nobody_up() {
        let kept = Deferred::new(10, 50, 100);
        let year_ms = 31_536_000_000;
        assert_eq!(kept.due(year_ms, 9), (vec![], None));
        parked(&kept, &[(2, year_ms + 100)]);
        kept.found(redriven(&[("b", 3)]).iter().map(|(key, held_message)| in_lane(key, held_message, None)));
        assert_eq!(kept.due(year_ms, 9).0.len(), 1);
        kept.ended(&redriven(&[("b", 3)])[0].0, Some(year_ms + 50));
        assert_eq!(kept.due(1_000, 9), (vec![], Some(1_100)), "the shortest longest wait is a second");
        assert_eq!(due(&kept, 1_100), [(at("a", 2).held_key(), true)]);
        assert_eq!(due(&kept, 2_000).len(), 1);
    }

    #[test]
    fn times_of_kept_messages_tell_their_order() {
        let kept = Deferred::new(10, u64::MAX, u64::MAX);
        assert_eq!([kept.time(5), kept.time(5), kept.time(3), kept.time(9)], [5, 6, 7, 9]);
    }
}
