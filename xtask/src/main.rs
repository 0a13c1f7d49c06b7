//! The chores of this repository, one small module each. Ships nothing: users see `hapax`.

mod bench;
mod demo;
mod guests;
mod house;
mod test;
mod tidy;
mod workspace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// The command line. By clap's functions: its derive is a procedural macro, which would be compiled
/// for xtask alone.
fn command_line() -> Command {
    let chore = |name: &'static str, about: &'static str| Command::new(name).about(about);
    let passed_on = |name: &'static str, help: &'static str| {
        Arg::new(name).help(help).num_args(0..).trailing_var_arg(true).allow_hyphen_values(true)
    };
    Command::new("cargo xtask")
        .bin_name("cargo xtask")
        .about("The chores of this repository. Start with `demo`, then `test`; both do all of their own set-up")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(chore("demo", "Show the main job: messages that repeat go in, every effect happens once"))
        .subcommand(
            chore("test", "Build everything the tests need, then run all tests")
                .arg(passed_on("filter", "Passed on to the test runner")),
        )
        .subcommand(
            chore("bench", "Measure the host beside bare loops and other ways to do the job, and write a report")
                .arg(passed_on("arguments", "Passed on to the bench: scenarios, --quick, --long, --list, --help")),
        )
        .subcommand(
            chore("setup", "Find or make a compiler for guests, and say which way was taken")
                .after_help("HAPAX_GUEST_TOOLCHAIN=rustup|debian forces one."),
        )
        .subcommand(chore("guests", "Build all guests, examples and fixtures, and print the folder of the components"))
        .subcommand(chore("bindings", "Make the guest SDK's bindings again from wit/").arg(
            Arg::new("check").long("check").help("Change nothing; fail if they are stale").action(ArgAction::SetTrue),
        ))
        .subcommand(chore("tidy", "Check the house rules that no compiler checks"))
}

fn main() -> ExitCode {
    match run(&command_line().get_matches(), &root()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reason, without a backtrace: it is what a user of this repository reads first.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(matches: &ArgMatches, root: &Path) -> anyhow::Result<()> {
    match matches.subcommand() {
        Some(("demo", _)) => demo::run(root),
        Some(("test", chore)) => test::run(root, &words(chore, "filter")),
        Some(("bench", chore)) => bench::run(root, &words(chore, "arguments")),
        Some(("setup", _)) => guests::setup(root),
        Some(("guests", _)) => guests::run(root),
        Some(("bindings", chore)) => bindings(root, chore.get_flag("check")),
        Some(("tidy", _)) => tidy::run(root),
        other => bail!("{other:?} is a chore that nothing does"),
    }
}

fn words(chore: &ArgMatches, name: &str) -> Vec<String> {
    chore.get_many(name).into_iter().flatten().cloned().collect()
}

/// Runs the generator, a program of its own: no other chore needs what it is made of.
fn bindings(root: &Path, check: bool) -> anyhow::Result<()> {
    let mut generator = demo::cargo(root);
    generator.args(["run", "--quiet", "--package", "xtask", "--features", "bindings", "--bin", "bindings", "--"]);
    generator.args(check.then_some("--check"));
    if !generator.status()?.success() {
        bail!("cargo xtask bindings failed: see above");
    }
    Ok(())
}

/// The repository's root: where this was compiled from, unless cargo says that it runs another
/// checkout's.
fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR");
    let folder = manifest.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    folder.parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}
