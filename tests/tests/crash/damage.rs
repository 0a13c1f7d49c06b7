//! Damage: single bits of the store's files are turned, and everything is read. Each answer is the
//! right one, or a refusal; once one is refused, all are.

use std::io;
use std::sync::Arc;

use futures_util::FutureExt as _;
use hapax_core::{
    Failure, HeldMessage, IdempotencyStorage as _, Inspect as _, MessageProcessor, NativeProcessor, Outbox as _,
    OutboxRow, Outcome, Outgoing, Output, Record, RecordKey, Scope, StoreError,
};
use hapax_store::{RedbStore, StoreOptions};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::random::Random;
use parking_lot::Mutex;

/// A file in memory.
#[derive(Debug, Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl redb::StorageBackend for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock();
        let range = bytes.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.lock().resize(length as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let range = bytes.get_mut(offset as usize..offset as usize + data.len());
        range.ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        Ok(())
    }
}

/// Both files of a store that is closed.
#[derive(Clone)]
struct Files {
    database: Vec<u8>,
    journal: Vec<u8>,
}

/// Everything that is read of a store.
#[derive(Debug, PartialEq)]
struct Contents {
    records: Vec<Option<Record>>,
    state: Vec<Option<bytes::Bytes>>,
    held: Vec<Vec<HeldMessage>>,
    outbox: Vec<OutboxRow>,
}

const MESSAGES: usize = 120;

/// Notes the message in the state and sends one, or refuses it.
fn noting() -> Arc<dyn MessageProcessor> {
    Arc::new(NativeProcessor::new(|run, context| {
        Box::pin(async move {
            if run.message.kind == "reject" {
                return Err(Failure::Reject("no".into()));
            }
            context.set(&format!("seen/{}", run.message.id), run.message.id.clone())?;
            context.send(Outgoing { kind: "seen".into(), ..Outgoing::default() })?;
            Ok(Output { content_type: None, data: run.message.id.clone().into() })
        })
    }))
}

fn options() -> StoreOptions {
    StoreOptions { journal_bytes: 1 << 16, page_cache_bytes: 1 << 16, ..StoreOptions::default() }
}

impl Files {
    async fn filled() -> Self {
        let (database, journal) = (Memory::default(), Memory::default());
        let store = Arc::new(RedbStore::open_backends(database.clone(), journal.clone(), options()).unwrap());
        let bench = Bench::new("p", store.clone(), noting(), quick()).await;
        for number in 0..MESSAGES {
            let kind = if number % 10 == 9 { "reject" } else { "test" };
            let message = hapax_core::Message { kind: kind.into(), ..message(&format!("m-{number}"), "{}") };
            assert!(!matches!(bench.handle(message).await, Outcome::Retry { .. }));
        }
        drop(bench);
        drop(store);
        Self { database: database.0.lock().clone(), journal: journal.0.lock().clone() }
    }

    fn opened(&self) -> Result<RedbStore, String> {
        let [database, journal] =
            [&self.database, &self.journal].map(|bytes| Memory(Arc::new(Mutex::new(bytes.clone()))));
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            RedbStore::open_backends(database, journal, options())
        }));
        opened.map_err(|_| "a panic".to_owned())?.map_err(|error| error.to_string())
    }
}

fn now<T>(read: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    read.now_or_never().expect("this store answers at once")
}

impl Contents {
    fn of(store: &RedbStore) -> Result<Self, StoreError> {
        let view = store.view(&Scope::of("p"));
        let mut contents = Self { records: Vec::new(), state: Vec::new(), held: Vec::new(), outbox: Vec::new() };
        for number in 0..MESSAGES {
            let key = RecordKey::by_message_id(&Scope::of("p"), &message(&format!("m-{number}"), ""));
            contents.records.push(now(store.record(&key))?);
            contents.state.push(now(view.get(&format!("seen/m-{number}")))?.1);
            if number % 10 == 9 {
                contents.held.push(now(store.held_under(&key))?);
            }
        }
        contents.outbox = now(store.pending(None, 1_000))?;
        Ok(contents)
    }
}

/// Proves G162.
#[tokio::test]
async fn a_turned_bit_anywhere_in_the_database_gives_the_right_answer_or_none() {
    let files = Files::filled().await;
    let expected = Contents::of(&files.opened().unwrap()).unwrap();
    assert!(expected.records.iter().all(Option::is_some) && expected.held.iter().all(|held| held.len() == 1));
    let flips = std::env::var("HAPAX_CASES").map_or(400, |cases| cases.parse().unwrap());
    let mut random = Random::of(7);
    let (mut right, mut refused) = (0, 0);
    for _ in 0..flips {
        let (at, bit) = (random.below(files.database.len() as u64) as usize, random.below(8));
        let mut damaged = files.clone();
        damaged.database[at] ^= 1 << bit;
        let Ok(store) = damaged.opened() else {
            refused += 1;
            continue;
        };
        match Contents::of(&store) {
            Ok(contents) => {
                right += 1;
                assert!(contents == expected, "bit {bit} of byte {at} gives a wrong answer");
            }
            Err(error) => {
                refused += 1;
                assert!(matches!(error, StoreError::Damaged(_)), "{error:?}");
                let key = RecordKey::by_message_id(&Scope::of("p"), &message("m-0", ""));
                assert!(now(store.record(&key)).is_err(), "closed by the first damage, byte {at}");
                assert!(store.failure().is_some());
            }
        }
    }
    assert!(right > 0 && refused > flips / 10, "{right} right, {refused} refused");
}

/// Nobody reads the damaged page: the scrub finds it.
/// Proves G163.
#[tokio::test]
async fn damage_that_nobody_reads_is_found() {
    let files = Files::filled().await;
    let pages = files.database.len() / 4_096;
    // The last pages of the file are in use by no table here.
    let mut damaged = files.clone();
    let page =
        (2..pages).find(|page| files.database[page * 4_096..][..4_096].iter().any(|byte| *byte != 0) && *page > 3);
    damaged.database[page.unwrap() * 4_096 + 9] ^= 1;
    let Ok(store) = damaged.opened() else { return };
    for _ in 0..60_000 {
        if store.failure().is_some() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    panic!("it was never found");
}

hapax_tests::mutations! {
    mutation_damage_that_is_served_is_found: a_turned_bit_anywhere_in_the_database_gives_the_right_answer_or_none is red with "damage-is-served";
}
