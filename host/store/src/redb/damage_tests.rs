//! Single bits turned anywhere in a database or a journal: every answer is right, or refused, or
//! the scrub finds the damage.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Commit, Effects, Expected, Feed as _, Fingerprint, Group, HeldChange, HeldMessage, HoldReason,
    IdempotencyStorage as _, Inspect as _, Message, Outbox as _, Outgoing, Output, Record, RecordChange, RecordKey,
    RecordState, Scope, StoreError,
};
use parking_lot::Mutex;
use redb::StorageBackend;

use crate::format::layout::Applied;
use crate::journal::{self, Survey};
use crate::{RedbStore, StoreOptions};

/// A file in memory; cloning shares it.
#[derive(Debug, Clone, Default)]
struct File(Arc<Mutex<Vec<u8>>>);

impl StorageBackend for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock();
        let from = (offset as usize).checked_add(out.len()).and_then(|end| bytes.get(offset as usize..end));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }
}

const MESSAGES: u64 = 60;

fn open(database: &File, journal: &File) -> Result<RedbStore, crate::OpenError> {
    let options =
        StoreOptions { page_cache_bytes: 1 << 20, bucket_rows_max: 15, filters: true, ..StoreOptions::default() };
    RedbStore::open_backends(database.clone(), journal.clone(), options)
}

fn key(number: u64) -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), &Message::new(format!("m-{number}"), "/s", "t"))
}

/// A commit with everything that a message may leave.
fn commit(number: u64) -> Commit {
    let fingerprint = Fingerprint { version: 1, digest: [1; 16] };
    let output = Output { content_type: None, data: format!("output {number}").into() };
    let dead = number.is_multiple_of(10);
    let error = || "e".to_owned();
    let record = Record {
        state: if dead { RecordState::DeadLettered { error: error() } } else { RecordState::Completed { output } },
        epoch: 1,
        attempts: 1,
        fingerprint,
        position: None,
        component: "c".into(),
        saga: None,
        received_ms: 0,
        changed_ms: 0,
        expires_ms: (!number.is_multiple_of(4)).then_some(60_000 * (number % 2 + 1)),
        history: Vec::new(),
    };
    let held = HeldMessage {
        message: Message::new(format!("m-{number}"), "/s", "t"),
        fingerprint,
        position: None,
        hold_reason: HoldReason::Dead,
        error: error(),
        attempts: 1,
        component: "c".into(),
        at_ms: 1,
    };
    Commit {
        expected: Expected::Absent,
        record: RecordChange::Put(record.into()),
        version: number + 1,
        effects: Effects {
            writes: [(format!("k{number:03}"), Some(format!("value {number}").into()))].into(),
            outgoing: vec![Outgoing { kind: format!("o{number}"), ..Outgoing::default() }],
        },
        held_message: dead.then(|| HeldChange::Put(Box::new(held))),
        at_ms: number,
        ..Commit::of(&key(number))
    }
}

fn now<T>(answer: BoxFuture<'_, Result<T, StoreError>>) -> Result<T, StoreError> {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(answer)
}

/// Every answer that a store gives, as text; the first error ends it.
fn answers(store: &RedbStore) -> Result<String, StoreError> {
    use std::fmt::Write as _;
    let mut out = String::new();
    for number in 0..MESSAGES + 10 {
        writeln!(out, "{:?}", now(store.record(&key(number)))?).unwrap();
        writeln!(out, "{:?}", now(store.held_under(&key(number)))?).unwrap();
        writeln!(out, "{:?}", now(store.view(&Scope::of("p")).get(&format!("k{number:03}")))?).unwrap();
    }
    writeln!(out, "{:?}", now(store.view(&Scope::of("p")).scan("k", None, 1_000))?).unwrap();
    writeln!(out, "{:?} {:?}", now(store.pending(None, 1_000))?, now(store.outbox_len())?).unwrap();
    writeln!(out, "{:?}", now(store.held_messages(None, None, 1_000))?).unwrap();
    writeln!(out, "{:?}", now(store.events(None, None, 1_000))?).unwrap();
    writeln!(out, "{:?}", now(store.records(None, None, 1_000))?).unwrap();
    Ok(out)
}

/// A store whose messages are in the tables, but for the last few, which only the journal has.
struct Victim {
    database: Vec<u8>,
    /// A journal with the frames of the last few, and no more bytes than they take: it is searched
    /// as a whole at every start.
    journal: Vec<u8>,
    applied: Applied,
    store_id: String,
    frames: usize,
    answers: String,
}

