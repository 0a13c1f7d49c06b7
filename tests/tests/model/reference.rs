//! The pipeline against its reference: random deliveries, duplicates, reorderings, failures, deaths
//! of the host, jumps of the clock, two owners, operators. After each step the store holds what the
//! reference holds. `HAPAX_CASES` for the long form; what ever failed stands in
//! `tests/proptest-regressions`, and is tried first.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use hapax_core::{
    Actor as Operating, Committer, Context, ContextError, Counters, Failure, Handling, HeldKey, IdempotentConsumer,
    Invocation, MessageProcessor, NativeProcessor, Observer, Operator, Outcome, Outgoing, Output, Parts, Position,
    RESERVED, Record, RecordKey, RecordState, Report, Scope, Store, rebuild_record, record_history, run_deferred,
};
use hapax_store::{MemoryStore, StoreOptions};
use hapax_tests::backend::LossyDisk;
use hapax_tests::clock::StillClock;
use hapax_tests::model::{By, Input, KEYS, Model, OWNERS, START_MS, State, Transition, retry_after_ms};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// What one case runs over.
#[derive(Debug, Clone)]
struct World {
    model: Model,
    /// On redb, over a disk that loses what is not synced; else in memory.
    on_redb: bool,
    /// Consumers keep terminal records in memory. A second owner does not tell the first what it
    /// wrote: where an entity has one record, there is one owner then.
    cached: bool,
}

impl World {
    fn owners(&self) -> usize {
        if self.cached && self.model.by.has_positions() { 1 } else { OWNERS }
    }
}

/// The strategy of a test, as a type.
trait Case: 'static {
    const BY: By;
}

macro_rules! strategies {
    ($($name:ident)*) => {$(
        struct $name;
        impl Case for $name {
            const BY: By = By::$name;
        }
    )*};
}

strategies! { MessageId Version StrictAccept StrictDeadLetter Timestamp ContentHash }

struct Reference<S>(PhantomData<S>);

fn input() -> impl Strategy<Value = Input> + Clone {
    (0..KEYS, prop::bool::weighted(0.2)).prop_map(|(key, other_body)| Input { key, other_body })
}

/// Where there are gaps, in order: what one is parked for may else come right behind it, and then
/// it runs with or without having been kept.
fn burst(by: By) -> impl Strategy<Value = Transition> {
    let in_order = move |mut inputs: Vec<Input>| {
        if by.is_strict() {
            inputs.sort();
        }
        Transition::Burst(inputs)
    };
    prop::collection::vec(input(), 2..6).prop_map(in_order)
}

fn transition(by: By, owners: usize) -> BoxedStrategy<Transition> {
    let owner = 0..owners;
    let race = move |input| if owners == OWNERS { Transition::Race(input) } else { Transition::Deliver(0, input) };
    prop_oneof![
        10 => (owner.clone(), input()).prop_map(|(owner, input)| Transition::Deliver(owner, input)),
        3 => burst(by),
        2 => input().prop_map(race),
        2 => (prop::option::of(input()), 0..12u64, any::<u64>())
            .prop_map(|(during, operations, seed)| Transition::Crash { during, operations, seed }),
        1 => Just(Transition::Restart),
        3 => prop_oneof![Just(700), Just(1_400), Just(600_000), Just(3_600_000)].prop_map(Transition::Jump),
        1 => Just(Transition::Back),
        2 => Just(Transition::Sweep),
        3 => owner.prop_map(Transition::Keep),
        2 => (0..9usize).prop_map(Transition::Redrive),
        1 => (0..9usize).prop_map(Transition::Discard),
        1 => (0..9usize).prop_map(Transition::Evict),
    ]
    .boxed()
}

impl<S: Case> ReferenceStateMachine for Reference<S> {
    type State = World;
    type Transition = Transition;

    fn init_state() -> BoxedStrategy<World> {
        let world = |(on_redb, cached)| World { model: Model::new(S::BY), on_redb, cached };
        (any::<bool>(), any::<bool>()).prop_map(world).boxed()
    }

    fn transitions(world: &World) -> BoxedStrategy<Transition> {
        transition(world.model.by, world.owners())
    }

    fn apply(mut world: World, transition: &Transition) -> World {
        world.model.apply(transition);
        world
    }
}

fn failed(error: ContextError) -> Failure {
    Failure::retry(error.to_string())
}

