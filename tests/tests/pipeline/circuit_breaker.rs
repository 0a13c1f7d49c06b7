//! The circuit breaker in the pipeline and before the outbox, under a clock that only the test
//! turns: what is open calls nothing, pulls nothing, and costs no message an attempt.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, BreakerPolicy, BreakerState, CircuitBreaker, CircuitBreakerParts, Clock as _, Commit, Committer, Context,
    Counters, Effects, Failure, Handling, HoldReason, IdempotencyStorage as _, Inspect as _, Invocation, Message,
    MessageProcessor, Operator, Options, Outbox as _, OutboxRelay, Outcome, Outgoing, Output, Published, Publisher,
    RecordKey, Scope, StoredOutcome, TransportError, Unavailable,
};
use hapax_store::{MemoryStore, RedbStore};
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message};
use hapax_tests::mutation::turns_red;
use hapax_tests::source::{ListSource, Seen};
use hapax_tests::stepped::{SteppedClock, eventually, let_others_run};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

const OPEN_MS: u64 = 1_000;

fn policy() -> BreakerPolicy {
    BreakerPolicy {
        window_calls: 10,
        calls_min: 4,
        failure_rate_percent: 50,
        slow_rate_percent: 50,
        slow_call_ms: 100,
        open_ms: OPEN_MS,
        probes: 2,
    }
}

fn options() -> Options {
    Options { attempts_max: 1, breaker: Some(policy()), ..Options::default() }
}

/// Something outside that is down or not; each run takes `takes_ms` of the clock.
struct Patient {
    clock: SteppedClock,
    down: AtomicBool,
    takes_ms: AtomicU64,
    runs: AtomicU64,
    /// The second and later attempts that it saw.
    later_attempts: AtomicU64,
    /// A run needs a permit to go on.
    gate: Semaphore,
    done: Mutex<Vec<String>>,
}

impl Patient {
    fn new(clock: &SteppedClock) -> Arc<Self> {
        Arc::new(Self {
            clock: clock.clone(),
            down: AtomicBool::new(false),
            takes_ms: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            later_attempts: AtomicU64::new(0),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            done: Mutex::default(),
        })
    }

    fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    fn runs(&self) -> u64 {
        self.runs.load(Ordering::SeqCst)
    }
}

impl MessageProcessor for Patient {
    fn process<'a>(&'a self, run: &'a Invocation, _: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.later_attempts.fetch_add(u64::from(run.attempt > 1), Ordering::SeqCst);
        self.clock.advance(self.takes_ms.load(Ordering::SeqCst));
        let result = match &*run.message.kind {
            "reject" => Err(Failure::Reject("no".into())),
            "invalid" => Err(Failure::Invalid("what?".into())),
            _ if self.down.load(Ordering::SeqCst) => Err(Failure::retry("it is down")),
            _ => {
                self.done.lock().push(run.message.id.clone());
                Ok(Output::default())
            }
        };
        Box::pin(async move {
            let _permit = self.gate.acquire().await.unwrap();
            result
        })
    }

    fn digest(&self) -> &str {
        "patient"
    }
}

struct Ward {
    clock: SteppedClock,
    patient: Arc<Patient>,
    store: Arc<RedbStore>,
    bench: Bench,
}

impl Ward {
    async fn new(options: Options) -> Self {
        let clock = SteppedClock::at(1_000_000);
        let store = Arc::new(LossyDisk::new().open().unwrap());
        let patient = Patient::new(&clock);
        let bench = Bench::timed("p", store.clone(), patient.clone(), options, Arc::new(clock.clone())).await;
        Self { clock, patient, store, bench }
    }

    fn state(&self) -> BreakerState {
        self.bench.consumer.status().breaker.unwrap().state
    }

    /// Handles a message as HTTP does: the client sends again.
    async fn put_off(&self, id: &str) -> Outcome {
        let handling = Handling { retry_here: false, ..Handling::default() };
        self.bench.consumer.handle(message(id, "{}"), handling).await.unwrap()
    }

