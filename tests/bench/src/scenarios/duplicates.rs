//! Duplicates, from the cache and from the store, beside a bare read loop: one thread, no disk
//! write.

use std::time::{Duration, Instant};

use hapax_core::{Handling, IdempotentConsumer, Message, Outcome};

use crate::bare::redb::Bare;
use crate::measure::{Spread, settle, thread_cpu};
use crate::pipeline::Host;
use crate::report::Section;
use crate::work::{self, Ids, Item};
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "duplicates",
    about: "duplicates from the cache and from the store, beside a bare redb read loop; one thread",
    by_default: true,
    run,
};

/// Bytes of cache for the part that is answered from it: enough for every record that is asked for.
const CACHE_BYTES: u64 = 256 << 20;

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let records = bench.pick(2_000, 1_000_000, 1_000_000);
    let reads = bench.pick(1_000, 100_000, 100_000);
    let host = Host::filled(bench.folder(), Ids::Random, records);
    let bare = Bare::filled(bench.folder(), Ids::Random, records);
    settle();
    let picked = work::picked(reads, records);
    let keys: Vec<_> = picked.clone().map(|number| Item::new(Ids::Random, number).record_key()).collect();
    let (cached, uncached) = (host.consumer(CACHE_BYTES), host.consumer(0));
    // The first time through fills the cache.
    answer(&cached, &messages(picked.clone()));
    let mut rounds = [const { Vec::new() }; 5];
    let us = |time: Duration| time.as_secs_f64() * 1e6 / reads as f64;
    for _ in 0..bench.rounds(5) {
        let messages = messages(picked.clone());
        let (cpu, _) = answer(&cached, &messages);
        rounds[0].push(us(cpu));
        let (cpu, wall) = answer(&uncached, &messages);
        rounds[1].push(us(wall));
        rounds[2].push(us(cpu));
        rounds[3].push(us(bare.read_each(&keys)));
        rounds[4].push(us(bare.read_in_one(&keys)));
    }
    section.text(format!("{reads} duplicates a round, of {records} records, in random order."));
    section.table(&["a duplicate", "microseconds"]);
    let names = [
        "answered from the cache, CPU",
        "answered from the store, no cache",
        "answered from the store, no cache, CPU",
        "bare redb, a transaction a read",
        "bare redb, all reads in one transaction",
    ];
    for (name, round) in names.iter().zip(&rounds) {
        section.row(vec![(*name).into(), Spread::of(round.iter().copied()).to_string()]);
    }
    judge(section, &rounds);
    Ok(())
}

/// Made before anything is timed.
fn messages(numbers: impl Iterator<Item = u64>) -> Vec<Message> {
    numbers.map(|number| Item::new(Ids::Random, number).message()).collect()
}

/// Brings duplicates to their ends on this thread; CPU and wall time.
fn answer(consumer: &IdempotentConsumer, messages: &[Message]) -> (Duration, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Cloned ahead: the clone is the load generator's, and dropping it the pipeline's.
    let messages = messages.to_vec();
    runtime.block_on(async {
        let (cpu, wall) = (thread_cpu(), Instant::now());
        for message in messages {
            let outcome = consumer.handle(message, Handling::default()).await.unwrap();
            assert!(matches!(outcome, Outcome::Duplicate(_)), "{outcome:?}");
        }
        (thread_cpu() - cpu, wall.elapsed())
    })
}

fn judge(section: &mut Section, rounds: &[Vec<f64>; 5]) {
    let cached = Spread::of(rounds[0].iter().copied());
    section.judge("duplicate-cache", format!("{cached} us"), cached.median <= 2.0);
    // Rates are the inverse of times.
    let ratio = Spread::ratio(&rounds[3], &rounds[1]);
    let blind = Spread::ratio(&rounds[4], &rounds[1]);
    section.judge("duplicate-store", format!("{ratio} x"), ratio.median >= 0.8);
    section.text(format!(
        "The target is judged by the loop that opens a transaction a read, since an answer must see every commit before it. To \
         the loop that reads all in one transaction the ratio is {blind}."
    ));
}
