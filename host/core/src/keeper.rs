//! The keeper: brings messages that the store keeps to their ends. Those that were redriven run at once; those that are parked
//! run when the one before them has ended, and by policy when their time is over. Decides when; how is the pipeline's.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::consumer::IdempotentConsumer;
use crate::ending::Ending;
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
}

#[derive(Debug, Default)]
struct Waiting {
    entries: BTreeMap<LetterKey, Entry>,
    /// The store is to be read again.
    reload: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    position: Option<Position>,
    /// It may be tried from this time on, in milliseconds since the Unix epoch; `None`: once the one before it has ended.
    ready_ms: Option<u64>,
    /// Its wait is over at this time, likewise, if it is parked.
    until_ms: Option<u64>,
    running: bool,
}

impl Entry {
    /// When something is to be done about it.
    fn due_ms(&self) -> u64 {
        let soonest = self.ready_ms.into_iter().chain(self.until_ms).min();
        soonest.unwrap_or(u64::MAX)
    }

    fn is_due(&self, now_ms: u64) -> bool {
        !self.running && self.due_ms() <= now_ms
    }

    fn is_ready(&self, now_ms: u64) -> bool {
        self.ready_ms.is_some_and(|ready_ms| ready_ms <= now_ms)
    }
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
        Self { max, waiting: Mutex::default(), changed: Notify::new() }
    }

    /// Notes a message that is about to be parked until `until_ms`. Answers when its wait is over, which is as before if it
    /// is parked already; an ending if there is no room.
    pub(crate) fn park(&self, key: LetterKey, position: Option<Position>, until_ms: u64) -> Result<u64, Ending> {
        let mut waiting = self.waiting.lock();
        let parked = waiting.entries.len();
        match waiting.entries.entry(key) {
            Slot::Occupied(mut entry) => {
                let entry = entry.get_mut();
                let until_ms = entry.until_ms.map_or(until_ms, |before_ms| before_ms.min(until_ms));
                *entry = Entry { ready_ms: None, until_ms: Some(until_ms), ..entry.clone() };
                self.changed.notify_one();
                Ok(until_ms)
            }
            Slot::Vacant(_) if parked >= self.max => {
                let error = format!("{} messages are parked or redriven already, which is the most", self.max);
                Err(Ending::Retry { error, after_ms: COME_AGAIN_MS })
            }
            Slot::Vacant(slot) => {
                slot.insert(Entry { position, ready_ms: None, until_ms: Some(until_ms), running: false });
                self.changed.notify_one();
                Ok(until_ms)
            }
        }
    }

    /// The message of `record` at `position` has ended: the first of those behind it may go. Those that are not behind it
    /// any more may see that they are too late.
    pub(crate) fn settled(&self, record: &RecordKey, position: Option<&Position>) {
        let mut waiting = self.waiting.lock();
        let next =
            waiting.of(record).filter_map(|(_, entry)| entry.position.clone()).filter(|at| Some(at) > position).min();
        for (_, entry) in waiting.of(record).filter(|(_, entry)| entry.position <= next) {
            entry.ready_ms = Some(0);
            self.changed.notify_one();
        }
    }

    /// Whether the message is kept.
    pub(crate) fn holds(&self, identity: &Identity) -> bool {
        self.waiting.lock().entries.contains_key(&identity.letter_key())
    }

    /// Has the store read again: an operator has redriven something.
    pub(crate) fn reload(&self) {
        self.waiting.lock().reload = true;
        self.changed.notify_one();
    }

    /// How many messages wait or are on their way.
    pub(crate) fn len(&self) -> usize {
        self.waiting.lock().entries.len()
    }

    fn take_reload(&self) -> bool {
        std::mem::take(&mut self.waiting.lock().reload)
    }

    /// Notes a message that was found in the store. What it waits for may have ended before anybody knew of it here: so a
    /// parked one is tried once.
    fn found(&self, key: LetterKey, letter: &DeadLetter) {
        let until_ms = match letter.standing {
            Standing::Dead => return,
            Standing::Redriven => None,
            Standing::Parked { until_ms, .. } => Some(until_ms),
        };
        let entry = Entry { position: letter.position.clone(), ready_ms: Some(0), until_ms, running: false };
        self.waiting.lock().entries.entry(key).or_insert(entry);
    }

    /// The messages that may run now, and when the next one may, in milliseconds since the Unix epoch.
    fn due(&self, now_ms: u64, room: usize) -> (Vec<Due>, Option<u64>) {
        let mut waiting = self.waiting.lock();
        let due = waiting.entries.iter().filter(|(_, entry)| entry.is_due(now_ms));
        let due: Vec<_> =
            due.map(|(key, entry)| Due { key: key.clone(), timed_out: !entry.is_ready(now_ms) }).collect();
        let mut taken: Vec<Due> = Vec::new();
        for mut due in due {
            if taken.len() == room {
                break;
            }
            // Of those that wait for the same message, the first goes first, whosever time is over.
            if due.timed_out
                && let Some((first, _)) =
                    waiting.of(&due.key.record).min_by(|one, other| one.1.position.cmp(&other.1.position))
            {
                due.key = first.clone();
            }
            let Some(entry) = waiting.entries.get_mut(&due.key).filter(|entry| !entry.running) else { continue };
            entry.running = true;
            taken.push(due);
        }
        let later = waiting.entries.values().filter(|entry| !entry.running).map(Entry::due_ms).min();
        (taken, later)
    }

    /// A message that was on its way waits again, for another one.
    fn waits(&self, key: &LetterKey) {
        if let Some(entry) = self.waiting.lock().entries.get_mut(key) {
            entry.running = false;
        }
        self.changed.notify_one();
    }

    /// A message that was on its way is kept no longer; or is to be tried again at `again_ms`.
    fn ended(&self, key: &LetterKey, again_ms: Option<u64>) {
        let mut waiting = self.waiting.lock();
        match again_ms {
            None => drop(waiting.entries.remove(key)),
            Some(_) => {
                if let Some(entry) = waiting.entries.get_mut(key) {
                    *entry = Entry { ready_ms: again_ms, until_ms: None, running: false, ..entry.clone() };
                }
            }
        }
        self.changed.notify_one();
    }
}

