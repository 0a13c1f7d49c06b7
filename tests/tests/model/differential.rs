//! One random history of deliveries, restarts, sweeps and jumps of the clock, on every way to
//! configure a store: endings and what is left are the same. A cache and a filter may spare a read,
//! and never change an answer.
//!
//! Proves G29.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Clock as _, Context, Failure, Handling, HeldMessage, Invocation, Message, MessageProcessor, NativeProcessor,
    Options, Outcome, Outgoing, Output, Record, RecordKey, Scope, Store,
};
use hapax_store::{MemoryStore, RedbStore, StoreOptions};
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message};
use hapax_tests::clock::SimulatedClock;
use hapax_tests::mutation::turns_red;
use hapax_tests::random::{Random, seed};

const START_MS: u64 = 1_700_000_000_000;
const RETENTION_MS: u64 = 400_000;
/// Few enough that most deliveries are duplicates.
const IDS: u64 = 24;

#[derive(Debug, Clone)]
enum Event {
    Deliver { id: u64, other_body: bool, retry_here: bool },
    Restart { killed: bool },
    Sweep,
    Jump { by_ms: u64 },
}

fn history(random: &mut Random, length: usize) -> Vec<Event> {
    let event = |random: &mut Random| match random.below(20) {
        0 => Event::Restart { killed: random.once_in(2) },
        1 => Event::Sweep,
        2 => Event::Jump { by_ms: random.below(RETENTION_MS / 2) },
        _ => Event::Deliver { id: random.below(IDS), other_body: random.once_in(8), retry_here: !random.once_in(4) },
    };
    (0..length).map(|_| event(random)).collect()
}

/// Does what the id says: most succeed, count and send; some fail for good, some only the first two
/// times, some always.
fn moody() -> Arc<dyn MessageProcessor> {
    fn process<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            let number: u64 = run.message.id.parse().unwrap();
            let key = format!("count/{}", number % 5);
            let before = context.get(&key).await.map_err(|error| Failure::retry(error.to_string()))?;
            let count = before.map_or(0, |text| std::str::from_utf8(&text).unwrap().parse::<u64>().unwrap()) + 1;
            let write = if count % 7 == 0 { context.delete(&key) } else { context.set(&key, count.to_string()) };
            write.map_err(|error| Failure::retry(error.to_string()))?;
            let outgoing = Outgoing { kind: "counted".into(), data: run.message.data.clone(), ..Outgoing::default() };
            context.send(outgoing).map_err(|error| Failure::retry(error.to_string()))?;
            match number % 8 {
                0 => Err(Failure::Reject("no".into())),
                1 if run.attempt < 3 => Err(Failure::retry("not yet")),
                2 => Err(Failure::retry("never")),
                _ => Ok(Output { content_type: None, data: format!("{key} is {count}").into() }),
            }
        })
    }
    Arc::new(NativeProcessor::new(process))
}

/// What a history leaves behind.
#[derive(Debug, PartialEq)]
struct Left {
    outcomes: Vec<Outcome>,
    /// Without what has expired, and without epochs: a store may keep a record longer, which a
    /// younger one then follows.
    records: Vec<(RecordKey, Record)>,
    held_messages: Vec<HeldMessage>,
    state: Vec<(String, String)>,
    sent: Vec<Message>,
}

async fn bench(store: &Arc<impl Store>, clock: &SimulatedClock, cache_bytes: u64) -> Bench {
    let options = Options {
        retention_ms: RETENTION_MS,
        backoff_base_ms: 1_000,
        backoff_max_ms: 9_000,
        attempts_max: 4,
        cache_bytes,
        ..Options::default()
    };
    Bench::timed("p", store.clone(), moody(), options, Arc::new(clock.clone())).await
}

