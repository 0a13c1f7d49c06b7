//! Retries under a clock that only the test turns: a message that waits holds no worker and stalls
//! nobody but those behind it, and it waits as long as its processor asked, not for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, Context, Failure, Handling, IdempotencyStorage as _, Inspect as _, Invocation, Message, MessageProcessor,
    NativeProcessor, Operator, Options, Outcome, Output, RecordKey, Scope, run_deferred,
};
use hapax_store::MemoryStore;
use hapax_tests::bench::{Bench, message};
use hapax_tests::mutation::turns_red;
use hapax_tests::source::{ListSource, Seen};
use hapax_tests::stepped::{SteppedClock, eventually, let_others_run};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// What a message of type `later` asks for with its first attempt.
const LATER_MS: u64 = 1_000;

/// Fails messages of type `later` once, those of type `for-ever` always and with the longest delay
/// there is, and those of type `fails` always. Of those that completed, it notes the order in which
/// each key's ran.
fn unhurried() -> Arc<dyn MessageProcessor> {
    fn run<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        let later = |after_ms| Err(Failure::Retry { reason: "later".into(), after_ms: Some(after_ms) });
        let result = match (&*run.message.kind, run.attempt) {
            ("later", 1) => later(LATER_MS),
            ("for-ever", _) => later(u64::MAX),
            ("fails", _) => Err(Failure::retry("not now")),
            _ => Ok(Output::default()),
        };
        Box::pin(async move {
            if let (Ok(_), Some(key)) = (&result, run.message.extensions.get("partitionkey")) {
                let key = format!("order/{key}");
                let before = context.get(&key).await.unwrap().unwrap_or_default();
                let after = [&before[..], run.message.id.as_bytes(), b","].concat();
                context.set(&key, after).unwrap();
            }
            result
        })
    }
    Arc::new(NativeProcessor::new(run))
}

/// Longer than an end takes on a busy machine.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

struct Desk {
    clock: SteppedClock,
    store: Arc<MemoryStore>,
    bench: Bench,
    seen: Seen,
    stop: watch::Sender<bool>,
}

impl Desk {
    async fn new(options: Options) -> Self {
        let (clock, store) = (SteppedClock::at(1_000_000), Arc::new(MemoryStore::default()));
        let bench = Bench::timed("p", store.clone(), unhurried(), options, Arc::new(clock.clone())).await;
        Self { clock, store, bench, seen: Seen::default(), stop: watch::Sender::new(false) }
    }

    /// Runs a source over `messages`.
    fn run(&self, messages: Vec<Message>, taken_max: usize) -> JoinHandle<()> {
        let (consumer, observer) = (self.bench.consumer.clone(), Arc::new(self.seen.clone()));
        let (mut source, stop) = (ListSource::new(messages, &self.seen), self.stop.subscribe());
        tokio::spawn(async move {
            hapax_core::run_source(&consumer, &mut source, observer, taken_max, stop).await.unwrap();
        })
    }

    async fn attempts(&self, id: &str) -> u32 {
        let key = RecordKey::by_message_id(&Scope::of("p"), &message(id, ""));
        self.store.record(&key).await.unwrap().map_or(0, |record| record.attempts)
    }
}

fn of(kind: &str, id: impl Into<String>, key: Option<&str>) -> Message {
    let mut message = Message { kind: kind.into(), ..message(&id.into(), "{}") };
    message.extensions.extend(key.map(|key| ("partitionkey".to_owned(), key.to_owned())));
    message
}