/// Does what the message's type says; writes first, so that what fails would leave a trace.
fn processor() -> Arc<dyn MessageProcessor> {
    fn process<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            let data: serde_json::Value = serde_json::from_slice(&run.message.data).unwrap();
            let (label, entity) = (data["label"].as_str().unwrap(), run.message.subject.as_ref().unwrap());
            let key = format!("log/{entity}");
            let before = context.get(&key).await.map_err(failed)?.unwrap_or_default();
            tokio::task::yield_now().await;
            let log = format!("{}{label},", std::str::from_utf8(&before).unwrap());
            context.set(&key, log.clone()).map_err(failed)?;
            context.send(Outgoing { data: label.to_owned().into(), ..Outgoing::default() }).map_err(failed)?;
            let retry = Failure::Retry { reason: "not now".into(), after_ms: Some(retry_after_ms(run.attempt)) };
            match &*run.message.kind {
                "reject" => Err(Failure::Reject("no".into())),
                "fails" => Err(retry),
                "fails-once" if run.attempt == 1 => Err(retry),
                _ => Ok(Output { content_type: None, data: log.into() }),
            }
        })
    }
    Arc::new(NativeProcessor::new(process))
}

struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

/// The host's life between two starts.
struct Life {
    store: Arc<dyn Store>,
    committer: Arc<Committer>,
    owners: Vec<IdempotentConsumer>,
}

struct Host {
    runtime: Runtime,
    clock: StillClock,
    by: By,
    cache_bytes: u64,
    disk: Option<LossyDisk>,
    memory: Arc<MemoryStore>,
    life: Option<Life>,
    /// Records as they were after the last step.
    before: BTreeMap<RecordKey, Record>,
}

/// Everything small, so that there are several buckets and memtables.
fn small() -> StoreOptions {
    StoreOptions { memtable_bytes: 1_000, bucket_rows_max: 3, ..StoreOptions::default() }
}

impl Host {
    fn new(world: &World) -> Self {
        let mut host = Self {
            runtime: tokio::runtime::Builder::new_current_thread().build().unwrap(),
            clock: StillClock::at(START_MS),
            by: world.model.by,
            cache_bytes: if world.cached { 1 << 20 } else { 0 },
            disk: world.on_redb.then(LossyDisk::new),
            memory: Arc::default(),
            life: None,
            before: BTreeMap::new(),
        };
        host.start();
        host
    }

    fn life(&self) -> &Life {
        self.life.as_ref().unwrap()
    }

    fn start(&mut self) {
        let store: Arc<dyn Store> = match &self.disk {
            Some(disk) => Arc::new(disk.open_with(small()).unwrap()),
            None => self.memory.clone(),
        };
        let committer = self.runtime.block_on(Committer::start(store.clone())).unwrap();
        let owners = (0..OWNERS).map(|_| self.owner(&store, &committer)).collect();
        self.life = Some(Life { store, committer, owners });
    }

    /// A consumer that does not wait for retries: time stands still while it is at work.
    fn owner(&self, store: &Arc<dyn Store>, committer: &Arc<Committer>) -> IdempotentConsumer {
        let consumer = IdempotentConsumer::new(Parts {
            scope: Scope::of("p"),
            processor: processor(),
            storage: store.clone(),
            committer: committer.clone(),
            outbound: None,
            clock: Arc::new(self.clock.clone()),
            metrics: Arc::new(Counters::default()),
            options: self.by.options(self.cache_bytes),
        });
        consumer.stop();
        consumer
    }

    fn crash(&mut self, during: Option<Input>, operations: u64, seed: u64) {
        if let (Some(input), Some(disk)) = (during, &self.disk) {
            disk.fail_after(operations);
            // Whether it ended is not known; its source delivers it again.
            drop(self.runtime.block_on(self.deliver(0, input)));
        }
        if let Some(disk) = &self.disk {
            disk.fail_after(0);
        }
        self.life = None;
        self.disk = self.disk.take().map(|disk| disk.after_power_loss(seed));
        self.start();
    }

    async fn deliver(&self, owner: usize, input: Input) -> Option<Outcome> {
        self.life().owners[owner]
            .handle(input.message(self.by), Handling { retry_here: false, ..Handling::default() })
            .await
            .ok()
    }

