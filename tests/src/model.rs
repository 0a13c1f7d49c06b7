//! The reference: what one processor must end with, whatever arrives, in whatever order, and
//! whatever dies. Plain, sequential, in memory; one function a rule. It borrows the names of things
//! from the core (keys, fingerprints) and none of its decisions.

use std::collections::{BTreeMap, BTreeSet};

use hapax_core::{HeldKey, HoldReason, Identity, RecordKey};

mod input;

use input::Mood;
pub use input::{By, Input};

/// First reading of the clock, in milliseconds since the Unix epoch.
pub const START_MS: u64 = 1_700_000_000_000;
/// Attempts before a message fails for good.
pub const ATTEMPTS_MAX: u32 = 3;
/// Retention of records, in milliseconds.
pub const RETENTION_MS: u64 = 5_400_000;
/// Extra retention of the last position of an entity, in milliseconds.
pub const HORIZON_MS: u64 = 3_600_000;
/// Time that a message is parked, in milliseconds.
pub const TIMEOUT_MS: u64 = 600_000;
/// Largest lead of a timestamp over the clock, in milliseconds.
pub const SKEW_MS: u64 = 60_000;
/// Longest delay before a retry, in milliseconds.
const LONGEST_MS: u64 = 86_400_000;
/// Lead of a clock that is taken for an ordinary one, in milliseconds.
const CLOCK_SKEW_MS: u64 = 60_000;
/// Least time before a held message is tried again, in milliseconds.
const COME_AGAIN_MS: u64 = 1_000;
/// The version of an entity's first message.
const FIRST: u64 = 1;
/// Messages there are: six of each of two entities.
pub const KEYS: u8 = 12;
/// Consumers over the store.
pub const OWNERS: usize = 2;

/// Something happens to the processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transition {
    /// A message is delivered to one of the owners.
    Deliver(usize, Input),
    /// Messages are delivered at once to the first owner, in this order.
    Burst(Vec<Input>),
    /// One message is delivered to all owners at once.
    Race(Input),
    /// The host dies, with its power, after so many operations of the disk; perhaps while a message
    /// is delivered, which is then delivered again. `seed` picks what the disk keeps of what was
    /// not synced.
    Crash {
        /// The message.
        during: Option<Input>,
        /// Operations that still go well.
        operations: u64,
        /// Seed that picks the bytes left on the disk.
        seed: u64,
    },
    /// The host stops and starts again.
    Restart,
    /// The clock goes on by so many milliseconds.
    Jump(u64),
    /// The clock is set back by an hour.
    Back,
    /// The store forgets what has expired.
    Sweep,
    /// An owner runs what the store keeps for it.
    Keep(usize),
    /// An operator redrives the n-th held message, if that is allowed.
    Redrive(usize),
    /// An operator discards the n-th held message.
    Discard(usize),
    /// An operator evicts the n-th record, if it may be.
    Evict(usize),
}

/// Contents of a record: its message and its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Message of the record.
    pub input: Input,
    /// Progress of the message.
    pub state: State,
    /// Attempts made.
    pub attempts: u32,
    /// It counts until then, in milliseconds since the Unix epoch.
    expires_ms: Option<u64>,
    /// Time of its last change, in milliseconds since the Unix epoch.
    changed_ms: u64,
    /// True if the message has ever failed for good: only then can a discard restore that failure.
    given_up: bool,
}

/// Progress of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// To the end, with this result.
    Completed(String),
    /// It failed for good.
    DeadLettered,
    /// It runs again at this time, in milliseconds since the Unix epoch.
    RetryDue(u64),
}

/// A held message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    input: Input,
    /// Reason for the wait.
    pub hold_reason: HoldReason,
    /// Attempts made.
    pub attempts: u32,
    /// Time when the message was held: gives the order of the messages that one owner holds.
    kept_ms: u64,
}