/// Proves G50.
#[tokio::test]
async fn more_messages_wait_for_their_retry_than_may_run_and_fresh_ones_go_through() {
    const WAITING: usize = 50;
    const FRESH: usize = 20;
    let desk = Desk::new(Options { runs_max: 2, ..Options::default() }).await;
    let first = desk.run((0..3).map(|number| of("later", format!("{number}"), None)).collect(), 1_000);
    let under_way = || desk.bench.consumer.status().runs_under_way;
    // Or two of them wait in all the places there are, and the third for one.
    eventually("they wait", || desk.clock.asleep() == 3 || (desk.clock.asleep(), under_way()) == (2, 2)).await;
    assert_eq!(under_way(), 0, "who waits for a retry holds no place");
    desk.clock.advance(LATER_MS);
    first.await.unwrap();

    let waiting = (0..WAITING).map(|number| of("later", format!("w-{number}"), None));
    let fresh = (0..FRESH).map(|number| of("fresh", format!("f-{number}"), None));
    let running = desk.run(waiting.chain(fresh).collect(), 1_000);
    eventually("all fresh ones have ended, and the others wait", || {
        desk.seen.ended("completed").len() == 3 + FRESH && desk.clock.asleep() == WAITING
    })
    .await;
    desk.clock.advance(LATER_MS - 1);
    let_others_run().await;
    assert_eq!((desk.seen.outcomes(), desk.clock.asleep()), (3 + FRESH, WAITING), "not before its time");
    desk.clock.advance(1);
    running.await.unwrap();
    assert_eq!(desk.seen.ended("completed").len(), 3 + WAITING + FRESH);
    assert_eq!((desk.attempts("w-7").await, desk.attempts("f-7").await), (2, 1));
}

#[test]
fn mutation_a_retry_that_holds_its_place_is_found() {
    turns_red(
        module_path!(),
        "more_messages_wait_for_their_retry_than_may_run_and_fresh_ones_go_through",
        "retry-holds-place",
    );
}

/// Proves G50, G108.
#[tokio::test]
async fn one_hot_or_blocked_key_never_stalls_another() {
    const BEHIND: usize = 400;
    let desk = Desk::new(Options { runs_max: 2, ..Options::default() }).await;
    // The first of the key waits for its retry, and very many behind it for their turn; the others
    // come in between.
    let mut messages = vec![of("later", "b-000", Some("blocked"))];
    let mut others = Vec::new();
    for number in 1..=BEHIND {
        messages.push(of("fresh", format!("b-{number:03}"), Some("blocked")));
        if number % 10 == 0 {
            others.push(format!("o-{number:03}"));
            messages.push(of("fresh", format!("o-{number:03}"), Some(&format!("key-{}", number % 4))));
        }
    }
    let running = desk.run(messages, BEHIND + 2);
    let first_waits = || desk.clock.asleep() == 1;
    eventually("all others have ended", || desk.seen.outcomes() >= others.len() && first_waits()).await;
    let mut ended = desk.seen.ended("completed");
    ended.sort();
    assert_eq!(ended, others, "and of the blocked key nobody");
    desk.clock.advance(LATER_MS);
    running.await.unwrap();
    let (_, order) = desk.store.view(&Scope::of("p")).get("order/blocked").await.unwrap();
    let expected: String = (0..=BEHIND).map(|number| format!("b-{number:03},")).collect();
    assert_eq!(order.unwrap(), expected, "in the order received");
}

#[test]
fn mutation_a_turn_that_is_waited_for_in_a_place_is_found() {
    turns_red(module_path!(), "one_hot_or_blocked_key_never_stalls_another", "turn-waited-for-in-a-place");
}

