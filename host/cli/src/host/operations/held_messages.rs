//! Held messages as JSON: filtered lists, and one message with all its data. Reads only.

use std::collections::BTreeMap;

use base64::Engine as _;
use hapax_core::{HeldKey, HeldMessage, HoldReason, Message, Store};
use hapax_transport::{HeldFilter, RequestError};
use serde_json::{Value, json};

use super::{PAGE, failed, records};
use crate::output::time;

/// A parsed filter.
pub(super) struct Wanted<'a> {
    filter: &'a HeldFilter,
    after: Option<HeldKey>,
    since_ms: u64,
    until_ms: u64,
}

impl<'a> Wanted<'a> {
    pub(super) fn by(filter: &'a HeldFilter, now_ms: u64) -> Result<Self, RequestError> {
        let parse = |name, text: &Option<String>, default| match text {
            Some(text) => time::parse(name, text, now_ms),
            None => Ok(default),
        };
        let after = filter.after.as_deref().map(parse_key).transpose()?;
        let since_ms = parse("since", &filter.since, 0)?;
        Ok(Self { filter, after, since_ms, until_ms: parse("until", &filter.until, u64::MAX)? })
    }

    fn holds(&self, held_message: &HeldMessage) -> bool {
        let same = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
        same(&self.filter.kind, &held_message.message.kind)
            && same(&self.filter.source, &held_message.message.source)
            && self.filter.error.as_ref().is_none_or(|error| held_message.error.contains(error))
            && self.filter.hold_reason.is_none_or(|kind| kind == held_message.hold_reason.kind())
            && (self.since_ms..self.until_ms).contains(&held_message.at_ms)
    }

    /// Passes each message that the filter selects to `taken`, in the order of the keys, until it
    /// returns false.
    pub(super) async fn each(
        self,
        store: &dyn Store,
        mut taken: impl FnMut(HeldKey, HeldMessage) -> bool,
    ) -> Result<(), RequestError> {
        let mut after = self.after.clone();
        loop {
            let page =
                store.held_messages(self.filter.processor.as_deref(), after.as_ref(), PAGE).await.map_err(failed)?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(last.clone());
            for (key, held_message) in page {
                if self.holds(&held_message) && !taken(key, held_message) {
                    return Ok(());
                }
            }
        }
    }
}

pub(super) fn parse_key(text: &str) -> Result<HeldKey, RequestError> {
    text.parse().map_err(|error: hapax_core::ParseHeldKeyError| RequestError::Invalid(error.to_string()))
}

pub(super) async fn list(store: &dyn Store, filter: &HeldFilter, now_ms: u64) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    let mut found: Vec<(HeldKey, Value)> = Vec::new();
    let mut more = false;
    let take = |key, held_message| {
        more = found.len() == limit;
        if !more {
            let summary = summary(&key, &held_message);
            found.push((key, summary));
        }
        !more
    };
    Wanted::by(filter, now_ms)?.each(store, take).await?;
    let next = found.last().filter(|_| more).map(|(key, _)| key.to_string());
    let held_messages: Vec<_> = found.into_iter().map(|(_, summary)| summary).collect();
    Ok(json!({ "letters": held_messages, "next": next }))
}

pub(super) async fn show(store: &dyn Store, text: &str) -> Result<Value, RequestError> {
    let key = parse_key(text)?;
    let held_messages = store.held_under(&key.record).await.map_err(failed)?;
    let held_message = held_messages.iter().find(|held_message| held_message.fingerprint.digest == key.fingerprint);
    let Some(held_message) = held_message else {
        return Err(RequestError::NotFound(format!(
            "there is no dead letter {key}; `hapax dlq list` shows every held message"
        )));
    };
    let record = store.record(&key.record).await.map_err(failed)?;
    let mut shown = whole(&key, held_message);
    shown["record"] = json!(key.record.to_string());
    shown["state"] = json!(record.as_ref().map(|record| record.state.name()));
    shown["history"] = json!(record.as_ref().map_or_else(Vec::new, |record| records::events(record).0));
    shown["blocks"] = blocks(&key, held_message, &held_messages);
    Ok(shown)
}

/// Returns the parked messages after this one, in the order in which they will run.
fn blocks(key: &HeldKey, held_message: &HeldMessage, held_messages: &[HeldMessage]) -> Value {
    let behind = |other: &&HeldMessage| {
        matches!(other.hold_reason, HoldReason::Parked { .. })
            && other.position.is_some()
            && other.position > held_message.position
    };
    let mut behind: Vec<_> = held_messages.iter().filter(behind).collect();
    behind.sort_by(|one, other| one.position.cmp(&other.position));
    behind.into_iter().map(|other| json!(other.key(&key.record).to_string())).collect()
}

/// Returns a held message for a list.
fn summary(key: &HeldKey, held_message: &HeldMessage) -> Value {
    let mut summary = json!({
        "key": key.to_string(), "processor": key.record.scope.processor, "source": held_message.message.source,
        "id": held_message.message.id, "type": held_message.message.kind, "standing": held_message.hold_reason.kind(), "error": held_message.error,
        "attempts": held_message.attempts, "component": held_message.component, "at_ms": held_message.at_ms,
    });
    if let Some(position) = &held_message.position {
        summary["position"] = json!(position.to_string());
    }
    if let HoldReason::Parked { awaits, until_ms } = held_message.hold_reason {
        summary["awaits"] = json!(awaits);
        summary["until_ms"] = json!(until_ms);
    }
    summary
}

/// Returns a held message with its body and attributes.
pub(super) fn whole(key: &HeldKey, held_message: &HeldMessage) -> Value {
    let mut whole = summary(key, held_message);
    let message = &held_message.message;
    whole["attributes"] = json!(message.attributes().into_iter().collect::<BTreeMap<_, _>>());
    if let Some(idempotency_key) = &message.idempotency_key {
        whole["idempotency_key"] = json!(idempotency_key);
    }
    if !message.headers.is_empty() {
        whole["headers"] = json!(message.headers);
    }
    let (name, data) = body(message);
    whole[name] = json!(data);
    whole
}

/// Returns the payload under its CloudEvents name: text, or base64 if it is not UTF-8.
pub(super) fn body(message: &Message) -> (&'static str, String) {
    match std::str::from_utf8(&message.data) {
        Ok(text) => ("data", text.to_owned()),
        Err(_) => ("data_base64", base64::engine::general_purpose::STANDARD.encode(&message.data)),
    }
}
