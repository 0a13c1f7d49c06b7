//! `hapax run`: runs the messages of a file through one processor, to the end of the file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hapax_core::{AfterRefusal, IdempotentConsumer, RelayError, StoreError};
use hapax_store::StoreOptions;
use hapax_transport::JsonlSource;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::outbound::GrantSetting;
use crate::config::{self, Config, Outbox, Processor};
use crate::exit::{Failed, INTERRUPTED, INVALID_INPUT, SUCCESS};
use crate::host::{self, Host, joined, status};
use crate::output::note;
use crate::output::progress::Progress;
use crate::output::run_printer::{CompensatedPrinter, HeldPrinter, OutboxCounts, Printer, Style};
use crate::output::waiting::Waiting;

/// Messages taken from the source for each one that may run.
const TAKEN_PER_RUN: usize = 16;

/// Interval at which the progress bar moves.
const TICK_EVERY: Duration = Duration::from_millis(200);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Component to run, with every setting at its default.
    #[arg(long, value_name = "X.wasm", required_unless_present = "config", conflicts_with = "config")]
    component: Option<PathBuf>,
    /// Configuration file that has the store, and the processor that --processor names.
    #[arg(long, value_name = "FILE", requires = "processor")]
    config: Option<PathBuf>,
    /// Use the circuit breaker that the configuration has for the processor; without this, none:
    /// the file is taken to its end.
    #[arg(long, requires = "config")]
    breaker: bool,
    /// Origin that the processor may call, like `http` in a configuration; may be given more than
    /// once.
    #[arg(long, value_name = "URL", conflicts_with = "config")]
    http: Vec<String>,
    /// Setting that the component reads through `config`; may be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "config", value_parser = setting)]
    set: Vec<(String, String)>,
    /// Folder of the store, which is created if it is absent [default: hapax-store, or the `store`
    /// of the configuration]
    #[arg(long, value_name = "PATH")]
    store: Option<PathBuf>,
    /// Name of the processor, which scopes its records and state [default: the component's file
    /// name]
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// File of messages, one CloudEvent in JSON on each line; `-` is standard input.
    #[arg(long, value_name = "FILE|-", default_value = "-")]
    input: PathBuf,
    /// File to which outbox messages are appended, one CloudEvent on each line; without it they
    /// stay in the outbox.
    #[arg(long, value_name = "FILE|-")]
    outbox: Option<PathBuf>,
    /// Maximum number of messages in flight. With 1, each has an outcome before the next is read.
    #[arg(long, value_name = "N", default_value_t = 64)]
    concurrency: usize,
    /// Maximum size of one message, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = config::default_max_message_bytes())]
    max_message_bytes: usize,
    /// Print one line for each message.
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

/// The processor to run, and its store.
struct Setup {
    name: String,
    processor: Processor,
    store: PathBuf,
    options: StoreOptions,
    after_refusal: AfterRefusal,
}

/// Takes the processor and the store from the arguments, or from the configuration that they name.
fn setup(args: &Args) -> anyhow::Result<Setup> {
    let Some(path) = &args.config else {
        let component = args.component.clone().unwrap_or_default();
        let name = args.processor.clone().or_else(|| Some(component.file_stem()?.to_str()?.to_owned()));
        let name = name.ok_or_else(|| Failed::usage("give the processor a name with --processor"))?;
        let store = args.store.clone().unwrap_or_else(|| "hapax-store".into());
        let mut processor = Processor::plain(component);
        processor.http = args.http.iter().cloned().map(GrantSetting::Url).collect();
        processor.config = args.set.iter().cloned().collect();
        let (options, after_refusal) = (StoreOptions::default(), AfterRefusal::default());
        return Ok(Setup { name, processor, store, options, after_refusal });
    };
    let mut config = Config::read(path)?;
    let name = args.processor.clone().unwrap_or_default();
    let mut processor = config.processors.remove(&name).ok_or_else(|| {
        let known: Vec<_> = config.processors.keys().map(String::as_str).collect();
        Failed::usage(format!("{}: it has no processor {name}; it has {}", path.display(), known.join(", ")))
    })?;
    let (options, after_refusal) = (config.limits.store_options(), config.outbox_after_refusal());
    let store = args.store.clone().unwrap_or(config.store);
    if !args.breaker && processor.switch_breaker_off() {
        note("`hapax run` uses no circuit breaker; with --breaker it uses the one of the configuration");
    }
    Ok(Setup { name, processor, store, options, after_refusal })
}

