//! The binary: parses the command line, joins the parts, and runs a command. It decides nothing
//! about messages.

mod commands;
mod config;
mod exit;
mod host;
mod output;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Host for message processors that are WebAssembly components. A message may be delivered many
/// times; its effects happen once.
#[derive(Parser)]
#[command(name = "hapax", version, propagate_version = true)]
struct Cli {
    /// Print JSON on standard output.
    #[arg(long, global = true)]
    json: bool,
    /// Log filter for standard error: a level or a list of targets, such as `info` or
    /// `hapax_core=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the messages of a file through a processor, to the end of the file.
    Run(commands::run::Args),
    /// Serve processors over HTTP until a signal comes.
    Up(commands::up::Args),
    /// Check a configuration, or a component, without running it.
    Check(commands::check::Args),
    /// Send a message to a running host.
    Send(commands::send::Args),
    /// Print the status of a running host.
    Status(commands::status::Args),
    /// List, redrive or discard held messages: dead letters, and messages that wait.
    #[command(subcommand)]
    Dlq(commands::dlq::Command),
    /// List, redrive or discard outgoing messages that their destination refused.
    #[command(subcommand)]
    Outbox(commands::outbox::Command),
    /// Print the audit trail: the actions of operators.
    Audit(commands::audit::Args),
    /// List deduplication records, or evict one.
    #[command(subcommand)]
    Records(commands::records::Command),
    /// List sagas, and resume those that are stuck.
    #[command(subcommand)]
    Saga(commands::saga::Command),
    /// Print a processor's state.
    #[command(subcommand)]
    State(commands::state::Command),
    /// Print a processor's event streams.
    Streams(commands::streams::Args),
    /// Examine a store that no host has open; repair a damaged journal on request.
    Doctor(commands::doctor::Args),
    /// Return the space of expired data to the disk. No host may have the store open.
    Compact(commands::doctor::CompactArgs),
    /// Build a component from the folder of its source.
    Build(commands::build::Args),
}

/// Messages are allocated by one thread and freed by another. mimalloc is fast at that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match log_to_stderr(&cli.log).and_then(|()| run(cli.command, json)) {
        Ok(code) => code,
        Err(error) => output::report(&error, json),
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
        Command::Outbox(command) => commands::outbox::command(command, json),
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

/// Logs lines for people if standard error is a terminal, and JSON otherwise. Without colours: an
/// escape character in a line is escaped, whoever wrote it.
fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| exit::Failed::usage(format!("--log {filter}: {error}; give it a level, such as `info`")))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| output::progress::Stderr);
    if std::io::stderr().is_terminal() {
        subscriber.without_time().with_target(false).with_ansi(false).init();
    } else {
        subscriber.json().init();
    }
    Ok(())
}
