//! The engine beside a bare wasmtime loop, in turn: one invocation, many in flight, each host call.
//! Writes to no store.

mod bare;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Context, EffectLimits, Entry, Invocation, Message, MessageProcessor, StateView, StoreError, Version};
use hapax_engine::{Engine, EngineConfig, InstanceMode, LoadOptions, ReuseLimits, WasmProcessor};

use self::bare::Bare;
use crate::measure::Spread;
use crate::report::Section;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "engine",
    about: "one invocation, many in flight and each host call, beside a bare wasmtime loop with the same limits",
    by_default: true,
    run,
};

/// Instances at once, in the engine and in the bare loop.
const INSTANCES: u32 = 256;
/// Invocations of one loop before the other has its turn.
const TURN: u32 = 100;
/// Turns of a loop in a round.
const TURNS: u32 = 20;
/// Duration of a round with many messages in flight.
const IN_FLIGHT_ROUND: Duration = Duration::from_millis(700);
/// Calls of one kind in one message; none of them is over a limit.
const CALLS: u32 = 500;
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

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let guests = std::env::var_os("HAPAX_GUESTS").map(PathBuf::from);
    let guests = guests.ok_or_else(|| Missing("HAPAX_GUESTS is not set; `cargo xtask bench` sets it".into()))?;
    let component = |name: &str| {
        let path = guests.join(name).with_extension("wasm");
        std::fs::read(&path).map_err(|error| Missing(format!("{}: {error}", path.display())))
    };
    let (intake, fixtures) = (component("order-intake")?, component("hapax-fixtures")?);
    let config = EngineConfig { max_instances: INSTANCES, ..EngineConfig::default() };
    let engine = Engine::new(config).unwrap();
    let parts = Arc::new(Parts {
        fresh: Loaded::new(&engine, &intake, InstanceMode::Fresh),
        reused: Loaded::new(&engine, &intake, REUSE),
        bare: Bare::new(&intake, INSTANCES + EngineConfig::default().kept_instances),
        order: order(),
    });
    let rounds = bench.rounds(5);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(one_at_a_time(section, rounds, &parts));
    in_flight(section, rounds, &parts);
    runtime.block_on(host_calls(section, rounds, &Loaded::new(&engine, &fixtures, REUSE)));
    Ok(())
}

/// One component, three ways to run it.
struct Parts {
    fresh: Loaded,
    reused: Loaded,
    bare: Bare,
    order: Invocation,
}

async fn one_at_a_time(section: &mut Section, rounds: usize, parts: &Parts) {
    let order = &parts.order;
    let mut warm = parts.bare.warm(&order.message).await;
    let mut figures = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        let mut turns = [const { Vec::new() }; 4];
        for _ in 0..TURNS {
            turns[0].push(timed(async || parts.fresh.run(order).await).await);
            turns[1].push(timed(async || parts.bare.fresh(&order.message).await).await);
            turns[2].push(timed(async || parts.reused.run(order).await).await);
            turns[3].push(timed(async || warm.call().await).await);
        }
        // The middle turn: one during which another program had the core says nothing.
        for (figures, turns) in figures.iter_mut().zip(turns) {
            figures.push(Spread::of(turns).median);
        }
    }
    section.table(&["one invocation of `order-intake`", "engine, us", "bare wasmtime, us", "ratio"]);
    let [engine_fresh, bare_fresh, engine_reused, bare_warm] = &figures;
    section.fact("bare-fresh-us", Spread::of(bare_fresh.iter().copied()).median);
    for (what, target, most, ours, bare) in [
        ("fresh instance", "engine-fresh", 1.2, engine_fresh, bare_fresh),
        ("reused instance", "engine-reused", 2.0, engine_reused, bare_warm),
    ] {
        let ratio = Spread::ratio(ours, bare);
        let spreads = [ours, bare].map(|times| Spread::of(times.iter().copied()).to_string());
        section.row(vec![what.into(), spreads[0].clone(), spreads[1].clone(), ratio.to_string()]);
        section.judge(target, format!("{ratio} x"), ratio.median <= most);
    }
}

/// Microseconds of an invocation, over a turn of one loop.
async fn timed(mut run: impl AsyncFnMut() -> usize) -> f64 {
    let since = Instant::now();
    for _ in 0..TURN {
        assert!(run().await > 0, "the plugin answered nothing");
    }
    since.elapsed().as_secs_f64() * 1e6 / f64::from(TURN)
}

/// The engine alone with many in flight, on all cores: what it leaves to the rest of the pipeline.
fn in_flight(section: &mut Section, rounds: usize, parts: &Arc<Parts>) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    section.text(format!("Without a store, on {cores} cores; as many bare loops as there are cores."));
    section.table(&["in flight", "instances", "engine, a second", "bare wasmtime, a second", "ratio"]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores).enable_all().build().unwrap();
    for tasks in [1, cores, 64, 1_024] {
        for reused in [false, true] {
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                ours.push(runtime.block_on(rate(tasks, parts, reused, true)));
                // As many loops as there are cores: more would only stand in each other's way.
                bare.push(runtime.block_on(rate(tasks.min(cores), parts, reused, false)));
            }
            if tasks == cores && !reused {
                section.fact("bare-fresh-all-cores", Spread::of(bare.iter().copied()).median);
            }
            let ratio = Spread::ratio(&ours, &bare).to_string();
            let [ours, bare] = [ours, bare].map(|rates| Spread::of(rates).to_string());
            let mode = if reused { "reused" } else { "fresh" };
            section.row(vec![tasks.to_string(), mode.into(), ours, bare, ratio]);
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
                // The bare loops only: they are as few as the cores, and the pool is not larger
                // than it must be.
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

async fn host_calls(section: &mut Section, rounds: usize, fixtures: &Loaded) {
    section.table(&["host call, from a Rust guest and back", "ns"]);
    for call in ["get-hit", "get-miss", "set", "delete", "compare-and-set", "scan-10", "send", "log", "config"] {
        let many = invocation(&format!("repeat/{call}"), CALLS.to_string());
        let none = invocation(&format!("repeat/{call}"), "0".to_owned());
        let mut times = Vec::new();
        for _ in 0..rounds {
            let [with, without] = [&many, &none].map(|message| async move {
                let since = Instant::now();
                for _ in 0..TURNS {
                    fixtures.run(message).await;
                }
                since.elapsed().as_nanos() as f64
            });
            times.push((with.await - without.await) / f64::from(CALLS * TURNS));
        }
        section.row(vec![call.into(), Spread::of(times).to_string()]);
    }
}