    /// Accepted in order, run in any.
    async fn burst(&self, inputs: &[Input]) -> Vec<Outcome> {
        let owner = &self.life().owners[0];
        let accept =
            |input: &Input| owner.accept(input.message(self.by), Handling { retry_here: false, ..Handling::default() });
        let accepted: Vec<_> = inputs.iter().map(accept).collect();
        let mut outcomes: Vec<_> = join_all(accepted.into_iter().rev().map(|accepted| owner.process(accepted))).await;
        outcomes.reverse();
        outcomes.into_iter().map(Result::unwrap).collect()
    }

    async fn keep(&self, owner: usize) {
        let (life, (_stop, stopping)) = (self.life(), watch::channel(true));
        run_deferred(life.owners[owner].clone(), life.store.clone(), Arc::new(Nobody), stopping).await.unwrap();
    }

    /// Does something to the n-th kept message; the second owner, which operators do not know of,
    /// starts anew.
    fn operate(&mut self, deed: impl AsyncFnOnce(&Life, &Operator)) {
        let life = self.life();
        let first = [life.owners[0].clone()];
        let clock = Arc::new(self.clock.clone());
        let operator = Operator::new(life.store.clone(), life.committer.clone(), clock, first);
        self.runtime.block_on(deed(life, &operator));
        for owner in 1..OWNERS {
            let life = self.life();
            let anew = self.owner(&life.store, &life.committer);
            self.life.as_mut().unwrap().owners[owner] = anew;
        }
    }

