//! Throughput and latency by the number of messages in flight, beside redb direct and the bare
//! append, on a million records.

use crate::bare::append;
use crate::bare::redb::Bare;
use crate::measure::{Run, Spread, settle, short};
use crate::pipeline::Host;
use crate::plot::{Axis, Line, Plot};
use crate::report::Section;
use crate::work::Ids;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "throughput",
    about: "throughput and latency by messages in flight, beside redb direct and append + fdatasync",
    by_default: true,
    run,
};

/// Messages in flight, and how many messages a round of the host, of redb direct and of the append
/// has.
const STEPS: [(usize, [u64; 3]); 5] = [
    (1, [2_000, 1_000, 2_000]),
    (8, [8_000, 2_400, 8_000]),
    (64, [40_000, 9_600, 40_000]),
    (256, [80_000, 15_360, 80_000]),
    (1_024, [120_000, 30_720, 245_760]),
];
const LOOPS: [&str; 3] = ["hapax, native", "redb direct", "append + fdatasync"];

/// The rounds of the three loops at one number in flight.
struct Step {
    in_flight: usize,
    loops: [Vec<Run>; 3],
    /// Time that the host still worked after each round, in seconds.
    behind: Vec<f64>,
    /// The disk's sync time at each round.
    sync_ms: Vec<f64>,
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    for ids in [Ids::Random, Ids::Ordered] {
        series(bench, section, ids);
    }
    section.text(
        "\"Behind\" is how long the process still worked after the last answer of a round, before the next loop had its turn. \
         redb direct writes groups as large as the number in flight, alone on the machine; its latency is its group's.",
    );
    Ok(())
}

fn series(bench: &Workbench, section: &mut Section, ids: Ids) {
    let records = bench.pick(2_000, 1_000_000, 1_000_000);
    let mut host = Host::filled(bench.folder(), ids, records);
    let mut bare = Bare::filled(bench.folder(), ids, records);
    settle();
    section.text(format!("### {} ids\n\nOn {records} records that are there already.", ids.name()));
    section.table(&[
        "in flight",
        "loop",
        "messages a second",
        "p50 ms",
        "p99 ms",
        "longest ms",
        "messages a commit",
        "behind s",
        "sync ms",
    ]);
    let steps: Vec<_> = STEPS.iter().map(|step| measure(bench, section, &mut host, &mut bare, *step)).collect();
    section.text(format!("At the end the host's store held {} records, redb direct {}.", host.records, bare.records));
    ratios(section, &steps);
    if ids == Ids::Random {
        judge(section, &steps);
    }
    plots(section, ids, &steps);
}

fn measure(
    bench: &Workbench,
    section: &mut Section,
    host: &mut Host,
    bare: &mut Bare,
    (in_flight, messages): (usize, [u64; 3]),
) -> Step {
    let group = in_flight as u64;
    // A quick round has a few groups of each loop.
    let messages = messages.map(|messages| bench.pick(group * 4, messages, messages));
    let mut step = Step { in_flight, loops: [const { Vec::new() }; 3], behind: Vec::new(), sync_ms: Vec::new() };
    for _ in 0..bench.rounds(5) {
        step.sync_ms.push(bench.sync_ms());
        step.loops[0].push(host.run_fresh(in_flight, messages[0]));
        step.behind.push(settle().as_secs_f64());
        step.loops[1].push(bare.run(group, messages[1]));
        step.loops[2].push(append::run(bench.folder(), Ids::Random, group, messages[2]));
    }
    for (at, (name, runs)) in LOOPS.iter().zip(&step.loops).enumerate() {
        let of = |value: fn(&Run) -> f64| Spread::of(runs.iter().map(value));
        section.row(vec![
            in_flight.to_string(),
            (*name).into(),
            of(Run::rate).to_string(),
            of(|run| run.latency_ms(0.5)).to_string(),
            of(|run| run.latency_ms(0.99)).to_string(),
            short(of(|run| run.latency_ms(1.0)).greatest),
            short(of(|run| run.group).median),
            if at == 0 { Spread::of(step.behind.iter().copied()).to_string() } else { "-".into() },
            short(Spread::of(step.sync_ms.iter().copied()).median),
        ]);
    }
    step
}