/// A held message in an owner's memory.
#[derive(Debug, Clone)]
struct Entry {
    input: Input,
    /// It may be tried from then on; `None`: once the one before it has ended.
    ready_ms: Option<u64>,
    /// Its wait is over then, if it is parked.
    until_ms: Option<u64>,
    /// Time when a redriven message was held: it waits for the redriven messages of its entity that
    /// were held before it.
    redriven_ms: Option<u64>,
}

/// Everything that is left, and what was answered last.
#[derive(Debug, Clone)]
pub struct Model {
    /// The strategy.
    pub by: By,
    /// Milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// Records, also expired ones.
    records: BTreeMap<RecordKey, Record>,
    /// Last versions of the entities, where versions have no gaps: they outlive the records.
    last_versions: BTreeMap<RecordKey, u64>,
    /// Latest expiry of the records that a sweep has removed since.
    swept_ms: u64,
    /// Held messages.
    pub held_messages: BTreeMap<HeldKey, Letter>,
    /// The application's state.
    pub state: BTreeMap<String, String>,
    /// Sent messages: ids and data.
    pub sent: BTreeSet<(String, String)>,
    /// Answers to the last transition's deliveries.
    pub outcomes: Vec<&'static str>,
    kept: [BTreeMap<HeldKey, Entry>; OWNERS],
    /// Time when each owner last held a message.
    last_ms: [u64; OWNERS],
}

/// Decision of the records about a message.
enum Answer {
    Run,
    NotYet,
    Duplicate,
    Stale,
    Mismatch,
    Gap(u64),
}

fn held_key(identity: &Identity) -> HeldKey {
    HeldKey { record: identity.record.clone(), fingerprint: identity.fingerprint.digest }
}

impl Record {
    fn has_expired(&self, now_ms: u64) -> bool {
        self.expires_ms.is_some_and(|expires_ms| expires_ms <= now_ms)
    }
}

impl Model {
    /// Nothing has happened yet.
    pub fn new(by: By) -> Self {
        Self {
            by,
            now_ms: START_MS,
            records: BTreeMap::new(),
            last_versions: BTreeMap::new(),
            swept_ms: 0,
            held_messages: BTreeMap::new(),
            state: BTreeMap::new(),
            sent: BTreeSet::new(),
            outcomes: Vec::new(),
            kept: Default::default(),
            last_ms: Default::default(),
        }
    }

    /// Records that count.
    pub fn live(&self) -> impl Iterator<Item = (&RecordKey, &Record)> {
        self.records.iter().filter(|(_, record)| !record.has_expired(self.now_ms))
    }

    /// Applies a transition.
    pub fn apply(&mut self, transition: &Transition) {
        self.outcomes.clear();
        match transition {
            Transition::Deliver(owner, input) => self.deliver(*owner, *input),
            Transition::Burst(inputs) => inputs.iter().for_each(|input| self.deliver(0, *input)),
            Transition::Race(input) => (0..OWNERS).for_each(|owner| self.deliver(owner, *input)),
            Transition::Crash { during, .. } => {
                self.forget_all(0..OWNERS);
                during.iter().for_each(|input| self.deliver(0, *input));
            }
            Transition::Restart => self.forget_all(0..OWNERS),
            Transition::Jump(by_ms) => self.now_ms += by_ms,
            Transition::Back => self.set_back(3_600_000),
            Transition::Sweep => {
                let ended = self.records.extract_if(.., |_, record| record.has_expired(self.now_ms));
                self.swept_ms = ended.filter_map(|(_, record)| record.expires_ms).fold(self.swept_ms, u64::max);
            }
            Transition::Keep(owner) => self.keep(*owner),
            Transition::Redrive(nth) => self.redrive(*nth),
            Transition::Discard(nth) => self.discard(*nth),
            Transition::Evict(nth) => self.evict(*nth),
        }
    }

