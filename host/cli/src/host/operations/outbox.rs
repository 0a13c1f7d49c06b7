//! Refused messages, the dead letters of the outbox, as JSON: filtered lists, and one message with
//! all its data. Reads only.

use hapax_core::{RefusedMessage, RefusedMessages, Store};
use hapax_transport::{HeldFilter, RequestError};
use serde_json::{Value, json};

use super::held_messages::body;
use super::{PAGE, failed};
use crate::output::time;

/// A parsed filter.
pub(super) struct Wanted<'a> {
    filter: &'a HeldFilter,
    since_ms: u64,
    until_ms: u64,
}

impl<'a> Wanted<'a> {
    pub(super) fn by(filter: &'a HeldFilter, now_ms: u64) -> Result<Self, RequestError> {
        for (name, is_set) in [("standing", filter.hold_reason.is_some()), ("source", filter.source.is_some())] {
            if is_set {
                let text =
                    format!("{name}: refused messages are not listed by it; name their `processor`, or leave it out");
                return Err(RequestError::Invalid(text));
            }
        }
        let parse = |name, text: &Option<String>, default| match text {
            Some(text) => time::parse(name, text, now_ms),
            None => Ok(default),
        };
        let since_ms = parse("since", &filter.since, 0)?;
        Ok(Self { filter, since_ms, until_ms: parse("until", &filter.until, u64::MAX)? })
    }

    fn holds(&self, letter: &RefusedMessage) -> bool {
        let same = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
        same(&self.filter.processor, &letter.processor)
            && same(&self.filter.kind, &letter.kind)
            && self.filter.error.as_ref().is_none_or(|error| letter.error.contains(error))
            && (self.since_ms..self.until_ms).contains(&letter.at_ms)
    }

    /// Passes each message that the filter selects to `taken`, in the order of the ids, until it
    /// returns false.
    pub(super) async fn each(
        self,
        store: &dyn Store,
        mut taken: impl FnMut(RefusedMessage) -> bool,
    ) -> Result<(), RequestError> {
        let refused = RefusedMessages::new(store);
        let mut after = self.filter.after.clone();
        loop {
            let page = refused.list(after.as_deref(), PAGE).await.map_err(failed)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.id.clone());
            for letter in page {
                if self.holds(&letter) && !taken(letter) {
                    return Ok(());
                }
            }
        }
    }
}

pub(super) async fn list(store: &dyn Store, filter: &HeldFilter, now_ms: u64) -> Result<Value, RequestError> {
    let limit = filter.listed()?;
    let (mut found, mut more) = (Vec::new(), false);
    let take = |letter: RefusedMessage| {
        more = found.len() == limit;
        if !more {
            found.push(letter);
        }
        !more
    };
    Wanted::by(filter, now_ms)?.each(store, take).await?;
    let next = found.last().filter(|_| more).map(|letter| letter.id.clone());
    Ok(json!({ "messages": found.iter().map(summary).collect::<Vec<_>>(), "next": next }))
}

pub(super) async fn show(store: &dyn Store, id: &str) -> Result<Value, RequestError> {
    let found = RefusedMessages::new(store).find(id).await.map_err(failed)?;
    let (letter, message) = found.ok_or_else(|| {
        RequestError::NotFound(format!(
            "there is no refused message {id}; `hapax outbox list` shows every refused message"
        ))
    })?;
    let mut shown = summary(&letter);
    shown["attributes"] = message.attributes().into_iter().map(|(name, value)| (name, Value::from(value))).collect();
    let (name, data) = body(&message);
    shown[name] = json!(data);
    Ok(shown)
}

fn summary(letter: &RefusedMessage) -> Value {
    let mut summary = json!(letter);
    summary["position"] = json!(format!("{}-{}", letter.position.version, letter.position.index));
    summary
}
