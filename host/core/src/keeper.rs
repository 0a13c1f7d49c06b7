//! The keeper: brings messages that the store keeps to their ends. Those that were redriven run at once; those that are parked
//! run when the one before them has ended, and by policy when their time is over. Decides when; how is the pipeline's.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::consumer::IdempotentConsumer;
use crate::ending::Ending;
use crate::fault;
use crate::key::RecordKey;
use crate::run::{Observer, Report};
use crate::storage::{DeadLetter, Inspect, LetterKey, Standing, StoreError};
use crate::strategy::{GapPolicy, Identity, Position};

/// Kept messages on their way at one time.
const AT_ONCE: usize = 64;
/// Kept messages read from the store at one time.
const PAGE: usize = 256;
/// What finds too many kept messages may come again after this many milliseconds.
const COME_AGAIN_MS: u64 = 1_000;

/// The kept messages that a consumer is to run, in memory: the store says the same, and is read again at the start.
#[derive(Debug)]
pub(crate) struct Kept {
    max: usize,
    waiting: Mutex<Waiting>,
    changed: Notify,
    /// When the last message was kept, in milliseconds since the Unix epoch.
    last_ms: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    entries: BTreeMap<LetterKey, Entry>,
    /// Those that may go once they are due: all that are not on their way, but of each lane the first only.
    order: BTreeSet<Slot>,
    /// The redriven messages of each ordering key, in the order in which they were kept.
    lanes: HashMap<String, BTreeSet<(u64, LetterKey)>>,
}

/// Due at, kept at (milliseconds since the Unix epoch), and which; `None` is before all.
type Slot = (u64, u64, Option<LetterKey>);

#[derive(Debug, Clone)]
struct Entry {
    position: Option<Position>,
    /// Runs from this time on, in milliseconds since the Unix epoch.
    due_ms: u64,
    /// It is due because its time is over, not because the one before it has ended.
    parked: bool,
    running: bool,
    /// An operator had it run again while it was still on its way.
    again: bool,
    /// When it was kept, in milliseconds since the Unix epoch: those of one lane go in this order.
    at_ms: u64,
    /// Of a redriven message: its ordering key. It waits for those of its lane that were kept before it.
    lane: Option<String>,
}

/// A kept message whose time has come.
#[derive(Debug, PartialEq, Eq)]
struct Due {
    key: LetterKey,
    /// It has waited long enough.
    timed_out: bool,
}