    /// Clears the memory of the owners.
    fn forget_all(&mut self, owners: std::ops::Range<usize>) {
        for owner in owners {
            self.kept[owner].clear();
            self.last_ms[owner] = 0;
        }
    }

    /// Set back, unless a record would count again that the store may have forgotten; a host may
    /// remember it still.
    fn set_back(&mut self, by_ms: u64) {
        let before_ms = self.now_ms - by_ms.min(self.now_ms - START_MS);
        let ended = |record: &Record| record.has_expired(self.now_ms) && !record.has_expired(before_ms);
        if !self.records.values().any(ended) && self.swept_ms <= before_ms {
            self.now_ms = before_ms;
        }
    }

    fn deliver(&mut self, owner: usize, input: Input) {
        let outcome = self.offer(owner, input, false, false);
        self.outcomes.push(outcome);
    }

    /// A message comes, from its source or from the held messages.
    fn offer(&mut self, owner: usize, input: Input, kept: bool, past_gap: bool) -> &'static str {
        if self.is_refused(input) {
            let refused = held_key(&input.identity_of_refused(self.by));
            self.put_letter(owner, refused, input, HoldReason::Dead, 0);
            return "dead-lettered";
        }
        let name = input.identity(self.by);
        match self.answer(&name, input, past_gap) {
            Answer::Run => self.run(owner, input, &name, kept),
            Answer::NotYet => "retry",
            Answer::Gap(awaits) => self.park(owner, input, &name, awaits),
            Answer::Duplicate => self.over(owner, &name, kept, "duplicate"),
            Answer::Stale => self.over(owner, &name, kept, "stale"),
            Answer::Mismatch => {
                self.put_letter(owner, held_key(&name), input, HoldReason::Dead, 0);
                "mismatch"
            }
        }
    }

    fn is_refused(&self, input: Input) -> bool {
        self.by == By::Timestamp && input.time_ms() > self.now_ms + SKEW_MS
    }

    fn answer(&self, name: &Identity, input: Input, past_gap: bool) -> Answer {
        let record = self.records.get(&name.record).filter(|record| !record.has_expired(self.now_ms));
        let strict = self.by.is_strict() && !past_gap;
        let Some(record) = record else {
            let last = self.last_versions.get(&name.record).copied();
            let next = last.map_or(FIRST, |last| last + 1);
            return match input.version() {
                version if last.is_some_and(|last| version <= last) => Answer::Stale,
                version if strict && version < next => Answer::Stale,
                version if strict && version > next => Answer::Gap(next),
                _ => Answer::Run,
            };
        };
        let (last, position) = (record.input.position(self.by), input.position(self.by));
        if position < last {
            return Answer::Stale;
        }
        if position > last {
            let due = matches!(record.state, State::RetryDue(_));
            return match (record.input.version(), input.version()) {
                (last, version) if strict && version > last + 1 => Answer::Gap(last + 1),
                (last, _) if strict && due => Answer::Gap(last),
                _ => Answer::Run,
            };
        }
        if record.input.identity(self.by).fingerprint != name.fingerprint {
            return Answer::Mismatch;
        }
        match record.state {
            State::Completed(_) | State::DeadLettered => Answer::Duplicate,
            State::RetryDue(at_ms) if at_ms > self.now_ms && record.changed_ms <= self.now_ms + CLOCK_SKEW_MS => {
                Answer::NotYet
            }
            State::RetryDue(_) => Answer::Run,
        }
    }

    fn over(&mut self, owner: usize, name: &Identity, kept: bool, outcome: &'static str) -> &'static str {
        let key = held_key(name);
        if kept || self.kept[owner].contains_key(&key) {
            self.held_messages.remove(&key);
        }
        outcome
    }

    fn run(&mut self, owner: usize, input: Input, name: &Identity, kept: bool) -> &'static str {
        let same = |record: &&Record| {
            !record.has_expired(self.now_ms) && record.input.position(self.by) == input.position(self.by)
        };
        let found = self.records.get(&name.record).filter(same);
        let (known, was_given_up) = (found.is_some(), found.is_some_and(|record| record.given_up));
        let attempts = found.map_or(0, |record| record.attempts) + 1;
        let (state, outcome) = match input.mood(self.by) {
            Mood::Fine => (State::Completed(self.take_effect(input, name)), "completed"),
            Mood::FailsOnce if attempts > 1 => (State::Completed(self.take_effect(input, name)), "completed"),
            Mood::FailsOnce | Mood::Fails if attempts < ATTEMPTS_MAX => {
                (State::RetryDue(self.now_ms + retry_after_ms(attempts)), "retry")
            }
            Mood::Fails | Mood::FailsOnce | Mood::Reject => (State::DeadLettered, "dead-lettered"),
        };
        let expires_ms = (outcome != "retry").then_some(self.now_ms + self.life_ms());
        let given_up = state == State::DeadLettered || was_given_up;
        self.records.insert(
            name.record.clone(),
            Record { input, state, attempts, expires_ms, changed_ms: self.now_ms, given_up },
        );
        match outcome {
            "dead-lettered" => {
                self.put_letter(owner, held_key(name), input, HoldReason::Dead, attempts);
            }
            "completed" if known || kept || self.by.is_strict() => drop(self.held_messages.remove(&held_key(name))),
            _ => {}
        }
        if outcome != "retry" && self.by.is_strict() {
            self.last_versions.insert(name.record.clone(), input.version());
            self.wake_behind(owner, input, name);
        }
        outcome
    }

    /// Returns the retention of a record, in milliseconds.
    fn life_ms(&self) -> u64 {
        RETENTION_MS + if self.by.has_positions() { HORIZON_MS } else { 0 }
    }

    /// State, outgoing message, result.
    fn take_effect(&mut self, input: Input, name: &Identity) -> String {
        let label = input.label(self.by);
        let log = self.state.entry(format!("log/e{}", input.entity())).or_default();
        log.push_str(&format!("{label},"));
        let result = log.clone();
        self.sent.insert((name.message_key.outgoing_id(0), label));
        result
    }

    /// A message has ended: the next that waits may go, and those that it leaves behind learn their
    /// fate.
    fn wake_behind(&mut self, owner: usize, input: Input, name: &Identity) {
        let of_record = |key: &HeldKey| key.record == name.record;
        let versions =
            self.kept[owner].iter().filter(|(key, _)| of_record(key)).map(|(_, entry)| entry.input.version());
        let next = versions.filter(|version| *version > input.version()).min().unwrap_or(0);
        for (_, entry) in self.kept[owner].iter_mut().filter(|(key, _)| of_record(key)) {
            if entry.input.version() <= input.version().max(next) {
                entry.ready_ms = Some(0);
            }
        }
    }

    fn park(&mut self, owner: usize, input: Input, name: &Identity, awaits: u64) -> &'static str {
        let (key, later_ms) = (held_key(name), self.now_ms + TIMEOUT_MS);
        let known_ms = self.kept[owner].get(&key).and_then(|entry| entry.until_ms);
        let until_ms = known_ms.map_or(later_ms, |known_ms| known_ms.min(later_ms));
        let entry = Entry { input, ready_ms: None, until_ms: Some(until_ms), redriven_ms: None };
        self.kept[owner].insert(key.clone(), entry);
        self.put_letter(owner, key, input, HoldReason::Parked { awaits, until_ms }, 0);
        "parked"
    }

    /// An owner brings to an end what may run now.
    fn keep(&mut self, owner: usize) {
        self.load(owner);
        loop {
            let taken = self.take_due(owner);
            if taken.is_empty() {
                return;
            }
            for (key, timed_out) in taken {
                self.bring_to_its_end(owner, &key, timed_out);
            }
        }
    }

    fn load(&mut self, owner: usize) {
        for (key, held_message) in &self.held_messages {
            let waits =
                matches!(self.answer(&held_message.input.identity(self.by), held_message.input, false), Answer::Gap(_));
            self.last_ms[owner] = self.last_ms[owner].max(held_message.kept_ms);
            let (ready_ms, until_ms, redriven_ms) = match held_message.hold_reason {
                HoldReason::Dead => continue,
                HoldReason::Parked { until_ms, .. } => ((!waits).then_some(0), Some(until_ms), None),
                HoldReason::Redriven => (Some(0), None, Some(held_message.kept_ms)),
            };
            let entry = Entry { input: held_message.input, ready_ms, until_ms, redriven_ms };
            self.kept[owner].entry(key.clone()).or_insert(entry);
        }
    }

    /// Returns the messages that may run now: of each record the first in order, if its time is
    /// over. A deferred message holds up those behind it.
    fn take_due(&mut self, owner: usize) -> Vec<(HeldKey, bool)> {
        let (now_ms, by) = (self.now_ms, self.by);
        // A clock that was ahead holds nobody up.
        for entry in self.kept[owner].values_mut() {
            entry.ready_ms = entry.ready_ms.map(|ready_ms| ready_ms.min(now_ms + LONGEST_MS));
            entry.until_ms = entry.until_ms.map(|until_ms| until_ms.min(now_ms + TIMEOUT_MS));
        }
        let records: BTreeSet<_> = self.kept[owner].keys().map(|key| key.record.clone()).collect();
        let next_of = |record: &RecordKey| {
            let of_record = || self.kept[owner].iter().filter(|(key, _)| key.record == *record);
            let over = of_record().any(|(_, entry)| entry.until_ms.is_some_and(|until_ms| until_ms <= now_ms));
            let may_be_first = of_record().filter(|(key, entry)| self.is_first_redriven(owner, key, entry));
            let (key, first) = may_be_first.min_by_key(|(_, entry)| entry.input.position(by))?;
            let is_ready = first.ready_ms.is_some_and(|ready_ms| ready_ms <= now_ms);
            (is_ready || first.until_ms.is_some() && over).then(|| (key.clone(), !is_ready))
        };
        records.iter().filter_map(next_of).collect()
    }

    /// Returns true if no other redriven message of its entity goes before it.
    fn is_first_redriven(&self, owner: usize, key: &HeldKey, entry: &Entry) -> bool {
        let Some(redriven_ms) = entry.redriven_ms else { return true };
        let of_entity = self.kept[owner].iter().filter(|(_, other)| other.input.entity() == entry.input.entity());
        let mut redriven = of_entity.filter_map(|(key, other)| Some((other.redriven_ms?, key)));
        redriven.all(|other| (redriven_ms, key) <= other)
    }

    /// Holds a message, later than every message that its owner has held before.
    fn put_letter(&mut self, owner: usize, key: HeldKey, input: Input, hold_reason: HoldReason, attempts: u32) {
        let kept_ms = self.now_ms.max(self.last_ms[owner] + 1);
        self.last_ms[owner] = kept_ms;
        self.held_messages.insert(key, Letter { input, hold_reason, attempts, kept_ms });
    }

    fn bring_to_its_end(&mut self, owner: usize, key: &HeldKey, timed_out: bool) {
        let held_message =
            self.held_messages.get(key).filter(|held_message| held_message.hold_reason != HoldReason::Dead).cloned();
        let Some(held_message) = held_message else {
            self.kept[owner].remove(key);
            return;
        };
        let (input, give_up) = (held_message.input, timed_out && self.by == By::StrictDeadLetter);
        let waits = matches!(self.answer(&input.identity(self.by), input, false), Answer::Gap(_));
        let outcome = if give_up && waits {
            self.put_letter(owner, key.clone(), input, HoldReason::Dead, 0);
            "dead-lettered"
        } else {
            self.offer(owner, input, true, timed_out && !give_up)
        };
        match outcome {
            "retry" => {
                let record = &self.records[&input.identity(self.by).record];
                let State::RetryDue(at_ms) = record.state else { panic!("a message that is to be retried is due") };
                let again_ms = self.now_ms + (at_ms - self.now_ms).max(COME_AGAIN_MS);
                let entry = self.kept[owner].get_mut(key).unwrap();
                (entry.ready_ms, entry.until_ms) = (Some(again_ms), None);
            }
            "parked" => {}
            _ => drop(self.kept[owner].remove(key)),
        }
        // Kept under its id, as one that was refused, and known by its entity now; or the other way
        // round.
        let refused = self.is_refused(input);
        let now = if refused { input.identity_of_refused(self.by) } else { input.identity(self.by) };
        if outcome != "retry" && held_key(&now) != *key {
            self.held_messages.remove(key);
        }
    }

    fn nth_letter(&self, nth: usize) -> Option<(HeldKey, Letter)> {
        let held_messages = self.held_messages.len();
        let (key, held_message) = self.held_messages.iter().nth(nth.checked_rem(held_messages)?)?;
        Some((key.clone(), held_message.clone()))
    }

    fn redrive(&mut self, nth: usize) {
        self.forget_all(1..OWNERS);
        let Some((key, held_message)) =
            self.nth_letter(nth).filter(|(_, held_message)| held_message.hold_reason == HoldReason::Dead)
        else {
            return;
        };
        let (by, now_ms) = (self.by, self.now_ms);
        if let Some(record) = self.records.get_mut(&key.record).filter(|record| !record.has_expired(now_ms)) {
            let same = record.input.identity(by).fingerprint.digest == key.fingerprint;
            if same && record.state == State::DeadLettered {
                let (state, attempts) = (State::RetryDue(now_ms), 0);
                *record = Record { state, attempts, expires_ms: None, changed_ms: now_ms, ..record.clone() };
            } else if same || !by.has_positions() {
                return;
            }
        }
        // The first owner is told.
        let (input, redriven_ms) = (held_message.input, Some(held_message.kept_ms));
        self.last_ms[0] = self.last_ms[0].max(held_message.kept_ms);
        self.kept[0].insert(key.clone(), Entry { input, ready_ms: Some(0), until_ms: None, redriven_ms });
        self.held_messages.insert(key, Letter { hold_reason: HoldReason::Redriven, ..held_message });
    }

    fn discard(&mut self, nth: usize) {
        self.forget_all(1..OWNERS);
        let Some((key, held_message)) = self.nth_letter(nth) else { return };
        self.held_messages.remove(&key);
        if held_message.hold_reason != HoldReason::Redriven {
            return;
        }
        // Nobody runs it then: its record is as it was before.
        let (by, expires_ms) = (self.by, Some(self.now_ms + self.life_ms()));
        if let Some(record) = self.records.get_mut(&key.record)
            && record.input.identity(by).fingerprint.digest == key.fingerprint
            && matches!(record.state, State::RetryDue(_))
            && record.given_up
        {
            let (state, attempts) = (State::DeadLettered, held_message.attempts);
            *record = Record { state, attempts, expires_ms, ..record.clone() };
        }
    }

    fn evict(&mut self, nth: usize) {
        self.forget_all(1..OWNERS);
        let live = self.live().count();
        let found = nth.checked_rem(live).and_then(|nth| self.live().nth(nth));
        if let Some((key, _)) = found.filter(|(_, record)| !matches!(record.state, State::RetryDue(_))) {
            let key = key.clone();
            self.records.remove(&key);
            self.last_versions.remove(&key);
        }
    }
}

/// Retry delay that a failing message asks for after its n-th attempt, in milliseconds.
pub fn retry_after_ms(attempt: u32) -> u64 {
    u64::from(attempt) * 700
}
