//! Reads over every state the parts of an open store can be in: the same random commits go to it
//! and to the store in memory, while the applier is held back and let go; every answer must be the
//! same.
#![expect(clippy::unwrap_used, reason = "tests")]

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use hapax_core::{
    Commit, Cursor, Effects, Expected, Feed as _, FeedEntry, FeedEventKind, Fingerprint, Group, HeldChange, HeldKey,
    HeldMessage, HoldReason, IdempotencyStorage, Inspect as _, Message, Outbox as _, OutboxPosition, Outgoing, Output,
    Record, RecordChange, RecordKey, RecordState, Scope, StoreError, Verdict,
};
use redb::backends::InMemoryBackend;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{MemoryStore, RedbStore, StoreOptions};

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

fn now<T>(answer: BoxFuture<'_, Result<T, StoreError>>) -> T {
    answer.now_or_never().expect("stores answer at once").unwrap()
}

fn store(memtable_bytes: usize) -> RedbStore {
    let options = StoreOptions { memtable_bytes, bucket_rows_max: 3, ..StoreOptions::default() };
    RedbStore::open_backends(InMemoryBackend::new(), InMemoryBackend::new(), options).unwrap()
}

fn key(number: u64) -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), &Message::new(format!("m-{number}"), "/s", "t"))
}

const KEYS: u64 = 8;

struct Twins {
    redb: RedbStore,
    memory: MemoryStore,
    version: u64,
    random: Random,
    context: String,
}

impl Twins {
    fn commit(&mut self, key: RecordKey) -> Commit {
        self.version += 1;
        let found = now(self.memory.record(&key));
        // Now and then one that expects what is not so.
        let epoch = found.map(|record| record.epoch + u64::from(self.random.below(10) == 0));
        let expected = if self.random.below(10) == 0 { Expected::Anything } else { Expected::of(epoch) };
        let epoch = epoch.unwrap_or(0) + 1;
        let state = match self.random.below(3) {
            0 => {
                RecordState::Completed { output: Output { content_type: None, data: self.version.to_string().into() } }
            }
            1 => RecordState::RetryDue { error: "e".into(), at_ms: 5 },
            _ => RecordState::DeadLettered { error: "e".into() },
        };
        let fingerprint = Fingerprint { version: 1, digest: [self.random.below(3) as u8; 16] };
        let dead_letter = || HeldMessage {
            message: Message::new("m", "/s", "t"),
            fingerprint,
            position: None,
            hold_reason: HoldReason::Dead,
            error: self.version.to_string(),
            attempts: 1,
            component: "c".into(),
            at_ms: 1,
        };
        let held_message = match state {
            RecordState::DeadLettered { .. } => Some(HeldChange::Put(Box::new(dead_letter()))),
            RecordState::Completed { .. } => Some(HeldChange::Remove(fingerprint)),
            _ => None,
        };
        let record = Record {
            state,
            epoch,
            attempts: 1,
            fingerprint,
            position: None,
            component: "c".into(),
            saga: None,
            received_ms: 0,
            changed_ms: 0,
            expires_ms: Some(60_000 * self.random.below(4)),
            history: Vec::new(),
        };
        let writes = (0..self.random.below(3)).map(|_| {
            let value = (self.random.below(3) > 0).then(|| self.version.to_string().into());
            (format!("k{}", self.random.below(6)), value)
        });
        let writes = writes.collect();
        let outgoing =
            (0..self.random.below(4)).map(|number| Outgoing { kind: format!("o{number}"), ..Outgoing::default() });
        let effects = Effects { writes, outgoing: outgoing.collect() };
        let record = match self.random.below(8) {
            0 => RecordChange::Keep,
            1 => RecordChange::Remove,
            _ => RecordChange::Put(record.into()),
        };
        Commit {
            expected,
            record,
            version: self.version,
            effects,
            held_message,
            at_ms: self.version,
            ..Commit::of(&key)
        }
    }

    fn group(&mut self) -> Group {
        let mut keys: Vec<u64> = (0..self.random.below(3)).map(|_| self.random.below(KEYS)).collect();
        keys.sort_unstable();
        keys.dedup();
        let commits = keys.into_iter().map(|number| self.commit(key(number))).collect();
        let pending = now(self.memory.pending(None, 1_000));
        let sent = if self.random.below(3) == 0 { self.random.below(pending.len() as u64 + 1) } else { 0 };
        let sent = pending.iter().take(sent as usize).map(|row| row.position).collect();
        let note = |number: u64| {
            let kind = if number.is_multiple_of(2) { FeedEventKind::Replayed } else { FeedEventKind::Stale };
            FeedEntry { digest: key(number).digest(), ..FeedEntry::of_many(kind, number, self.version) }
        };
        let notes =
            if self.random.below(4) == 0 { (0..self.random.below(KEYS)).map(note).collect() } else { Vec::new() };
        Group { commits, sent, feed_entries: notes }
    }

    fn write(&mut self) {
        let group = self.group();
        let verdicts: Vec<Verdict> = now(self.redb.commit(&group));
        assert_eq!(verdicts, now(self.memory.commit(&group)), "{}: verdicts on {group:?}", self.context);
    }