impl Kept {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, waiting: Mutex::default(), changed: Notify::new(), last_ms: AtomicU64::new(0) }
    }

    /// The time for a message that is kept at `now_ms`: later than that of every one before it, so that their order can be
    /// told from their times.
    pub(crate) fn time(&self, now_ms: u64) -> u64 {
        let next = |last_ms: u64| now_ms.max(last_ms + 1);
        let before = self.last_ms.fetch_update(Relaxed, Relaxed, |last_ms| Some(next(last_ms)));
        next(before.unwrap_or_else(|last_ms| last_ms))
    }

    /// Notes a message that is about to be parked. Answers when its wait is over, which is as before if it is parked
    /// already; an ending if there is no room.
    pub(crate) fn park(&self, record: &RecordKey, letter: &DeadLetter) -> Result<u64, Ending> {
        let mut waiting = self.waiting.lock();
        let Standing::Parked { until_ms, .. } = letter.standing else {
            unreachable!("only parked messages are parked")
        };
        let key = letter.key(record);
        if let Some(mut entry) = waiting.take(&key) {
            entry.running = false;
            entry.lane = None;
            let was_parked = std::mem::replace(&mut entry.parked, true);
            entry.due_ms = if was_parked { entry.due_ms.max(1) } else { until_ms };
            let due_ms = entry.due_ms;
            waiting.put(key, entry);
            self.changed.notify_one();
            return Ok(due_ms);
        }
        if waiting.entries.len() >= self.max {
            let error = format!("{} messages are parked or redriven already, which is the most", self.max);
            return Err(Ending::Retry { error, after_ms: COME_AGAIN_MS });
        }
        waiting.put(key, Entry::of(letter, until_ms, None));
        self.changed.notify_one();
        Ok(until_ms)
    }

    /// A message has ended: the first of those that wait behind it may go. It may itself be one that was kept.
    pub(crate) fn settled(&self, message: &Identity) {
        let mut waiting = self.waiting.lock();
        let itself = LetterKey { record: message.record.clone(), fingerprint: message.fingerprint.digest };
        if let Some(first) = waiting.first_of(&message.record, Some(&itself)).cloned() {
            waiting.change(&first, |entry| {
                entry.parked = false;
                entry.due_ms = 0;
            });
            self.changed.notify_one();
        }
    }

    /// Whether the message is kept.
    pub(crate) fn holds(&self, identity: &Identity) -> bool {
        let key = LetterKey { record: identity.record.clone(), fingerprint: identity.fingerprint.digest };
        self.waiting.lock().entries.contains_key(&key)
    }

    /// Notes messages that the store keeps, each with its ordering key.
    pub(crate) fn found<'a>(&self, found: impl IntoIterator<Item = (LetterKey, &'a DeadLetter, Option<String>)>) {
        let mut waiting = self.waiting.lock();
        for (key, letter, lane) in found {
            self.last_ms.fetch_max(letter.at_ms, Relaxed);
            let entry = match letter.standing {
                Standing::Dead => continue,
                Standing::Redriven => Entry::of(letter, 0, lane),
                Standing::Parked { until_ms, .. } => Entry::of(letter, until_ms, None),
            };
            match waiting.entries.get_mut(&key) {
                Some(there) if there.running => there.again = true,
                Some(_) if entry.parked => {}
                _ => waiting.put(key, entry),
            }
        }
        self.changed.notify_one();
    }

    /// The messages that may run now, and when the next one may, in milliseconds since the Unix epoch.
    fn due(&self, now_ms: u64, room: usize) -> (Vec<Due>, Option<u64>) {
        let mut waiting = self.waiting.lock();
        let due = waiting.due(now_ms, room);
        for due in &due {
            waiting.change(&due.key, |entry| entry.running = true);
        }
        // What is due and waits for another goes when that one has ended.
        let later = waiting.order.range((now_ms.saturating_add(1), 0, None)..).next();
        (due, later.map(|(due_ms, ..)| *due_ms))
    }

    /// A message that was on its way is kept no longer; or is to be tried again at `again_ms`.
    fn ended(&self, key: &LetterKey, again_ms: Option<u64>) {
        let mut waiting = self.waiting.lock();
        let again = waiting.entries.get(key).is_some_and(|entry| entry.again);
        match again_ms.or(again.then_some(0)) {
            None => drop(waiting.take(key)),
            Some(due_ms) => {
                waiting.change(key, |entry| *entry = Entry { running: false, again: false, due_ms, ..entry.clone() })
            }
        }
        self.changed.notify_one();
    }
}

impl Entry {
    fn of(letter: &DeadLetter, due_ms: u64, lane: Option<String>) -> Self {
        let parked = matches!(letter.standing, Standing::Parked { .. });
        let at_ms = if fault::mutated("redrive-out-of-order") { u64::MAX - letter.at_ms } else { letter.at_ms };
        let position = letter.position.clone();
        Self { position, due_ms, parked, running: false, again: false, at_ms, lane }
    }
}

impl Waiting {
    /// Notes a message, instead of what was noted of it.
    fn put(&mut self, key: LetterKey, entry: Entry) {
        self.take(&key);
        let place = (entry.at_ms, key.clone());
        if let Some(lane) = &entry.lane {
            // It may be before the one that was first.
            let first = self.lanes.get(lane).and_then(|lane| lane.first()).map(|(_, first)| first.clone());
            first.iter().for_each(|first| self.unlist(first));
            self.lanes.entry(lane.clone()).or_default().insert(place);
            first.iter().for_each(|first| self.list(first));
        }
        self.entries.insert(key.clone(), entry);
        self.list(&key);
    }

