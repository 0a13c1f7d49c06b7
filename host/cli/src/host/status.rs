//! Status of a running host as JSON, the answer of `GET /v1/status`. Reads only.

use hapax_core::{
    CircuitBreaker, Clock as _, Counted, IdempotentConsumer, RefusedMessages, SagaLog, SagaState, Scope, Store,
    SystemClock, unfinished_messages,
};
use serde_json::{Map, Value, json};

use crate::host::Host;

/// Maximum number of sagas that one status counts: a status must stay cheap however many sagas are
/// unsettled.
const SAGAS_COUNTED: usize = 10_000;
/// Maximum number of refused messages that one status counts.
const REFUSED_COUNTED: usize = 10_000;

/// Maximum number of overdue messages that one status counts.
const OVERDUE_COUNTED: usize = 10_000;
/// Time after which an unfinished message counts as overdue, in milliseconds: sooner, it may be on
/// its way.
const OVERDUE_AFTER_MS: u64 = 60_000;

/// Returns the status of a host as JSON, without its sagas.
pub(crate) async fn of<'a>(
    host: &Host,
    consumers: impl Iterator<Item = (&'a str, &'a IdempotentConsumer)>,
    outbox_breaker: Option<&CircuitBreaker>,
) -> Result<Value, String> {
    let facts = host.store.facts().await.map_err(|error| error.to_string())?;
    let mut processors = Map::new();
    let mut waiting = 0;
    for (name, consumer) in consumers {
        let counted = host.counters.lock().get(name).map(|counters| counters.read()).unwrap_or_default();
        waiting += consumer.status().waiting as u64;
        processors.insert(name.to_owned(), processor(&counted, consumer));
    }
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now_ms": SystemClock.now_ms(),
        "processors": processors,
        "outbox": {
            "pending": facts.outbox_pending,
            "refused": refused(&*host.store).await?,
            "trouble": host.relay_status.trouble(),
            "breaker": outbox_breaker.map(CircuitBreaker::status),
        },
        "store": {
            "dead_letters": facts.held_messages.saturating_sub(waiting),
            "unapplied_bytes": facts.unapplied_bytes,
            "buckets": facts.buckets,
            "failure": host.failure().map(|error| error.to_string()),
        },
    }))
}

/// Returns the number of outgoing messages that their destination refused, up to
/// [`REFUSED_COUNTED`].
pub(crate) async fn refused(store: &dyn Store) -> Result<usize, String> {
    RefusedMessages::new(store).count(REFUSED_COUNTED).await.map_err(|error| error.to_string())
}

/// Returns the numbers of compensating and of stuck sagas, up to [`SAGAS_COUNTED`].
pub(crate) async fn sagas(store: &dyn Store) -> Result<Value, String> {
    let unsettled = SagaLog::new(store, &Scope::of("")).unsettled(None, SAGAS_COUNTED).await;
    let unsettled = unsettled.map_err(|error| error.to_string())?;
    let count = |state| unsettled.iter().filter(|saga| saga.state == state).count();
    Ok(json!({ "compensating": count(SagaState::Compensating), "stuck": count(SagaState::Stuck) }))
}

/// Returns the number of unfinished messages that nobody has delivered again for a minute after
/// their time, up to [`OVERDUE_COUNTED`].
pub(crate) async fn overdue(store: &dyn Store) -> Result<Value, String> {
    let before_ms = SystemClock.now_ms().saturating_sub(OVERDUE_AFTER_MS);
    let overdue = unfinished_messages(store, &Scope::of(""), before_ms, None, OVERDUE_COUNTED).await;
    Ok(json!(overdue.map_err(|error| error.to_string())?.len()))
}

fn processor(counted: &Counted, consumer: &IdempotentConsumer) -> Value {
    let looked = counted.cache_hits + counted.cache_misses;
    let hit_rate = if looked == 0 { 0.0 } else { counted.cache_hits as f64 / looked as f64 };
    let mut value = json!(consumer.status());
    value["outcomes"] = counted.outcomes.iter().map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
    value["conflicts"] = json!(counted.conflicts);
    value["cache_hits"] = json!(counted.cache_hits);
    value["cache_misses"] = json!(counted.cache_misses);
    value["cache_hit_rate"] = json!((hit_rate * 10_000.0).round() / 10_000.0);
    value
}
