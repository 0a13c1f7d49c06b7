//! The chores of this repository, one small module each. Ships nothing: users see `hapax`.

mod bench;
mod bindings;
mod demo;
mod guests;
mod house;
mod setup;
mod test;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of this repository. Start with `demo`, then `test`; both do all of their own set-up.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Show the main job: messages that repeat go in, every effect happens once
    Demo,
    /// Build everything the tests need, then run all tests
    Test {
        /// Passed on to the test runner
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        filter: Vec<String>,
    },
    /// Measure the host beside bare loops and other ways to do the job, and write a report
    Bench {
        /// Passed on to the bench: scenarios, --quick, --long, --list, --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Find or make a compiler for guests, and say which way was taken
    ///
    /// HAPAX_GUEST_TOOLCHAIN=rustup|debian forces one.
    Setup,
    /// Build all guests, examples and fixtures, and print the folder of the components
    Guests,
    /// Make the guest SDK's bindings again from wit/
    Bindings {
        /// Change nothing; fail if they are stale
        #[arg(long)]
        check: bool,
    },
    /// Check the house rules that no compiler checks
    Tidy,
}

fn main() -> ExitCode {
    match run(Cli::parse().chore, &root()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reason, without a backtrace: it is what a user of this repository reads first.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore, root: &Path) -> anyhow::Result<()> {
    match chore {
        Chore::Demo => demo::run(root),
        Chore::Test { filter } => test::run(root, &filter),
        Chore::Bench { arguments } => bench::run(root, &arguments),
        Chore::Setup => setup::run(),
        Chore::Guests => guests::run(),
        Chore::Bindings { check } => bindings::run(root, check),
        Chore::Tidy => tidy::run(root),
    }
}

/// The repository's root: where this was compiled from, unless cargo says that it runs another
/// checkout's.
fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR");
    let folder = manifest.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    folder.parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}
