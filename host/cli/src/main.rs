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
    Run(run::Args),
    /// Serve processors over HTTP until told to stop.
    Up(up::Args),
    /// Check a configuration, or a component against the contract, without running anything.
    Check(check::Args),
    /// Send a message to a running host.
    Send(send::Args),
    /// Ask a running host how it is doing.
    Status(status::Args),
    /// Look at messages that failed for good or wait, run them again, or forget them.
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// What operators did.
    Audit(audit::Args),
    /// Look at deduplication records, or forget one.
    #[command(subcommand)]
    Records(records::Command),
    /// Look at what was done outside and the way back, and go on where that is halted.
    #[command(subcommand)]
    Saga(saga::Command),
    /// Look at a processor's state.
    #[command(subcommand)]
    State(state::Command),
    /// Look at a processor's event streams.
    Events(events::Args),
    /// Examine a store that nobody has open, and mend a damaged journal if told to.
    Doctor(doctor::Args),
    /// Give the space of what was forgotten back to the disk. The store must not be open.
    Compact(doctor::CompactArgs),
    /// Build a guest's folder into a component.
    Build(build::Args),
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
        Command::Run(args) => run::command(args, json),
        Command::Up(args) => up::command(&args, json),
        Command::Check(args) => check::command(&args, json),
        Command::Send(args) => send::command(&args, json),
        Command::Status(args) => status::command(&args, json),
        Command::Dlq(command) => dlq::command(command, json),
        Command::Audit(args) => audit::command(args, json),
        Command::Records(command) => records::command(command, json),
        Command::Saga(command) => saga::command(command, json),
        Command::State(command) => state::command(command, json),
        Command::Events(args) => events::command(args, json),
        Command::Doctor(args) => doctor::command(&args, json),
        Command::Compact(args) => doctor::compact(&args, json),
        Command::Build(args) => build::command(&args, json),
    }
}

/// For people on a terminal, JSON otherwise.
fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| exit::Failed::usage(format!("--log {filter}: {error}; give it a level, such as `info`")))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| progress::Stderr);
    if std::io::stderr().is_terminal() {
        subscriber.without_time().with_target(false).init();
    } else {
        subscriber.json().init();
    }
    Ok(())
}
