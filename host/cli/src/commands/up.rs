//! `hapax up`: serves processors over HTTP until a signal comes.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hapax_core::{CircuitBreaker, Observer, RelayError, Report, SourceError, StoreError, run_source};
use hapax_transport::{HttpLimits, JsonlSource, operator_router, router, status_router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::config::{Config, SourceSetting};
use crate::exit::Failed;
use crate::host::ingress::{HttpIngress, Routes};
use crate::host::{self, Host, joined};
use crate::output::line;

/// Messages of one source that are taken and have no outcome yet, at most. Those that wait behind
/// another message are among them, so there are more than runs.
const TAKEN_MAX: usize = 1_024;

/// Runs at the same time, at most; the engine's instance pool has room for as many.
const CONCURRENCY: usize = 256;

/// Time for which a host whose store has failed answers that it is not ready, before it ends.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = "hapax.toml")]
    config: PathBuf,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let config = Config::read(&args.config)?;
    host::block_on(up(config, json))
}

/// Time for the last answers to reach their clients, once every message has an outcome.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

async fn up(config: Config, json: bool) -> anyhow::Result<ExitCode> {
    let host = Host::open(&config.store, config.limits.store_options(), CONCURRENCY).await?;
    let routes = Routes::of(&host, &config.processors)?;
    let stop = host::stop_on_signal()?;
    let outbox_breaker = outbox_breaker(&host, &config).await?;
    let mut workers = Workers::start(&host, &config, &routes, outbox_breaker.clone(), stop.clone()).await?;
    let listener = listen(&config).await?;
    announce(&listener, &config, json)?;
    let store_failed = host.store_failed();
    let operations = host.operations(routes.consumers(), stop.clone());
    let ingress = Arc::new(HttpIngress::new(routes, host, outbox_breaker, stop));
    let router = router(ingress.clone(), limits(&config))
        .merge(status_router(ingress.clone()))
        .merge(operator_router(operations));
    tokio::select! {
        served = serve(listener, router, ingress.clone()) => served?,
        failed = workers.failure() => failed?,
        error = after_failure(store_failed) => return Err(error.into()),
    }
    workers.finish().await?;
    ingress.failure().map_or(Ok(ExitCode::SUCCESS), |error| Err(error.into()))
}

/// Serves until a signal has come and every accepted message has an outcome. Then connections have
/// a while to end: one whose request never arrives holds nobody up.
async fn serve(listener: TcpListener, router: Router, ingress: Arc<HttpIngress>) -> anyhow::Result<()> {
    let drained = ingress.clone().drained();
    tokio::select! {
        served = axum::serve(listener, router).with_graceful_shutdown(drained).into_future() => served?,
        () = async {
            ingress.clone().drained().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        } => {}
    }
    Ok(())
}

/// Completes when the store has failed, and load balancers had the time to see that the host is not
/// ready.
async fn after_failure(failed: impl Future<Output = StoreError>) -> StoreError {
    let error = failed.await;
    tracing::error!("the host ends in {} s, since {error}", SEEN_WITHIN.as_secs());
    tokio::time::sleep(SEEN_WITHIN).await;
    error
}

/// Returns the circuit breaker of the outbox destination, if the configuration has both.
async fn outbox_breaker(host: &Host, config: &Config) -> anyhow::Result<Option<Arc<CircuitBreaker>>> {
    match (&config.outbox, config.outbox_breaker()?) {
        (Some(to), Some(policy)) => Ok(Some(host.breaker(to, policy).await?)),
        _ => Ok(None),
    }
}

async fn listen(config: &Config) -> anyhow::Result<TcpListener> {
    TcpListener::bind(config.listen).await.map_err(|error| {
        Failed::usage(format!("cannot listen on {}: {error}; set `listen` in the configuration", config.listen))
    })
}

fn limits(config: &Config) -> HttpLimits {
    HttpLimits {
        max_message_bytes: config.max_message_bytes,
        max_batch_bytes: config.max_batch_bytes,
        max_batch_items: config.max_batch_items,
    }
}

/// Prints the address of each processor.
fn announce(listener: &TcpListener, config: &Config, json: bool) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let names: Vec<_> = config.processors.keys().collect();
    if json {
        line(&json!({ "listening": address.to_string(), "processors": names }).to_string());
    } else {
        for name in names {
            line(&format!("http://{address}/v1/processors/{name}/messages"));
        }
    }
    Ok(())
}

