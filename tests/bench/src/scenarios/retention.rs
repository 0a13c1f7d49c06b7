//! Effect of dropping expired records on live traffic, at an offered load that the host carries
//! easily.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hapax_core::{Handling, Message, Options, Outcome};

use crate::measure::{Run, Sample, Spread, folder_bytes, settle, short};
use crate::pipeline::{Host, now_ms};
use crate::plot::{Axis, Plot};
use crate::report::{Met, Section};
use crate::work::Ids;
use crate::workbench::{Size, Workbench};
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "retention",
    about: "live traffic at a fixed offered load while a tenth of 1 million or (--long) 10 million records expires",
    by_default: true,
    run,
};

/// Messages a second that are offered: about half of what redb direct carries at 64 in flight.
const OFFERED: u64 = 4_000;
/// A message that finds so many in flight waits, as a source that stops pulling.
const IN_FLIGHT_MAX: usize = 1_024;

/// One phase: what live traffic did, and what was dropped meanwhile.
struct Phase {
    run: Run,
    /// Records dropped, and how many seconds that took.
    dropped: Option<(u64, f64)>,
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let records = bench.pick(2_000, 1_000_000, 10_000_000);
    let window = Duration::from_secs(bench.pick(1, 10, 20));
    let mut phases = (Vec::new(), Vec::new());
    let (mut disk, mut sync_ms) = (Vec::new(), Vec::new());
    section.text(format!(
        "{OFFERED} messages a second are offered for {} s, first in quiet, then while the {} expired of {records} records are \
         dropped. Latency counts from when a message was due, so that a stall is not hidden.",
        window.as_secs(),
        records / 10
    ));
    for _ in 0..bench.rounds(bench.pick(1, 3, 3)) {
        let mut host = with_expired(bench, records);
        sync_ms.push(bench.sync_ms());
        phases.0.push(phase(&mut host, window, false));
        let before = folder_bytes(host.path());
        phases.1.push(phase(&mut host, window, true));
        settle();
        disk.push((before, folder_bytes(host.path())));
    }
    table(section, &phases, &sync_ms);
    let (before, after) = disk[0];
    section.text(format!(
        "The store had {} MiB before and {} MiB after, in the first round.",
        before >> 20,
        after >> 20
    ));
    plot(section, &phases.0[0].run, &phases.1[0].run);
    judge(bench, section, &phases);
    Ok(())
}

/// A store of which the first tenth has expired.
fn with_expired(bench: &Workbench, records: u64) -> Host {
    let mut host = Host::filled(bench.folder(), Ids::Random, 0);
    host.fill_changed(records / 10, now_ms() - 2 * Options::default().retention_ms);
    host.fill(records);
    settle();
    host
}

fn phase(host: &mut Host, window: Duration, dropping: bool) -> Phase {
    let messages = host.fresh(OFFERED * window.as_secs());
    std::thread::scope(|scope| {
        let host = &*host;
        let drop = scope.spawn(move || {
            dropping.then(|| {
                // In the midst of it.
                std::thread::sleep(window / 10);
                let since = Instant::now();
                (host.expire(), since.elapsed().as_secs_f64())
            })
        });
        let run = offer(host, messages);
        Phase { run, dropped: drop.join().unwrap() }
    })
}

/// Sends each message when it is due, whatever became of those before.
fn offer(host: &Host, messages: Vec<Message>) -> Run {
    let consumer = host.consumer(Options::default().cache_bytes);
    let count = messages.len() as u64;
    let slots = Arc::new(tokio::sync::Semaphore::new(IN_FLIGHT_MAX));
    let (ended, since) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let samples = host.runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for (number, message) in messages.into_iter().enumerate() {
            let due = since + Duration::from_secs_f64(number as f64 / OFFERED as f64);
            tokio::time::sleep_until(due.into()).await;
            let slot = slots.clone().acquire_owned().await.unwrap();
            let (consumer, ended) = (consumer.clone(), ended.clone());
            tasks.spawn(async move {
                let outcome = consumer.handle(message, Handling::default()).await.unwrap();
                assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
                drop(slot);
                ended.fetch_add(1, Relaxed);
                Sample::of(since, due)
            });
        }
        tasks.join_all().await
    });
    assert_eq!(ended.load(Relaxed), count);
    Run::new(samples, count, since.elapsed(), f64::NAN)
}

fn table(section: &mut Section, (quiet, dropping): &(Vec<Phase>, Vec<Phase>), sync_ms: &[f64]) {
    section.table(&["", "messages a second", "p50 ms", "p99 ms", "longest ms", "dropped", "in s", "sync ms"]);
    for (name, phases) in [("quiet", quiet), ("while records are dropped", dropping)] {
        let of = |value: fn(&Run) -> f64| Spread::of(phases.iter().map(|phase| value(&phase.run))).to_string();
        let dropped: Vec<_> = phases.iter().filter_map(|phase| phase.dropped).collect();
        let (records, seconds) = match dropped.first() {
            Some((records, _)) => (records.to_string(), Spread::of(dropped.iter().map(|drop| drop.1)).to_string()),
            None => ("-".into(), "-".into()),
        };
        section.row(vec![
            name.into(),
            of(Run::rate),
            of(|run| run.latency_ms(0.5)),
            of(|run| run.latency_ms(0.99)),
            of(|run| run.latency_ms(1.0)),
            records,
            seconds,
            short(Spread::of(sync_ms.iter().copied()).median),
        ]);
    }
}

fn plot(section: &mut Section, quiet: &Run, dropping: &Run) {
    let window = Duration::from_millis(200);
    section.plot(
        "rate",
        &Plot {
            title: "Live traffic, first round",
            x: Axis { label: "seconds", logarithmic: false },
            y: Axis { label: "messages a second", logarithmic: false },
            lines: vec![
                ("quiet".into(), quiet.over_time(window)),
                ("while records are dropped".into(), dropping.over_time(window)),
            ],
        },
    );
    section.plot(
        "latency",
        &Plot {
            title: "Latencies of live traffic, first round",
            x: Axis { label: "milliseconds", logarithmic: true },
            y: Axis { label: "% of messages", logarithmic: false },
            lines: vec![
                ("quiet".into(), quiet.histogram()),
                ("while records are dropped".into(), dropping.histogram()),
            ],
        },
    );
}

fn judge(bench: &Workbench, section: &mut Section, (quiet, dropping): &(Vec<Phase>, Vec<Phase>)) {
    let each = |phases: &[Phase], value: fn(&Run) -> f64| phases.iter().map(|p| value(&p.run)).collect::<Vec<_>>();
    let rate = Spread::ratio(&each(dropping, Run::rate), &each(quiet, Run::rate));
    let p99 = |run: &Run| run.latency_ms(0.99);
    let p99 = Spread::ratio(&each(dropping, p99), &each(quiet, p99));
    let met = |met: bool| if bench.size == Size::Long { Met::from(met) } else { Met::NotJudged };
    let at = if bench.size == Size::Long { "" } else { " at a tenth of the records" };
    section.judge("retention", format!("{rate} x{at}"), met(rate.median >= 0.95));
    section.judge("retention-p99", format!("{p99} x{at}"), met(p99.median <= 2.0));
}