    /// Four messages that fail for good, by which it opens.
    async fn open(&self) {
        self.patient.set_down(true);
        for number in 0..4 {
            assert!(matches!(self.put_off(&format!("f-{number}")).await, Outcome::DeadLettered { .. }));
        }
        assert!(matches!(self.state(), BreakerState::Open { .. }));
    }
}

fn numbered(count: usize, keys: usize) -> impl Iterator<Item = Message> {
    (0..count).map(move |number| {
        let mut message = message(&format!("{number:03}"), "{}");
        message.extensions.insert("partitionkey".into(), (number % keys).to_string());
        message
    })
}

/// Proves G51, G112.
#[tokio::test]
async fn open_it_pulls_and_runs_nothing_and_no_attempt_is_lost() {
    const MESSAGES: usize = 40;
    const TAKEN_MAX: usize = 8;
    // As few places as can be: whoever waits must hold none.
    let ward = Ward::new(Options { runs_max: 1, ..options() }).await;
    ward.patient.set_down(true);
    let seen = Seen::default();
    let mut source = ListSource::new(numbered(MESSAGES, 20), &seen);
    let (consumer, observer) = (ward.bench.consumer.clone(), Arc::new(seen.clone()));
    let (_stop, stopped) = watch::channel(false);
    let running =
        tokio::spawn(async move { hapax_core::run_source(&consumer, &mut source, observer, TAKEN_MAX, stopped).await });

    // Everybody sleeps who was taken: nothing can happen until the clock is turned. Until the
    // fourth had failed, others were pulled in the place of the three before it; from then on
    // nobody.
    const PULLED_MAX: usize = TAKEN_MAX + 3;
    let all_wait = |ended: usize| seen.outcomes() == ended && ward.clock.asleep() >= seen.pulled() - ended;
    eventually("it is open, and all wait", || all_wait(4) || seen.pulled() > PULLED_MAX).await;
    let pulled = seen.pulled();
    assert!(pulled <= PULLED_MAX, "{pulled} were pulled");
    assert!(matches!(ward.state(), BreakerState::Open { .. }));
    ward.clock.advance(OPEN_MS - 1);
    let_others_run().await;
    assert_eq!((ward.patient.runs(), seen.pulled()), (4, pulled));

    // One probe, which fails: that message has failed, and nobody else.
    ward.clock.advance(1);
    eventually("a probe failed, and all wait again", || all_wait(5)).await;
    assert_eq!((ward.patient.runs(), seen.ended("dead-lettered").len()), (5, 5));
    assert_eq!(seen.pulled(), pulled);
    let status = ward.bench.consumer.status();
    assert_eq!((status.breaker.unwrap().opened, status.runs_under_way), (2, 0));

    ward.patient.set_down(false);
    ward.clock.advance(OPEN_MS);
    running.await.unwrap().unwrap();
    assert_eq!(ward.state(), BreakerState::Closed);
    assert_eq!((seen.ended("completed").len(), seen.ended("dead-lettered").len()), (MESSAGES - 5, 5));
    assert_eq!(ward.patient.later_attempts.load(Ordering::SeqCst), 0, "waiting is no attempt");
    for message in numbered(MESSAGES, 20) {
        let key = RecordKey::by_message_id(&Scope::of("p"), &message);
        assert_eq!(ward.store.record(&key).await.unwrap().unwrap().attempts, 1, "{}", message.id);
    }
    // Also those who waited have gone in the order of their key.
    let done = ward.patient.done.lock().clone();
    for key in 0..20 {
        let of_key: Vec<_> = done.iter().filter(|id| id.parse::<usize>().unwrap() % 20 == key).collect();
        assert!(of_key.is_sorted(), "{of_key:?}");
    }
}

#[test]
fn mutation_waiting_costs_an_attempt_is_found() {
    turns_red(module_path!(), "open_it_pulls_and_runs_nothing_and_no_attempt_is_lost", "breaker-open-counts-attempts");
}

#[test]
fn mutation_a_paused_source_is_pulled_is_found() {
    turns_red(module_path!(), "open_it_pulls_and_runs_nothing_and_no_attempt_is_lost", "breaker-open-pulls");
}

