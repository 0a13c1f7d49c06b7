//! Operators beside a consumer at work, with native processors, on both stores: whatever is
//! redriven, discarded and delivered at the same time, each message completes at most once and none
//! is forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Committer, Context, Counters, Failure, Handling, HeldKey, IdempotentConsumer, Inspect, Invocation, Message,
    MessageProcessor, Observer, Operator, OperatorAction, OperatorError, Outcome, Output, Parts, Report, Scope, Store,
    SystemClock, run_deferred,
};
use hapax_store::{MemoryStore, RedbStore};
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{message, quick};
use hapax_tests::clock::SimulatedClock;
use hapax_tests::mutation::turns_red;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

/// Rejects everything until it is repaired. Then a message of type `held` waits for the gate, and
/// one of type `slow` fails at its first two attempts.
#[derive(Default)]
struct Broken {
    repaired: AtomicBool,
    runs: Mutex<BTreeMap<String, u32>>,
    /// Ids in the order in which they completed.
    order: Mutex<Vec<String>>,
    entered: Notify,
    gate: Notify,
}

impl MessageProcessor for Broken {
    fn process<'a>(&'a self, run: &'a Invocation, _: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            if !self.repaired.load(SeqCst) {
                return Err(Failure::Reject("broken".into()));
            }
            if run.message.kind == "held" {
                self.entered.notify_one();
                self.gate.notified().await;
            }
            if run.message.kind == "slow" && run.attempt < 3 {
                return Err(Failure::retry("not yet"));
            }
            tokio::task::yield_now().await;
            self.order.lock().push(run.message.id.clone());
            *self.runs.lock().entry(run.message.id.clone()).or_default() += 1;
            Ok(Output::default())
        })
    }

    fn digest(&self) -> &str {
        "broken"
    }
}

struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

/// A consumer with its keeper, and an operator beside it.
struct Host<S> {
    store: Arc<S>,
    processor: Arc<Broken>,
    consumer: IdempotentConsumer,
    operator: Arc<Operator>,
    stop: watch::Sender<bool>,
    keeper: tokio::task::JoinHandle<()>,
}

impl<S: Store> Host<S> {
    async fn new(store: Arc<S>) -> Self {
        let processor = Arc::new(Broken::default());
        let committer = Committer::start(store.clone()).await.unwrap();
        let consumer = IdempotentConsumer::new(Parts {
            scope: Scope::of("p"),
            processor: processor.clone(),
            storage: store.clone(),
            committer: committer.clone(),
            outbound: None,
            clock: Arc::new(SystemClock),
            metrics: Arc::new(Counters::default()),
            options: quick(),
        });
        // Nobody waits by this clock: what is in flight is refused at once.
        let clock = Arc::new(SimulatedClock::at(1_000_000));
        let operator = Operator::new(store.clone(), committer, clock, [consumer.clone()]);
        let (stop, stopped) = watch::channel(false);
        let keeping = run_deferred(consumer.clone(), store.clone(), Arc::new(Nobody), stopped);
        let keeper = tokio::spawn(async move { keeping.await.unwrap() });
        Self { store, processor, consumer, operator: Arc::new(operator), stop, keeper }
    }

    async fn held_messages(&self) -> Vec<HeldKey> {
        let held_messages = Inspect::held_messages(&*self.store, Some("p"), None, 10_000).await.unwrap();
        held_messages.into_iter().map(|(key, _)| key).collect()
    }

    async fn handle(&self, message: Message) -> Outcome {
        self.consumer.handle(message, Handling::default()).await.unwrap()
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.keeper.await.unwrap();
    }
}

fn me() -> Actor {
    Actor { actor: "me".into(), reason: String::new() }
}

fn redb() -> Arc<RedbStore> {
    Arc::new(LossyDisk::new().open().unwrap())
}

