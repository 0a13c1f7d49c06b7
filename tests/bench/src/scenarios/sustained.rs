//! A million messages without a break at 1,024 in flight: what is left when nothing can be put off.

use std::time::Duration;

use crate::bare::redb::Bare;
use crate::measure::{Run, Spread, settle, short};
use crate::pipeline::Host;
use crate::plot::{Axis, Plot};
use crate::report::Section;
use crate::work::Ids;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "sustained",
    about: "a million messages at 1,024 in flight, random ids, beside redb direct",
    by_default: true,
    run,
};

const IN_FLIGHT: usize = 1_024;

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let records = bench.pick(2_000, 1_000_000, 1_000_000);
    let messages = bench.pick(8_192, 1_000_000, 1_000_000);
    let rounds = bench.rounds(3);
    section.text(format!("{rounds} rounds, each on fresh stores of {records} records; then {messages} messages."));
    section.table(&[
        "loop",
        "messages a second",
        "p50 ms",
        "p99 ms",
        "longest ms",
        "longest pause ms",
        "messages a commit",
        "behind s",
        "sync ms",
    ]);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(host(bench, section, records, messages));
        theirs.push(direct(bench, section, records, messages));
    }
    judge(section, &ours, &theirs);
    plot(section, &ours[0], &theirs[0]);
    Ok(())
}

fn host(bench: &Workbench, section: &mut Section, records: u64, messages: u64) -> Run {
    let mut host = Host::filled(bench.folder(), Ids::Random, records);
    settle();
    let sync_ms = bench.sync_ms();
    let run = host.run_fresh(IN_FLIGHT, messages);
    let behind = settle().as_secs_f64();
    row(section, "hapax, native", &run, short(behind), sync_ms);
    run
}

fn direct(bench: &Workbench, section: &mut Section, records: u64, messages: u64) -> Run {
    let mut bare = Bare::filled(bench.folder(), Ids::Random, records);
    let sync_ms = bench.sync_ms();
    let run = bare.run(IN_FLIGHT as u64, messages);
    row(section, "redb direct", &run, "-".into(), sync_ms);
    run
}

fn row(section: &mut Section, name: &str, run: &Run, behind: String, sync_ms: f64) {
    section.row(vec![
        name.into(),
        short(run.rate()),
        short(run.latency_ms(0.5)),
        short(run.latency_ms(0.99)),
        short(run.latency_ms(1.0)),
        short(run.longest_pause_ms()),
        short(run.group),
        behind,
        short(sync_ms),
    ]);
}

fn judge(section: &mut Section, ours: &[Run], theirs: &[Run]) {
    let each = |runs: &[Run], value: fn(&Run) -> f64| runs.iter().map(value).collect::<Vec<_>>();
    let ratio = Spread::ratio(&each(ours, Run::rate), &each(theirs, Run::rate));
    section.judge("sustained", format!("{ratio} x"), ratio.median >= 5.0);
    let p99 = Spread::of(each(ours, |run| run.latency_ms(0.99)));
    section.judge("sustained-p99", format!("{p99} ms"), p99.median <= 100.0);
    let pause = Spread::of(each(ours, Run::longest_pause_ms));
    section.judge("sustained-pause", format!("{pause} ms"), pause.greatest <= 250.0);
}

fn plot(section: &mut Section, ours: &Run, theirs: &Run) {
    // About a hundred points of the shorter line.
    let window = (ours.elapsed.min(theirs.elapsed) / 100).max(Duration::from_millis(20));
    section.plot(
        "rate",
        &Plot {
            title: "Throughput over time, first round",
            x: Axis { label: "seconds", logarithmic: false },
            y: Axis { label: "messages a second", logarithmic: false },
            lines: vec![
                ("hapax, native".into(), ours.over_time(window)),
                ("redb direct".into(), theirs.over_time(window)),
            ],
        },
    );
    section.plot(
        "histogram",
        &Plot {
            title: "Latencies, first round",
            x: Axis { label: "milliseconds", logarithmic: true },
            y: Axis { label: "% of messages", logarithmic: false },
            lines: vec![("hapax, native".into(), ours.histogram()), ("redb direct".into(), theirs.histogram())],
        },
    );
}
