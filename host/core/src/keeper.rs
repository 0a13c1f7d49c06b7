//! The keeper: brings messages that the store keeps to their ends. Those that were redriven run at once; those that are parked
//! run when the one before them has ended, and by policy when their time is over. Decides when; how is the pipeline's.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

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
    /// Runs from this time on, in milliseconds since the Unix epoch.
    due_ms: u64,
    /// It is due because its time is over, not because the one before it has ended.
    parked: bool,
    running: bool,
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

    /// Notes a message that is about to be parked. Answers when its wait is over, which is as before if it is parked
    /// already; an ending if there is no room.
    pub(crate) fn park(&self, record: &RecordKey, letter: &DeadLetter) -> Result<u64, Ending> {
        let mut waiting = self.waiting.lock();
        let Standing::Parked { until_ms, .. } = letter.standing else {
            unreachable!("only parked messages are parked")
        };
        let key = letter.key(record);
        if let Some(entry) = waiting.entries.get_mut(&key) {
            let was_parked = std::mem::replace(&mut entry.parked, true);
            entry.due_ms = if was_parked { entry.due_ms.max(1) } else { until_ms };
            let due_ms = entry.due_ms;
            self.changed.notify_one();
            return Ok(due_ms);
        }
        if waiting.entries.len() >= self.max {
            let error = format!("{} messages are parked or redriven already, which is the most", self.max);
            return Err(Ending::Retry { error, after_ms: COME_AGAIN_MS });
        }
        let entry = Entry { position: letter.position.clone(), due_ms: until_ms, parked: true, running: false };
        waiting.entries.insert(key, entry);
        self.changed.notify_one();
        Ok(until_ms)
    }

    /// The message of `record` at `position` has ended: the first of those that wait behind it may go, and what it leaves
    /// behind learns its fate.
    pub(crate) fn settled(&self, record: &RecordKey, position: Option<&Position>) {
        let mut waiting = self.waiting.lock();
        let next = waiting.of(record).filter_map(|(_, entry)| entry.position.clone());
        let next = next.filter(|next| Some(next) > position).min();
        let last = next.as_ref().filter(|_| !fault::mutated("nobody-is-woken")).or(position);
        for (_, entry) in waiting.of(record).filter(|(_, entry)| entry.position.as_ref() <= last) {
            entry.parked = false;
            entry.due_ms = 0;
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

    fn take_reload(&self) -> bool {
        std::mem::take(&mut self.waiting.lock().reload)
    }

    /// Notes a message that was found in the store. One that is parked runs at once if what it waits for has ended.
    fn found(&self, key: LetterKey, letter: &DeadLetter, waits: bool) {
        let (due_ms, parked) = match letter.standing {
            Standing::Dead => return,
            Standing::Parked { .. } if fault::mutated("parked-forgotten-at-a-restart") => return,
            Standing::Parked { until_ms, .. } if waits => (until_ms, true),
            Standing::Redriven | Standing::Parked { .. } => (0, false),
        };
        let entry = Entry { position: letter.position.clone(), due_ms, parked, running: false };
        self.waiting.lock().entries.entry(key).or_insert(entry);
    }

    /// The messages that may run now, and when the next one may, in milliseconds since the Unix epoch.
    fn due(&self, now_ms: u64, room: usize) -> (Vec<Due>, Option<u64>) {
        let mut waiting = self.waiting.lock();
        let due = waiting.entries.iter().filter(|(_, entry)| !entry.running && entry.due_ms <= now_ms);
        let mut records: Vec<_> = due.map(|(key, _)| key.record.clone()).collect();
        records.dedup();
        let mut taken: Vec<Due> = Vec::new();
        for record in records {
            if taken.len() == room {
                break;
            }
            if let Some((key, entry)) = waiting.next_of(&record, now_ms) {
                entry.running = true;
                taken.push(Due { key, timed_out: entry.parked });
            }
        }
        // What is due and was not taken goes when another one ends.
        let later = waiting.entries.values().filter(|entry| !entry.running && entry.due_ms > now_ms);
        (taken, later.map(|entry| entry.due_ms).min())
    }

    /// A message that was on its way is parked again, for another one.
    fn waits_again(&self, key: &LetterKey) {
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
            Some(again_ms) => {
                if let Some(entry) = waiting.entries.get_mut(key) {
                    entry.running = false;
                    // It has run: it waits for its next attempt now, not for another message.
                    entry.parked = false;
                    entry.due_ms = again_ms;
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
        let from = self.entries.range_mut((Bound::Included(from), Bound::Unbounded));
        from.take_while(move |(key, _)| key.record == *record)
    }

    /// The one of them that may go now: the first in order, whosever time is over, and one at a time. One that is put off holds up
    /// those behind it.
    fn next_of(&mut self, record: &RecordKey, now_ms: u64) -> Option<(LetterKey, &mut Entry)> {
        let (mut on_its_way, mut over) = (false, false);
        for (_, entry) in self.of(record) {
            on_its_way |= entry.running;
            over |= entry.parked && entry.due_ms <= now_ms;
        }
        let first = self.of(record).min_by(|(_, one), (_, other)| one.position.cmp(&other.position));
        let (key, _) =
            first.filter(|(_, first)| !on_its_way && if first.parked { over } else { first.due_ms <= now_ms })?;
        let key = key.clone();
        self.entries.get_mut(&key).map(|entry| (key, entry))
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
        for (key, letter) in &page {
            let waits = consumer.waits(&key.record, letter).await?;
            consumer.kept().found(key.clone(), letter, waits);
        }
        match page.into_iter().last() {
            Some((key, _)) => after = Some(key),
            None => return Ok(()),
        }
    }
}

/// Runs a kept message. One that the strategy knows by another name now than when it was kept is kept under the old one no longer.
async fn run_again(
    consumer: &IdempotentConsumer,
    key: &LetterKey,
    letter: DeadLetter,
    past_gap: bool,
) -> Result<Ending, StoreError> {
    let fingerprint = letter.fingerprint;
    let accepted = consumer.accept_kept(letter, past_gap);
    let renamed = accepted.identity.letter_key() != *key;
    let ending = consumer.process(accepted).await?;
    if renamed && !matches!(ending, Ending::Retry { .. } | Ending::InFlight { .. }) {
        consumer.keep_no_longer(key, fingerprint).await?;
        consumer.kept().ended(key, None);
    }
    Ok(ending)
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
    let given_up = due.timed_out && policy == Some(GapPolicy::DeadLetter);
    let ending = if given_up && consumer.waits(&due.key.record, &letter).await? {
        consumer.give_up_parked(letter).await?
    } else {
        run_again(&consumer, &due.key, letter, due.timed_out && !given_up).await?
    };
    match ending {
        Ending::Retry { after_ms, .. } | Ending::InFlight { after_ms } => {
            let again_ms = consumer.clock().now_ms().saturating_add(after_ms.max(COME_AGAIN_MS));
            consumer.kept().ended(&due.key, Some(again_ms));
        }
        Ending::Parked { .. } => consumer.kept().waits_again(&due.key),
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
        kept.settled(&record("a"), Some(&Position::Version(1)));
        assert_eq!(kept.due(1, 9).0, [Due { key: second.key(&record("a")), timed_out: false }]);
    }

    #[test]
    fn of_one_record_one_is_on_its_way_and_what_is_put_off_holds_up_those_behind_it() {
        let kept = Kept::new(10);
        let (second, third) = (letter(2, 100), letter(3, 100));
        kept.park(&record("a"), &second).expect("there is room");
        kept.park(&record("a"), &third).expect("there is room");
        kept.park(&record("b"), &third).expect("there is room");
        let due = |letter: &DeadLetter, of: &str, timed_out| Due { key: letter.key(&record(of)), timed_out };
        assert_eq!(kept.due(100, 9).0, [due(&second, "a", true), due(&third, "b", true)]);
        kept.ended(&second.key(&record("a")), Some(500));
        assert_eq!(kept.due(499, 9), (vec![], Some(500)), "it is not run before its time, nor is the one behind it");
        assert_eq!(kept.due(500, 9).0, [due(&second, "a", false)]);
        kept.settled(&record("a"), second.position.as_ref());
        kept.ended(&second.key(&record("a")), None);
        assert_eq!(kept.due(500, 9).0, [due(&third, "a", false)]);
    }

    #[test]
    fn parking_again_does_not_prolong_the_wait_and_too_many_are_put_off() {
        let kept = Kept::new(1);
        assert_eq!(kept.park(&record("a"), &letter(2, 100)), Ok(100));
        assert_eq!(kept.park(&record("a"), &letter(2, 900)), Ok(100));
        assert!(matches!(kept.park(&record("a"), &letter(3, 100)), Err(Ending::Retry { .. })));
    }
}
