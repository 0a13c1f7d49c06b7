//! Kept messages as JSON: lists with filters, and one with everything that is known of it. Reads only.

use std::collections::BTreeMap;

use base64::Engine as _;
use hapax_core::Message;
use hapax_core::storage::{DeadLetter, LetterKey, Standing, Store};
use hapax_transport::{LetterFilter, Refusal, StandingName};
use serde_json::{Value, json};

use super::{failed, moment, records};

/// Kept messages read from the store at one time.
const PAGE: usize = 256;

/// A filter that was understood.
pub(super) struct Wanted<'a> {
    filter: &'a LetterFilter,
    after: Option<LetterKey>,
    since_ms: u64,
    until_ms: u64,
}

impl<'a> Wanted<'a> {
    pub(super) fn by(filter: &'a LetterFilter, now_ms: u64) -> Result<Self, Refusal> {
        let parse = |name, text: &Option<String>, default| match text {
            Some(text) => moment::parse(name, text, now_ms),
            None => Ok(default),
        };
        let after = filter.after.as_deref().map(parse_key).transpose()?;
        let since_ms = parse("since", &filter.since, 0)?;
        Ok(Self { filter, after, since_ms, until_ms: parse("until", &filter.until, u64::MAX)? })
    }

    fn holds(&self, letter: &DeadLetter) -> bool {
        let same = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
        same(&self.filter.kind, &letter.message.kind)
            && same(&self.filter.source, &letter.message.source)
            && self.filter.error.as_ref().is_none_or(|error| letter.error.contains(error))
            && self.filter.standing.is_none_or(|standing| standing == standing_of(letter))
            && (self.since_ms..self.until_ms).contains(&letter.at_ms)
    }

    /// Hands over all that it finds, in the order of their keys, while they are `taken`.
    pub(super) async fn each(
        self,
        store: &dyn Store,
        mut taken: impl FnMut(LetterKey, DeadLetter) -> bool,
    ) -> Result<(), Refusal> {
        let mut after = self.after.clone();
        loop {
            let page = store.letters(self.filter.processor.as_deref(), after.as_ref(), PAGE).await.map_err(failed)?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(last.clone());
            for (key, letter) in page {
                if self.holds(&letter) && !taken(key, letter) {
                    return Ok(());
                }
            }
        }
    }
}

pub(super) fn parse_key(text: &str) -> Result<LetterKey, Refusal> {
    text.parse().map_err(|error: hapax_core::storage::NotALetterKey| Refusal::Invalid(error.to_string()))
}

fn standing_of(letter: &DeadLetter) -> StandingName {
    match letter.standing {
        Standing::Dead => StandingName::Dead,
        Standing::Redriven => StandingName::Redriven,
        Standing::Parked { .. } => StandingName::Parked,
    }
}

pub(super) async fn list(store: &dyn Store, filter: &LetterFilter, now_ms: u64) -> Result<Value, Refusal> {
    let limit = filter.listed()?;
    let mut found: Vec<(LetterKey, Value)> = Vec::new();
    let mut more = false;
    let take = |key, letter| {
        more = found.len() == limit;
        if !more {
            let summary = summary(&key, &letter);
            found.push((key, summary));
        }
        !more
    };
    Wanted::by(filter, now_ms)?.each(store, take).await?;
    let next = found.last().filter(|_| more).map(|(key, _)| key.to_string());
    let letters: Vec<_> = found.into_iter().map(|(_, summary)| summary).collect();
    Ok(json!({ "letters": letters, "next": next }))
}

pub(super) async fn show(store: &dyn Store, text: &str) -> Result<Value, Refusal> {
    let key = parse_key(text)?;
    let letters = store.dead_letters(&key.record).await.map_err(failed)?;
    let letter = letters.iter().find(|letter| letter.fingerprint.digest == key.fingerprint);
    let Some(letter) = letter else {
        return Err(Refusal::NotFound(format!("there is no dead letter {key}; `hapax dlq list` shows all there are")));
    };
    let record = store.admit(&key.record).await.map_err(failed)?;
    let mut shown = whole(&key, letter);
    shown["record"] = json!(key.record.to_string());
    shown["state"] = json!(record.as_ref().map(|record| record.state.name()));
    shown["history"] = json!(record.as_ref().map_or_else(Vec::new, |record| records::events(record).0));
    shown["blocks"] = blocks(&key, letter, &letters);
    Ok(shown)
}

/// The parked messages that come after this one, in the order in which they will run.
fn blocks(key: &LetterKey, letter: &DeadLetter, letters: &[DeadLetter]) -> Value {
    let behind = |other: &&DeadLetter| {
        matches!(other.standing, Standing::Parked { .. })
            && other.position.is_some()
            && other.position > letter.position
    };
    let mut behind: Vec<_> = letters.iter().filter(behind).collect();
    behind.sort_by(|one, other| one.position.cmp(&other.position));
    behind.into_iter().map(|other| json!(other.key(&key.record).to_string())).collect()
}

/// In a list.
fn summary(key: &LetterKey, letter: &DeadLetter) -> Value {
    let mut summary = json!({
        "key": key.to_string(), "processor": key.record.scope.processor, "source": letter.message.source,
        "id": letter.message.id, "type": letter.message.kind, "standing": standing_of(letter), "error": letter.error,
        "attempts": letter.attempts, "component": letter.component, "at_ms": letter.at_ms,
    });
    if let Some(position) = &letter.position {
        summary["position"] = json!(position.to_string());
    }
    if let Standing::Parked { awaits, until_ms } = letter.standing {
        summary["awaits"] = json!(awaits);
        summary["until_ms"] = json!(until_ms);
    }
    summary
}

/// With its message.
pub(super) fn whole(key: &LetterKey, letter: &DeadLetter) -> Value {
    let mut whole = summary(key, letter);
    let message = &letter.message;
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

/// The payload, under the name that CloudEvents gives it: text, or else base64.
fn body(message: &Message) -> (&'static str, String) {
    match std::str::from_utf8(&message.data) {
        Ok(text) => ("data", text.to_owned()),
        Err(_) => ("data_base64", base64::engine::general_purpose::STANDARD.encode(&message.data)),
    }
}