#[tokio::test]
async fn who_cannot_wait_is_put_off_and_nothing_is_written() {
    let ward = Ward::new(options()).await;
    ward.open().await;
    assert_eq!(ward.put_off("m").await, Outcome::Paused { after_ms: OPEN_MS });
    ward.clock.advance(OPEN_MS - 1);
    assert_eq!(ward.put_off("m").await, Outcome::Paused { after_ms: 1 });
    let key = RecordKey::by_message_id(&Scope::of("p"), &message("m", ""));
    assert_eq!(ward.store.record(&key).await.unwrap(), None);
    // What has ended is answered as ever.
    let again = ward.put_off("f-0").await;
    assert!(matches!(again, Outcome::Duplicate(StoredOutcome::Failed(_))), "{again:?}");
    assert_eq!(ward.patient.runs(), 4);
    let counted = ward.bench.counters.read();
    assert!(counted.outcomes.contains(&("paused", 2)) && counted.breaker_opened == 1, "{counted:?}");

    ward.patient.set_down(false);
    ward.clock.advance(1);
    assert!(matches!(ward.put_off("m").await, Outcome::Completed { .. }));
    assert_eq!(ward.state(), BreakerState::HalfOpen);
    assert!(matches!(ward.put_off("n").await, Outcome::Completed { .. }));
    assert_eq!(ward.state(), BreakerState::Closed);
}

#[tokio::test]
async fn half_open_no_more_run_at_once_than_may_probe() {
    let ward = Ward::new(options()).await;
    ward.open().await;
    ward.patient.set_down(false);
    ward.patient.gate.forget_permits(Semaphore::MAX_PERMITS);
    ward.clock.advance(OPEN_MS);
    let consumer = &ward.bench.consumer;
    let mut probes = ["a", "b"].map(|id| Box::pin(consumer.handle(message(id, "{}"), Handling::default())));
    let mut waits = Box::pin(consumer.handle(message("c", "{}"), Handling::default()));
    for probe in &mut probes {
        assert!(futures_util::poll!(probe).is_pending());
    }
    assert!(futures_util::poll!(&mut waits).is_pending());
    assert_eq!(ward.patient.runs(), 4 + 2, "two may probe, and both run");
    assert_eq!(ward.put_off("d").await, Outcome::Paused { after_ms: 1_000 });

    // One of them goes away: its place is another's.
    let [one, gone] = probes;
    drop(gone);
    assert!(futures_util::poll!(&mut waits).is_pending());
    assert_eq!(ward.patient.runs(), 4 + 3);
    ward.patient.gate.add_permits(2);
    assert!(matches!(one.await.unwrap(), Outcome::Completed { .. }));
    assert!(matches!(waits.await.unwrap(), Outcome::Completed { .. }));
    assert_eq!(ward.state(), BreakerState::Closed);
}

#[test]
fn mutation_half_open_lets_all_through_is_found() {
    turns_red(module_path!(), "half_open_no_more_run_at_once_than_may_probe", "half-open-lets-all-through");
}

#[tokio::test]
async fn what_a_processor_refuses_is_an_answer() {
    let ward = Ward::new(options()).await;
    for number in 0..50 {
        let kind = if number % 2 == 0 { "reject" } else { "invalid" };
        let refused = Message { kind: kind.into(), ..message(&format!("{number}"), "{}") };
        let handling = Handling { retry_here: false, ..Handling::default() };
        let outcome = ward.bench.consumer.handle(refused, handling).await.unwrap();
        assert!(matches!(outcome, Outcome::DeadLettered { .. }), "{outcome:?}");
    }
    let breaker = ward.bench.consumer.status().breaker.unwrap();
    assert_eq!((breaker.state, breaker.failed), (BreakerState::Closed, 0));
}

#[test]
fn mutation_what_is_refused_counts_as_a_failure_is_found() {
    turns_red(module_path!(), "what_a_processor_refuses_is_an_answer", "breaker-counts-what-is-refused");
}

