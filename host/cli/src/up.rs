//! `hapax up`: processors behind HTTP, until a signal says stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use hapax_core::{Ending, Handling, IdempotentConsumer, Message, Stored};
use hapax_transport::{Answer, HttpLimits, Ingress, router};
use serde_json::json;
use tokio::sync::watch;

use crate::config::Config;
use crate::host::{self, Host};
use crate::report::line;

/// Runs under way at most; the engine's pool has as many places.
const CONCURRENCY: usize = 256;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = "hapax.toml")]
    config: PathBuf,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let config = Config::read(&args.config)?;
    host::block_on(up(config, json))
}

async fn up(config: Config, json: bool) -> anyhow::Result<ExitCode> {
    let host = Host::open(&config.store, CONCURRENCY).await?;
    let consumers = config
        .processors
        .iter()
        .map(|(name, processor)| Ok((name.clone(), host.consumer(name, processor)?)))
        .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    let stop = host::stop_on_signal()?;
    let (ended, outbox_stop) = watch::channel(false);
    let mut relay = config.outbox.clone().map(|to| host.relay(to, outbox_stop)).transpose()?;

    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}; set `listen` in the configuration", config.listen))?;
    announce(&listener, config.processors.keys(), json)?;
    let door = Arc::new(Door { consumers });
    let limits = HttpLimits { max_message_bytes: config.max_message_bytes };
    let mut stopping = stop.clone();
    let serving = axum::serve(listener, router(door.clone(), limits)).with_graceful_shutdown(async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    });
    // Consumers learn of the stop as well: a message that waits for its retry is put off.
    let told = tokio::spawn(door.clone().stop_with(stop));
    tokio::select! {
        served = serving => served?,
        failed = async { match &mut relay { Some(relay) => relay.await, None => std::future::pending().await } } => {
            failed??;
        }
    }
    told.abort();
    ended.send_replace(true);
    if let Some(relay) = relay.take() {
        relay.await??;
    }
    Ok(ExitCode::SUCCESS)
}

fn announce<'a>(
    listener: &tokio::net::TcpListener,
    names: impl Iterator<Item = &'a String>,
    json: bool,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let names: Vec<_> = names.collect();
    if json {
        line(&json!({ "listening": address.to_string(), "processors": names }).to_string());
    } else {
        for name in names {
            line(&format!("http://{address}/v1/processors/{name}/messages"));
        }
    }
    Ok(())
}

/// Where HTTP's messages come in.
struct Door {
    consumers: BTreeMap<String, IdempotentConsumer>,
}

impl Door {
    async fn stop_with(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        if stop.wait_for(|stop| *stop).await.is_ok() {
            self.consumers.values().for_each(IdempotentConsumer::stop);
        }
    }
}

impl Ingress for Door {
    fn deliver(&self, processor: &str, message: Message) -> BoxFuture<'static, Answer> {
        let Some(consumer) = self.consumers.get(processor).cloned() else {
            let known = self.consumers.keys().cloned().collect();
            return Box::pin(std::future::ready(Answer::UnknownProcessor { known }));
        };
        // The client is the source: it delivers again, so a retry is its to make.
        let handling = Handling { wait_in_flight: true, retry_here: false };
        Box::pin(async move {
            match consumer.handle(message, handling).await {
                Ok(ending) => answer(ending),
                Err(error) => Answer::Unavailable { reason: error.to_string() },
            }
        })
    }
}

fn answer(ending: Ending) -> Answer {
    match ending {
        Ending::Completed { output } => Answer::Completed { output },
        Ending::Duplicate(Stored::Completed(output)) => Answer::Replayed { output },
        Ending::Duplicate(Stored::Failed(error)) => Answer::Failed { error, replayed: true },
        Ending::DeadLettered { error } => Answer::Failed { error, replayed: false },
        Ending::Mismatch => Answer::Mismatch,
        Ending::Retry { error, after_ms } => Answer::RetryLater { error, after_ms },
        Ending::InFlight { .. } => Answer::InFlight,
    }
}