/// Lives through a history; `restart` makes the store of the next life from the one before.
async fn live<S: Store>(
    history: &[Event],
    cache_bytes: u64,
    mut store: Arc<S>,
    restart: impl Fn(Arc<S>, bool) -> Arc<S>,
) -> Left {
    let clock = SimulatedClock::at(START_MS);
    let mut here = bench(&store, &clock, cache_bytes).await;
    let mut outcomes = Vec::new();
    for event in history {
        match event {
            Event::Deliver { id, other_body, retry_here } => {
                let body = if *other_body { "[]" } else { "{}" };
                let handling = Handling { retry_here: *retry_here, ..Handling::default() };
                outcomes.push(here.consumer.handle(message(&id.to_string(), body), handling).await.unwrap());
            }
            Event::Restart { killed } => {
                drop(here);
                store = restart(store, *killed);
                here = bench(&store, &clock, cache_bytes).await;
            }
            Event::Sweep => drop(store.sweep(clock.now_ms()).await.unwrap()),
            Event::Jump { by_ms } => clock.advance(*by_ms),
        }
    }
    left(&*store, clock.now_ms(), outcomes).await
}

async fn left(store: &impl Store, now_ms: u64, outcomes: Vec<Outcome>) -> Left {
    let records = store.records(None, None, 1_000).await.unwrap().into_iter();
    let records = records.filter(|(_, record)| !record.has_expired(now_ms));
    let mut held_messages = Vec::new();
    for id in 0..IDS {
        let key = RecordKey::by_message_id(&Scope::of("p"), &message(&id.to_string(), ""));
        held_messages.extend(store.held_under(&key).await.unwrap());
    }
    let state = store.view(&Scope::of("p")).scan("", None, 1_000).await.unwrap().into_iter();
    let state = state.map(|(key, _, value)| (key, String::from_utf8(value.to_vec()).unwrap()));
    let sent = store.pending(None, 10_000).await.unwrap().into_iter().map(|row| row.message);
    Left {
        outcomes,
        records: records.map(|(key, record)| (key, without_epochs(record))).collect(),
        held_messages,
        state: state.collect(),
        sent: sent.collect(),
    }
}

/// Epochs go on after a record that was swept in one store and not yet in the other.
fn without_epochs(mut record: Record) -> Record {
    record.history.iter_mut().for_each(|entry| entry.epoch = 0);
    Record { epoch: 0, ..record }
}

/// On redb, with everything small, so that there are several buckets, full ones and open ones.
async fn on_redb(history: &[Event], cache_bytes: u64, filters: bool, memtable_bytes: usize) -> Left {
    let options = StoreOptions { memtable_bytes, bucket_rows_max: 3, filters, ..StoreOptions::default() };
    let disk = LossyDisk::new();
    let open = || Arc::new(disk.open_with(options.clone()).unwrap());
    live(history, cache_bytes, open(), |store: Arc<RedbStore>, killed| {
        if killed {
            disk.kill(store)
        } else {
            drop(store)
        }
        open()
    })
    .await
}

async fn all_ways_are_one(seed: u64, length: usize) {
    let history = history(&mut Random::of(seed), length);
    let memory = Arc::new(MemoryStore::default());
    let wanted = live(&history, 0, memory, |store, _| store).await;
    assert!(
        wanted.outcomes.iter().any(|outcome| matches!(outcome, Outcome::Duplicate(_))),
        "no duplicate: it tests nothing"
    );
    for cache_bytes in [0, 1 << 20] {
        for filters in [false, true] {
            for memtable_bytes in [1, 1 << 20] {
                let left = on_redb(&history, cache_bytes, filters, memtable_bytes).await;
                let context = format!(
                    "HAPAX_SEED={seed}, cache of {cache_bytes} bytes, filters: {filters}, memtables of {memtable_bytes} bytes"
                );
                for (number, (found, wanted)) in left.outcomes.iter().zip(&wanted.outcomes).enumerate() {
                    assert_eq!(found, wanted, "{context}: the ending of delivery {number}");
                }
                assert_eq!(left, wanted, "{context}");
            }
        }
    }
}

/// Proves G115.
#[tokio::test]
async fn cache_and_filters_change_no_answer() {
    for seed in 1..=6 {
        all_ways_are_one(seed, 160).await;
    }
}

#[tokio::test]
async fn cache_and_filters_change_no_answer_at_random() {
    all_ways_are_one(seed(), 400).await;
}

#[test]
fn mutation_bloom_half_built_changes_answers() {
    turns_red(module_path!(), "cache_and_filters_change_no_answer", "bloom-half-built");
}
