//! This build beside another one, each a process of its own, round by round in turn: whether a
//! change has made the host slower.

use std::path::Path;

use tempfile::TempDir;

use crate::child::Child;
use crate::measure::Spread;
use crate::report::Section;
use crate::work::Ids;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "builds",
    about: "this build beside another one's bench, given by --against: rates, latencies, processor time",
    by_default: false,
    run,
};

/// Messages in flight, and messages of a round.
const STEPS: [(usize, u64); 5] = [(1, 2_000), (8, 8_000), (64, 40_000), (256, 60_000), (1_024, 80_000)];

/// Rounds of each build before the processes are started anew.
const TURNS: usize = 3;

/// A build's results of one round: messages a second, p50 and p99 in milliseconds, processor time a
/// message in microseconds.
type Round = [f64; 4];

/// A build at work, on a store of its own.
struct Build {
    child: Child,
    _folder: TempDir,
}

impl Build {
    fn start(bench: &Workbench, program: &Path, ids: Ids, records: u64) -> Self {
        let folder = tempfile::tempdir_in(bench.folder()).unwrap();
        let store = folder.path().join("store");
        let child = Child::start_of(program, "rounds", &store, u64::from(ids == Ids::Ordered), records);
        Self { child: child.wait_for("ready"), _folder: folder }
    }

    fn round(&mut self, in_flight: usize, messages: u64) -> Round {
        let answer = self.child.ask(&format!("{in_flight} {messages}"));
        let numbers: Vec<f64> = answer.split(' ').map(|number| number.parse().unwrap()).collect();
        numbers.try_into().unwrap()
    }
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let Some(other) = &bench.against else {
        return Err(Missing("give --against the bench of another build: its target/release/hapax-bench".into()));
    };
    let this = std::env::current_exe().unwrap();
    let (records, pairs) = (bench.pick(2_000, 300_000, 1_000_000), bench.rounds(9));
    section.text(format!(
        "This build's figure to that of the other, each in a process of its own on {records} records. {pairs} pairs of processes, since no \
         two are alike, not of one build either; of each the median of {TURNS} rounds, in turn. Processor time is a message's, with \
         what was done behind the answers."
    ));
    for ids in [Ids::Random, Ids::Ordered] {
        let mut ratios: Vec<[Vec<f64>; 4]> = STEPS.iter().map(|_| [const { Vec::new() }; 4]).collect();
        for pair in 0..pairs {
            // Who is started first is slower, also than itself: that changes too.
            let mut builds = if pair % 2 == 0 { [&*this, other] } else { [other, &*this] }
                .map(|program| Build::start(bench, program, ids, records));
            if pair % 2 == 1 {
                builds.reverse();
            }
            for ((in_flight, messages), ratios) in STEPS.iter().zip(&mut ratios) {
                let messages = bench.pick(*in_flight as u64 * 4, *messages, *messages);
                let [ours, theirs] = turns(&mut builds, pair, *in_flight, messages);
                (0..4).for_each(|at| ratios[at].push(median(&ours, at) / median(&theirs, at)));
            }
            builds.into_iter().for_each(|build| build.child.end());
        }
        section.text(format!("### {} ids", ids.name()));
        section.table(&["in flight", "rate", "p50", "p99", "processor time"]);
        for ((in_flight, _), ratios) in STEPS.iter().zip(ratios) {
            let spreads = ratios.map(|ratios| Spread::of(ratios).to_string());
            section.row([in_flight.to_string()].into_iter().chain(spreads).collect());
        }
    }
    Ok(())
}

/// Rounds of both in turn; who begins changes, so that neither always comes second.
fn turns(builds: &mut [Build; 2], pair: usize, in_flight: usize, messages: u64) -> [Vec<Round>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for turn in 0..2 * TURNS {
        let at = (pair + turn + turn / 2) % 2;
        all[at].push(builds[at].round(in_flight, messages));
    }
    all
}

fn median(rounds: &[Round], at: usize) -> f64 {
    Spread::of(rounds.iter().map(|round| round[at])).median
}