/// Background tasks of the host. Each runs until `ended` turns true; a source, until its input ends
/// or a signal comes.
struct Workers {
    sources: JoinSet<Result<(), SourceError>>,
    ended: watch::Sender<bool>,
    sweeper: JoinHandle<Result<(), StoreError>>,
    /// Runs deferred messages, one task for each processor, and compensations.
    deferred: JoinSet<Result<(), StoreError>>,
    relay: Option<JoinHandle<Result<u64, RelayError>>>,
}

impl Workers {
    async fn start(
        host: &Host,
        config: &Config,
        routes: &Routes,
        outbox_breaker: Option<Arc<CircuitBreaker>>,
        signal: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        // Opened before anything runs: a source that cannot be read is refused at start.
        let opened = open_sources(config)?;
        let (ended, stop) = watch::channel(false);
        let sweeper = host.sweeper(stop.clone());
        let mut deferred = JoinSet::new();
        for consumer in routes.consumers() {
            consumer.restore().await?;
            deferred.spawn(host.deferred(&consumer, Arc::new(Unobserved), stop.clone()));
        }
        deferred.spawn(host.compensator(routes.consumers(), Arc::new(Unobserved), stop.clone()));
        deferred.spawn(host.abandoned(routes.consumers(), stop.clone()));
        let mut sources = JoinSet::new();
        for (setting, mut source) in opened {
            let consumer = routes.consumer(&setting.processor).expect("the configuration was checked").clone();
            let (observer, signal) = (Arc::new(SourceObserver(setting.file.clone())), signal.clone());
            sources.spawn(async move { run_source(&consumer, &mut source, observer, TAKEN_MAX, signal).await });
        }
        let policy = config.outbox_after_refusal();
        let relay = config.outbox.clone().map(|to| host.relay(to, policy, outbox_breaker, stop)).transpose()?;
        Ok(Self { sources, ended, sweeper, deferred, relay })
    }

    /// Completes when a task has failed: none of them ends by itself before `ended`.
    async fn failure(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            ended = async { match &mut self.relay { Some(relay) => relay.await, None => std::future::pending().await } } => {
                joined(ended).map(drop)
            }
            ended = &mut self.sweeper => joined(ended),
            Some(ended) = self.deferred.join_next() => joined(ended),
            failed = first_failure(&mut self.sources) => Err(failed),
        }
    }

    /// Stops the tasks. Sources have been told to stop by the signal, and bring what they have
    /// taken to its outcome. Deferred messages and compensations end before the relay is waited
    /// for: their last commits may add to the outbox, which the relay sends until it is empty. The
    /// sweeper changes nothing that others wait for.
    async fn finish(mut self) -> anyhow::Result<()> {
        while let Some(ended) = self.sources.join_next().await {
            joined(ended)?;
        }
        self.ended.send_replace(true);
        while let Some(ended) = self.deferred.join_next().await {
            joined(ended)?;
        }
        if let Some(relay) = self.relay {
            joined(relay.await)?;
        }
        Ok(())
    }
}

/// Opens the sources of the configuration.
fn open_sources(config: &Config) -> anyhow::Result<Vec<(&SourceSetting, JsonlSource)>> {
    let mut opened = Vec::new();
    for setting in &config.sources {
        let file = &setting.file;
        let source = JsonlSource::open(file, config.max_message_bytes).map_err(|error| {
            Failed::usage(format!("cannot read the source {}: {error}; correct `file` of the source", file.display()))
        })?;
        opened.push((setting, source));
    }
    Ok(opened)
}

/// Completes when a source has failed. One that has come to the end of its input has not.
async fn first_failure(sources: &mut JoinSet<Result<(), SourceError>>) -> anyhow::Error {
    while let Some(ended) = sources.join_next().await {
        if let Err(error) = joined(ended) {
            return error;
        }
    }
    std::future::pending().await
}

/// Logs the lines of a source that are no messages, by the source's file.
struct SourceObserver(PathBuf);

impl Observer for SourceObserver {
    fn ended(&self, report: Report<'_>) {
        if let Report::Invalid { position, reason } = report {
            tracing::warn!("{}, {position}: skipped, it is no message: {reason}", self.0.display());
        }
    }
}

/// Drops reports: a client learns the outcome of a deferred message by sending the message again.
struct Unobserved;

impl Observer for Unobserved {
    fn ended(&self, _: Report<'_>) {}
}