    /// Every read that waits for nothing.
    fn compare(&mut self) {
        let context = &self.context;
        for number in 0..KEYS {
            let key = key(number);
            assert_eq!(now(self.redb.record(&key)), now(self.memory.record(&key)), "{context}: record {number}");
            assert_eq!(now(self.redb.held_under(&key)), now(self.memory.held_under(&key)), "{context}: letters");
        }
        let after = (self.random.below(2) == 0).then(|| {
            let fingerprint = [self.random.below(3) as u8; 16];
            HeldKey { record: key(self.random.below(KEYS)), fingerprint }
        });
        let limit = self.random.below(5) as usize;
        let page = now(self.memory.held_messages(Some("p"), after.as_ref(), limit));
        assert_eq!(
            now(self.redb.held_messages(Some("p"), after.as_ref(), limit)),
            page,
            "{context}: letters after {after:?}"
        );
        let (redb, memory) = (self.redb.view(&Scope::of("p")), self.memory.view(&Scope::of("p")));
        for number in 0..6 {
            let name = format!("k{number}");
            assert_eq!(now(redb.get(&name)), now(memory.get(&name)), "{context}: state {name}");
        }
        let start = format!("k{}", self.random.below(6));
        let end = Some(format!("k{}", self.random.below(7))).filter(|_| self.random.below(2) == 0);
        for limit in [1, 2, 100] {
            let (found, wanted) =
                (redb.scan(&start, end.as_deref(), limit), memory.scan(&start, end.as_deref(), limit));
            assert_eq!(now(found), now(wanted), "{context}: scan {start} to {end:?}, at most {limit}");
        }
        let version = self.random.below(self.version + 1);
        let after = Some(OutboxPosition { version, index: 1 }).filter(|_| self.random.below(2) == 0);
        for limit in [1, 3, 1_000] {
            let (found, wanted) = (self.redb.pending(after, limit), self.memory.pending(after, limit));
            assert_eq!(now(found), now(wanted), "{context}: outbox after {after:?}, at most {limit}");
        }
        assert_eq!(now(self.redb.outbox_len()) as usize, now(self.memory.pending(None, 1_000)).len(), "{context}");
    }

    /// The feed from any place, all of it or of one record; that of one record brings all that is
    /// journalled to the tables.
    fn compare_events(&mut self, of: Option<u128>) {
        let after = Cursor { sequence: self.random.below(self.version + 3), index: self.random.below(4) as u32 };
        for (after, limit) in [(None, 1_000), (None, 3), (Some(after), 1), (Some(after), 1_000)] {
            let (found, wanted) = (self.redb.events(of, after, limit), self.memory.events(of, after, limit));
            assert_eq!(now(found), now(wanted), "{}: events after {after:?}, at most {limit}", self.context);
        }
    }

    fn compare_records(&self) {
        let (found, wanted) = (self.redb.records(None, None, 100), self.memory.records(None, None, 100));
        assert_eq!(now(found), now(wanted), "{}: all records", self.context);
    }
}

#[test]
fn reads_are_the_same_at_every_depth() {
    for seed in 0..60 {
        let memtable_bytes = [1, 600, 1 << 20][seed as usize % 3];
        let mut twins = Twins {
            redb: store(memtable_bytes),
            memory: MemoryStore::default(),
            version: 0,
            random: Random(seed * 2 + 1),
            context: format!("seed {seed}"),
        };
        for round in 0..6 {
            twins.context = format!("seed {seed}, round {round}");
            let core = twins.redb.core();
            // The applier waits for the catalogue: what is written now stays in the memtables.
            let held = core.catalogue.lock();
            for _ in 0..6 {
                twins.write();
                twins.compare();
                twins.compare_events(None);
            }
            drop(held);
            if twins.random.below(2) == 0 {
                twins.redb.flush().unwrap();
                twins.compare();
                twins.compare_records();
                twins.compare_events(None);
                let digest = key(twins.random.below(KEYS)).digest();
                twins.compare_events(Some(digest));
            }
        }
    }
}

/// Whoever waits for the tables waits for what was there when it began to wait: under load there
/// would be no end of it.
#[test]
fn what_comes_while_the_tables_are_waited_for_is_not_waited_for() {
    let store = store(1 << 20);
    let core = store.core();
    let write = |number: u64| {
        let effects = Effects { writes: [("k".to_owned(), Some("v".into()))].into(), outgoing: Vec::new() };
        let commit = Commit { effects, version: number, ..Commit::of(&key(number)) };
        now(store.commit(&Group { commits: vec![commit], ..Group::default() }));
    };
    // The applier waits for the catalogue.
    let held = core.catalogue.lock();
    write(1);
    let last = core.view.read().last_sequence();
    write(2);
    assert!(!core.view.write().push_down(last));
    write(3);
    assert!(!core.view.write().push_down(last));
    assert!(!core.view.read().active.is_empty(), "what came later stays where it is");
    drop(held);
    store.flush().unwrap();
    assert!(core.view.write().push_down(last) && core.view.read().active.is_empty());
    store.flush().unwrap();
}

/// Two that wait for the tables sleep until the applier has done something.
/// Proves G180.
#[test]
fn two_that_wait_do_not_wake_each_other() {
    let store = store(1 << 20);
    let core = store.core();
    let effects = Effects { writes: [("k".to_owned(), Some("v".into()))].into(), outgoing: Vec::new() };
    let commit = Commit { effects, version: 1, ..Commit::of(&key(1)) };
    // The applier waits for the catalogue.
    let held = core.catalogue.lock();
    now(store.commit(&Group { commits: vec![commit], ..Group::default() }));
    let last = core.view.read().last_sequence();
    let looks = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                core.wait_for(|view| {
                    looks.fetch_add(1, Ordering::Relaxed);
                    view.push_down(last).then_some(())
                })
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(held);
    });
    let looks = looks.into_inner();
    assert!(looks < 50, "they looked {looks} times in a tenth of a second");
}

crate::mutations! {
    mutation_waiters_that_wake_each_other_are_found: two_that_wait_do_not_wake_each_other is red with "waiters-wake-each-other";
}