async fn redriven_by_many_and_delivered_again(store: Arc<impl Store>) {
    let host = Arc::new(Host::new(store).await);
    let ids: Vec<_> = (0..200).map(|number| format!("m-{number}")).collect();
    for id in &ids {
        assert!(matches!(host.handle(message(id, "{}")).await, Outcome::DeadLettered { .. }));
    }
    host.processor.repaired.store(true, SeqCst);
    let deeds: Vec<_> = host.held_messages().await.into_iter().map(OperatorAction::Redrive).collect();
    assert_eq!(deeds.len(), ids.len());
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let (operator, deeds) = (host.operator.clone(), deeds.clone());
        tasks.spawn(async move {
            for result in operator.perform_all(&deeds, &me()).await {
                match result {
                    // Somebody else was first.
                    Ok(()) | Err(OperatorError::Refused(_) | OperatorError::NotFound { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let (host, ids) = (host.clone(), ids.clone());
        tasks.spawn(async move {
            for id in ids {
                host.handle(message(&id, "{}")).await;
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    // What was refused because it was in flight is dead still, or ended meanwhile.
    while !host.held_messages().await.is_empty() {
        let left: Vec<_> = host.held_messages().await.into_iter().map(OperatorAction::Redrive).collect();
        host.operator.perform_all(&left, &me()).await;
    }
    let once: BTreeMap<_, _> = ids.into_iter().map(|id| (id, 1)).collect();
    assert_eq!(*host.processor.runs.lock(), once);
    Arc::into_inner(host).unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_completes_once_whoever_redrives_and_delivers_in_memory() {
    redriven_by_many_and_delivered_again(Arc::new(MemoryStore::default())).await;
}

/// Proves G44.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_completes_once_whoever_redrives_and_delivers_on_redb() {
    redriven_by_many_and_delivered_again(redb()).await;
}

#[tokio::test]
async fn what_is_in_flight_is_refused_and_nobody_waits_for_it() {
    let host = Host::new(redb()).await;
    let held = Message::new("m", "/test", "held");
    assert!(matches!(host.handle(held).await, Outcome::DeadLettered { .. }));
    host.processor.repaired.store(true, SeqCst);
    let key = host.held_messages().await.remove(0);
    host.operator.redrive(&key, &me()).await.unwrap();
    host.processor.entered.notified().await;
    for deed in [
        OperatorAction::Discard(key.clone()),
        OperatorAction::Redrive(key.clone()),
        OperatorAction::Evict(key.record.clone()),
    ] {
        let refused = host.operator.perform(&deed, &me()).await.unwrap_err();
        assert!(matches!(&refused, OperatorError::Refused(why) if why.contains("is being processed")), "{refused}");
    }
    assert_eq!(host.held_messages().await, std::slice::from_ref(&key), "it is kept while it runs");
    host.processor.gate.notify_one();
    while !host.held_messages().await.is_empty() {
        tokio::task::yield_now().await;
    }
    // It has completed, and may be forgotten now.
    while let Err(OperatorError::Refused(_)) = host.operator.evict(&key.record, &me()).await {
        tokio::task::yield_now().await;
    }
    assert_eq!(host.processor.runs.lock()["m"], 1);
    host.stop().await;
}

fn of_key(id: &str, kind: &str, key: &str) -> Message {
    let mut message = Message::new(id, "/test", kind);
    message.extensions.insert("partitionkey".into(), key.into());
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn order_of_a_key_holds_through_redrive_and_retries_and_stalls_no_other() {
    let host = Host::new(redb()).await;
    let kinds = ["slow", "test", "slow", "held", "test", "slow", "test"];
    for (number, kind) in kinds.iter().enumerate().rev() {
        for key in ["p", "q"] {
            // Only the one of the first key is held.
            let kind = if key == "q" && *kind == "held" { "slow" } else { kind };
            host.handle(of_key(&format!("{key}{number}"), kind, key)).await;
        }
    }
    host.processor.repaired.store(true, SeqCst);
    let deeds: Vec<_> = host.held_messages().await.into_iter().map(OperatorAction::Redrive).collect();
    assert_eq!(deeds.len(), 14);
    assert!(host.operator.perform_all(&deeds, &me()).await.iter().all(Result::is_ok));
    host.processor.entered.notified().await;
    while host.held_messages().await.len() > 4 {
        tokio::task::yield_now().await;
    }
    // All of the other key are done, and those that came before the one that is held.
    let done = |key: char| -> Vec<String> {
        host.processor.order.lock().iter().filter(|id| id.starts_with(key)).cloned().collect()
    };
    assert_eq!(done('q'), ["q6", "q5", "q4", "q3", "q2", "q1", "q0"]);
    assert_eq!(done('p'), ["p6", "p5", "p4"]);
    host.processor.gate.notify_one();
    while !host.held_messages().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(done('p'), ["p6", "p5", "p4", "p3", "p2", "p1", "p0"]);
    host.stop().await;
}

#[test]
fn mutation_redriven_out_of_order_turns_order_red() {
    turns_red(
        module_path!(),
        "order_of_a_key_holds_through_redrive_and_retries_and_stalls_no_other",
        "redrive-out-of-order",
    );
}

#[test]
fn mutation_redriven_without_its_record_loses_messages() {
    turns_red(module_path!(), "each_completes_once_whoever_redrives_and_delivers_on_redb", "redrive-without-record");
}