/// Where every place is taken, the source is left alone: what it handed out would only queue, and
/// had to be kept in memory.
/// Proves G109.
#[tokio::test]
async fn a_source_is_not_drained_while_every_place_is_taken() {
    const MESSAGES: usize = 2_000;
    /// Before those that were pulled first have had their turn, a few more are pulled.
    const AHEAD_MAX: usize = 200;
    let gate = Arc::new(Semaphore::new(0));
    let behind = gate.clone();
    let waits = NativeProcessor::new(move |_, _| {
        let gate = behind.clone();
        Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Ok(Output::default())
        })
    });
    let (store, seen) = (Arc::new(MemoryStore::default()), Seen::default());
    let options = Options { runs_max: 2, ..Options::default() };
    let bench = Bench::new("p", store, Arc::new(waits), options).await;
    let messages = (0..MESSAGES).map(|number| of("fresh", format!("{number}"), None));
    let (mut source, observer) = (ListSource::new(messages, &seen), Arc::new(seen.clone()));
    let (consumer, (_stop, stop)) = (bench.consumer.clone(), watch::channel(false));
    let running = tokio::spawn(async move {
        hapax_core::run_source(&consumer, &mut source, observer, 10 * MESSAGES, stop).await.unwrap();
    });
    eventually("the places are taken", || bench.consumer.status().runs_under_way == 2).await;
    let_others_run().await;
    assert!(seen.pulled() <= AHEAD_MAX, "{} were pulled", seen.pulled());
    gate.add_permits(MESSAGES);
    running.await.unwrap();
    assert_eq!(seen.ended("completed").len(), MESSAGES);
}

#[test]
fn mutation_a_source_that_is_drained_ahead_is_found() {
    turns_red(module_path!(), "a_source_is_not_drained_while_every_place_is_taken", "source-drained-ahead");
}

/// All that may be taken is taken and waits for its retry, which is far away: the source has no room.
/// Proves G137.
#[tokio::test]
async fn told_to_stop_while_as_many_wait_as_may_be_taken_it_ends_at_once() {
    const TAKEN_MAX: usize = 20;
    let desk = Desk::new(Options { runs_max: 2, ..Options::default() }).await;
    let messages = (0..10 * TAKEN_MAX).map(|number| of("later", format!("{number}"), None));
    let running = desk.run(messages.collect(), TAKEN_MAX);
    eventually("all that were taken wait", || desk.clock.asleep() == TAKEN_MAX).await;
    desk.stop.send_replace(true);
    tokio::time::timeout(ENDS_WITHIN, running).await.expect("it ends").unwrap();
    assert_eq!(desk.seen.settled("nack").len(), TAKEN_MAX, "the source has them back");
    assert_eq!(desk.seen.pulled(), TAKEN_MAX);
}

/// Some run, and others wait for a slot or for their turn behind them: these do not run any more.
/// Proves G137.
#[tokio::test]
async fn told_to_stop_it_waits_for_what_runs_and_for_nothing_else() {
    const WAITING: usize = 50;
    let gate = Arc::new(Semaphore::new(0));
    let (behind, runs) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = runs.clone();
    let waits = NativeProcessor::new(move |_, _| {
        counted.fetch_add(1, SeqCst);
        let gate = behind.clone();
        Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Ok(Output::default())
        })
    });
    let (store, seen, stop) = (Arc::new(MemoryStore::default()), Seen::default(), watch::Sender::new(false));
    let bench = Bench::new("p", store, Arc::new(waits), Options { runs_max: 2, ..Options::default() }).await;
    let of_one_key = (0..WAITING).map(|number| of("fresh", format!("k-{number}"), Some("key")));
    let messages = of_one_key.chain((0..WAITING).map(|number| of("fresh", format!("f-{number}"), None)));
    let (mut source, observer) = (ListSource::new(messages, &seen), Arc::new(seen.clone()));
    let (consumer, stopped) = (bench.consumer.clone(), stop.subscribe());
    let running = tokio::spawn(async move {
        hapax_core::run_source(&consumer, &mut source, observer, 10 * WAITING, stopped).await.unwrap();
    });
    eventually("two run", || runs.load(SeqCst) == 2).await;
    let_others_run().await;
    stop.send_replace(true);
    let_others_run().await;
    gate.add_permits(2 * WAITING);
    tokio::time::timeout(ENDS_WITHIN, running).await.expect("it ends").unwrap();
    assert_eq!((runs.load(SeqCst), seen.ended("completed").len()), (2, 2));
    assert_eq!(seen.settled("nack").len() + 2, seen.pulled(), "the source has the others back");
}