    /// Does it; answers the endings of what was delivered, if they are certain.
    fn apply(&mut self, transition: &Transition) -> Option<Vec<&'static str>> {
        let names = |outcomes: Vec<Outcome>| Some(outcomes.iter().map(Outcome::name).collect());
        match transition {
            Transition::Deliver(owner, input) => {
                return names(vec![self.runtime.block_on(self.deliver(*owner, *input)).unwrap()]);
            }
            Transition::Burst(inputs) => {
                return names(self.runtime.block_on(self.burst(inputs)));
            }
            Transition::Race(input) => {
                let all = join_all((0..OWNERS).map(|owner| self.deliver(owner, *input)));
                let outcomes = self.runtime.block_on(all);
                assert!(outcomes.iter().all(Option::is_some));
            }
            Transition::Crash { during, operations, seed } => {
                self.life = None;
                self.start();
                self.crash(*during, *operations, *seed);
                if let Some(input) = during {
                    self.runtime.block_on(self.deliver(0, *input)).unwrap();
                }
            }
            Transition::Restart => {
                self.life = None;
                self.start();
            }
            Transition::Jump(_) | Transition::Back => {}
            Transition::Sweep => {
                let now_ms = hapax_core::Clock::now_ms(&self.clock);
                self.runtime.block_on(self.life().store.sweep(now_ms)).unwrap();
            }
            Transition::Keep(owner) => self.runtime.block_on(self.keep(*owner)),
            Transition::Redrive(nth) => self.operate(async |life, operator| {
                if let Some(key) = nth_letter(life, *nth).await {
                    let _ = operator.redrive(&key, &by()).await;
                }
            }),
            Transition::Discard(nth) => self.operate(async |life, operator| {
                if let Some(key) = nth_letter(life, *nth).await {
                    operator.discard(&key, &by()).await.unwrap();
                }
            }),
            Transition::Evict(nth) => {
                let live: Vec<_> = self.live().into_keys().collect();
                self.operate(async |_, operator| {
                    if let Some(key) = nth.checked_rem(live.len()).map(|nth| &live[nth]) {
                        let _ = operator.evict(key, &by()).await;
                    }
                });
            }
        }
        None
    }

    /// Records that count.
    fn live(&self) -> BTreeMap<RecordKey, Record> {
        let records = self.runtime.block_on(self.life().store.records(Some("p"), None, 1_000)).unwrap();
        let now_ms = hapax_core::Clock::now_ms(&self.clock);
        records.into_iter().filter(|(_, record)| !record.has_expired(now_ms)).collect()
    }

    /// The store holds what the reference holds, and nothing that was written before is other than
    /// it may be.
    fn check(&mut self, model: &Model) {
        let live = self.live();
        let found: BTreeMap<_, _> = live.iter().map(|(key, record)| (key.clone(), told(record))).collect();
        let wanted: BTreeMap<_, _> =
            model.live().map(|(key, record)| (key.clone(), wanted(model.by, record))).collect();
        assert_eq!(found, wanted, "records");
        self.runtime.block_on(self.check_the_rest(model));
        for (key, record) in &live {
            let (received, entries) = record_history(record);
            assert_eq!(rebuild_record(&received, &entries).unwrap().as_ref(), Some(record), "the history of {key}");
            let changed =
                self.before.get(key).filter(|before| *before != record && before.received_ms == record.received_ms);
            assert!(changed.is_none_or(|before| before.epoch < record.epoch), "the epoch of {key} stands still");
        }
        self.before = live;
    }

    async fn check_the_rest(&self, model: &Model) {
        let store = &self.life().store;
        let state = store.view(&Scope::of("p")).scan("", Some(&RESERVED.to_string()), 1_000).await.unwrap();
        let state: BTreeMap<_, _> = state.into_iter().map(|(key, _, value)| (key, text(&value))).collect();
        assert_eq!(state, model.state, "state");
        let sent = store.pending(None, 10_000).await.unwrap();
        let ids: std::collections::BTreeSet<_> =
            sent.iter().map(|row| (row.message.id.clone(), text(&row.message.data))).collect();
        assert_eq!(ids, model.sent, "sent");
        let held_messages = store.held_messages(Some("p"), None, 1_000).await.unwrap();
        let held_messages: BTreeMap<_, _> = held_messages
            .into_iter()
            .map(|(key, held_message)| (key, (held_message.hold_reason, held_message.attempts)))
            .collect();
        let wanted = model
            .held_messages
            .iter()
            .map(|(key, held_message)| (key.clone(), (held_message.hold_reason, held_message.attempts)));
        assert_eq!(held_messages, wanted.collect(), "kept messages");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn by() -> Operating {
    Operating { actor: "the model".into(), reason: "to see".into() }
}

async fn nth_letter(life: &Life, nth: usize) -> Option<HeldKey> {
    let held_messages = life.store.held_messages(Some("p"), None, 1_000).await.unwrap();
    nth.checked_rem(held_messages.len()).map(|nth| held_messages[nth].0.clone())
}

/// A record as far as the reference knows it.
#[derive(Debug, PartialEq)]
struct Told {
    state: State,
    attempts: u32,
    position: Option<Position>,
    fingerprint: hapax_core::Fingerprint,
}

fn told(record: &Record) -> Told {
    let state = match &record.state {
        RecordState::Completed { output } => State::Completed(text(&output.data)),
        RecordState::DeadLettered { .. } => State::DeadLettered,
        RecordState::RetryDue { at_ms, .. } => State::RetryDue(*at_ms),
        other => panic!("{}: nothing leads there", other.name()),
    };
    Told { state, attempts: record.attempts, position: record.position.clone(), fingerprint: record.fingerprint }
}

fn wanted(by: By, record: &hapax_tests::model::Record) -> Told {
    let identity = record.input.identity(by);
    let (position, fingerprint) = (identity.position, identity.fingerprint);
    Told { state: record.state.clone(), attempts: record.attempts, position, fingerprint }
}

struct Pipeline<S>(PhantomData<S>);

impl<S: Case> StateMachineTest for Pipeline<S> {
    type SystemUnderTest = Host;
    type Reference = Reference<S>;

    fn init_test(world: &World) -> Host {
        Host::new(world)
    }

    fn apply(mut host: Host, world: &World, transition: Transition) -> Host {
        host.clock.set(world.model.now_ms);
        if let Some(outcomes) = host.apply(&transition) {
            assert_eq!(outcomes, world.model.outcomes, "endings");
        }
        host.check(&world.model);
        host
    }

    /// After faults stop everything drains, in longer than the clock was ever set back by and a
    /// message is parked: what waits comes to its end, and nothing vanishes on the way.
    fn teardown(mut host: Host, mut world: World) {
        let last = [Transition::Jump(1_200_000)].into_iter().chain((0..world.owners()).map(Transition::Keep));
        let last: Vec<_> = last.collect();
        for transition in last.iter().cycle().take(16 * last.len()) {
            world.model.apply(transition);
            host = Self::apply(host, &world, transition.clone());
        }
        let waits = world
            .model
            .held_messages
            .values()
            .find(|held_message| held_message.hold_reason != hapax_core::HoldReason::Dead);
        assert_eq!(waits, None, "it waits for ever");
    }
}

/// Few cases by default, `HAPAX_CASES=5000` for the long form. With a mutation in the code nothing
/// is kept, and nothing is made small.
fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct(concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/model.txt"));
    let mutated = std::env::var("HAPAX_MUTATION").is_ok();
    ProptestConfig {
        cases: std::env::var("HAPAX_CASES").map_or(40, |cases| cases.parse().unwrap()),
        failure_persistence: (!mutated).then(|| Box::new(file) as _),
        max_shrink_iters: if mutated { 0 } else { 5_000 },
        ..ProptestConfig::default()
    }
}

/// One history that is written down.
fn lives_through<S: Case>(on_redb: bool, cached: bool, history: Vec<Transition>) {
    let world = World { model: Model::new(S::BY), on_redb, cached };
    Pipeline::<S>::test_sequential(config(), world, history, None);
}

fn deliver(key: u8) -> Transition {
    Transition::Deliver(0, Input { key, other_body: false })
}

/// Histories that the reference found the pipeline to end differently from, once.
/// Proves G42, G126.
#[test]
fn what_was_found_once_is_not_found_again() {
    use Transition::{Burst, Jump, Keep, Redrive, Restart};
    for (on_redb, cached) in [(false, false), (false, true), (true, false), (true, true)] {
        // Each that waits lets the next go, not only the first.
        let chain = [4, 6, 8, 2].map(deliver).into_iter().chain([Jump(700), deliver(2), Keep(0)]).collect();
        lives_through::<StrictDeadLetter>(on_redb, cached, chain);
        // What it waited for came, the host died before it ran.
        let late = vec![deliver(5), deliver(3), Restart, Jump(600_000), Keep(0)];
        lives_through::<StrictDeadLetter>(on_redb, cached, late);
        // One whose time is over stands behind one that is to be retried: that one is not run
        // before its time.
        let behind = vec![deliver(7), deliver(9), Jump(600_000), Keep(0), Keep(0), Jump(1_000), Keep(0)];
        lives_through::<StrictAccept>(on_redb, cached, behind);
        // Refused, redriven when its time has come: it has another name then.
        let ahead = vec![deliver(10), Jump(7_200_000), Redrive(0), Keep(0), Restart, Keep(0)];
        lives_through::<Timestamp>(on_redb, cached, ahead);
        // Two bodies of one message wait for the same one: the first in order runs, and the other
        // one is the mismatch.
        let other = Transition::Deliver(0, Input { key: 9, other_body: true });
        let bodies = vec![deliver(5), other, deliver(9), deliver(11), Jump(600_000), Keep(0)];
        lives_through::<StrictAccept>(on_redb, cached, bodies);
        // An older one comes while a newer one is on its way.
        let overtaken = Burst([5, 1].map(|key| Input { key, other_body: false }).to_vec());
        lives_through::<Timestamp>(on_redb, cached, vec![deliver(1), overtaken]);
    }
}

prop_state_machine! {
    #![proptest_config(config())]

    /// Proves G37, G63, G64, G90.
    #[test]
    fn by_message_id_it_ends_as_the_reference(sequential 1..40 => Pipeline<MessageId>);

    /// Proves G60.
    #[test]
    fn by_version_it_ends_as_the_reference(sequential 1..40 => Pipeline<Version>);

    /// Proves G41, G126.
    #[test]
    fn by_strict_version_it_ends_as_the_reference_where_gaps_are_given_up(sequential 1..40 => Pipeline<StrictAccept>);

    /// Proves G41.
    #[test]
    fn by_strict_version_it_ends_as_the_reference_where_what_waits_is_given_up(sequential 1..40 => Pipeline<StrictDeadLetter>);

    /// Proves G61.
    #[test]
    fn by_timestamp_it_ends_as_the_reference(sequential 1..40 => Pipeline<Timestamp>);

    /// Proves G62.
    #[test]
    fn by_content_hash_it_ends_as_the_reference(sequential 1..40 => Pipeline<ContentHash>);
}

hapax_tests::mutations! {
    mutation_parked_forgotten_at_a_restart_is_found:
        what_was_found_once_is_not_found_again is red with "parked-forgotten-at-a-restart";
    mutation_nobody_is_woken_is_found: what_was_found_once_is_not_found_again is red with "nobody-is-woken";
    mutation_open_counts_as_ended_is_found: by_message_id_it_ends_as_the_reference is red with "open-counts-as-ended";
    mutation_gap_runs_is_found_by_the_model:
        by_strict_version_it_ends_as_the_reference_where_gaps_are_given_up is red with "gap-runs";
}