impl Waiting {
    /// The messages that are kept under a record.
    fn of<'a>(&'a mut self, record: &'a RecordKey) -> impl Iterator<Item = (&'a LetterKey, &'a mut Entry)> {
        let from = LetterKey { record: record.clone(), fingerprint: [0; 16] };
        let entries = self.entries.range_mut((Bound::Included(from), Bound::Unbounded));
        entries.take_while(move |(key, _)| key.record == *record)
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
        if consumer.kept().take_reload() {
            load(&consumer, &*store).await?;
        }
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
            biased;
            _ = stop.wait_for(|stop| *stop), if !stopping => stopping = true,
            () = consumer.kept().changed.notified() => {}
            Some(ended) = under_way.join_next() => joined(ended)?,
            () = async { consumer.clock().sleep(next_ms).await }, if !stopping && next_ms < u64::MAX && under_way.len() < AT_ONCE => {}
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
        for (key, letter) in &page {
            consumer.kept().found(key.clone(), letter);
        }
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
    let (message, fingerprint) = (letter.message.clone(), letter.fingerprint);
    let policy = consumer.options().strategy.gaps().map(|gaps| gaps.then);
    let (ending, key) = match (due.timed_out, policy) {
        (true, Some(GapPolicy::DeadLetter)) => (consumer.give_up_parked(letter).await?, due.key.clone()),
        (past_gap, _) => {
            let accepted = consumer.accept_kept(letter, past_gap);
            let key = accepted.identity.letter_key();
            (consumer.process(accepted).await?, key)
        }
    };
    let again = matches!(ending, Ending::Retry { .. } | Ending::InFlight { .. });
    if key != due.key && !again {
        consumer.kept_no_longer(&due.key, fingerprint).await?;
        consumer.kept().ended(&due.key, None);
    }
    match ending {
        Ending::Retry { after_ms, .. } | Ending::InFlight { after_ms } | Ending::Paused { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(COME_AGAIN_MS));
            consumer.kept().ended(&due.key, Some(again_ms));
        }
        Ending::Parked { .. } => consumer.kept().waits(&due.key),
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

    impl Kept {
        fn parks(&self, record_key: &str, letter: &DeadLetter) -> Result<u64, Ending> {
            let Standing::Parked { until_ms, .. } = letter.standing else { panic!("{letter:?}") };
            self.park(letter.key(&record(record_key)), letter.position.clone(), until_ms)
        }
    }

    fn record(key: &str) -> RecordKey {
        RecordKey::new(Scope::of("p"), "/source".into(), key.into())
    }

    #[test]
    fn the_first_of_an_entity_goes_first_whosever_time_is_over() {
        let kept = Kept::new(10);
        let (late, early) = (letter(3, 100), letter(2, 200));
        kept.parks("a", &late).expect("there is room");
        kept.parks("a", &early).expect("there is room");
        assert_eq!(kept.due(99, 9), (vec![], Some(100)));
        let (due, later) = kept.due(100, 9);
        assert_eq!(due, [Due { key: early.key(&record("a")), timed_out: true }]);
        assert_eq!(later, Some(100));
        kept.ended(&early.key(&record("a")), None);
        assert_eq!(kept.due(100, 9).0, [Due { key: late.key(&record("a")), timed_out: true }]);
    }

    #[test]
    fn who_waits_behind_goes_once_the_one_before_has_ended() {
        let kept = Kept::new(10);
        let (second, third) = (letter(2, 100), letter(3, 100));
        kept.parks("a", &second).expect("there is room");
        kept.parks("a", &third).expect("there is room");
        kept.parks("b", &second).expect("there is room");
        kept.settled(&record("a"), Some(&Position::Version(1)));
        assert_eq!(kept.due(1, 9).0, [Due { key: second.key(&record("a")), timed_out: false }]);
        // It ends while it is still noted: the one behind it is next, not itself.
        kept.settled(&record("a"), Some(&Position::Version(2)));
        kept.ended(&second.key(&record("a")), None);
        assert_eq!(kept.due(1, 9).0, [Due { key: third.key(&record("a")), timed_out: false }]);
    }

    #[test]
    fn what_is_found_at_the_start_is_tried_once() {
        let kept = Kept::new(10);
        let parked = letter(2, 100);
        kept.found(parked.key(&record("a")), &parked);
        assert_eq!(kept.due(1, 9).0, [Due { key: parked.key(&record("a")), timed_out: false }]);
        assert_eq!(kept.parks("a", &letter(2, 900)), Ok(100), "and waits as long as before, if it must");
        kept.settled(&record("a"), Some(&Position::Version(1)));
        assert_eq!(kept.due(1, 9).0, [], "it is on its way still");
        kept.parks("a", &letter(2, 900)).expect("there is room");
        kept.waits(&parked.key(&record("a")));
        assert_eq!(kept.due(99, 9), (vec![], Some(100)));
    }

    #[test]
    fn parking_again_does_not_prolong_the_wait_and_too_many_are_put_off() {
        let kept = Kept::new(1);
        assert_eq!(kept.parks("a", &letter(2, 100)), Ok(100));
        assert_eq!(kept.parks("a", &letter(2, 900)), Ok(100));
        assert!(matches!(kept.parks("a", &letter(3, 100)), Err(Ending::Retry { .. })));
    }
}
