//! HTTP ingress of a running host: hands messages to consumers, and stops accepting them after a
//! signal.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::{BoxFuture, ready};
use hapax_core::{
    CircuitBreaker, Handling, IdempotentConsumer, Message, MismatchPolicy, Outcome, StoreError, StoredOutcome,
};
use hapax_transport::{Answer, Ingress, StatusSource};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::config::Processor;
use crate::host::operations::apart;
use crate::host::{Host, status};

/// Reason for a refusal after a signal.
const STOPPING: &str = "the host is stopping; send the message again later, or to another host";

/// The routes of a host's processors, by name.
pub(crate) struct Routes(BTreeMap<String, Route>);

/// Route from HTTP to one processor.
struct Route {
    consumer: IdempotentConsumer,
    handling: Handling,
    /// Names of the headers that the processor's strategy reads.
    headers: Vec<String>,
}

impl Routes {
    /// Loads the processors.
    pub(crate) fn of(host: &Host, processors: &BTreeMap<String, Processor>) -> anyhow::Result<Self> {
        let route = |(name, processor): (&String, &Processor)| {
            // The client delivers again, so retries are its own.
            let handling = Handling { wait_in_flight: processor.wait_in_flight, retry_here: false };
            let consumer = host.consumer(name, processor)?;
            let headers = consumer.options().strategy.headers();
            Ok((name.clone(), Route { consumer, handling, headers }))
        };
        processors.iter().map(route).collect::<anyhow::Result<_>>().map(Self)
    }

    /// Returns the consumer of each processor.
    pub(crate) fn consumers(&self) -> Vec<IdempotentConsumer> {
        self.0.values().map(|route| route.consumer.clone()).collect()
    }

    /// Returns the consumer of a processor.
    pub(crate) fn consumer(&self, processor: &str) -> Option<&IdempotentConsumer> {
        self.0.get(processor).map(|route| &route.consumer)
    }
}

/// Accepts the messages that come over HTTP.
pub(crate) struct HttpIngress {
    routes: Routes,
    host: Host,
    outbox_breaker: Option<Arc<CircuitBreaker>>,
    /// True once a signal has come: no message is accepted any more.
    stop: watch::Receiver<bool>,
    /// Number of accepted messages that have no outcome yet.
    under_way: watch::Sender<usize>,
}

impl HttpIngress {
    pub(crate) fn new(
        routes: Routes,
        host: Host,
        outbox_breaker: Option<Arc<CircuitBreaker>>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self { routes, host, outbox_breaker, stop, under_way: watch::Sender::new(0) }
    }

    /// Returns the route of a processor, unless it does not exist or the host is stopping.
    fn route(&self, processor: &str) -> Result<&Route, Answer> {
        match self.routes.0.get(processor) {
            None => Err(Answer::UnknownProcessor { known: self.routes.0.keys().cloned().collect() }),
            Some(_) if *self.stop.borrow() => Err(Answer::Unavailable { reason: STOPPING.to_owned() }),
            Some(route) => Ok(route),
        }
    }

    /// Returns the failure that closed the store, if one did.
    pub(crate) fn failure(&self) -> Option<StoreError> {
        self.host.failure()
    }

    /// Completes when a signal has come and every accepted message has an outcome. The server
    /// answers until then, so that clients learn that the host is stopping.
    pub(crate) async fn drained(self: Arc<Self>) {
        let mut stop = self.stop.clone();
        if stop.wait_for(|stop| *stop).await.is_err() {
            return std::future::pending().await;
        }
        // Messages that wait for their retry are put off: the drain would wait as long as they do.
        self.routes.0.values().for_each(|route| route.consumer.stop());
        let _ = self.under_way.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// Counts an accepted message until it is dropped.
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
        // Counted before `stop` is read: `drained`, which reads the count after the signal, misses
        // no accepted message.
        let under_way = UnderWay::begin(&self.under_way);
        let (consumer, handling) = match self.route(processor) {
            Ok(route) => (route.consumer.clone(), route.handling),
            Err(refused) => return Box::pin(ready(refused)),
        };
        Box::pin(async move {
            let _under_way = under_way;
            answer(consumer.handle(message, handling).await, consumer.options().mismatch)
        })
    }

    fn deliver_batch(&self, processor: &str, messages: Vec<Message>) -> BoxFuture<'static, Vec<Answer>> {
        let under_way = UnderWay::begin(&self.under_way);
        let (consumer, handling) = match self.route(processor) {
            Ok(route) => (route.consumer.clone(), route.handling),
            Err(refused) => return Box::pin(ready(vec![refused; messages.len()])),
        };
        Box::pin(async move {
            let _under_way = under_way;
            let mismatch = consumer.options().mismatch;
            let ended = consumer.handle_all(messages, handling).await.into_iter();
            ended.map(|ended| answer(ended, mismatch)).collect()
        })
    }

    fn headers(&self, processor: &str) -> &[String] {
        self.routes.0.get(processor).map_or(&[], |route| &route.headers)
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
            let consumers = self.routes.0.iter().map(|(name, route)| (&**name, &route.consumer));
            let mut status = status::of(&self.host, consumers, self.outbox_breaker.as_deref()).await?;
            let store = self.host.store.clone();
            let counted = apart(async move { (status::sagas(&*store).await, status::overdue(&*store).await) }).await;
            (status["sagas"], status["overdue"]) = (counted.0?, counted.1?);
            status["stopping"] = json!(*self.stop.borrow());
            Ok(status)
        })
    }
}

/// Translates the outcome of a message for the client.
fn answer(ended: Result<Outcome, StoreError>, mismatch: MismatchPolicy) -> Answer {
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
        Outcome::Mismatch => Answer::Mismatch { held: mismatch == MismatchPolicy::DeadLetter },
        Outcome::Stale => Answer::Stale,
        Outcome::Parked { awaits, until_ms } => Answer::Parked { awaits, until_ms },
        Outcome::Retry { error, after_ms } => Answer::RetryLater { error, after_ms },
        Outcome::InFlight { .. } => Answer::InFlight,
        Outcome::Paused { after_ms } => Answer::Paused { after_ms },
    }
}
