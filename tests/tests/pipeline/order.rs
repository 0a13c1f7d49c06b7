//! Order within a key under attack: a message keeps its turn until nothing can send it back to the
//! start; and runs that are overtaken again and again come through in the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hapax_core::{
    Clock as _, Commit, Handling, Message, MessageProcessor, NativeProcessor, Options, Outcome, Output, RecordKey,
    SagaEvent, SagaId, SagaLog, SagaLogEntry, Scope, SystemClock, Verdict,
};
use hapax_store::MemoryStore;
use hapax_tests::bench::{Bench, message, quick};
use tokio::sync::{Notify, Semaphore};

fn of_key(id: &str, key: &str) -> Message {
    let mut message = message(id, "{}");
    message.extensions.insert("partitionkey".into(), key.into());
    message
}

/// The first message joins a saga, and is held in its first run until the test lets it go. In its
/// second run it waits a while for the second message, which must not come.
struct Overtaken {
    runs: AtomicUsize,
    first_runs: Notify,
    let_go: Semaphore,
    second_ran: Notify,
    is_overtaken: AtomicBool,
}

fn overtaken(shared: Arc<Overtaken>) -> Arc<dyn MessageProcessor> {
    Arc::new(NativeProcessor::new(move |run, context| {
        let shared = shared.clone();
        Box::pin(async move {
            if &*run.message.id == "m-2" {
                shared.second_ran.notify_one();
                return Ok(Output::default());
            }
            if shared.runs.fetch_add(1, Ordering::SeqCst) == 0 {
                context.join_saga("trip").await?;
                shared.first_runs.notify_one();
                shared.let_go.acquire().await.expect("it is never closed").forget();
            } else if tokio::time::timeout(Duration::from_millis(200), shared.second_ran.notified()).await.is_ok() {
                shared.is_overtaken.store(true, Ordering::SeqCst);
            }
            Ok(Output::default())
        })
    }))
}

/// A member's saga changes while the message runs: the store refuses its commit after it has been
/// sequenced, and it runs again, before its successor.
/// Proves G146.
#[tokio::test]
async fn a_message_that_the_store_sends_back_keeps_its_turn() {
    let shared = Arc::new(Overtaken {
        runs: AtomicUsize::new(0),
        first_runs: Notify::new(),
        let_go: Semaphore::new(0),
        second_ran: Notify::new(),
        is_overtaken: AtomicBool::new(false),
    });
    let store = Arc::new(MemoryStore::default());
    let bench = Bench::new("p", store.clone(), overtaken(shared.clone()), Options::default()).await;
    let accepted = ["m-1", "m-2"].map(|id| bench.consumer.accept(of_key(id, "k"), Handling::default()));
    let running = accepted.map(|accepted| {
        let consumer = bench.consumer.clone();
        tokio::spawn(async move { consumer.process(accepted).await })
    });
    shared.first_runs.notified().await;
    let read = SagaLog::new(&*store, &Scope::of("p")).read(&SagaId::named("trip").unwrap()).await.unwrap();
    let completed = SagaLogEntry { event: SagaEvent::Completed, at_ms: 1 };
    let (change, _) = read.append(&[completed], u64::MAX).unwrap();
    let other = RecordKey::new(Scope::of("q"), "/s".into(), "other".into());
    let commit = Commit { shared: Some(Box::new(change)), ..Commit::of(&other) };
    assert_eq!(bench.committer.submit(commit).durable().await.unwrap(), Verdict::Committed);
    shared.let_go.add_permits(1);
    let [one, two] = running;
    assert!(matches!(two.await.unwrap().unwrap(), Outcome::Completed { .. }));
    one.await.unwrap().unwrap();
    assert_eq!(shared.runs.load(Ordering::SeqCst), 2, "the store refused its first commit");
    assert!(!shared.is_overtaken.load(Ordering::SeqCst), "its successor ran between its runs");
}

/// Of two bodies under one key in one batch, the first runs, whatever the threads do.
/// Proves G147.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_bodies_under_one_key_in_a_batch_the_first_runs() {
    let processor = Arc::new(NativeProcessor::new(|_, _| Box::pin(async { Ok(Output::default()) })));
    let bench = Bench::new("p", Arc::new(MemoryStore::default()), processor, quick()).await;
    let pair = |number: usize| [1, 2].map(|body| message(&format!("m-{number}"), &format!("{{\"body\":{body}}}")));
    let outcomes = bench.consumer.handle_all((0..200).flat_map(pair).collect(), Handling::default()).await;
    let names: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().unwrap().name()).collect();
    assert_eq!(names, ["completed", "mismatch"].repeat(200));
}

/// Lines that share a record are one line, in the order of the batch.
#[tokio::test]
async fn lines_that_share_a_record_are_one() {
    let processor = Arc::new(NativeProcessor::new(|_, _| Box::pin(async { Ok(Output::default()) })));
    let bench = Bench::new("p", Arc::new(MemoryStore::default()), processor, quick()).await;
    let with = |id: &str, key: &str, body: &str| Message { data: body.to_owned().into(), ..of_key(id, key) };
    let batch = vec![with("x", "a", "1"), with("y", "b", "1"), with("x", "b", "2"), with("y", "a", "2")];
    let outcomes = bench.consumer.handle_all(batch, Handling::default()).await;
    let names: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().unwrap().name()).collect();
    assert_eq!(names, ["completed", "completed", "mismatch", "mismatch"]);
}

/// One message needs longer than the others leave its key alone: after some conflicts, it reserves
/// the order.
/// Proves G148.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_overtaken_again_and_again_comes_through() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let processor = Arc::new(NativeProcessor::new(move |run, context| {
        let runs = counted.clone();
        Box::pin(async move {
            context.get("hot").await?;
            if &*run.message.id == "slow" {
                runs.fetch_add(1, Ordering::SeqCst);
                SystemClock.sleep(20).await;
            }
            context.set("hot", run.message.id.clone())?;
            Ok(Output::default())
        })
    }));
    let bench = Bench::new("p", Arc::new(MemoryStore::default()), processor, Options::default()).await;
    let consumer = bench.consumer.clone();
    let slow = tokio::spawn(async move { consumer.handle(message("slow", "{}"), Handling::default()).await });
    let mut quick_ones = 0;
    while !slow.is_finished() {
        assert!(quick_ones < 20_000, "never");
        bench.handle(message(&format!("quick-{quick_ones}"), "{}")).await;
        quick_ones += 1;
    }
    assert!(matches!(slow.await.unwrap(), Ok(Outcome::Completed { .. })));
    assert!((2..=10).contains(&runs.load(Ordering::SeqCst)), "{runs:?} runs");
}

hapax_tests::mutations! {
    mutation_a_turn_passed_before_the_verdict_is_found: a_message_that_the_store_sends_back_keeps_its_turn is red with "turn-passed-before-the-verdict";
    mutation_a_batch_that_races_for_a_key_is_found: of_two_bodies_under_one_key_in_a_batch_the_first_runs is red with "batch-races-for-a-key";
    mutation_conflicts_without_end_are_found: a_run_that_is_overtaken_again_and_again_comes_through is red with "conflicts-without-end";
}