hapax_tests::mutations! {
    mutation_a_stop_that_waits_for_room_is_found:
        told_to_stop_while_as_many_wait_as_may_be_taken_it_ends_at_once is red with "stop-waits-for-room";
    mutation_a_stop_that_runs_what_waits_is_found:
        told_to_stop_it_waits_for_what_runs_and_for_nothing_else is red with "stop-runs-what-waits";
}

/// The limit of `one_hot_or_blocked_key_never_stalls_another`: what was taken is in memory, and so
/// it is bounded. The source waits then, no longer than the first message of the key does; nothing
/// is lost.
#[tokio::test]
async fn once_as_many_wait_as_may_be_taken_the_source_waits_too() {
    const TAKEN_MAX: usize = 10;
    let desk = Desk::new(Options::default()).await;
    let mut messages = vec![of("later", "b-00", Some("blocked"))];
    messages.extend((1..20).map(|number| of("fresh", format!("b-{number:02}"), Some("blocked"))));
    messages.push(of("fresh", "other", Some("other")));
    let running = desk.run(messages, TAKEN_MAX);
    eventually("the first waits", || desk.clock.asleep() == 1 && desk.seen.pulled() == TAKEN_MAX).await;
    let_others_run().await;
    assert_eq!(desk.seen.pulled(), TAKEN_MAX);
    assert_eq!(desk.seen.outcomes(), 0);
    desk.clock.advance(LATER_MS);
    running.await.unwrap();
    assert_eq!((desk.seen.pulled(), desk.seen.ended("completed").len()), (21, 21));
}

#[tokio::test]
async fn a_wait_ends_early_when_the_host_stops() {
    let desk = Desk::new(Options::default()).await;
    let running = desk.run((0..9).map(|number| of("later", format!("{number}"), None)).collect(), 100);
    eventually("all wait", || desk.clock.asleep() == 9).await;
    desk.stop.send_replace(true);
    running.await.unwrap();
    assert_eq!((desk.seen.ended("retry").len(), desk.seen.settled("nack").len()), (9, 9));
    // What was tried is remembered.
    assert_eq!(desk.attempts("3").await, 1);
}

#[tokio::test]
async fn a_processor_says_when_and_cannot_say_never() {
    let desk = Desk::new(Options { retry_after_max_ms: 60_000, ..Options::default() }).await;
    let put_off = Handling { retry_here: false, ..Handling::default() };
    for (kind, expected_ms) in [("later", LATER_MS), ("for-ever", 60_000)] {
        let outcome = desk.bench.consumer.handle(of(kind, kind, None), put_off).await.unwrap();
        assert_eq!(outcome, Outcome::Retry { error: "later".into(), after_ms: expected_ms });
        // Delivered again too early, it does not run.
        desk.clock.advance(expected_ms - 1);
        let outcome = desk.bench.consumer.handle(of(kind, kind, None), put_off).await.unwrap();
        assert_eq!(outcome, Outcome::Retry { error: "later".into(), after_ms: 1 });
        assert_eq!(desk.attempts(kind).await, 1);
    }
}

