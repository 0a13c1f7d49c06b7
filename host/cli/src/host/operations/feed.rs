//! The feed of record events as JSON: its pages, and the events of one record that the record's own
//! history lacks. Reads only.

use hapax_core::{Cursor, FeedEvent, FeedEventKind, RecordKey, Store};
use hapax_transport::{FeedPage, RequestError};
use serde_json::{Value, json};

use super::failed;

/// Maximum number of events of one record, counted from the oldest in the feed.
const OF_RECORD_MAX: usize = 10_000;

/// Returns up to `limit` events after the cursor `after`.
pub(super) async fn page(store: &dyn Store, after: Option<&str>, limit: usize) -> Result<FeedPage, RequestError> {
    let after = after.map(str::parse::<Cursor>).transpose();
    let after = after.map_err(|error| RequestError::Invalid(format!("after: {error}")))?;
    let page = store.events(None, after, limit).await.map_err(failed)?;
    let next = page.next(after).unwrap_or_default().to_string();
    Ok(FeedPage { events: page.events.iter().map(as_json).collect(), next, truncated: page.truncated })
}

/// Returns the events of a record that its own history lacks. If the record is gone, returns all
/// its events in the feed.
pub(super) async fn beyond(store: &dyn Store, key: &RecordKey, is_gone: bool) -> Result<Vec<Value>, RequestError> {
    let page = store.events(Some(key.digest()), None, OF_RECORD_MAX).await.map_err(failed)?;
    let told = page.events.iter().filter(|event| is_gone || is_beyond(event.entry.kind));
    Ok(told.map(as_json).collect())
}

fn is_beyond(kind: FeedEventKind) -> bool {
    matches!(
        kind,
        FeedEventKind::Replayed
            | FeedEventKind::Stale
            | FeedEventKind::Parked
            | FeedEventKind::Discarded
            | FeedEventKind::Evicted
    )
}

fn as_json(event: &FeedEvent) -> Value {
    let entry = &event.entry;
    json!({
        "cursor": event.cursor.to_string(), "event": entry.kind.name(), "at_ms": entry.at_ms,
        "key": event.key.as_ref().map(ToString::to_string), "record": format!("{:032x}", entry.digest),
        "attempts": entry.attempts, "epoch": entry.epoch, "times": entry.times,
    })
}
