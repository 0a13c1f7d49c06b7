//! The engine beside a bare wasmtime loop, in turn: one invocation, many in flight, each host call, a start with many
//! processors. Writes to no store; prints what it measured beside the targets.

mod bare;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::context::{EffectLimits, Entry, StateView, Version};
use hapax_core::storage::StoreError;
use hapax_core::{Context, Invocation, Message, MessageProcessor};
use hapax_engine::{Engine, EngineConfig, InstanceMode, LoadOptions, ReuseLimits, WasmProcessor};

use self::bare::Bare;
use crate::{ROUNDS, spread};

/// Instances at once, in the engine and in the bare loop.
const INSTANCES: u32 = 256;
/// Invocations of one loop before the other has its turn.
const TURN: u32 = 100;
/// Turns of a loop in a round.
const TURNS: u32 = 20;
/// How long a round with many in flight takes.
const IN_FLIGHT_ROUND: Duration = Duration::from_millis(700);
/// Calls of one kind in one message; none of them is over a limit.
const CALLS: u32 = 500;
/// Components of the start.
const PROCESSORS: usize = 100;

/// State that is there already: `there`, and ten entries below `ten/`.
struct Given(BTreeMap<String, Bytes>);

impl Given {
    fn new() -> Arc<Self> {
        let ten = (0..10).map(|number| (format!("ten/{number}"), Bytes::from_static(b"0123456789abcdef")));
        Arc::new(Self(ten.chain([("there".to_owned(), Bytes::from_static(b"0123456789abcdef"))]).collect()))
    }
}

impl StateView for Given {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        Box::pin(async move { Ok(self.0.get(key).map_or((0, None), |value| (1, Some(value.clone())))) })
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        let inside = move |key: &str| end.is_none_or(|end| key < end);
        let entries = self.0.range(start.to_owned()..).take_while(move |(key, _)| inside(key)).take(limit);
        Box::pin(async move { Ok(entries.map(|(key, value)| (key.clone(), 1, value.clone())).collect()) })
    }
}

/// A component with what it takes to run it.
struct Loaded {
    processor: WasmProcessor,
    view: Arc<dyn StateView>,
    limits: Arc<EffectLimits>,
}

impl Loaded {
    fn new(engine: &Engine, component: &[u8], instance: InstanceMode) -> Self {
        let config = BTreeMap::from([("greeting".to_owned(), "hello".to_owned())]);
        let options = LoadOptions { name: "bench".into(), config, instance, ..LoadOptions::default() };
        let processor = engine.load(component, options).unwrap();
        Self { limits: processor.effect_limits().clone(), processor, view: Given::new() }
    }

    /// One message; the bytes of its answer.
    async fn run(&self, invocation: &Invocation) -> usize {
        let mut context = Context::new(self.view.clone(), self.limits.clone());
        self.processor.process(invocation, &mut context).await.unwrap().data.len()
    }
}