    /// Forgets a message; the next of its lane is first then.
    fn take(&mut self, key: &LetterKey) -> Option<Entry> {
        self.unlist(key);
        let entry = self.entries.remove(key)?;
        if let Some(name) = &entry.lane
            && let Some(lane) = self.lanes.get_mut(name)
        {
            lane.remove(&(entry.at_ms, key.clone()));
            match lane.first().map(|(_, next)| next.clone()) {
                Some(next) => self.list(&next),
                None => drop(self.lanes.remove(name)),
            }
        }
        Some(entry)
    }

    /// Changes what is noted of a message, but not its lane and its place in it.
    fn change(&mut self, key: &LetterKey, change: impl FnOnce(&mut Entry)) {
        self.unlist(key);
        if let Some(entry) = self.entries.get_mut(key) {
            change(entry);
        }
        self.list(key);
    }

    fn list(&mut self, key: &LetterKey) {
        if let Some(entry) = self.entries.get(key).filter(|entry| !entry.running && self.is_first(key, entry)) {
            self.order.insert((entry.due_ms, entry.at_ms, Some(key.clone())));
        }
    }

    fn unlist(&mut self, key: &LetterKey) {
        if let Some(entry) = self.entries.get(key) {
            self.order.remove(&(entry.due_ms, entry.at_ms, Some(key.clone())));
        }
    }

    /// Whether no other goes before it: it is in no lane, or the first of its lane.
    fn is_first(&self, key: &LetterKey, entry: &Entry) -> bool {
        let Some(lane) = entry.lane.as_ref().and_then(|lane| self.lanes.get(lane)) else { return true };
        lane.first().is_some_and(|(_, first)| first == key)
    }

    /// Up to `room` messages that may go now.
    fn due(&self, now_ms: u64, room: usize) -> Vec<Due> {
        let mut due: Vec<Due> = Vec::new();
        let mut entities = HashSet::new();
        let slots = self.order.iter().take_while(|(due_ms, ..)| *due_ms <= now_ms);
        for key in slots.filter_map(|(.., key)| key.as_ref()) {
            if due.len() == room {
                break;
            }
            let timed_out = self.entries.get(key).is_some_and(|entry| entry.parked);
            // Of those that wait for the same message, the first goes first, whosever time is over.
            let key = match timed_out {
                true if !entities.insert(&key.record) => continue,
                true => self.first_of(&key.record, None).unwrap_or(key),
                false => key,
            };
            let may_go = self.entries.get(key).is_some_and(|entry| !entry.running);
            if may_go && due.iter().all(|due| due.key != *key) {
                due.push(Due { key: key.clone(), timed_out });
            }
        }
        due
    }

    /// The earliest message that is kept under a record, but for one.
    fn first_of(&self, record: &RecordKey, but: Option<&LetterKey>) -> Option<&LetterKey> {
        let from = LetterKey { record: record.clone(), fingerprint: [0; 16] };
        let of_record = self.entries.range((Bound::Included(from), Bound::Unbounded));
        of_record
            .take_while(|(key, _)| key.record == *record)
            .filter(|(key, _)| Some(*key) != but)
            .min_by(|(_, one), (_, other)| one.position.cmp(&other.position))
            .map(|(key, _)| key)
    }
}

/// Runs what the store keeps for `consumer`, until `stop` turns true; then brings what may run at once to its end.
/// `observer` is told of every ending.
pub async fn run(
    consumer: IdempotentConsumer,
    store: Arc<dyn Inspect>,
    observer: Arc<dyn Observer>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    load(&consumer, &*store).await?;
    let mut under_way: JoinSet<Result<(), StoreError>> = JoinSet::new();
    let mut stopping = false;
    loop {
        let now_ms = consumer.clock().now_ms();
        let (due, later) = consumer.kept().due(now_ms, AT_ONCE - under_way.len());
        for due in due {
            under_way.spawn(bring_to_its_end(consumer.clone(), store.clone(), observer.clone(), due));
        }
        if stopping && under_way.is_empty() {
            return Ok(());
        }
        let next_ms = later.map_or(u64::MAX, |due_ms| due_ms.saturating_sub(now_ms).max(1));
        tokio::select! {
            _ = stop.wait_for(|stop| *stop), if !stopping => stopping = true,
            () = consumer.kept().changed.notified() => {}
            Some(ended) = under_way.join_next() => joined(ended)?,
            () = consumer.clock().sleep(next_ms), if next_ms < u64::MAX && under_way.len() < AT_ONCE => {}
        }
    }
}

