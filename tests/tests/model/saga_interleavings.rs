//! Sagas whose messages are under way at the same time: random orders of beginnings, late effects
//! at the service, clients that go away, and turns of the clock. Each case is run to its end:
//! abandoned messages are given up, and compensations are made. Then a rule that knows nothing of
//! the code holds: what took effect at the service stays if its message, or its saga, completed, and
//! is followed by its compensation otherwise. `HAPAX_CASES` for the long form.

use std::sync::Arc;
use std::time::Duration;

use hapax_core::{
    AbandonedParts, Handling, IdempotencyStorage as _, IdempotentConsumer, Message, Options, SagaId, SagaLog,
    SagaState, Scope, Select, Strategy, VersionOrder, run_abandoned, unfinished_messages,
};
use hapax_tests::owners::Owners;
use hapax_tests::plans::{Op, Reply, call, plan, step};
use hapax_tests::random::Random;
use hapax_tests::stepped::let_others_run;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const LEASE_MS: u64 = 30_000;
const HORIZON_MS: u64 = 24 * 60 * 60 * 1_000;
const MESSAGES: usize = 4;
const STEPS: [&str; MESSAGES] = ["a", "b", "c", "d"];

/// Returns the relation between the messages of a case.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Related {
    /// They share the saga `trip`.
    BySaga,
    /// They are versions of one entity, each with a saga of its own.
    ByEntity,
}

/// A case under way.
struct Life {
    world: Owners,
    consumer: IdempotentConsumer,
    related: Related,
    messages: Vec<Message>,
    tasks: Vec<JoinHandle<()>>,
}

/// A message that takes a step, and then completes, fails for now, or fails for good.
fn message(number: usize, related: Related, random: &mut Random) -> Message {
    let name = STEPS[number];
    let mut ops = match random.below(5) {
        0 => vec![],
        _ => vec![step(name), call(&format!("/{name}"))],
    };
    match random.below(4) {
        0 => ops.push(Op::Reject),
        1 => ops.push(Op::RetryUntil(9)),
        _ => {}
    }
    ops.push(Op::Set(format!("done/m-{number}"), "yes".into()));
    let mut message = plan(&format!("m-{number}"), &ops);
    match related {
        Related::BySaga => drop(message.extensions.insert("saga".into(), "trip".into())),
        Related::ByEntity => {
            message.subject = Some("e".into());
            message.extensions.insert("version".into(), (number + 1).to_string());
        }
    }
    message
}

impl Life {
    async fn new(related: Related, random: &mut Random) -> Self {
        let world = Owners::new().await;
        let strategy = match related {
            Related::BySaga => Strategy::default(),
            Related::ByEntity => {
                let [entity, version] = ["subject", "version"].map(|name| Select::Attribute(name.into()));
                Strategy::Version { entity, version, order: VersionOrder::Monotonic }
            }
        };
        let consumer = world.consumer("p", Options { strategy, lease_ms: LEASE_MS, ..Options::default() });
        let messages = (0..MESSAGES).map(|number| message(number, related, random)).collect();
        Self { world, consumer, related, messages, tasks: Vec::new() }
    }

    fn deliver(&mut self, number: usize, late: bool) {
        if late {
            self.world.books.reply(&format!("/{}", STEPS[number]), &[Reply::Late]);
        }
        let (consumer, message) = (self.consumer.clone(), self.messages[number].clone());
        let handling = Handling { wait_in_flight: false, retry_here: false };
        self.tasks.push(tokio::spawn(async move { drop(consumer.handle(message, handling).await) }));
    }

    async fn goes_on(&mut self, random: &mut Random) {
        match random.below(6) {
            0 | 1 => self.deliver(random.below(MESSAGES as u64) as usize, random.below(2) == 0),
            2 => self.world.books.let_go_of(&format!("/{}", STEPS[random.below(MESSAGES as u64) as usize])),
            3 if !self.tasks.is_empty() => {
                // The client goes away, and the run with it.
                let index = random.below(self.tasks.len() as u64) as usize;
                self.tasks.swap_remove(index).abort();
            }
            4 => self.world.clock.advance(random.below(LEASE_MS)),
            _ => tokio::time::sleep(Duration::from_millis(random.below(2))).await,
        }
        let_others_run().await;
    }

    /// Lets all that is under way come to its end, and gives up what is abandoned.
    async fn ends(&mut self) {
        let stores = || Arc::new(self.world.store.clone());
        for round in 0..20_000 {
            STEPS.iter().for_each(|name| self.world.books.let_go_of(&format!("/{name}")));
            self.world.clock.advance(if round % 50 == 49 { HORIZON_MS + LEASE_MS } else { 500 });
            let_others_run().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            if self.tasks.iter().any(|task| !task.is_finished()) {
                continue;
            }
            let parts = AbandonedParts {
                scope: Scope::of("p"),
                store: stores(),
                clock: Arc::new(self.world.clock.clone()),
                consumers: vec![self.consumer.clone()],
            };
            run_abandoned(parts, watch::channel(true).1).await.unwrap();
            let left = unfinished_messages(&self.world.store, &Scope::of("p"), u64::MAX, None, 10).await.unwrap();
            let log = SagaLog::new(&self.world.store, &Scope::of("p"));
            if left.is_empty() && log.unsettled(None, 10).await.unwrap().is_empty() {
                return;
            }
        }
        panic!("it never came to its end");
    }

    /// Fails if the rule is broken.
    async fn check(&self, seed: u64) {
        let log = SagaLog::new(&self.world.store, &Scope::of("p"));
        let trip = log.read(&SagaId::named("trip").unwrap()).await.unwrap().saga.state;
        let state = self.world.store.view(&Scope::of("p"));
        let applied = self.world.books.applied();
        for (number, name) in STEPS.iter().enumerate() {
            let (call, undo) = (format!("/{name} m-{number}"), format!("/undo/{name} m-{number}"));
            let completed = state.get(&format!("done/m-{number}")).await.unwrap().1.is_some();
            let stays = match self.related {
                Related::BySaga => trip != SagaState::Compensated,
                Related::ByEntity => completed,
            };
            let last = |what: &String| applied.iter().rposition(|one| one == what);
            let fits = match (last(&call), last(&undo)) {
                (Some(_), undone) if stays => undone.is_none(),
                (Some(taken), undone) => undone.is_some_and(|undone| undone > taken),
                (None, _) => true,
            };
            let ops = String::from_utf8_lossy(&self.messages[number].data).into_owned();
            assert!(
                fits,
                "seed {seed}, {:?}: {call}, completed: {completed}, trip {trip:?}\n{ops}\n{applied:?}",
                self.related
            );
        }
    }
}

async fn one_case(seed: u64) {
    let mut random = Random::of(seed);
    let related = if random.below(2) == 0 { Related::BySaga } else { Related::ByEntity };
    let mut life = Life::new(related, &mut random).await;
    let _compensator = life.world.compensating(&life.consumer);
    for _ in 0..20 {
        life.goes_on(&mut random).await;
    }
    life.ends().await;
    life.check(seed).await;
}

/// Proves G144.
#[tokio::test]
async fn whatever_is_under_way_what_took_effect_stays_or_is_compensated() {
    let cases = std::env::var("HAPAX_CASES").map_or(40, |cases| cases.parse().unwrap());
    for seed in 0..cases {
        one_case(seed).await;
    }
}

hapax_tests::mutations! {
    mutation_sagas_that_ignore_runs_break_the_rule: whatever_is_under_way_what_took_effect_stays_or_is_compensated is red with "sagas-ignore-runs";
}