async fn run(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    let Setup { name, processor, store, options, after_refusal } = setup(&args)?;
    let mut source = JsonlSource::open(&args.input, args.max_message_bytes)
        .map_err(|error| Failed::usage(format!("cannot read the input {}: {error}", args.input.display())))?;
    let host = Host::open(&store, options, args.concurrency).await?;
    let consumer = host.consumer(&name, &processor)?;
    let stop = host::stop_on_signal()?;
    let style = style(json, args.verbose);
    let printer = Arc::new(Printer::new(style));
    let outbox = args.outbox.map(|path| (Outbox::File(path), after_refusal));
    let workers = Workers::start(&host, &consumer, &printer, outbox)?;
    let waiting = Waiting::new(printer.clone());
    let watching = waiting.start(&consumer);
    let ticking = (style == Style::Quiet).then(|| show_progress(&source, &printer)).flatten();

    let taken_max = taken_max(args.concurrency);
    let read = hapax_core::run_source(&consumer, &mut source, waiting, taken_max, stop.clone()).await;
    let finished = workers.finish(&host, &consumer, stop.clone()).await;
    watching.abort();
    // The bar leaves the terminal before an error or the summary is printed.
    hide_progress(ticking).await;
    read?;
    let sent = finished?;
    let refused = status::refused(&*host.store).await.map_err(anyhow::Error::msg)?;
    printer.summary(&OutboxCounts { sent, pending: host.store.outbox_len().await?, refused });
    Ok(ExitCode::from(exit_code(*stop.borrow(), printer.invalid())))
}

fn style(json: bool, verbose: bool) -> Style {
    match (json, verbose) {
        (true, _) => Style::Json,
        (false, true) => Style::Lines,
        (false, false) => Style::Quiet,
    }
}

/// Returns the number of messages that are taken from the source at the same time. Many more than
/// run at the same time: messages that wait for their turn or their retry hold up no others. With
/// one run at a time, each message has an outcome before the next is read.
fn taken_max(concurrency: usize) -> usize {
    if concurrency == 1 { 1 } else { concurrency.saturating_mul(TAKEN_PER_RUN) }
}

fn exit_code(is_stopped: bool, invalid: u64) -> u8 {
    match (is_stopped, invalid) {
        (true, _) => INTERRUPTED,
        (false, 0) => SUCCESS,
        (false, _) => INVALID_INPUT,
    }
}

/// Background tasks beside the source. Each kind has its own sender, since they stop one after the
/// other.
struct Workers {
    stop_deferred: watch::Sender<bool>,
    stop_compensator: watch::Sender<bool>,
    stop_others: watch::Sender<bool>,
    deferred: JoinHandle<Result<(), StoreError>>,
    compensator: JoinHandle<Result<(), StoreError>>,
    compensated: Arc<CompensatedPrinter>,
    relay: Option<JoinHandle<Result<u64, RelayError>>>,
    sweeper: JoinHandle<Result<(), StoreError>>,
}

impl Workers {
    fn start(
        host: &Host,
        consumer: &IdempotentConsumer,
        printer: &Arc<Printer>,
        outbox: Option<(Outbox, AfterRefusal)>,
    ) -> anyhow::Result<Self> {
        let (stop_others, others_stop) = watch::channel(false);
        let (stop_deferred, deferred_stop) = watch::channel(false);
        let (stop_compensator, compensator_stop) = watch::channel(false);
        let sweeper = host.sweeper(others_stop.clone());
        let relay = outbox.map(|(to, policy)| host.relay(to, policy, None, others_stop)).transpose()?;
        let held = Arc::new(HeldPrinter(printer.clone()));
        let deferred = tokio::spawn(host.deferred(consumer, held, deferred_stop));
        let compensated = Arc::new(CompensatedPrinter(printer.clone()));
        let compensator = tokio::spawn(host.compensator(vec![consumer.clone()], compensated.clone(), compensator_stop));
        Ok(Self { stop_deferred, stop_compensator, stop_others, deferred, compensator, compensated, relay, sweeper })
    }

    /// Stops the tasks, and returns the number of outbox messages that were sent. The order follows
    /// the messages: a deferred message that fails may need compensation, and both may add to the
    /// outbox, which the relay sends until it is empty.
    async fn finish(
        self,
        host: &Host,
        consumer: &IdempotentConsumer,
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<u64> {
        self.stop_deferred.send_replace(true);
        let deferred = joined(self.deferred.await);
        self.stop_compensator.send_replace(true);
        let compensated = match joined(self.compensator.await) {
            // Compensations that wait for their retry are waited for, as messages that wait for
            // theirs are.
            Ok(()) => host.settle(vec![consumer.clone()], self.compensated, stop).await.map_err(Into::into),
            failed => failed,
        };
        self.stop_others.send_replace(true);
        let sent = match self.relay {
            Some(relay) => joined(relay.await),
            None => Ok(0),
        };
        deferred?;
        compensated?;
        let sent = sent?;
        joined(self.sweeper.await)?;
        Ok(sent)
    }
}

/// Starts a task that moves the progress bar; returns none if standard error is no terminal.
fn show_progress(source: &JsonlSource, printer: &Arc<Printer>) -> Option<JoinHandle<()>> {
    let bar = Progress::on_terminal(source.total_bytes())?;
    Some(tokio::spawn(tick(bar, printer.clone(), source.bytes_read())))
}

/// Stops the task, and waits until it has dropped the bar.
async fn hide_progress(ticking: Option<JoinHandle<()>>) {
    if let Some(ticking) = ticking {
        ticking.abort();
        let _ = ticking.await;
    }
}

/// Moves the progress bar until it is aborted.
async fn tick(bar: Progress, printer: Arc<Printer>, read: Arc<AtomicU64>) {
    loop {
        bar.set(read.load(Relaxed), printer.counts());
        tokio::time::sleep(TICK_EVERY).await;
    }
}
