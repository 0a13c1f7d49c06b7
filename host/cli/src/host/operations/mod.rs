//! Answers the requests of operators from a store, alike for the command line and for HTTP. Core
//! decides which actions are legal.

mod entries;
mod feed;
mod held_messages;
mod outbox;
mod records;
mod sagas;
mod selection;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapax_core::{Clock as _, Operator, OperatorAction, OperatorError, OutboxAction, Store, StoreError, SystemClock};
use hapax_transport::{AuditFilter, FeedPage, Operations, OperatorRequest, RequestError};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

use crate::output::time;

/// A store, and the operator that changes it.
#[derive(Clone)]
pub(crate) struct Ops {
    store: Arc<dyn Store>,
    operator: Arc<Operator>,
    /// True once the host stops: requests wait no longer.
    stop: watch::Receiver<bool>,
    /// Held by a request that may read much of the store. Several at once would take the processors
    /// from the messages.
    reading: Arc<Semaphore>,
}

/// Items that a list reads from the store at one time, before it filters them.
const PAGE: usize = 256;

/// Interval at which a request that waits for the feed to grow reads it again, in milliseconds.
const LOOK_AGAIN_MS: u64 = 100;

impl Ops {
    pub(crate) fn new(store: Arc<dyn Store>, operator: Operator, stop: watch::Receiver<bool>) -> Self {
        Self { store, operator: Arc::new(operator), stop, reading: Arc::new(Semaphore::new(1)) }
    }

    /// Answers a request, or performs its action.
    pub(crate) async fn ask(&self, request: OperatorRequest) -> Result<Value, RequestError> {
        match request {
            OperatorRequest::Letters(filter) => held_messages::list(&*self.store, &filter, SystemClock.now_ms()).await,
            OperatorRequest::Letter(key) => held_messages::show(&*self.store, &key).await,
            OperatorRequest::Redrive(chosen) => self.redrive(&chosen).await,
            OperatorRequest::Discard(chosen) => self.discard(&chosen).await,
            OperatorRequest::Records(filter) => records::list(&*self.store, &filter).await,
            OperatorRequest::Record(key) => records::show(&*self.store, &key).await,
            OperatorRequest::History(key) => records::history(&*self.store, &key).await,
            OperatorRequest::Evict(chosen) => self.on_records("evict", &chosen, OperatorAction::Evict).await,
            OperatorRequest::GiveUp(chosen) => self.on_records("give-up", &chosen, OperatorAction::GiveUp).await,
            OperatorRequest::Audit(filter) => self.audit(&filter).await,
            OperatorRequest::Sagas(filter) => sagas::list(&*self.store, &filter).await,
            OperatorRequest::Saga(id) => sagas::show(&*self.store, &id).await,
            OperatorRequest::RefusedMessages(filter) => outbox::list(&*self.store, &filter, SystemClock.now_ms()).await,
            OperatorRequest::RefusedMessage(id) => outbox::show(&*self.store, &id).await,
            OperatorRequest::RedriveOutgoing(chosen) => self.on_refused(OutboxAction::Redrive, &chosen).await,
            OperatorRequest::DiscardOutgoing(chosen) => self.on_refused(OutboxAction::Discard, &chosen).await,
            OperatorRequest::State(processor, filter) => entries::state(self, &processor, &filter).await,
            OperatorRequest::StateValue(processor, key) => entries::value(&*self.store, &processor, &key).await,
            OperatorRequest::Streams(processor, filter) => entries::streams(self, &processor, &filter).await,
            OperatorRequest::StreamEvents(processor, stream, filter) => {
                entries::events(&*self.store, &processor, &stream, &filter).await
            }
            OperatorRequest::ResumeSaga(verb, chosen) => self.resume(verb, &chosen).await,
        }
    }

    async fn audit(&self, filter: &AuditFilter) -> Result<Value, RequestError> {
        let limit = filter.listed()?;
        let since_ms = match &filter.since {
            Some(since) => time::parse("since", since, SystemClock.now_ms())?,
            None => 0,
        };
        let mut lines = self.operator.trail_since(&filter.processor, since_ms, limit + 1).await.map_err(failed)?;
        let more = lines.len() > limit;
        lines.truncate(limit);
        Ok(json!({ "actions": lines, "more": more }))
    }
}

impl Operations for Ops {
    fn perform(&self, request: OperatorRequest) -> BoxFuture<'static, Result<Value, RequestError>> {
        let ops = self.clone();
        Box::pin(apart(async move {
            let _reading = match reads_much(&request) {
                true => Some(ops.reading.clone().acquire_owned().await.expect("it is never closed")),
                false => None,
            };
            ops.ask(request).await
        }))
    }

    fn events(&self, after: Option<String>, limit: usize) -> BoxFuture<'static, Result<FeedPage, RequestError>> {
        let store = self.store.clone();
        Box::pin(apart(async move { feed::page(&*store, after.as_deref(), limit).await }))
    }

    fn feed_changed(&self) -> BoxFuture<'static, bool> {
        let mut stop = self.stop.clone();
        Box::pin(async move {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(LOOK_AGAIN_MS)) => true,
                _ = stop.wait_for(|stop| *stop) => false,
            }
        })
    }
}

