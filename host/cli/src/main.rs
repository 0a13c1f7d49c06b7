//! The binary: reads the command line, joins the parts, runs a command. Decides nothing about messages.

mod commands;
mod config;
mod exit;
mod host;
mod output;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A host for message processors that ship as WebAssembly components: a message may be delivered many times, its effects
/// happen once.
#[derive(Parser)]
#[command(name = "hapax", version, propagate_version = true)]
struct Cli {
    /// Print JSON on standard output.
    #[arg(long, global = true)]
    json: bool,
    /// What to log to standard error, such as `info` or `hapax_core=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a file of messages through a processor, to its end.
    Run(commands::run::Args),
    /// Serve processors over HTTP until told to stop.
    Up(commands::up::Args),
    /// Check a configuration, or a component against the contract, without running anything.
    Check(commands::check::Args),
    /// Send a message to a running host.
    Send(commands::send::Args),
    /// Ask a running host how it is doing.
    Status(commands::status::Args),
    /// Look at messages that failed for good or wait, run them again, or forget them.
    #[command(subcommand)]
    Dlq(commands::dlq::Command),
    /// What operators did.
    Audit(commands::audit::Args),
    /// Look at deduplication records, or forget one.
    #[command(subcommand)]
    Records(commands::records::Command),
    /// Look at what was done outside and the way back, and go on where that is halted.
    #[command(subcommand)]
    Saga(commands::saga::Command),
    /// Look at a processor's state.
    #[command(subcommand)]
    State(commands::state::Command),
    /// Look at a processor's event streams.
    Streams(commands::streams::Args),
    /// Examine a store that nobody has open, and mend a damaged journal if told to.
    Doctor(commands::doctor::Args),
    /// Give the space of what was forgotten back to the disk. The store must not be open.
    Compact(commands::doctor::CompactArgs),
    /// Build a guest's folder into a component.
    Build(commands::build::Args),
}

/// Messages are allocated by one thread and freed by another, many at a time, which this allocator is made for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match log_to_stderr(&cli.log).and_then(|()| run(cli.command, json)) {
        Ok(code) => code,
        Err(error) => exit::report(&error, json),
    }
}

fn run(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(args) => commands::run::command(args, json),
        Command::Up(args) => commands::up::command(&args, json),
        Command::Check(args) => commands::check::command(&args, json),
        Command::Send(args) => commands::send::command(&args, json),
        Command::Status(args) => commands::status::command(&args, json),
        Command::Dlq(command) => commands::dlq::command(command, json),
        Command::Audit(args) => commands::audit::command(args, json),
        Command::Records(command) => commands::records::command(command, json),
        Command::Saga(command) => commands::saga::command(command, json),
        Command::State(command) => commands::state::command(command, json),
        Command::Streams(args) => commands::streams::command(args, json),
        Command::Doctor(args) => commands::doctor::command(&args, json),
        Command::Compact(args) => commands::doctor::compact(&args, json),
        Command::Build(args) => commands::build::command(&args, json),
    }
}

/// For people on a terminal, JSON otherwise.
fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| exit::Failed::usage(format!("--log {filter}: {error}; give it a level, such as `info`")))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| output::progress::Stderr);
    if std::io::stderr().is_terminal() {
        subscriber.without_time().with_target(false).init();
    } else {
        subscriber.json().init();
    }
    Ok(())
}