impl Step {
    fn each(&self, at: usize, value: fn(&Run) -> f64) -> Vec<f64> {
        self.loops[at].iter().map(value).collect()
    }

    /// Ours to another loop's, round by round.
    fn ratio(&self, other: usize, value: fn(&Run) -> f64) -> Spread {
        Spread::ratio(&self.each(0, value), &self.each(other, value))
    }

    fn p99_to_p50(&self) -> Spread {
        Spread::of(self.loops[0].iter().map(|run| run.latency_ms(0.99) / run.latency_ms(0.5)))
    }

    fn median(&self, at: usize, value: fn(&Run) -> f64) -> f64 {
        Spread::of(self.each(at, value)).median
    }
}

fn ratios(section: &mut Section, steps: &[Step]) {
    section.table(&["in flight", "rate to redb direct", "rate to append", "p50 to append's", "p99 to own p50"]);
    for step in steps {
        section.row(vec![
            step.in_flight.to_string(),
            step.ratio(1, Run::rate).to_string(),
            step.ratio(2, Run::rate).to_string(),
            step.ratio(2, |run| run.latency_ms(0.5)).to_string(),
            step.p99_to_p50().to_string(),
        ]);
    }
}

fn judge(section: &mut Section, steps: &[Step]) {
    let [one, _, sixty_four, ..] = steps else { return };
    let rate = one.ratio(2, Run::rate);
    section.judge("1-rate", format!("{rate} x"), rate.median >= 0.8);
    let p50 = one.ratio(2, |run| run.latency_ms(0.5));
    section.judge("1-p50", format!("{p50} x"), p50.median <= 1.3);
    let rate = sixty_four.ratio(1, Run::rate);
    section.judge("64-rate", format!("{rate} x"), rate.median >= 5.0);
    let tail = sixty_four.p99_to_p50();
    section.judge("64-p99", format!("{tail} x"), tail.median <= 2.0);
}

fn plots(section: &mut Section, ids: Ids, steps: &[Step]) {
    let by_in_flight = |at: usize, value: fn(&Run) -> f64| -> Vec<(f64, f64)> {
        steps.iter().map(|step| (step.in_flight as f64, step.median(at, value))).collect()
    };
    let in_flight = || Axis { label: "messages in flight", logarithmic: true };
    section.plot(
        &format!("{}-rate", ids.name()),
        &Plot {
            title: &format!("Throughput, {} ids", ids.name()),
            x: in_flight(),
            y: Axis { label: "messages a second", logarithmic: true },
            lines: LOOPS.iter().enumerate().map(|(at, name)| ((*name).into(), by_in_flight(at, Run::rate))).collect(),
        },
    );
    let latency = |name: &str, at: usize| -> [Line; 2] {
        [
            (format!("{name}, p50"), by_in_flight(at, |run| run.latency_ms(0.5))),
            (format!("{name}, p99"), by_in_flight(at, |run| run.latency_ms(0.99))),
        ]
    };
    section.plot(
        &format!("{}-latency", ids.name()),
        &Plot {
            title: &format!("Latency, {} ids", ids.name()),
            x: in_flight(),
            y: Axis { label: "milliseconds", logarithmic: true },
            lines: [latency("hapax", 0), latency("redb direct", 1)].concat(),
        },
    );
    let histogram = |step: &Step| (format!("{} in flight", step.in_flight), step.loops[0][0].histogram());
    section.plot(
        &format!("{}-histogram", ids.name()),
        &Plot {
            title: &format!("Latencies of one round, hapax, {} ids", ids.name()),
            x: Axis { label: "milliseconds", logarithmic: true },
            y: Axis { label: "% of messages", logarithmic: false },
            lines: steps.iter().map(histogram).collect(),
        },
    );
}