#[tokio::test]
async fn slow_runs_open_it_though_they_went_well() {
    let ward = Ward::new(options()).await;
    ward.patient.takes_ms.store(100, Ordering::SeqCst);
    for number in 0..4 {
        assert!(matches!(ward.put_off(&format!("in-time-{number}")).await, Outcome::Completed { .. }));
    }
    ward.patient.takes_ms.store(101, Ordering::SeqCst);
    for number in 0..4 {
        assert_eq!(ward.state(), BreakerState::Closed);
        assert!(matches!(ward.put_off(&format!("slow-{number}")).await, Outcome::Completed { .. }));
    }
    assert!(matches!(ward.put_off("m").await, Outcome::Paused { .. }), "four of eight were slow");
}

#[tokio::test]
async fn who_waits_for_it_goes_when_the_host_stops() {
    let ward = Ward::new(options()).await;
    ward.open().await;
    let waiting = ward.bench.handle(message("m", "{}"));
    let stop = async {
        eventually("it waits", || ward.clock.asleep() == 1).await;
        ward.bench.consumer.stop();
    };
    let (outcome, ()) = tokio::join!(waiting, stop);
    assert_eq!(outcome, Outcome::Paused { after_ms: OPEN_MS });
}

#[tokio::test]
async fn a_host_that_is_started_again_does_not_begin_with_what_was_given_up() {
    let ward = Ward::new(options()).await;
    ward.open().await;
    let next = async || {
        // Written behind what the breaker wrote.
        let key = RecordKey::new(Scope::of("p"), "/s".into(), "k".into());
        ward.bench.committer.submit(Commit::of(&key)).durable().await.unwrap();
        let clock = Arc::new(ward.clock.clone());
        let bench = Bench::timed("p", ward.store.clone(), ward.patient.clone(), options(), clock).await;
        bench.consumer.restore().await.unwrap();
        bench
    };
    ward.clock.advance(400);
    let bench = next().await;
    let handling = Handling { retry_here: false, ..Handling::default() };
    let handle = async |bench: &Bench, id| bench.consumer.handle(message(id, "{}"), handling).await.unwrap();
    assert_eq!(handle(&bench, "m").await, Outcome::Paused { after_ms: OPEN_MS - 400 });
    assert_eq!(ward.patient.runs(), 4);

    // Down for longer than it would have been open: the first message is a probe.
    ward.clock.advance(OPEN_MS * 60);
    let bench = next().await;
    ward.patient.set_down(false);
    assert!(matches!(handle(&bench, "m").await, Outcome::Completed { .. }));
    assert_eq!(bench.consumer.status().breaker.unwrap().state, BreakerState::HalfOpen);
    assert!(matches!(handle(&bench, "n").await, Outcome::Completed { .. }));
    assert_eq!(bench.consumer.status().breaker.unwrap().state, BreakerState::Closed);
}

#[test]
fn mutation_the_breaker_is_forgotten_at_the_restart_is_found() {
    turns_red(
        module_path!(),
        "a_host_that_is_started_again_does_not_begin_with_what_was_given_up",
        "breaker-not-stored",
    );
}

#[tokio::test]
async fn what_is_redriven_waits_for_it_and_is_no_dead_letter_again() {
    let ward = Ward::new(options()).await;
    ward.open().await;
    let operator = Operator::new(
        ward.store.clone(),
        ward.bench.committer.clone(),
        Arc::new(ward.clock.clone()),
        [ward.bench.consumer.clone()],
    );
    let (stop, stopped) = watch::channel(false);
    let seen = Seen::default();
    let kept =
        hapax_core::run_deferred(ward.bench.consumer.clone(), ward.store.clone(), Arc::new(seen.clone()), stopped);
    let kept = tokio::spawn(kept);
    let (key, _) = ward.store.held_messages(Some("p"), None, 1).await.unwrap().remove(0);
    let by = Actor { actor: "somebody".into(), reason: "it may work now".into() };
    operator.redrive(&key, &by).await.unwrap();
    eventually("it waits for the breaker", || ward.clock.asleep() == 1).await;
    let_others_run().await;
    assert_eq!((ward.patient.runs(), seen.outcomes()), (4, 0));
    ward.patient.set_down(false);
    ward.clock.advance(OPEN_MS);
    eventually("it has ended", || seen.outcomes() == 1).await;
    assert_eq!(seen.ended("completed").len(), 1);
    assert_eq!(ward.store.held_messages(Some("p"), None, 9).await.unwrap().len(), 3, "it is kept no longer");

    // One that waits when the host stops stays redriven, and does not hold up the stop.
    ward.patient.set_down(true);
    assert!(matches!(ward.put_off("fails-as-a-probe").await, Outcome::DeadLettered { .. }));
    let (key, _) = ward.store.held_messages(Some("p"), None, 1).await.unwrap().remove(0);
    operator.redrive(&key, &by).await.unwrap();
    eventually("it waits for the breaker", || ward.clock.asleep() == 1).await;
    ward.bench.consumer.stop();
    stop.send_replace(true);
    kept.await.unwrap().unwrap();
    let held_messages = ward.store.held_under(&key.record).await.unwrap();
    assert_eq!(held_messages[0].hold_reason, HoldReason::Redriven);
}

