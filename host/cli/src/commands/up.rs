//! `hapax up`: processors behind HTTP, until a signal says stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    CircuitBreaker, Handling, IdempotentConsumer, Message, Observer, Outcome, Report, StoreError, StoredOutcome,
};
use hapax_transport::{Answer, HttpLimits, Ingress, StatusSource, operator_router, router, status_router};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::commands::status;
use crate::config::Config;
use crate::exit::Failed;
use crate::host::{self, Host};
use crate::output::line;

/// Runs under way at most; the engine's pool has as many places.
const CONCURRENCY: usize = 256;

/// What is answered once a signal has come.
const STOPPING: &str = "the host is stopping; send it again when it is back, or to another";

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
    let host = Host::open(&config.store, config.limits.store_options(), CONCURRENCY).await?;
    let desks = config
        .processors
        .iter()
        .map(|(name, processor)| {
            // The client is the source: it delivers again, so a retry is its to make.
            let handling = Handling { wait_in_flight: processor.wait_in_flight, retry_here: false };
            let consumer = host.consumer(name, processor)?;
            let headers = consumer.options().strategy.headers();
            Ok((name.clone(), Desk { consumer, handling, headers }))
        })
        .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    let stop = host::stop_on_signal()?;
    let (ended, outbox_stop) = watch::channel(false);
    let mut sweeper = host.sweeper(ended.subscribe());
    let mut keepers = tokio::task::JoinSet::new();
    for desk in desks.values() {
        desk.consumer.restore().await?;
        keepers.spawn(host.keeper(&desk.consumer, Arc::new(Nobody), ended.subscribe()));
    }
    let consumers = desks.values().map(|desk| desk.consumer.clone()).collect();
    keepers.spawn(host.undo(consumers, Arc::new(Nobody), ended.subscribe()));
    let outbox_breaker = match (&config.outbox, config.outbox_breaker()?) {
        (Some(to), Some(policy)) => Some(host.breaker(to, policy).await?),
        _ => None,
    };
    let breaker = outbox_breaker.clone();
    let mut relay = config.outbox.clone().map(|to| host.relay(to, breaker, outbox_stop)).transpose()?;

    let listener = tokio::net::TcpListener::bind(config.listen).await.map_err(|error| {
        Failed::usage(format!("cannot listen on {}: {error}; set `listen` in the configuration", config.listen))
    })?;
    announce(&listener, config.processors.keys(), json)?;
    let operations = host.operations(desks.values().map(|desk| desk.consumer.clone()), stop.clone());
    let door = Arc::new(HttpIngress { desks, host, outbox_breaker, stop, under_way: watch::Sender::new(0) });
    let limits = HttpLimits {
        max_message_bytes: config.max_message_bytes,
        max_batch_bytes: config.max_batch_bytes,
        max_batch_items: config.max_batch_items,
    };
    let routes = router(door.clone(), limits).merge(status_router(door.clone())).merge(operator_router(operations));
    let serving = axum::serve(listener, routes).with_graceful_shutdown(door.clone().drained());
    tokio::select! {
        served = serving => served?,
        failed = async { match &mut relay { Some(relay) => relay.await, None => std::future::pending().await } } => {
            failed??;
        }
        failed = &mut sweeper => failed??,
        Some(failed) = keepers.join_next() => failed??,
    }
    ended.send_replace(true);
    while let Some(kept) = keepers.join_next().await {
        kept??;
    }
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

/// Nobody watches: who sent the message asks for its outcome under its key.
struct Nobody;

impl Observer for Nobody {
    fn ended(&self, _: Report<'_>) {}
}

/// Where HTTP's messages come in.
struct HttpIngress {
    desks: BTreeMap<String, Desk>,
    host: Host,
    outbox_breaker: Option<Arc<CircuitBreaker>>,
    /// True once a signal has come: nothing more is taken.
    stop: watch::Receiver<bool>,
    /// Messages that were taken and have not ended.
    under_way: watch::Sender<usize>,
}

/// One processor's.
struct Desk {
    consumer: IdempotentConsumer,
    handling: Handling,
    /// What the strategy looks at.
    headers: Vec<String>,
}

impl HttpIngress {
    /// The desk of a processor, if it takes messages.
    fn desk(&self, processor: &str) -> Result<&Desk, Answer> {
        match self.desks.get(processor) {
            None => Err(Answer::UnknownProcessor { known: self.desks.keys().cloned().collect() }),
            Some(_) if *self.stop.borrow() => Err(Answer::Unavailable { reason: STOPPING.to_owned() }),
            Some(desk) => Ok(desk),
        }
    }

