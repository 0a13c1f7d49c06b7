//! `hapax run`: a file of messages through one processor, to its end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hapax_store::StoreOptions;
use hapax_transport::JsonlSource;
use tokio::sync::watch;

use crate::config::outbound::GrantSetting;
use crate::config::{self, Config, Outbox, Processor};
use crate::exit::{Failed, INTERRUPTED, INVALID_INPUT, SUCCESS};
use crate::host::{self, Host};
use crate::output::progress::Progress;
use crate::output::run_printer::{CompensatedPrinter, KeptPrinter, Printer, Style};

/// Messages that are taken for each that may be in flight.
const TAKEN_PER_RUN: usize = 16;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The processor's component, with every setting at its default.
    #[arg(long, value_name = "X.wasm", required_unless_present = "config", conflicts_with = "config")]
    component: Option<PathBuf>,
    /// A configuration: its store, and the processor that --processor names, with its settings.
    #[arg(long, value_name = "FILE", requires = "processor")]
    config: Option<PathBuf>,
    /// An origin that the processor may call, as `http` in a configuration; may be given more than once.
    #[arg(long, value_name = "URL", conflicts_with = "config")]
    http: Vec<String>,
    /// What the component reads under KEY through `config`; may be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "config", value_parser = setting)]
    set: Vec<(String, String)>,
    /// Folder of the store; created where it is absent [default: hapax-store, or what the configuration says]
    #[arg(long, value_name = "PATH")]
    store: Option<PathBuf>,
    /// The processor's name, which scopes its records and state [default: the component's file name]
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// CloudEvents JSON, one a line; `-` is standard input.
    #[arg(long, value_name = "FILE|-", default_value = "-")]
    input: PathBuf,
    /// Where outbox messages are appended, one CloudEvent a line; without it they stay in the outbox.
    #[arg(long, value_name = "FILE|-")]
    outbox: Option<PathBuf>,
    /// Messages in flight, at most. With 1, each ends before the next is read.
    #[arg(long, value_name = "N", default_value_t = 64)]
    concurrency: usize,
    /// Bytes of one message, at most.
    #[arg(long, value_name = "BYTES", default_value_t = config::default_max_message_bytes())]
    max_message_bytes: usize,
    /// Print a line a message.
    #[arg(long, short)]
    verbose: bool,
}

pub(crate) fn command(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    if json && args.outbox.as_deref() == Some(Path::new("-")) {
        return Err(Failed::usage("--json and --outbox - would mix on standard output; give the outbox a file"));
    }
    if args.concurrency == 0 {
        return Err(Failed::usage("--concurrency must be at least 1"));
    }
    host::block_on(run(args, json))
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// What is run, over which store.
struct Selection {
    name: String,
    processor: Processor,
    store: PathBuf,
    options: StoreOptions,
}

/// By the arguments, or by the configuration that they name.
fn chosen(args: &Args) -> anyhow::Result<Selection> {
    let Some(path) = &args.config else {
        let component = args.component.clone().unwrap_or_default();
        let name = args.processor.clone().or_else(|| Some(component.file_stem()?.to_str()?.to_owned()));
        let name = name.ok_or_else(|| Failed::usage("give the processor a name with --processor"))?;
        let store = args.store.clone().unwrap_or_else(|| "hapax-store".into());
        let mut processor = Processor::plain(component);
        processor.http = args.http.iter().cloned().map(GrantSetting::Url).collect();
        processor.config = args.set.iter().cloned().collect();
        return Ok(Selection { name, processor, store, options: StoreOptions::default() });
    };
    let mut config = Config::read(path)?;
    let name = args.processor.clone().unwrap_or_default();
    let processor = config.processors.remove(&name).ok_or_else(|| {
        let known: Vec<_> = config.processors.keys().map(String::as_str).collect();
        Failed::usage(format!("{}: it has no processor {name}; it has {}", path.display(), known.join(", ")))
    })?;
    let store = args.store.clone().unwrap_or(config.store);
    Ok(Selection { name, processor, store, options: config.limits.store_options() })
}

async fn run(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    let Selection { name, processor, store, options } = chosen(&args)?;
    let mut source = JsonlSource::open(&args.input, args.max_message_bytes)
        .map_err(|error| Failed::usage(format!("cannot read the input {}: {error}", args.input.display())))?;
    let host = Host::open(&store, options, args.concurrency).await?;
    let consumer = host.consumer(&name, &processor)?;
    let stop = host::stop_on_signal()?;
    let (ended, outbox_stop) = watch::channel(false);
    let sweeper = host.sweeper(ended.subscribe());
    let relay = args.outbox.map(|path| host.relay(Outbox::File(path), None, outbox_stop)).transpose()?;

    let (kept_ended, kept_stop) = watch::channel(false);

    let style = match (json, args.verbose) {
        (true, _) => Style::Json,
        (false, true) => Style::Lines,
        (false, false) => Style::Quiet,
    };
    let printer = Arc::new(Printer::new(style));
    let kept = Arc::new(KeptPrinter(printer.clone()));
    let keeper = tokio::spawn(host.keeper(&consumer, kept, kept_stop));
    let (undo_ended, undo_stop) = watch::channel(false);
    let undone = Arc::new(CompensatedPrinter(printer.clone()));
    let undo = tokio::spawn(host.undo(vec![consumer.clone()], undone.clone(), undo_stop));
    let progress = if style == Style::Quiet { Progress::on_terminal(source.total_bytes()) } else { None };
    let ticking = progress.map(|bar| tokio::spawn(tick(bar, printer.clone(), source.bytes_read())));
    // Many more than are in flight: those that wait for their turn or their time hold up nobody. One at a time means one.
    let taken_max = if args.concurrency == 1 { 1 } else { args.concurrency.saturating_mul(TAKEN_PER_RUN) };
    let result = hapax_core::run_source(&consumer, &mut source, printer.clone(), taken_max, stop.clone()).await;

    kept_ended.send_replace(true);
    let kept = keeper.await?;
    undo_ended.send_replace(true);
    // Then what fails for a while is waited for, as messages that are tried again are.
    let undone = match undo.await? {
        Ok(()) => host.settle(vec![consumer.clone()], undone, stop.clone()).await,
        failed => failed,
    };
    ended.send_replace(true);
    let sent = match relay {
        Some(relay) => relay.await?,
        None => Ok(0),
    };
    if let Some(ticking) = ticking {
        ticking.abort();
        // Ended with it, the bar is off the terminal: what comes now stands alone.
        let _ = ticking.await;
    }
    result?;
    kept?;
    undone?;
    let sent = sent?;
    sweeper.await??;
    printer.summary(sent, host.store.outbox_len()?);
    Ok(ExitCode::from(match (*stop.borrow(), printer.invalid()) {
        (true, _) => INTERRUPTED,
        (false, 0) => SUCCESS,
        (false, _) => INVALID_INPUT,
    }))
}

/// Keeps the progress bar moving.
async fn tick(bar: Progress, printer: Arc<Printer>, read: Arc<AtomicU64>) {
    loop {
        bar.set(read.load(Relaxed), printer.counts());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