/// On many threads, under the machine's clock: nobody sleeps for ever, whatever opens and closes
/// meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn once_it_goes_well_again_everything_drains() {
    const MESSAGES: usize = 1_000;
    let clock = SteppedClock::at(0);
    let patient = Patient::new(&clock);
    let breaker = Some(BreakerPolicy { open_ms: 1, probes: 3, ..policy() });
    let options =
        Options { attempts_max: u32::MAX, backoff_base_ms: 1, backoff_max_ms: 2, breaker, ..Options::default() };
    let bench = Bench::new("p", Arc::new(MemoryStore::default()), patient.clone(), options).await;
    patient.set_down(true);
    let seen = Seen::default();
    let mut source = ListSource::new(numbered(MESSAGES, 50), &seen);
    let (consumer, observer) = (bench.consumer.clone(), Arc::new(seen.clone()));
    let (_stop, stopped) = watch::channel(false);
    let running =
        tokio::spawn(async move { hapax_core::run_source(&consumer, &mut source, observer, 64, stopped).await });
    let opened = || bench.consumer.status().breaker.unwrap().opened;
    for times in 1..=5 {
        eventually("it has opened, and again", || opened() >= times * 5).await;
        patient.set_down(false);
        eventually("some have ended", || seen.outcomes() >= times as usize * 20).await;
        patient.set_down(true);
    }
    patient.set_down(false);
    running.await.unwrap().unwrap();
    assert_eq!(seen.ended("completed").len(), MESSAGES);
    assert_eq!(bench.consumer.status().runs_under_way, 0);
}

/// A destination that is there or not.
struct Destination {
    there: Arc<AtomicBool>,
    tries: Arc<AtomicU64>,
    received: Arc<Mutex<Vec<String>>>,
}

impl Publisher for Destination {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<Published, TransportError>> {
        self.tries.fetch_add(1, Ordering::SeqCst);
        let there = self.there.load(Ordering::SeqCst);
        if there {
            self.received.lock().extend(batch.iter().map(|message| String::from_utf8(message.data.to_vec()).unwrap()));
        }
        let published = match there {
            true => Published::all(batch.len()),
            false => Published::none(batch.len(), Unavailable::for_now("nobody answers")),
        };
        Box::pin(std::future::ready(Ok(published)))
    }
}

