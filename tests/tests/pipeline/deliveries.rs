//! The pipeline with native processors, on both stores: effects once, in order, and every ending as
//! it should be.

use std::sync::Arc;

use hapax_core::{
    Handling, IdempotencyStorage, Inspect as _, Message, MismatchPolicy, Ordering, Outcome, RecordKey, Scope, Store,
    StoredOutcome,
};
use hapax_store::{MemoryStore, RedbStore};
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::processors::{Counter, ledger, obedient, recorder};

fn redb() -> Arc<RedbStore> {
    Arc::new(LossyDisk::new().open().unwrap())
}

async fn text(store: &impl IdempotencyStorage, processor: &str, key: &str) -> String {
    let (_, value) = store.view(&Scope::of(processor)).get(key).await.unwrap();
    String::from_utf8(value.unwrap_or_default().to_vec()).unwrap()
}

/// Proves G23, G90, G99.
#[tokio::test]
async fn duplicate_messages_are_processed_once() {
    let (store, counter) = (redb(), Counter::new());
    let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
    let Outcome::Completed { output: first } = bench.handle(message("m-1", r#"{"a":1,"b":2}"#)).await else { panic!() };
    for _ in 0..10 {
        // The same message, serialised anew by its producer.
        let outcome = bench.handle(message("m-1", r#"{ "b": 2, "a": 1 }"#)).await;
        assert_eq!(
            outcome,
            Outcome::Duplicate(StoredOutcome::Completed(first.clone())),
            "the stored result, byte for byte"
        );
    }
    assert_eq!(counter.runs(), 1);
    assert_eq!(text(&*store, "p", "count").await, "1");
}

/// Proves G24, G31.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn distributed_idempotency() {
    let (store, counter) = (redb(), Counter::new());
    let bench = Arc::new(Bench::new("p", store.clone(), counter.clone(), quick()).await);
    // 16 consumers, each delivers the same 50 messages.
    let consumers: Vec<_> = (0..16)
        .map(|_| {
            let bench = bench.clone();
            tokio::spawn(async move {
                let mut completed = 0;
                for number in 0..50 {
                    match bench.handle(message(&format!("m-{number}"), "{}")).await {
                        Outcome::Completed { .. } => completed += 1,
                        Outcome::Duplicate(StoredOutcome::Completed(_)) => {}
                        other => panic!("{other:?}"),
                    }
                }
                completed
            })
        })
        .collect();
    let mut completed = 0;
    for consumer in consumers {
        completed += consumer.await.unwrap();
    }
    assert_eq!(completed, 50, "each message completed in exactly one of its deliveries");
    assert_eq!(text(&*store, "p", "count").await, "50");
}

async fn ledger_stays_balanced(store: Arc<impl Store>) {
    let bench = Arc::new(Bench::new("ledger", store.clone(), ledger(), quick()).await);
    let tasks: Vec<_> = (0..400)
        .map(|number| {
            let bench = bench.clone();
            // Every message twice, over few accounts: nearly every run meets another.
            let id = format!("t-{}", number % 200);
            let (from, to) = (number % 200 % 3, (number % 200 + 1) % 5);
            let data = format!(r#"{{"from":"{from}","to":"{to}","amount":{}}}"#, number % 200 + 1);
            tokio::spawn(async move { bench.handle(message(&id, &data)).await })
        })
        .collect();
    let (mut completed, mut duplicates) = (0, 0);
    for task in tasks {
        match task.await.unwrap() {
            Outcome::Completed { .. } => completed += 1,
            Outcome::Duplicate(_) => duplicates += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((completed, duplicates), (200, 200));
    let mut expected = [0i64; 5];
    for number in 0..200i64 {
        expected[(number % 3) as usize] -= number + 1;
        expected[((number + 1) % 5) as usize] += number + 1;
    }
    for (account, expected) in expected.iter().enumerate() {
        assert_eq!(text(&*store, "ledger", &format!("account/{account}")).await, expected.to_string());
    }
    let ids: std::collections::HashSet<_> =
        store.pending(None, 1_000).await.unwrap().into_iter().map(|row| row.message.id).collect();
    assert_eq!(ids.len(), 200, "one outgoing message each, each under its own id");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_transfers_lose_nothing_in_memory() {
    ledger_stays_balanced(Arc::new(MemoryStore::default())).await;
}

/// Proves G34.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_transfers_lose_nothing_on_redb() {
    ledger_stays_balanced(redb()).await;
}

/// Proves G36, G103.
#[tokio::test]
async fn the_same_id_at_two_processors_runs_both() {
    let (store, counter) = (redb(), Counter::new());
    let one = Bench::new("one", store.clone(), counter.clone(), quick()).await;
    let two = Bench::sharing("two", store.clone(), one.committer.clone(), counter.clone(), quick());
    for bench in [&one, &two] {
        assert!(matches!(bench.handle(message("m", "{}")).await, Outcome::Completed { .. }));
    }
    let elsewhere = Message { source: "/elsewhere".into(), ..message("m", "{}") };
    assert!(matches!(one.handle(elsewhere).await, Outcome::Completed { .. }), "ids are unique in their source only");
    assert_eq!(counter.runs(), 3);
}

/// Proves G25, G98, G100.
#[tokio::test]
async fn another_body_under_the_same_key_never_runs() {
    let (store, counter) = (redb(), Counter::new());
    let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
    bench.handle(message("m", r#"{"amount":1}"#)).await;
    let key = RecordKey::by_message_id(&Scope::of("p"), &message("m", ""));
    let before = store.record(&key).await.unwrap();
    for _ in 0..2 {
        assert_eq!(bench.handle(message("m", r#"{"amount":2}"#)).await, Outcome::Mismatch);
    }
    assert_eq!(counter.runs(), 1);
    assert_eq!(store.record(&key).await.unwrap(), before, "the record is byte for byte as it was");
    let held_messages = store.held_under(&key).await.unwrap();
    assert_eq!(held_messages.len(), 1);
    assert_eq!(held_messages[0].message.data, r#"{"amount":2}"#);

    let options = hapax_core::Options { mismatch: MismatchPolicy::Reject, ..quick() };
    let strict = Bench::sharing("strict", store.clone(), bench.committer.clone(), counter, options);
    strict.handle(message("m", "1")).await;
    assert_eq!(strict.handle(message("m", "2")).await, Outcome::Mismatch);
    let key = RecordKey::by_message_id(&Scope::of("strict"), &message("m", ""));
    assert!(store.held_under(&key).await.unwrap().is_empty());
}

/// Proves G26, G102.
#[tokio::test]
async fn failures_end_as_they_should_and_leave_no_effects() {
    let store = redb();
    let bench = Bench::new("p", store.clone(), obedient(), quick()).await;
    let of = |kind: &str| Message { kind: kind.into(), ..message(kind, "{}") };
    for (kind, error) in
        [("reject", "rejected: no"), ("invalid", "invalid: what?"), ("retry", "failed 5 times, the last time: not now")]
    {
        assert_eq!(bench.handle(of(kind)).await, Outcome::DeadLettered { error: error.into() });
        assert_eq!(bench.handle(of(kind)).await, Outcome::Duplicate(StoredOutcome::Failed(error.into())));
        let key = RecordKey::by_message_id(&Scope::of("p"), &of(kind));
        let held_messages = store.held_under(&key).await.unwrap();
        assert_eq!((held_messages.len(), &*held_messages[0].error), (1, error));
        assert_eq!(held_messages[0].message, of(kind), "the dead letter keeps the message");
    }
    assert_eq!(text(&*store, "p", "runs").await, "", "a failed run writes nothing");
    let Outcome::Completed { output } = bench.handle(of("retry-until-3")).await else { panic!() };
    assert_eq!(output.data, "attempt 3");
    assert_eq!(text(&*store, "p", "runs").await, "1");
}

/// Proves G27.
#[tokio::test]
async fn attempts_survive_a_restart() {
    let store = redb();
    let put_off = Handling { retry_here: false, ..Handling::default() };
    let of = Message { kind: "retry".into(), ..message("m", "{}") };
    for attempt in 1..=5 {
        // Another consumer each time: nothing is remembered but what the store holds.
        let bench = Bench::new("p", store.clone(), obedient(), quick()).await;
        let outcome = loop {
            match bench.consumer.handle(of.clone(), put_off).await.unwrap() {
                // Not due yet.
                Outcome::Retry { after_ms, .. } if after_ms > 0 && attempts(&store).await < attempt => {
                    tokio::time::sleep(std::time::Duration::from_millis(after_ms)).await;
                }
                outcome => break outcome,
            }
        };
        assert_eq!(attempts(&store).await, attempt);
        assert_eq!(matches!(outcome, Outcome::DeadLettered { .. }), attempt == 5, "attempt {attempt}: {outcome:?}");
    }
}

async fn attempts(store: &RedbStore) -> u32 {
    let key = RecordKey::by_message_id(&Scope::of("p"), &message("m", ""));
    store.record(&key).await.unwrap().map_or(0, |record| record.attempts)
}

/// Proves G30, G105.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn order_of_a_key_holds_through_retries() {
    let store = redb();
    let bench = Bench::new("p", store.clone(), recorder(), quick()).await;
    let mut tasks = Vec::new();
    let mut expected = [String::new(), String::new(), String::new()];
    for number in 0..90 {
        let lane = number % 3;
        let mut message = message(&format!("{number}"), "{}");
        message.extensions.insert("partitionkey".into(), lane.to_string());
        if number % 7 == 0 {
            message.kind = "retry-until-3".into();
        }
        expected[lane].push_str(&format!("{number},"));
        // Accepted in order, run in any.
        let accepted = bench.consumer.accept(message, Handling::default());
        let consumer = bench.consumer.clone();
        tasks.push(tokio::spawn(async move { consumer.process(accepted).await.unwrap() }));
    }
    tasks.reverse();
    for task in tasks {
        assert!(matches!(task.await.unwrap(), Outcome::Completed { .. }));
    }
    for (lane, expected) in expected.iter().enumerate() {
        assert_eq!(text(&*store, "p", &format!("order/{lane}")).await, *expected);
    }
}

#[tokio::test]
async fn a_duplicate_in_flight_waits_or_is_told() {
    let store = redb();
    let options = hapax_core::Options { ordering: Ordering::None, ..quick() };
    let counter = Counter::new();
    let bench = Bench::new("p", store, counter.clone(), options).await;
    let consumer = &bench.consumer;
    let mut first = Box::pin(consumer.handle(message("m", "{}"), Handling::default()));
    assert!(futures_util::poll!(&mut first).is_pending());
    let told = consumer.handle(message("m", "{}"), Handling { wait_in_flight: false, ..Handling::default() }).await;
    assert!(matches!(told.unwrap(), Outcome::InFlight { .. }));
    let mut waits = Box::pin(consumer.handle(message("m", "{}"), Handling::default()));
    assert!(futures_util::poll!(&mut waits).is_pending());
    assert!(matches!(first.await.unwrap(), Outcome::Completed { .. }));
    assert!(matches!(waits.await.unwrap(), Outcome::Duplicate(StoredOutcome::Completed(_))));
    assert_eq!(counter.runs(), 1);
}

#[tokio::test]
async fn a_run_that_is_dropped_did_not_happen() {
    let (store, counter) = (redb(), Counter::new());
    let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
    let mut abandoned = Box::pin(bench.consumer.handle(message("m", "{}"), Handling::default()));
    assert!(futures_util::poll!(&mut abandoned).is_pending());
    drop(abandoned);
    assert!(matches!(bench.handle(message("m", "{}")).await, Outcome::Completed { .. }));
    assert_eq!(counter.runs(), 2);
    assert_eq!(text(&*store, "p", "count").await, "1");
}

hapax_tests::mutations! {
    mutation_record_expires_at_once_is_found:
        duplicate_messages_are_processed_once is red with "record-expires-at-once";
    mutation_replay_cut_short_is_found: duplicate_messages_are_processed_once is red with "replay-cut-short";
    mutation_fingerprint_unchecked_is_found:
        another_body_under_the_same_key_never_runs is red with "fingerprint-unchecked";
    mutation_record_goes_with_what_is_kept_is_found:
        another_body_under_the_same_key_never_runs is red with "record-goes-with-what-is-kept";
    mutation_key_without_processor_is_found:
        the_same_id_at_two_processors_runs_both is red with "key-without-processor";
    mutation_failed_run_keeps_its_effects_is_found:
        failures_end_as_they_should_and_leave_no_effects is red with "failed-run-keeps-its-effects";
    mutation_turn_passed_at_a_retry_is_found: order_of_a_key_holds_through_retries is red with "turn-passed-at-a-retry";
}
