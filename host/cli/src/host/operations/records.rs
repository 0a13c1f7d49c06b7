//! Deduplication records as JSON: lists, one record, and its history. Reads only.

use hapax_core::{
    Clock as _, HistoryEntry, Record, RecordEvent, RecordKey, RecordOrigin, RecordState, Scope, Store, StoredOutcome,
    SystemClock, UnfinishedEntry, rebuild_record, record_history, unfinished_messages,
};
use hapax_transport::{RecordFilter, RequestError};
use serde_json::{Value, json};

use super::{failed, feed, held_messages};
use crate::output::run_printer::result;

/// Entries of the index of unfinished messages read at one time.
const PAGE: usize = 1_000;

pub(super) fn parse_key(text: &str) -> Result<RecordKey, RequestError> {
    text.parse().map_err(|error: hapax_core::ParseRecordKeyError| RequestError::Invalid(error.to_string()))
}

pub(super) async fn list(store: &dyn Store, filter: &RecordFilter) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    if filter.overdue {
        return overdue(store, filter, limit).await;
    }
    let after = filter.after.as_deref().map(parse_key).transpose()?;
    let page = store.records(filter.processor.as_deref(), after.as_ref(), limit + 1).await.map_err(failed)?;
    let next = (page.len() > limit).then(|| page[limit - 1].0.to_string());
    let records: Vec<_> = page.iter().take(limit).map(|(key, record)| as_json(key, record)).collect();
    Ok(json!({ "records": records, "next": next }))
}

/// Lists the records of unfinished messages whose time is over, the oldest first.
async fn overdue(store: &dyn Store, filter: &RecordFilter, limit: usize) -> Result<Value, RequestError> {
    if filter.after.is_some() {
        return Err(RequestError::Invalid("after: this field does not go with `overdue`; raise `limit`".into()));
    }
    let (mut records, mut last, mut more) = (Vec::new(), None, false);
    'pages: loop {
        let page = unfinished_messages(store, &Scope::of(""), SystemClock.now_ms(), last.as_ref(), PAGE).await;
        let page = page.map_err(failed)?;
        for UnfinishedEntry { message, when_ms } in &page {
            let of_another = |name: &String| *name != *message.record.scope.processor;
            if filter.processor.as_ref().is_some_and(of_another) {
                continue;
            }
            if records.len() == limit {
                more = true;
                break 'pages;
            }
            let record = store.record(&message.record).await.map_err(failed)?;
            // The record may be of a later message of the entity.
            let own = record.filter(|record| message.is_of(record));
            let overtaken = || json!({ "state": "overtaken" });
            let mut shown = own.map_or_else(overtaken, |record| as_json(&message.record, &record));
            shown["key"] = json!(message.message_key.to_string());
            shown["record"] = json!(message.record.to_string());
            shown["overdue_since_ms"] = json!(when_ms);
            records.push(shown);
        }
        if page.len() < PAGE {
            break;
        }
        last = page.into_iter().last();
    }
    Ok(json!({ "records": records, "next": null, "more": more }))
}

pub(super) async fn show(store: &dyn Store, text: &str) -> Result<Value, RequestError> {
    let (key, record) = find(store, text).await?;
    let mut shown = as_json(&key, &record);
    let kept = store.held_under(&key).await.map_err(failed)?;
    shown["dead_letters"] =
        kept.iter().map(|held_message| held_messages::whole(&held_message.key(&key), held_message)).collect();
    Ok(shown)
}

/// Returns the events under a key. `rebuilt` is true if they make the stored record, and null if
/// there is no record.
pub(super) async fn history(store: &dyn Store, text: &str) -> Result<Value, RequestError> {
    let key = parse_key(text)?;
    let record = store.record(&key).await.map_err(failed)?;
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

async fn find(store: &dyn Store, text: &str) -> Result<(RecordKey, Record), RequestError> {
    let key = parse_key(text)?;
    match store.record(&key).await.map_err(failed)? {
        Some(record) => Ok((key, record)),
        None => Err(absent(&key)),
    }
}

fn absent(key: &RecordKey) -> RequestError {
    RequestError::NotFound(format!("there is no record {key}; `hapax records list` shows every record"))
}

/// Returns the events of a record, oldest first, and true if they make the stored record.
pub(super) fn events(record: &Record) -> (Vec<Value>, bool) {
    let (received, entries) = record_history(record);
    let rebuilt = rebuild_record(&received, &entries).is_ok_and(|rebuilt| rebuilt.as_ref() == Some(record));
    (std::iter::once(received_event(&received)).chain(entries.iter().map(event)).collect(), rebuilt)
}

fn received_event(received: &RecordOrigin) -> Value {
    let mut event = json!({ "event": "received", "at_ms": received.at_ms, "fingerprint": received.fingerprint.hex() });
    if let Some(position) = &received.position {
        event["position"] = json!(position.to_string());
    }
    event
}

fn event(entry: &HistoryEntry) -> Value {
    let mut event = json!({
        "event": entry.event.name(), "at_ms": entry.at_ms, "epoch": entry.epoch, "attempts": entry.attempts,
        "component": entry.component, "expires_ms": entry.expires_ms,
    });
    match &entry.event {
        RecordEvent::Completed(output) => event["result"] = result(output),
        RecordEvent::Failed { error, retry_at_ms } => {
            event["error"] = json!(error);
            event["retry_at_ms"] = json!(retry_at_ms);
        }
        RecordEvent::GivenUp { error } | RecordEvent::CompensationStarted { error } => event["error"] = json!(error),
        _ => {}
    }
    event
}

fn as_json(key: &RecordKey, record: &Record) -> Value {
    let stored = match &record.state {
        RecordState::Completed { output } => Some(StoredOutcome::Completed(output.clone())),
        state => state.error().map(|error| StoredOutcome::Failed(error.to_owned())),
    };
    let (output, error) = match stored {
        Some(StoredOutcome::Completed(output)) => (result(&output), Value::Null),
        Some(StoredOutcome::Failed(error)) => (Value::Null, json!(error)),
        None => (Value::Null, Value::Null),
    };
    json!({
        "key": key.to_string(), "tenant": key.scope.tenant, "processor": key.scope.processor, "source": key.source,
        "id": key.key, "state": record.state.name(), "epoch": record.epoch, "attempts": record.attempts,
        "component": record.component, "received_ms": record.received_ms, "changed_ms": record.changed_ms,
        "expires_ms": record.expires_ms, "result": output, "error": error,
    })
}
