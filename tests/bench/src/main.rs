//! `cargo xtask bench`: the pipeline beside bare loops and other ways that write the same bytes, in
//! one run, in turn. Writes a report with ratios beside their targets. The load generator runs on
//! the same cores as what it measures.
#![expect(clippy::unwrap_used, reason = "a bench that cannot go on says so by panicking")]

mod bare;
mod child;
mod hapax;
mod http;
mod measure;
mod pipeline;
mod plot;
mod report;
mod scenarios;
mod server;
mod targets;
mod work;
mod workbench;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;

use crate::report::Section;
use crate::workbench::{Size, Workbench};

/// The allocator of the host itself, for the bare loops too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures Hapax beside bare loops and other ways to do the job, and writes a report.
#[derive(clap::Parser)]
#[command(name = "cargo xtask bench --", bin_name = "cargo xtask bench --")]
struct Cli {
    /// Scenarios to run [default: all that needs nothing but this machine]
    scenarios: Vec<String>,
    /// Seconds each: shows that it works, judges nothing.
    #[arg(long, conflicts_with = "long")]
    quick: bool,
    /// As many records as the targets ask about: 10 million.
    #[arg(long)]
    long: bool,
    /// Folder of the report.
    #[arg(long, value_name = "FOLDER", default_value = "docs/internals/report")]
    out: PathBuf,
    /// Where the stores are made, and removed again; must be on a real disk.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    store: PathBuf,
    /// Rounds in turn [default: the scenario's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// The bench of another build, for the scenario `builds`.
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// List the scenarios.
    #[arg(long)]
    list: bool,
}

/// Something to measure.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// True if the scenario runs when none is named: it needs nothing but this machine.
    pub(crate) by_default: bool,
    pub(crate) run: fn(&Workbench, &mut Section) -> Result<(), Missing>,
}

/// Something that a scenario needs is not here, in words.
pub(crate) struct Missing(pub(crate) String);

/// Every scenario, in the order of the report.
pub(crate) const SCENARIOS: &[Scenario] = scenarios::ALL;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.next_if_eq(child::FLAG).is_some() {
        child::run(&arguments.collect::<Vec<_>>());
        return ExitCode::SUCCESS;
    }
    let cli = Cli::parse();
    if cli.list {
        SCENARIOS.iter().for_each(|scenario| println!("{:12} {}", scenario.name, scenario.about));
        return ExitCode::SUCCESS;
    }
    match chosen(&cli.scenarios) {
        Ok(scenarios) => measure(&cli, &scenarios),
        Err(unknown) => {
            eprintln!("there is no scenario `{unknown}`; --list names them");
            ExitCode::from(2)
        }
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Scenario>, &String> {
    if names.is_empty() {
        return Ok(SCENARIOS.iter().filter(|scenario| scenario.by_default).collect());
    }
    names.iter().map(|name| SCENARIOS.iter().find(|scenario| scenario.name == *name).ok_or(name)).collect()
}

fn measure(cli: &Cli, scenarios: &[&Scenario]) -> ExitCode {
    let size = match (cli.quick, cli.long) {
        (true, _) => Size::Quick,
        (_, true) => Size::Long,
        _ => Size::Normal,
    };
    let bench = match Workbench::new(&cli.store, size, cli.rounds.map(usize::from)) {
        Ok(bench) => bench.against(cli.against.clone()),
        Err(Missing(why)) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    std::fs::create_dir_all(&cli.out).unwrap();
    for scenario in scenarios {
        eprintln!("{}: {}", scenario.name, scenario.about);
        let mut section = Section::new(scenario.name, bench.stamp(), &cli.out);
        if let Err(Missing(why)) = (scenario.run)(&bench, &mut section) {
            eprintln!("  not measured: {why}");
            section.not_measured(&why);
        }
        section.save();
    }
    let page = report::write(&cli.out);
    println!("{}", page.display());
    ExitCode::SUCCESS
}