/// Does work that may read much of the store on a thread of its own: reads block, and no message
/// must wait for them.
pub(crate) async fn apart<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let runtime = tokio::runtime::Handle::current();
    let done = tokio::task::spawn_blocking(move || runtime.block_on(work)).await;
    done.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()))
}

/// Returns whether a request may read much of the store.
fn reads_much(request: &OperatorRequest) -> bool {
    use OperatorRequest::{Audit, History, Letters, Records, Sagas, State, StreamEvents, Streams};
    matches!(
        request,
        Audit(_) | History(_) | Letters(_) | Records(_) | Sagas(_) | State(..) | StreamEvents(..) | Streams(..)
    )
}

/// Translates a failure of the store.
fn failed(error: StoreError) -> RequestError {
    RequestError::Unavailable(error.to_string())
}

fn refusal(error: OperatorError) -> RequestError {
    match error {
        OperatorError::NotFound { what: what @ "record", .. } => {
            RequestError::NotFound(format!("{error}; `hapax records list` shows every {what}"))
        }
        OperatorError::NotFound { what: what @ "saga", .. } => {
            RequestError::NotFound(format!("{error}; `hapax saga list` shows every {what}"))
        }
        OperatorError::NotFound { what: what @ "refused message", .. } => {
            RequestError::NotFound(format!("{error}; `hapax outbox list` shows every {what}"))
        }
        OperatorError::NotFound { what: "unfinished message", .. } => RequestError::NotFound(format!(
            "{error}; `hapax records list --overdue` shows those that wait for a delivery"
        )),
        OperatorError::NotFound { .. } => {
            RequestError::NotFound(format!("{error}; `hapax dlq list` shows every held message"))
        }
        OperatorError::Refused(_) | OperatorError::Changed(_) => RequestError::Refused(error.to_string()),
        OperatorError::Store(error) => failed(error),
    }
}

#[cfg(test)]
mod tests {
    use hapax_core::{
        Commit, Committer, Fingerprint, HistoryEntry, Record, RecordChange, RecordEvent, RecordKey, RecordState,
    };
    use hapax_store::MemoryStore;

    use super::*;

    async fn ops() -> (Ops, Arc<Committer>) {
        let store = Arc::new(MemoryStore::default());
        let committer = Committer::start(store.clone()).await.expect("a committer");
        let operator = Operator::new(store.clone(), committer.clone(), Arc::new(SystemClock), []);
        (Ops::new(store, operator, watch::channel(false).1), committer)
    }

    fn dead() -> Record {
        let event = RecordEvent::GivenUp { error: "no".into() };
        let entry =
            HistoryEntry { event, at_ms: 200, epoch: 1, attempts: 1, component: "c".into(), expires_ms: Some(999) };
        Record {
            state: RecordState::DeadLettered { error: "no".into() },
            epoch: 1,
            attempts: 1,
            fingerprint: Fingerprint { version: 1, digest: [7; 16] },
            position: None,
            component: "c".into(),
            saga: None,
            received_ms: 100,
            changed_ms: 200,
            expires_ms: Some(999),
            history: vec![entry],
        }
    }

    async fn store(committer: &Committer, record: Record) {
        let key: RecordKey = KEY.parse().expect("a key");
        let commit = Commit { record: RecordChange::Put(record.into()), ..Commit::of(&key) };
        committer.submit(commit).durable().await.expect("a commit");
    }

    const KEY: &str = "default/p/%2Fs/k";

    fn events(history: &Value) -> Vec<&str> {
        let events = history["events"].as_array().expect("events").iter();
        events.map(|event| event["event"].as_str().expect("a name")).collect()
    }

    #[tokio::test]
    async fn what_the_feed_tells_of_a_record_joins_its_history() {
        let (ops, committer) = ops().await;
        store(&committer, dead()).await;
        let history = ops.ask(OperatorRequest::History(KEY.into())).await.expect("a history");
        assert_eq!((events(&history), &history["rebuilt"]), (vec!["received", "dead-lettered"], &Value::Bool(true)));
        let chosen = serde_json::from_value(json!({ "keys": [KEY], "actor": "me", "reason": "a test" }));
        ops.ask(OperatorRequest::Evict(chosen.expect("a choice"))).await.expect("it is forgotten");
        let gone = ops.ask(OperatorRequest::History(KEY.into())).await.expect("what the feed tells");
        assert_eq!((events(&gone), &gone["rebuilt"]), (vec!["dead-lettered", "evicted"], &Value::Null));
    }

    #[tokio::test]
    async fn a_record_that_is_not_what_its_history_makes_is_told() {
        let (ops, committer) = ops().await;
        store(&committer, Record { attempts: 2, ..dead() }).await;
        assert_eq!(ops.ask(OperatorRequest::History(KEY.into())).await.expect("a history")["rebuilt"], false);
    }
}
