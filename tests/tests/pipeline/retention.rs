//! What becomes of a message after its retention, in simulated time: its record counts as absent
//! from that moment on, in the store, in the cache, swept or not.
//!
//! Proves G29.

use std::sync::Arc;

use hapax_core::{Inspect as _, Message, Options, Outcome, RecordKey, Scope, Store, StoredOutcome};
use hapax_store::MemoryStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message};
use hapax_tests::clock::SimulatedClock;
use hapax_tests::processors::{Counter, obedient};

const RETENTION_MS: u64 = 600_000;
const START_MS: u64 = 1_700_000_000_000;

fn options(cache_bytes: u64) -> Options {
    Options { retention_ms: RETENTION_MS, cache_bytes, backoff_base_ms: 1, backoff_max_ms: 2, ..Options::default() }
}

/// With and without a cache, swept at every moment or never.
async fn a_record_counts_until_its_retention_ends<S: Store>(make: impl Fn() -> Arc<S>) {
    for (cache_bytes, swept) in [(0, false), (0, true), (1 << 20, false), (1 << 20, true)] {
        let (store, counter, clock) = (make(), Counter::new(), SimulatedClock::at(START_MS));
        let bench =
            Bench::timed("p", store.clone(), counter.clone(), options(cache_bytes), Arc::new(clock.clone())).await;
        let sweep = async || {
            if swept {
                // What is looked at by people is in the tables, where a sweep finds it.
                store.records(None, None, 10).await.unwrap();
                store.sweep(hapax_core::Clock::now_ms(&clock)).await.unwrap();
            }
        };
        let context = format!("cache of {cache_bytes} bytes, swept: {swept}");
        for life in 1..=3u64 {
            let Outcome::Completed { output } = bench.handle(message("m", "{}")).await else { panic!("{context}") };
            assert_eq!(output.data, life.to_string(), "{context}");
            clock.advance(RETENTION_MS - 1);
            sweep().await;
            assert_eq!(
                bench.handle(message("m", "{}")).await,
                Outcome::Duplicate(StoredOutcome::Completed(output)),
                "{context}"
            );
            assert_eq!(bench.handle(message("m", "[]")).await, Outcome::Mismatch, "{context}");
            clock.advance(1);
            sweep().await;
        }
        assert!(
            matches!(bench.handle(message("m", "[]")).await, Outcome::Completed { .. }),
            "another body is another life"
        );
        let record =
            store.record(&RecordKey::by_message_id(&Scope::of("p"), &message("m", ""))).await.unwrap().unwrap();
        assert_eq!((record.attempts, record.received_ms), (1, START_MS + 3 * RETENTION_MS), "{context}");
        assert_eq!(counter.runs(), 4, "{context}");
    }
}

#[tokio::test]
async fn a_record_counts_until_its_retention_ends_in_memory() {
    a_record_counts_until_its_retention_ends(|| Arc::new(MemoryStore::default())).await;
}

#[tokio::test]
async fn a_record_counts_until_its_retention_ends_on_redb() {
    a_record_counts_until_its_retention_ends(|| Arc::new(LossyDisk::new().open().unwrap())).await;
}

#[tokio::test]
async fn a_message_that_failed_for_good_may_run_again_after_its_retention_and_its_letter_stays() {
    let (store, clock) = (Arc::new(LossyDisk::new().open().unwrap()), SimulatedClock::at(START_MS));
    let bench = Bench::timed("p", store.clone(), obedient(), options(1 << 20), Arc::new(clock.clone())).await;
    let bad = Message { kind: "reject".into(), ..message("m", "{}") };
    let key = RecordKey::by_message_id(&Scope::of("p"), &bad);
    for _ in 0..2 {
        assert!(matches!(bench.handle(bad.clone()).await, Outcome::DeadLettered { .. }));
        assert!(matches!(bench.handle(bad.clone()).await, Outcome::Duplicate(StoredOutcome::Failed(_))));
        clock.advance(RETENTION_MS);
        assert_eq!(store.held_under(&key).await.unwrap().len(), 1);
    }
}