impl Victim {
    fn new() -> Self {
        let (database, journal) = (File::default(), File::default());
        let store = open(&database, &journal).unwrap();
        let write = |store: &RedbStore, numbers: std::ops::Range<u64>| {
            for number in numbers {
                now(store.commit(&Group { commits: vec![commit(number)], ..Group::default() })).unwrap();
            }
        };
        write(&store, 0..MESSAGES / 2);
        store.flush().unwrap();
        write(&store, MESSAGES / 2..MESSAGES - 5);
        drop(store);
        let tables = database.0.lock().clone();
        let store = open(&database, &journal).unwrap();
        let applied = store.core().view.read().snapshot.applied;
        write(&store, MESSAGES - 5..MESSAGES);
        let answers = answers(&store).unwrap();
        drop(store);
        let store_id = String::from_utf8(journal.0.lock()[12..44].to_vec()).unwrap();
        let frames = journal::survey(&journal, &store_id, &applied).unwrap().frames;
        let journal = journal::rebuilt(&store_id, applied.sequence, &frames);
        Self { database: tables, journal, applied, store_id, frames: frames.len(), answers }
    }

    /// Turns one bit of the journal, and returns what recovery makes of it.
    fn recovered(&self, at: usize, bit: u32) -> Fate {
        let journal = File(Arc::new(Mutex::new(self.journal.clone())));
        journal.0.lock()[at] ^= 1 << bit;
        match journal::survey(&journal, &self.store_id, &self.applied) {
            Ok(Survey { damage: None, frames, .. }) if frames.len() == self.frames => Fate::Right,
            // A bit turned in the last frame cannot be told from a frame that a crash tore.
            Ok(Survey { damage: None, frames, .. }) if frames.len() + 1 == self.frames => Fate::Torn,
            Ok(Survey { damage: None, .. }) => Fate::Wrong,
            Ok(Survey { damage: Some(_), .. }) | Err(_) => Fate::Refused,
        }
    }

    /// Turns one bit of the database, and returns what came of it.
    fn turned(&self, at: usize, bit: u32) -> Fate {
        let (database, journal) = (File::default(), File::default());
        database.0.lock().clone_from(&self.database);
        journal.0.lock().clone_from(&self.journal);
        database.0.lock()[at] ^= 1 << bit;
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| open(&database, &journal)));
        let Ok(Ok(store)) = opened else { return Fate::Refused };
        match answers(&store) {
            Ok(answers) if answers == self.answers => Fate::Right,
            Ok(_) if store.scrub().is_err() => Fate::Scrubbed,
            Ok(_) => Fate::Wrong,
            Err(_) => {
                assert!(now(store.record(&key(0))).is_err(), "damage was read, and the store is open");
                Fate::Refused
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Right,
    /// Not opened, or an error that closed the store.
    Refused,
    /// A wrong answer, which the scrub finds the cause of.
    Scrubbed,
    /// The last frame counts as torn.
    Torn,
    Wrong,
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

/// Bits to turn, of which a twentieth are the database's, since each of these opens a store: 10,000
/// by default, more with `HAPAX_FLIPS`.
fn flips() -> u64 {
    std::env::var("HAPAX_FLIPS").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000)
}

/// A byte of a file that is written, and a bit of it; the rest is zeros that nobody reads.
fn places(bytes: &[u8], count: u64) -> impl Iterator<Item = (usize, u32)> {
    let used = bytes.chunks(64).enumerate().filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0));
    let used: Vec<usize> = used.map(|(at, _)| at * 64).collect();
    let (mut state, length) = (0x9e37_79b9_7f4a_7c15, bytes.len());
    let places = (0..count).map(move |_| {
        let at = used[random(&mut state) as usize % used.len()] + random(&mut state) as usize % 64;
        (at, random(&mut state) as u32 % 8)
    });
    places.filter(move |(at, _)| *at < length)
}

#[test]
fn a_bit_turned_anywhere_in_the_database_gives_right_answers_or_none() {
    let victim = Victim::new();
    let mut counts = [0u64; 5];
    for (at, bit) in places(&victim.database, flips() / 20) {
        let fate = victim.turned(at, bit);
        assert_ne!(fate, Fate::Wrong, "byte {at}, bit {bit}");
        counts[fate as usize] += 1;
    }
    println!("right, refused, found by the scrub, torn, wrong: {counts:?}");
    assert!(counts[Fate::Refused as usize] > flips() / 500, "too few of the flips mattered: {counts:?}");
}

#[test]
fn a_bit_turned_anywhere_in_the_journal_is_refused_or_tears_the_last_frame() {
    let victim = Victim::new();
    let mut counts = [0u64; 5];
    for (at, bit) in places(&victim.journal, flips() - flips() / 20) {
        let fate = victim.recovered(at, bit);
        assert_ne!(fate, Fate::Wrong, "byte {at}, bit {bit}");
        counts[fate as usize] += 1;
    }
    println!("right, refused, found by the scrub, torn, wrong: {counts:?}");
    assert!(counts[Fate::Refused as usize] > flips() / 2, "too few of the flips mattered: {counts:?}");
}

crate::mutations! {
    mutation_a_database_without_seals_is_found: a_bit_turned_anywhere_in_the_database_gives_right_answers_or_none is red with "seals-unchecked";
}