    /// Completes when a signal has come and every message that was taken has ended. Until then the door answers, so
    /// that who asks learns that the host is stopping.
    async fn drained(self: Arc<Self>) {
        let mut stop = self.stop.clone();
        if stop.wait_for(|stop| *stop).await.is_err() {
            return std::future::pending().await;
        }
        // A message that waits for its retry is put off.
        self.desks.values().for_each(|desk| desk.consumer.stop());
        let _ = self.under_way.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// A message that was taken, until it is dropped.
struct UnderWay(watch::Sender<usize>);

impl UnderWay {
    fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Ingress for HttpIngress {
    fn deliver(&self, processor: &str, message: Message) -> BoxFuture<'static, Answer> {
        // Counted before it is asked whether the host stops: who counts to zero after the signal has missed nobody.
        let under_way = UnderWay::begin(&self.under_way);
        let (consumer, handling) = match self.desk(processor) {
            Ok(desk) => (desk.consumer.clone(), desk.handling),
            Err(refused) => return Box::pin(std::future::ready(refused)),
        };
        Box::pin(async move {
            let _under_way = under_way;
            answer(consumer.handle(message, handling).await)
        })
    }

    fn deliver_batch(&self, processor: &str, messages: Vec<Message>) -> BoxFuture<'static, Vec<Answer>> {
        let under_way = UnderWay::begin(&self.under_way);
        let (consumer, handling) = match self.desk(processor) {
            Ok(desk) => (desk.consumer.clone(), desk.handling),
            Err(refused) => return Box::pin(std::future::ready(vec![refused; messages.len()])),
        };
        Box::pin(async move {
            let _under_way = under_way;
            consumer.handle_all(messages, handling).await.into_iter().map(answer).collect()
        })
    }

    fn headers(&self, processor: &str) -> &[String] {
        self.desks.get(processor).map_or(&[], |desk| &desk.headers)
    }

    fn ready(&self) -> Result<(), String> {
        if *self.stop.borrow() {
            return Err(STOPPING.to_owned());
        }
        match self.host.failure() {
            None => Ok(()),
            Some(error) => Err(format!("the store takes nothing more until the host is started again: {error}")),
        }
    }
}

impl StatusSource for HttpIngress {
    fn status(&self) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(async {
            let consumers = self.desks.iter().map(|(name, desk)| (&**name, &desk.consumer));
            let mut status = status::of(&self.host, consumers, self.outbox_breaker.as_deref())?;
            status["sagas"] = status::sagas(&*self.host.store).await?;
            status["stopping"] = json!(*self.stop.borrow());
            Ok(status)
        })
    }
}

fn answer(ended: Result<Outcome, StoreError>) -> Answer {
    let outcome = match ended {
        Ok(outcome) => outcome,
        Err(error) => return Answer::Unavailable { reason: error.to_string() },
    };
    match outcome {
        Outcome::Completed { output } => Answer::Completed { output },
        Outcome::Duplicate(StoredOutcome::Completed(output)) => Answer::Replayed { output },
        Outcome::Duplicate(StoredOutcome::Failed(error)) => Answer::Failed { error, replayed: true },
        Outcome::DeadLettered { error }
        | Outcome::Compensating { error }
        | Outcome::Compensated { error }
        | Outcome::CompensationFailed { error } => Answer::Failed { error, replayed: false },
        Outcome::Mismatch => Answer::Mismatch,
        Outcome::Stale => Answer::Stale,
        Outcome::Parked { awaits, until_ms } => Answer::Parked { awaits, until_ms },
        Outcome::Retry { error, after_ms } => Answer::RetryLater { error, after_ms },
        Outcome::InFlight { .. } => Answer::InFlight,
        Outcome::Paused { after_ms } => Answer::Paused { after_ms },
    }
}