/// Proves G52.
#[tokio::test]
async fn a_destination_that_fails_is_left_alone_and_gets_everything_in_order() {
    const MESSAGES: usize = 3_000;
    let (clock, store) = (SteppedClock::at(5), Arc::new(MemoryStore::default()));
    let committer = Committer::start(store.clone()).await.unwrap();
    let breaker = Arc::new(CircuitBreaker::new(CircuitBreakerParts {
        name: "outbox/test".into(),
        policy: BreakerPolicy { probes: 1, ..policy() },
        committer: committer.clone(),
        clock: Arc::new(clock.clone()),
        metrics: Arc::new(Counters::default()),
    }));
    let written: Vec<_> = (0..MESSAGES)
        .map(|number| {
            let key = RecordKey::new(Scope::of("p"), "/s".into(), number.to_string().into());
            let outgoing = Outgoing { data: number.to_string().into(), ..Outgoing::default() };
            let effects = Effects { outgoing: vec![outgoing], ..Effects::default() };
            committer.submit(Commit { effects, ..Commit::of(&key) })
        })
        .collect();
    // They are written in their order: with the last, all are.
    written.into_iter().next_back().unwrap().durable().await.unwrap();
    let (there, tries, received) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::default());
    let destination = Destination { there: there.clone(), tries: tries.clone(), received: Arc::clone(&received) };
    let relay = OutboxRelay::new(store.clone(), committer.clone(), Box::new(destination), Arc::new(clock.clone()));
    let (stop, stopped) = watch::channel(false);
    let running = tokio::spawn(relay.guarded_by(Some(breaker.clone())).run(stopped));

    // Four tries, with the backoff between them; then it is left alone.
    for tried in 1..=4 {
        eventually("it waits after a try", || tries.load(Ordering::SeqCst) == tried && clock.asleep() == 1).await;
        if tried < 4 {
            assert_eq!(breaker.status().state, BreakerState::Closed);
            clock.advance(100 << (tried - 1));
        }
    }
    let BreakerState::Open { until_ms } = breaker.status().state else { panic!("{:?}", breaker.status()) };
    assert_eq!(until_ms, clock.now_ms() + OPEN_MS);
    clock.advance(OPEN_MS - 1);
    let_others_run().await;
    assert_eq!((tries.load(Ordering::SeqCst), clock.asleep()), (4, 1));
    clock.advance(1);
    eventually("one probe", || tries.load(Ordering::SeqCst) == 5 && clock.asleep() == 1).await;
    assert!(store.pending(None, MESSAGES).await.unwrap().len() == MESSAGES, "what was not sent stays");

    there.store(true, Ordering::SeqCst);
    clock.advance(OPEN_MS);
    eventually("all is sent", || received.lock().len() == MESSAGES).await;
    stop.send_replace(true);
    assert_eq!(running.await.unwrap().unwrap(), MESSAGES as u64);
    let expected: Vec<_> = (0..MESSAGES).map(|number| number.to_string()).collect();
    assert_eq!(*received.lock(), expected);
    assert_eq!(breaker.status().state, BreakerState::Closed);
}

#[test]
fn mutation_the_outbox_is_sent_though_it_is_open_is_found() {
    turns_red(
        module_path!(),
        "a_destination_that_fails_is_left_alone_and_gets_everything_in_order",
        "relay-ignores-breaker",
    );
}

#[tokio::test]
async fn stopping_does_not_wait_for_a_destination_that_is_left_alone() {
    let (clock, store) = (SteppedClock::at(5), Arc::new(MemoryStore::default()));
    let committer = Committer::start(store.clone()).await.unwrap();
    let breaker = Arc::new(CircuitBreaker::new(CircuitBreakerParts {
        name: "outbox/test".into(),
        policy: BreakerPolicy { calls_min: 1, ..policy() },
        committer: committer.clone(),
        clock: Arc::new(clock.clone()),
        metrics: Arc::new(Counters::default()),
    }));
    let key = RecordKey::new(Scope::of("p"), "/s".into(), "k".into());
    let effects = Effects { outgoing: vec![Outgoing::default()], ..Effects::default() };
    committer.submit(Commit { effects, ..Commit::of(&key) }).durable().await.unwrap();
    let tries = Arc::<AtomicU64>::default();
    let destination = Destination { there: Arc::default(), tries: tries.clone(), received: Arc::default() };
    let relay = OutboxRelay::new(store.clone(), committer.clone(), Box::new(destination), Arc::new(clock.clone()));
    let (stop, stopped) = watch::channel(false);
    let running = tokio::spawn(relay.guarded_by(Some(breaker)).run(stopped));
    eventually("it is left alone", || tries.load(Ordering::SeqCst) == 1 && clock.asleep() == 1).await;
    stop.send_replace(true);
    assert_eq!(running.await.unwrap().unwrap(), 0);
    assert_eq!(tries.load(Ordering::SeqCst), 1);
    let ids: BTreeSet<_> = store.pending(None, 9).await.unwrap().into_iter().map(|row| row.message.id).collect();
    assert_eq!(ids.len(), 1, "it stays in the outbox");
}
