//! State and event streams of a processor as JSON: lists, one value, the events of a stream. Reads
//! only.

use hapax_core::{Operator, RESERVED, Scope, Store, StreamEvent, list_state, list_streams, read_stream};
use hapax_transport::{EntryFilter, RequestError};
use serde_json::{Value, json};

use super::{Ops, failed};

/// Fails if a list is empty because the host has no such processor. A processor that is gone from
/// the host may still have state, which is shown; and where the store is stopped, nobody knows the
/// names.
fn check_processor(operator: &Operator, processor: &str, found: usize) -> Result<(), RequestError> {
    let known: Vec<&str> = operator.processors().collect();
    if found > 0 || known.is_empty() || operator.has_processor(processor) {
        return Ok(());
    }
    Err(RequestError::NotFound(format!("this host has no processor {processor}; it has {}", known.join(", "))))
}

/// Lists the entries of a processor's state. `next` is the key to go on after, if there may be
/// more.
pub(super) async fn state(ops: &Ops, processor: &str, filter: &EntryFilter) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    let view = ops.store.view(&Scope::of(processor));
    let prefix = filter.prefix.as_deref().unwrap_or_default();
    let entries = list_state(&*view, prefix, filter.after.as_deref(), limit).await.map_err(failed)?;
    check_processor(&ops.operator, processor, entries.len())?;
    let next = if entries.len() == limit { entries.last().map(|(key, _)| key.clone()) } else { None };
    let entries: Vec<Value> = entries.iter().map(|(key, value)| json!({ "key": key, "value": text(value) })).collect();
    Ok(json!({ "entries": entries, "next": next }))
}

/// Returns the value of one key.
pub(super) async fn value(store: &dyn Store, processor: &str, key: &str) -> Result<Value, RequestError> {
    let view = store.view(&Scope::of(processor));
    // Keys of the host itself, such as those of event streams, are not the processor's state.
    let value = if key.starts_with(RESERVED) { None } else { view.get(key).await.map_err(failed)?.1 };
    let value = value.ok_or_else(|| {
        RequestError::NotFound(format!(
            "{processor} has no state {key}; `hapax state list {processor}` shows what it has"
        ))
    })?;
    Ok(json!({ "key": key, "value": text(&value) }))
}

/// Lists the event streams of a processor with their versions.
pub(super) async fn streams(ops: &Ops, processor: &str, filter: &EntryFilter) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    no_prefix(filter)?;
    let view = ops.store.view(&Scope::of(processor));
    let streams = list_streams(&*view, filter.after.as_deref(), limit).await.map_err(failed)?;
    check_processor(&ops.operator, processor, streams.len())?;
    let next = if streams.len() == limit { streams.last().map(|(stream, _)| stream.clone()) } else { None };
    let streams: Vec<Value> =
        streams.iter().map(|(stream, version)| json!({ "stream": stream, "version": version })).collect();
    Ok(json!({ "streams": streams, "next": next }))
}

/// Lists the events of one stream, oldest first.
pub(super) async fn events(
    store: &dyn Store,
    processor: &str,
    stream: &str,
    filter: &EntryFilter,
) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    no_prefix(filter)?;
    let after: u64 = match &filter.after {
        Some(after) => after.parse().map_err(|_| {
            RequestError::Invalid(format!("after: {after:?} is no version of a stream; give a whole number"))
        })?,
        None => 0,
    };
    let view = store.view(&Scope::of(processor));
    let events = read_stream(&*view, stream, after, limit).await.map_err(failed)?;
    if events.is_empty() && read_stream(&*view, stream, 0, 1).await.map_err(failed)?.is_empty() {
        let there = format!("`hapax streams --processor {processor}` lists its streams");
        return Err(RequestError::NotFound(format!("{processor} has no event stream {stream}; {there}")));
    }
    let next = if events.len() == limit { events.last().map(|event| event.version.to_string()) } else { None };
    Ok(json!({ "events": events.iter().map(event).collect::<Vec<_>>(), "next": next }))
}

fn event(event: &StreamEvent) -> Value {
    let StreamEvent { id, version, kind, data } = event;
    let data = serde_json::from_slice(data).unwrap_or_else(|_| Value::from(String::from_utf8_lossy(data)));
    json!({ "version": version, "id": id, "type": kind, "data": data })
}

fn no_prefix(filter: &EntryFilter) -> Result<(), RequestError> {
    match &filter.prefix {
        Some(_) => Err(RequestError::Invalid("prefix: only state is listed by prefix; leave it out".into())),
        None => Ok(()),
    }
}

/// Returns text, or the bytes as numbers if the value is not UTF-8.
fn text(value: &[u8]) -> Value {
    std::str::from_utf8(value).map_or_else(|_| json!(value), |text| json!(text))
}
