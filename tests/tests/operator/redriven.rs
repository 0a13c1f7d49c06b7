//! Dead letters that are redriven while the keeper is at work: each runs, however close the two
//! come to each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Context, Failure, HoldReason, IdempotencyStorage as _, Inspect as _, Invocation, MessageProcessor, Operator,
    Options, Outcome, Output, SystemClock, run_deferred,
};
use hapax_store::RedbStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message};
use hapax_tests::mutation::turns_red;
use hapax_tests::source::Seen;
use hapax_tests::stepped::{eventually, let_others_run};
use tokio::sync::watch;

/// Rejects everything until it is mended.
#[derive(Default)]
struct Mendable(AtomicBool);

impl MessageProcessor for Mendable {
    fn process<'a>(&'a self, _: &'a Invocation, _: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        let mended = self.0.load(Ordering::SeqCst);
        let result = if mended { Ok(Output::default()) } else { Err(Failure::Reject("broken".into())) };
        Box::pin(std::future::ready(result))
    }

    fn digest(&self) -> &str {
        "mendable"
    }
}

/// Proves G44.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_that_are_redriven_one_after_the_other_all_run() {
    const LETTERS: usize = 400;
    let store: Arc<RedbStore> = Arc::new(LossyDisk::new().open().unwrap());
    let processor = Arc::new(Mendable::default());
    let bench = Bench::new("p", store.clone(), processor.clone(), Options::default()).await;
    for number in 0..LETTERS {
        let outcome = bench.handle(message(&format!("m-{number}"), "{}")).await;
        assert!(matches!(outcome, Outcome::DeadLettered { .. }), "{outcome:?}");
    }
    processor.0.store(true, Ordering::SeqCst);
    let (stop, stopped) = watch::channel(false);
    let seen = Seen::default();
    let kept = run_deferred(bench.consumer.clone(), store.clone(), Arc::new(seen.clone()), stopped);
    let kept = tokio::spawn(kept);
    let clock = Arc::new(SystemClock);
    let operator = Operator::new(store.clone(), bench.committer.clone(), clock, [bench.consumer.clone()]);
    let by = Actor { actor: "somebody".into(), reason: "it is mended".into() };
    // Each wakes the keeper, which looks at the store while the next one is written.
    let held_messages = store.held_messages(Some("p"), None, LETTERS + 1).await.unwrap();
    for (key, _) in &held_messages {
        operator.redrive(key, &by).await.unwrap();
    }
    eventually("all have ended", || seen.outcomes() >= LETTERS).await;
    stop.send_replace(true);
    kept.await.unwrap().unwrap();
    assert_eq!((held_messages.len(), seen.ended("completed").len()), (LETTERS, LETTERS));
    assert_eq!(store.held_messages(Some("p"), None, 1).await.unwrap(), []);
    for (key, _) in &held_messages {
        assert!(store.is_processed(&key.record).await.unwrap(), "{key}");
    }
}

/// What the keeper sees in the store before the operator's deed is over must not be answered by
/// what the cache remembers.
#[tokio::test]
async fn a_letter_that_is_seen_while_it_is_redriven_runs() {
    let store: Arc<RedbStore> = Arc::new(LossyDisk::new().open().unwrap());
    let processor = Arc::new(Mendable::default());
    let bench = Bench::new("p", store.clone(), processor.clone(), Options::default()).await;
    for number in 0..100 {
        let outcome = bench.handle(message(&format!("m-{number}"), "{}")).await;
        assert!(matches!(outcome, Outcome::DeadLettered { .. }));
    }
    processor.0.store(true, Ordering::SeqCst);
    let clock = Arc::new(SystemClock);
    let operator = Operator::new(store.clone(), bench.committer.clone(), clock, [bench.consumer.clone()]);
    let by = Actor { actor: "somebody".into(), reason: "it is mended".into() };
    let held_messages = store.held_messages(Some("p"), None, 100).await.unwrap();
    // One that is written, and of which the operator has not heard yet. Where the committer was
    // faster, the next will do.
    let mut redriven = 0;
    let (key, redrive) = held_messages
        .iter()
        .find_map(|(key, _)| {
            redriven += 1;
            let mut redrive = Box::pin(operator.redrive(key, &by));
            (&mut redrive).now_or_never().is_none().then_some((key, redrive))
        })
        .unwrap();
    let is_written = || {
        let held_messages = store.held_under(&key.record).now_or_never().unwrap().unwrap();
        held_messages[0].hold_reason == HoldReason::Redriven
    };
    eventually("it is written", is_written).await;

    let (stop, stopped) = watch::channel(false);
    let seen = Seen::default();
    let kept = tokio::spawn(run_deferred(bench.consumer.clone(), store.clone(), Arc::new(seen.clone()), stopped));
    let_others_run().await;
    assert_eq!(seen.ended("duplicate"), [""; 0], "it is held off until the deed is done");
    redrive.await.unwrap();
    eventually("all have ended", || seen.outcomes() == redriven).await;
    assert_eq!(seen.ended("completed").len(), redriven);
    stop.send_replace(true);
    kept.await.unwrap().unwrap();
}

#[test]
fn mutation_a_cache_that_outlives_a_redrive_is_found() {
    turns_red(module_path!(), "a_letter_that_is_seen_while_it_is_redriven_runs", "cache-outlives-redrive");
}
