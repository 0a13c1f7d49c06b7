//! Deduplication records as JSON: lists, one of them, and its history. Reads only.

use hapax_core::history::{self, Received};
use hapax_core::record::{Event, Moment, Record, State};
use hapax_core::storage::Store;
use hapax_core::{RecordKey, Stored};
use hapax_transport::{RecordFilter, Refusal};
use serde_json::{Value, json};

use super::{failed, feed, letters};
use crate::output::run_printer::result;

pub(super) fn parse_key(text: &str) -> Result<RecordKey, Refusal> {
    text.parse().map_err(|error: hapax_core::key::NotARecordKey| Refusal::Invalid(error.to_string()))
}

pub(super) async fn list(store: &dyn Store, filter: &RecordFilter) -> Result<Value, Refusal> {
    let limit = filter.listed()?;
    let after = filter.after.as_deref().map(parse_key).transpose()?;
    let page = store.records(filter.processor.as_deref(), after.as_ref(), limit + 1).await.map_err(failed)?;
    let next = (page.len() > limit).then(|| page[limit - 1].0.to_string());
    let records: Vec<_> = page.iter().take(limit).map(|(key, record)| as_json(key, record)).collect();
    Ok(json!({ "records": records, "next": next }))
}

pub(super) async fn show(store: &dyn Store, text: &str) -> Result<Value, Refusal> {
    let (key, record) = find(store, text).await?;
    let mut shown = as_json(&key, &record);
    let kept = store.dead_letters(&key).await.map_err(failed)?;
    shown["dead_letters"] = kept.iter().map(|letter| letters::whole(&letter.key(&key), letter)).collect();
    Ok(shown)
}

/// What is known of a key's past; `rebuilt` says whether that makes the record that is stored, and is null where there is none.
pub(super) async fn history(store: &dyn Store, text: &str) -> Result<Value, Refusal> {
    let key = parse_key(text)?;
    let record = store.admit(&key).await.map_err(failed)?;
    let beyond = feed::beyond(store, &key, record.is_none()).await?;
    let (mut all, rebuilt) = match &record {
        Some(record) => (events(record).0, json!(events(record).1)),
        None if beyond.is_empty() => return Err(absent(&key)),
        None => (Vec::new(), Value::Null),
    };
    all.extend(beyond);
    all.sort_by_key(|event| event["at_ms"].as_u64());
    Ok(json!({ "key": key.to_string(), "events": all, "rebuilt": rebuilt }))
}

async fn find(store: &dyn Store, text: &str) -> Result<(RecordKey, Record), Refusal> {
    let key = parse_key(text)?;
    match store.admit(&key).await.map_err(failed)? {
        Some(record) => Ok((key, record)),
        None => Err(absent(&key)),
    }
}

fn absent(key: &RecordKey) -> Refusal {
    Refusal::NotFound(format!("there is no record {key}; `hapax records list` shows every record"))
}

/// What happened to a record, oldest first; and whether the record can be made again from that.
pub(super) fn events(record: &Record) -> (Vec<Value>, bool) {
    let (received, moments) = history::of(record);
    let rebuilt = history::rebuild(&received, &moments).is_ok_and(|rebuilt| rebuilt.as_ref() == Some(record));
    (std::iter::once(received_event(&received)).chain(moments.iter().map(event)).collect(), rebuilt)
}

fn received_event(received: &Received) -> Value {
    let mut event = json!({ "event": "received", "at_ms": received.at_ms, "fingerprint": received.fingerprint.hex() });
    if let Some(position) = &received.position {
        event["position"] = json!(position.to_string());
    }
    event
}

fn event(moment: &Moment) -> Value {
    let mut event = json!({
        "event": moment.event.name(), "at_ms": moment.at_ms, "epoch": moment.epoch, "attempts": moment.attempts,
        "component": moment.component, "expires_ms": moment.expires_ms,
    });
    match &moment.event {
        Event::Completed(output) => event["result"] = result(output),
        Event::Failed { error, retry_at_ms } => {
            event["error"] = json!(error);
            event["retry_at_ms"] = json!(retry_at_ms);
        }
        Event::GivenUp { error } | Event::CompensationStarted { error } => event["error"] = json!(error),
        _ => {}
    }
    event
}

fn as_json(key: &RecordKey, record: &Record) -> Value {
    let stored = match &record.state {
        State::Completed { output } => Some(Stored::Completed(output.clone())),
        state => state.error().map(|error| Stored::Failed(error.to_owned())),
    };
    let (output, error) = match stored {
        Some(Stored::Completed(output)) => (result(&output), Value::Null),
        Some(Stored::Failed(error)) => (Value::Null, json!(error)),
        None => (Value::Null, Value::Null),
    };
    json!({
        "key": key.to_string(), "tenant": key.scope.tenant, "processor": key.scope.processor, "source": key.source,
        "id": key.key, "state": record.state.name(), "epoch": record.epoch, "attempts": record.attempts,
        "component": record.component, "received_ms": record.received_ms, "changed_ms": record.changed_ms,
        "expires_ms": record.expires_ms, "result": output, "error": error,
    })
}