/// An order of about 256 bytes, for the plugin `order-intake`.
fn order() -> Invocation {
    let note = "x".repeat(190);
    let data = format!(r#"{{"order_id":"o-1","customer":"c-1","amount_cents":1200,"note":"{note}"}}"#);
    invocation("order.placed", data)
}

fn invocation(kind: &str, data: String) -> Invocation {
    let message = Message::new("0123456789abcdef", "/bench", kind).with_data("application/json", data);
    Invocation { message: Arc::new(message), idempotency_key: "0123456789abcdef".into(), attempt: 1, seed: 42 }
}

const REUSE: InstanceMode = InstanceMode::Reuse(ReuseLimits { messages: u32::MAX, growth_bytes: 16 << 20 });

/// Measures and prints all of it. `guests`: the folder with the components, built in release.
pub(crate) fn report(guests: &Path) {
    let component = |name: &str| std::fs::read(guests.join(name).with_extension("wasm")).unwrap();
    let (intake, fixtures) = (component("order-intake"), component("hapax-fixtures"));
    let config = EngineConfig { max_instances: INSTANCES, ..EngineConfig::default() };
    let engine = Engine::new(config).unwrap();
    let parts = Arc::new(Parts {
        fresh: Loaded::new(&engine, &intake, InstanceMode::Fresh),
        reused: Loaded::new(&engine, &intake, REUSE),
        bare: Bare::new(&intake, INSTANCES + EngineConfig::default().kept_instances),
        order: order(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(one_at_a_time(&parts));
    in_flight(&parts);
    runtime.block_on(host_calls(&Loaded::new(&engine, &fixtures, REUSE)));
    start(&intake);
}

/// One component, three ways to run it.
struct Parts {
    fresh: Loaded,
    reused: Loaded,
    bare: Bare,
    order: Invocation,
}

async fn one_at_a_time(parts: &Parts) {
    println!("\n| one invocation of `order-intake` | engine | bare wasmtime | ratio | target |");
    println!("|---|---|---|---|---|");
    let order = &parts.order;
    let mut warm = parts.bare.warm(&order.message).await;
    let (mut fresh, mut reused) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut turns = [const { Vec::new() }; 4];
        for _ in 0..TURNS {
            turns[0].push(timed(async || parts.fresh.run(order).await).await);
            turns[1].push(timed(async || parts.bare.fresh(&order.message).await).await);
            turns[2].push(timed(async || parts.reused.run(order).await).await);
            turns[3].push(timed(async || warm.call().await).await);
        }
        // The middle turn: one during which another program had the core says nothing.
        let [engine_fresh, bare_fresh, engine_reused, bare_warm] = turns.map(|turns| spread(turns.into_iter()).1);
        fresh.push((engine_fresh, bare_fresh));
        reused.push((engine_reused, bare_warm));
    }
    print_pairs("fresh instance", &fresh, "<= 1.2");
    print_pairs("reused instance", &reused, "<= 2");
}

/// Microseconds of an invocation, over a turn of one loop.
async fn timed(mut run: impl AsyncFnMut() -> usize) -> f64 {
    let since = Instant::now();
    for _ in 0..TURN {
        assert!(run().await > 0, "the plugin answered nothing");
    }
    since.elapsed().as_secs_f64() * 1e6 / f64::from(TURN)
}

fn print_pairs(what: &str, pairs: &[(f64, f64)], target: &str) {
    let ours = spread(pairs.iter().map(|pair| pair.0));
    let bare = spread(pairs.iter().map(|pair| pair.1));
    let ratio = spread(pairs.iter().map(|pair| pair.0 / pair.1));
    println!(
        "| {what} | {:.2} us ({:.2} - {:.2}) | {:.2} us ({:.2} - {:.2}) | **{:.2}** ({:.2} - {:.2}) | {target} |",
        ours.1, ours.0, ours.2, bare.1, bare.0, bare.2, ratio.1, ratio.0, ratio.2
    );
}

/// The engine alone with many in flight, on all cores: what it leaves to the rest of the pipeline.
fn in_flight(parts: &Arc<Parts>) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("\n| in flight on {cores} cores | engine, a second | bare wasmtime, a second | ratio | target |");
    println!("|---|---|---|---|---|");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores).enable_all().build().unwrap();
    for (tasks, target) in [(1, ""), (cores, ""), (64, ""), (1_024, ">= 0.8")] {
        for reused in [false, true] {
            let rounds: Vec<_> = (0..ROUNDS)
                .map(|_| {
                    let engine = runtime.block_on(rate(tasks, parts, reused, true));
                    // As many loops as there are cores: more would only stand in each other's way.
                    (engine, runtime.block_on(rate(tasks.min(cores), parts, reused, false)))
                })
                .collect();
            let ours = spread(rounds.iter().map(|round| round.0));
            let bare = spread(rounds.iter().map(|round| round.1));
            let ratio = spread(rounds.iter().map(|round| round.0 / round.1));
            let (mode, target) = if reused { ("reused", "") } else { ("fresh", target) };
            println!(
                "| {tasks}, {mode} | {:.0} ({:.0} - {:.0}) | {:.0} ({:.0} - {:.0}) | **{:.2}** ({:.2} - {:.2}) | {target} |",
                ours.1, ours.0, ours.2, bare.1, bare.0, bare.2, ratio.1, ratio.0, ratio.2
            );
        }
    }
}

/// Invocations a second of `tasks` loops at once.
async fn rate(tasks: usize, parts: &Arc<Parts>, reused: bool, engine: bool) -> f64 {
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let since = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let (parts, stop, done) = (parts.clone(), stop.clone(), done.clone());
            tokio::spawn(async move {
                let order = order();
                // The bare loops only: they are as few as the cores, and the pool is not larger than it must be.
                let mut warm = match (engine, reused) {
                    (false, true) => Some(parts.bare.warm(&order.message).await),
                    _ => None,
                };
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    match &mut warm {
                        Some(warm) => warm.call().await,
                        None if !engine => parts.bare.fresh(&order.message).await,
                        None if reused => parts.reused.run(&order).await,
                        None => parts.fresh.run(&order).await,
                    };
                    count += 1;
                    // Others have their turn, as they have in the pipeline at each await.
                    tokio::task::yield_now().await;
                }
                done.fetch_add(count, Ordering::Relaxed);
            })
        })
        .collect();
    tokio::time::sleep(IN_FLIGHT_ROUND).await;
    stop.store(true, Ordering::Relaxed);
    for task in running {
        task.await.unwrap();
    }
    done.load(Ordering::Relaxed) as f64 / since.elapsed().as_secs_f64()
}