#[tokio::test]
async fn attempts_have_a_limit_and_the_delays_between_them_grow() {
    let options = Options { attempts_max: 8, backoff_base_ms: 100, backoff_max_ms: 2_000, ..Options::default() };
    let desk = Desk::new(options.clone()).await;
    let put_off = Handling { retry_here: false, ..Handling::default() };
    let key = RecordKey::by_message_id(&Scope::of("p"), &of("fails", "m", None));
    for attempt in 1..8 {
        let outcome = desk.bench.consumer.handle(of("fails", "m", None), put_off).await.unwrap();
        let Outcome::Retry { after_ms, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(after_ms, options.backoff_ms(&key, attempt));
        desk.clock.advance(after_ms);
    }
    let outcome = desk.bench.consumer.handle(of("fails", "m", None), put_off).await.unwrap();
    assert_eq!(outcome, Outcome::DeadLettered { error: "failed 8 times, the last time: not now".into() });
}

/// Many redriven messages wait, for their retries or, with `key`, for the turn of their ordering
/// keys: one that could run does.
async fn one_that_may_run_does(key: Option<fn(usize) -> String>) {
    let desk = Desk::new(Options { attempts_max: 2, backoff_base_ms: 0, ..Options::default() }).await;
    let put_off = Handling { retry_here: false, ..Handling::default() };
    let key = |number| key.map(|key| key(number));
    // `last` sorts behind all that wait.
    let messages: Vec<_> =
        (0..100).map(|number| of("fails", format!("a-{number:03}"), key(number).as_deref())).collect();
    for message in messages.iter().chain([&of("fails", "z-last", None)]) {
        desk.bench.consumer.handle(message.clone(), put_off).await.unwrap();
        let outcome = desk.bench.consumer.handle(message.clone(), put_off).await.unwrap();
        assert!(matches!(outcome, Outcome::DeadLettered { .. }), "{outcome:?}");
    }
    let patient = Options { attempts_max: 2, backoff_base_ms: 1 << 40, backoff_max_ms: 1 << 40, ..Options::default() };
    let heals: Arc<dyn MessageProcessor> = Arc::new(NativeProcessor::new(|run, _| {
        let last = &*run.message.id == "z-last";
        Box::pin(async move { if last { Ok(Output::default()) } else { Err(Failure::retry("not now")) } })
    }));
    let (committer, clock) = (desk.bench.committer.clone(), Arc::new(desk.clock.clone()));
    let consumer = Bench::joined("p", desk.store.clone(), committer.clone(), heals, patient, clock.clone()).consumer;
    // Each of the keys has a message that waits for a retry, and keeps the turn.
    for (number, key) in (0..100).filter_map(|number| Some((number, key(number)?))) {
        let (consumer, first) = (consumer.clone(), of("fails", format!("b-{number:03}"), Some(&key)));
        tokio::spawn(async move { consumer.handle(first, Handling::default()).await });
    }
    let_others_run().await;
    let operator = Operator::new(desk.store.clone(), committer, clock, [consumer.clone()]);
    let by = Actor { actor: "test".into(), reason: String::new() };
    for (key, _) in desk.store.held_messages(Some("p"), None, 200).await.unwrap() {
        operator.redrive(&key, &by).await.unwrap();
    }
    let keeping =
        tokio::spawn(run_deferred(consumer, desk.store.clone(), Arc::new(desk.seen.clone()), desk.stop.subscribe()));
    let key = RecordKey::by_message_id(&Scope::of("p"), &message("z-last", ""));
    for _ in 0..5_000 {
        if desk.store.record(&key).await.unwrap().unwrap().state.is_terminal() {
            break;
        }
        desk.clock.advance(100);
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(desk.store.record(&key).await.unwrap().unwrap().state.name(), "completed");
    keeping.abort();
}

/// Proves G156.
#[tokio::test]
async fn redriven_messages_that_wait_leave_room_for_one_that_may_run() {
    one_that_may_run_does(None).await;
}

#[tokio::test]
async fn redriven_messages_that_wait_for_their_turns_leave_room_for_one_that_may_run() {
    one_that_may_run_does(Some(|number| format!("k-{number}"))).await;
}

hapax_tests::mutations! {
    mutation_a_held_message_that_waits_for_its_turn_is_found: redriven_messages_that_wait_for_their_turns_leave_room_for_one_that_may_run is red with "held-message-waits-for-its-turn";
    mutation_a_held_message_that_waits_in_its_place_is_found: redriven_messages_that_wait_leave_room_for_one_that_may_run is red with "held-message-waits-in-its-place";
}