fn joined(ended: Result<Result<(), StoreError>, tokio::task::JoinError>) -> Result<(), StoreError> {
    ended.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => Ok(()),
    })
}

/// Reads which messages the store keeps for the consumer.
async fn load(consumer: &IdempotentConsumer, store: &dyn Inspect) -> Result<(), StoreError> {
    let processor = consumer.scope().processor.clone();
    let mut after = None;
    loop {
        let page = store.letters(Some(&processor), after.as_ref(), PAGE).await?;
        consumer.redriven(page.iter().map(|(key, letter)| (key.clone(), letter)));
        match page.into_iter().last() {
            Some((key, _)) => after = Some(key),
            None => return Ok(()),
        }
    }
}

async fn bring_to_its_end(
    consumer: IdempotentConsumer,
    store: Arc<dyn Inspect>,
    observer: Arc<dyn Observer>,
    due: Due,
) -> Result<(), StoreError> {
    let letters = store.dead_letters(&due.key.record).await?;
    let letter = letters.into_iter().find(|letter| letter.fingerprint.digest == due.key.fingerprint);
    // It may have been delivered again meanwhile and have ended, or an operator has discarded it.
    let Some(letter) = letter.filter(|letter| letter.standing != Standing::Dead) else {
        consumer.kept().ended(&due.key, None);
        return Ok(());
    };
    let message = letter.message.clone();
    let policy = consumer.options().strategy.gaps().map(|gaps| gaps.then);
    let ending = match (due.timed_out, policy) {
        (true, Some(GapPolicy::DeadLetter)) => consumer.give_up_parked(letter).await?,
        (past_gap, _) => consumer.process(consumer.accept_kept(letter, past_gap)).await?,
    };
    match ending {
        Ending::Retry { after_ms, .. } | Ending::InFlight { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(COME_AGAIN_MS));
            consumer.kept().ended(&due.key, Some(again_ms));
        }
        // It waits again, for another one.
        Ending::Parked { .. } => {}
        ended => {
            observer.ended(Report::Ended { message: &message, ending: &ended });
            consumer.kept().ended(&due.key, None);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Fingerprint, Scope};
    use crate::message::Message;

    fn letter(version: u64, until_ms: u64) -> DeadLetter {
        let mut message = Message::new("id", "/source", "kind");
        message.subject = Some(version.to_string());
        DeadLetter {
            fingerprint: Fingerprint::of(&message).at(&Position::Version(version)),
            message,
            position: Some(Position::Version(version)),
            standing: Standing::Parked { awaits: 1, until_ms },
            error: String::new(),
            attempts: 0,
            component: "native".into(),
            at_ms: 0,
        }
    }

    fn identity(key: &str, version: u64) -> Identity {
        let fingerprint = letter(version, 0).fingerprint;
        Identity { record: record(key), own: record(key), fingerprint, position: Some(Position::Version(version)) }
    }

    fn record(key: &str) -> RecordKey {
        RecordKey::new(Scope::of("p"), "/source".into(), key.into())
    }

    #[test]
    fn the_first_of_an_entity_goes_first_whosever_time_is_over() {
        let kept = Kept::new(10);
        let (late, early) = (letter(3, 100), letter(2, 200));
        kept.park(&record("a"), &late).expect("there is room");
        kept.park(&record("a"), &early).expect("there is room");
        assert_eq!(kept.due(99, 9), (vec![], Some(100)));
        let (due, later) = kept.due(100, 9);
        assert_eq!(due, [Due { key: early.key(&record("a")), timed_out: true }]);
        assert_eq!(later, None, "the other one goes when this one has ended");
        kept.ended(&early.key(&record("a")), None);
        assert_eq!(kept.due(100, 9).0, [Due { key: late.key(&record("a")), timed_out: true }]);
    }

    #[test]
    fn who_waits_behind_goes_once_the_one_before_has_ended() {
        let kept = Kept::new(10);
        let (second, third) = (letter(2, 100), letter(3, 100));
        kept.park(&record("a"), &second).expect("there is room");
        kept.park(&record("a"), &third).expect("there is room");
        kept.park(&record("b"), &second).expect("there is room");
        kept.settled(&identity("a", 1));
        assert_eq!(kept.due(1, 9).0, [Due { key: second.key(&record("a")), timed_out: false }]);
        // The second has ended, and is still noted.
        kept.settled(&identity("a", 2));
        assert_eq!(kept.due(1, 9).0, [Due { key: third.key(&record("a")), timed_out: false }]);
    }

    #[test]
    fn parking_again_does_not_prolong_the_wait_and_too_many_are_put_off() {
        let kept = Kept::new(1);
        assert_eq!(kept.park(&record("a"), &letter(2, 100)), Ok(100));
        assert_eq!(kept.park(&record("a"), &letter(2, 900)), Ok(100));
        assert!(matches!(kept.park(&record("a"), &letter(3, 100)), Err(Ending::Retry { .. })));
    }

    fn redriven(id: &str, at_ms: u64) -> (LetterKey, DeadLetter) {
        let message = Message::new(id, "/source", "kind");
        let letter = DeadLetter { standing: Standing::Redriven, at_ms, position: None, message, ..letter(1, 0) };
        (letter.key(&record(id)), letter)
    }

    fn found(kept: &Kept, letters: &[(LetterKey, DeadLetter)], lane: Option<&str>) {
        kept.found(letters.iter().map(|(key, letter)| (key.clone(), letter, lane.map(str::to_owned))));
    }

    fn next(kept: &Kept) -> Vec<LetterKey> {
        kept.due(1, 9).0.into_iter().map(|due| due.key).collect()
    }

    #[test]
    fn the_redriven_of_a_lane_go_one_by_one_in_the_order_they_were_kept() {
        let kept = Kept::new(10);
        let lane = [redriven("b", 3), redriven("c", 1), redriven("a", 2)];
        found(&kept, &lane, Some("lane"));
        found(&kept, &[redriven("d", 9)], Some("other lane"));
        found(&kept, &[redriven("e", 9)], None);
        assert_eq!(next(&kept), [record("c"), record("d"), record("e")].map(|record| lane_key(&record)));
        assert_eq!(kept.due(1, 9), (vec![], None), "the first of the lane is on its way");
        // To be tried again, it is still the first.
        kept.ended(&lane[1].0, Some(100));
        assert_eq!(kept.due(1, 9), (vec![], Some(100)));
        assert_eq!(kept.due(100, 9).0.len(), 1);
        kept.ended(&lane[1].0, None);
        assert_eq!(next(&kept), [lane[2].0.clone()]);
        kept.ended(&lane[2].0, None);
        assert_eq!(next(&kept), [lane[0].0.clone()]);
    }

    fn lane_key(record: &RecordKey) -> LetterKey {
        LetterKey { record: record.clone(), fingerprint: letter(1, 0).fingerprint.digest }
    }

    #[test]
    fn what_is_redriven_before_its_last_run_has_been_noted_runs_again() {
        let kept = Kept::new(10);
        let letters = [redriven("a", 1)];
        found(&kept, &letters, None);
        assert_eq!(next(&kept).len(), 1);
        found(&kept, &letters, None);
        assert!(next(&kept).is_empty());
        kept.ended(&letters[0].0, None);
        assert_eq!(next(&kept).len(), 1, "it was redriven once more");
        kept.ended(&letters[0].0, None);
        assert!(next(&kept).is_empty());
    }

    #[test]
    fn of_two_kept_messages_the_earlier_can_be_told() {
        let kept = Kept::new(10);
        assert_eq!([5, 5, 4, 9].map(|now_ms| kept.time(now_ms)), [5, 6, 7, 9]);
    }
}
