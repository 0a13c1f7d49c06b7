//! `cargo xtask bench`: the pipeline beside bare loops that write the same bytes, in one run, in turn. Prints ratios; judges
//! nothing. The load generator runs on the same cores as what it measures.
#![expect(clippy::unwrap_used, reason = "a bench that cannot go on says so by panicking")]

mod bare;
mod engine;
mod pipeline;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Rounds; medians are printed with the least and the greatest.
const ROUNDS: usize = 5;

/// What one loop did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Messages a second.
    pub(crate) rate: f64,
    /// Median latency of a message or of its group.
    pub(crate) p50: Duration,
    /// 99th percentile, likewise.
    pub(crate) p99: Duration,
    /// Messages a commit.
    pub(crate) group: f64,
}

/// Latencies of one loop, to be summed up.
#[derive(Debug, Default)]
pub(crate) struct Latencies(pub(crate) Vec<Duration>);

impl Latencies {
    pub(crate) fn measured(mut self, messages: usize, elapsed: Duration, group: f64) -> Measured {
        self.0.sort_unstable();
        let at = |share: f64| self.0[((self.0.len() - 1) as f64 * share) as usize];
        Measured { rate: messages as f64 / elapsed.as_secs_f64(), p50: at(0.5), p99: at(0.99), group }
    }
}

fn main() {
    let folder: PathBuf = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    engine::report(&std::env::var_os("HAPAX_GUESTS").map(PathBuf::from).unwrap());
    println!("\nStore on {}; {ROUNDS} rounds in turn; median (least - greatest)\n", folder.display());
    println!("| in flight | loop | messages a second | p50 | p99 | messages a commit |");
    println!("|---|---|---|---|---|---|");
    for (in_flight, messages) in [(1, 1_000), (64, 20_000), (1_024, 60_000)] {
        compare(&folder, in_flight, messages);
    }
    println!();
    pipeline::duplicates(&folder);
}

fn compare(folder: &Path, in_flight: usize, messages: usize) {
    let mut rounds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let pipeline = pipeline::fresh(folder, in_flight, messages);
        // The bare loop writes groups of the size that the pipeline came to.
        let group = (pipeline.group.round() as usize).max(1);
        rounds[0].push(pipeline);
        rounds[1].push(bare::redb(folder, group, messages));
        rounds[2].push(bare::append(folder, in_flight, messages));
    }
    for (name, rounds) in ["hapax, native processor", "redb, bare", "append + fdatasync"].iter().zip(&rounds) {
        let rate = spread(rounds.iter().map(|round| round.rate));
        let (p50, p99) = (median(rounds.iter().map(|r| r.p50)), median(rounds.iter().map(|r| r.p99)));
        let group = spread(rounds.iter().map(|round| round.group));
        println!(
            "| {in_flight} | {name} | {:.0} ({:.0} - {:.0}) | {p50:.2?} | {p99:.2?} | {:.0} |",
            rate.1, rate.0, rate.2, group.1
        );
    }
    for (other, name, target) in [(1, "redb, bare, same groups", "target >= 0.9"), (2, "append + fdatasync", "part 2")]
    {
        let ratios = spread(rounds[0].iter().zip(&rounds[other]).map(|(ours, bare)| ours.rate / bare.rate));
        println!(
            "| {in_flight} | **ratio to {name}** | **{:.2}** ({:.2} - {:.2}) | {target} | | |",
            ratios.1, ratios.0, ratios.2
        );
    }
}

/// Least, median, greatest.
pub(crate) fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}