async fn host_calls(fixtures: &Loaded) {
    println!("\n| host call, from a Rust guest and back | nanoseconds |");
    println!("|---|---|");
    for call in ["get-hit", "get-miss", "set", "delete", "compare-and-set", "scan-10", "send", "log", "config"] {
        let many = invocation(&format!("repeat/{call}"), CALLS.to_string());
        let none = invocation(&format!("repeat/{call}"), "0".to_owned());
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let mut turns = [Vec::new(), Vec::new()];
            for _ in 0..TURNS {
                for (message, turns) in [&many, &none].into_iter().zip(&mut turns) {
                    let since = Instant::now();
                    fixtures.run(message).await;
                    turns.push(since.elapsed().as_nanos() as f64);
                }
            }
            let [with, without] = turns.map(|turns| spread(turns.into_iter()).1);
            rounds.push((with - without) / f64::from(CALLS));
        }
        let (least, median, greatest) = spread(rounds.into_iter());
        println!("| {call} | {median:.0} ({least:.0} - {greatest:.0}) |");
    }
}

/// A host with many processors whose compiled code is there already.
fn start(component: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let components: Vec<_> = (0..PROCESSORS).map(|number| distinct(component, number)).collect();
    let load_all = || {
        let config = EngineConfig { cache_dir: Some(folder.path().to_owned()), ..EngineConfig::default() };
        let since = Instant::now();
        let engine = Engine::new(config).unwrap();
        let loaded: Vec<_> =
            components.iter().map(|component| Loaded::new(&engine, component, InstanceMode::Fresh)).collect();
        (since.elapsed().as_secs_f64() * 1e3, loaded)
    };
    let (compiling, _) = load_all();
    let rounds = (0..ROUNDS).map(|_| {
        let (time, loaded) = load_all();
        assert!(loaded.iter().all(|loaded| loaded.processor.from_cache()), "it was compiled again");
        time
    });
    let (least, median, greatest) = spread(rounds);
    println!("\n| a start with {PROCESSORS} processors | milliseconds | target |");
    println!("|---|---|---|");
    println!("| compiled code cached | {median:.0} ({least:.0} - {greatest:.0}) | <= 1000 |");
    println!("| nothing cached, once | {compiling:.0} | |");
}

/// The same component under another digest: with a custom section of its own.
fn distinct(component: &[u8], number: usize) -> Vec<u8> {
    let name = format!("bench-{number:04}");
    let mut bytes = component.to_vec();
    bytes.extend([0, name.len() as u8 + 1, name.len() as u8]);
    bytes.extend(name.bytes());
    bytes
}
