//! WASM through the whole pipeline: `hapax run` over a file of orders at 1,024 in flight, beside
//! the same pipeline over the same file with the same work compiled in.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::BoxFuture;
use hapax_core::{
    Context, ContextError, Failure, Invocation, NativeProcessor, Observer, Options, Outgoing, Output, Report,
};
use hapax_transport::JsonlSource;
use tokio::sync::watch;

use crate::hapax::{self, Hapax};
use crate::measure::{Spread, children_cpu, cpu_of, settle};
use crate::pipeline::Host;
use crate::report::{Met, Section};
use crate::work::Ids;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "wasm",
    about: "order-intake as a component, a fresh instance a message, 1,024 in flight, through `hapax run`",
    by_default: true,
    run,
};

const IN_FLIGHT: usize = 1_024;

/// One loop's rounds.
#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    cpu_us: Vec<f64>,
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let hapax = Hapax::find()?;
    let folder = tempfile::tempdir_in(bench.folder()).unwrap();
    let messages = bench.pick(500, 100_000, 100_000);
    let file = orders(folder.path(), messages);
    let one = orders(folder.path(), 1);
    // Compiled once; then what a start costs, which no round shall pay.
    whole(&hapax, folder.path(), &one, IN_FLIGHT);
    let (mut wasm, mut native, mut sync_ms) = (Figures::default(), Figures::default(), Vec::new());
    for _ in 0..bench.rounds(5) {
        sync_ms.push(bench.sync_ms());
        let (start, start_cpu) = whole(&hapax, folder.path(), &one, IN_FLIGHT);
        let (wall, cpu) = whole(&hapax, folder.path(), &file, IN_FLIGHT);
        wasm.rate.push(messages as f64 / (wall - start));
        wasm.cpu_us.push((cpu - start_cpu) * 1e6 / messages as f64);
        let (wall, cpu) = compiled_in(bench, &file);
        native.rate.push(messages as f64 / wall);
        native.cpu_us.push(cpu * 1e6 / messages as f64);
        settle();
    }
    section.text(format!(
        "{messages} orders a round on fresh stores: each reads and writes its customer's balance and puts one message into the \
         outbox. Sync time {} ms. The start of the process is taken off.",
        Spread::of(sync_ms)
    ));
    section.table(&["processor", "messages a second", "CPU us a message"]);
    for (name, figures) in [("order-intake, WASM, `hapax run`", &wasm), ("the same work compiled in", &native)] {
        let cell = |values: &[f64]| Spread::of(values.iter().copied()).to_string();
        section.row(vec![name.into(), cell(&figures.rate), cell(&figures.cpu_us)]);
    }
    judge(section, &wasm, &native);
    Ok(())
}

/// The bare loop's time is the engine scenario's to measure.
fn judge(section: &mut Section, wasm: &Figures, native: &Figures) {
    let share = Spread::ratio(&wasm.rate, &native.rate);
    section.text(format!("To the same work compiled in: {share} x."));
    let Some(bare) = section.fact_of("engine", "bare-fresh-all-cores") else {
        let measured = format!("{share} x of the same work compiled in; what a bare loop leaves room for is not known");
        return section.judge("wasm", measured, Met::NotJudged);
    };
    // The rest of the pipeline takes the time that it takes without WASM, the bare loop its own,
    // both on all cores: two that run at once are slower than one alone, since cores share what
    // they do not have twice.
    let room: Vec<_> = native.rate.iter().map(|rate| 1.0 / (1.0 / rate + 1.0 / bare)).collect();
    let ratio = Spread::ratio(&wasm.rate, &room);
    section.text(format!(
        "Bare loops of instantiate + call, one a core, do {bare:.0} a second (scenario `engine`); beside the native pipeline on \
         the same cores they leave room for {} messages a second.",
        Spread::of(room)
    ));
    section.judge("wasm", format!("{ratio} x"), ratio.median >= 0.8);
}

/// A file of orders.
pub(crate) fn orders(folder: &Path, messages: u64) -> PathBuf {
    let file = folder.join(format!("orders-{messages}.jsonl"));
    std::fs::write(&file, (0..messages).map(hapax::order_line).collect::<String>()).unwrap();
    file
}

/// `hapax run` on a fresh store: seconds and CPU seconds of the whole process.
pub(crate) fn whole(hapax: &Hapax, cache: &Path, input: &Path, in_flight: usize) -> (f64, f64) {
    let store = tempfile::tempdir_in(cache).unwrap();
    let mut command = hapax.command(cache);
    command.arg("run").arg("--component").arg(&hapax.component).arg("--input").arg(input);
    command.arg("--store").arg(store.path().join("store")).args(["--concurrency", &in_flight.to_string()]);
    let (since, cpu) = (Instant::now(), children_cpu());
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "hapax run ended with {status}");
    (since.elapsed().as_secs_f64(), (children_cpu() - cpu).as_secs_f64())
}

/// Runs the same pipeline over the same file, with the same work compiled in; returns seconds and
/// CPU seconds.
fn compiled_in(bench: &Workbench, input: &Path) -> (f64, f64) {
    let host = Host::filled(bench.folder(), Ids::Random, 0);
    let consumer = host.consumer_of(Arc::new(NativeProcessor::new(take_order)), Options::default().cache_bytes);
    let mut source = JsonlSource::open(input, 1 << 20).unwrap();
    let (_stop, stopping) = watch::channel(false);
    let (since, cpu) = (Instant::now(), cpu_of(std::process::id()));
    let running = hapax_core::run_source(&consumer, &mut source, Arc::new(Deaf), IN_FLIGHT, stopping);
    host.runtime.block_on(running).unwrap();
    (since.elapsed().as_secs_f64(), (cpu_of(std::process::id()) - cpu).as_secs_f64())
}

struct Deaf;

impl Observer for Deaf {
    fn ended(&self, _: Report<'_>) {}
}

/// Work of the guest `order-intake`.
fn take_order<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
    Box::pin(async move {
        let invalid = |error: &dyn std::fmt::Display| Failure::Invalid(error.to_string());
        let failed = |error: ContextError| Failure::retry(error.to_string());
        let order: serde_json::Value = serde_json::from_slice(&run.message.data).map_err(|error| invalid(&error))?;
        let text = |name: &str| order[name].as_str().ok_or_else(|| invalid(&name));
        let key = format!("balance/{}", text("customer")?);
        let before = context.get(&key).await.map_err(failed)?;
        let before: i64 =
            before.map_or(Ok(0), |text| serde_json::from_slice(&text)).map_err(|error| invalid(&error))?;
        let balance = before + order["amount_cents"].as_i64().ok_or_else(|| invalid(&"amount_cents"))?;
        context.set(&key, balance.to_string()).map_err(failed)?;
        let outgoing = Outgoing {
            kind: "order.accepted".into(),
            content_type: Some("application/json".into()),
            data: run.message.data.clone(),
            ..Outgoing::default()
        };
        context.send(outgoing).map_err(failed)?;
        let answer = format!(r#"{{"order_id":"{}","balance_cents":{balance}}}"#, text("order_id")?);
        Ok(Output { content_type: Some("application/json".into()), data: answer.into() })
    })
}
