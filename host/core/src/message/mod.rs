//! A message and its CloudEvents attributes. Transports parse wire formats.

mod canonical;
mod decimal;
pub(crate) mod fingerprint;
pub(crate) mod identity;
mod json;
#[cfg(test)]
mod json_tests;
pub(crate) mod key;
pub(crate) mod older_fingerprint;
pub(crate) mod strategy;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A message as CloudEvents 1.0 describes it; cheap to share behind an `Arc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `id`: unique within `source`; never empty.
    pub id: String,
    /// `source`: who produced it; never empty.
    pub source: String,
    /// `type`: what happened, such as `order.placed`.
    pub kind: String,
    /// `subject`: what it happened to.
    pub subject: Option<String>,
    /// `time`: RFC 3339, as received.
    pub time: Option<String>,
    /// `datacontenttype`: the media type of `data`; absent means JSON.
    pub content_type: Option<String>,
    /// `dataschema`: the schema `data` adheres to.
    pub data_schema: Option<String>,
    /// Extension attributes by name: lower-case letters and digits.
    pub extensions: BTreeMap<String, String>,
    /// The payload, byte for byte as received.
    pub data: Bytes,
    /// Idempotency key given beside the message (HTTP's `Idempotency-Key`); it stands in for `id`.
    pub idempotency_key: Option<String>,
    /// Headers that the transport delivered beside the message and that the processor's strategy
    /// asks for; names are lower case.
    pub headers: BTreeMap<String, String>,
}

impl Message {
    /// Returns a message with the three required attributes and nothing else.
    pub fn new(id: impl Into<String>, source: impl Into<String>, kind: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            source: source.into(),
            kind: kind.into(),
            subject: None,
            time: None,
            content_type: None,
            data_schema: None,
            extensions: BTreeMap::new(),
            data: Bytes::new(),
            idempotency_key: None,
            headers: BTreeMap::new(),
        }
    }

    /// Returns the message with a payload of the given media type.
    #[must_use]
    pub fn with_data(mut self, content_type: impl Into<String>, data: impl Into<Bytes>) -> Self {
        self.content_type = Some(content_type.into());
        self.data = data.into();
        self
    }

    /// Returns `true` if `data` is JSON: no media type, `application/json`, `text/json` or any
    /// `+json`.
    pub fn is_json(&self) -> bool {
        self.content_type.as_deref().is_none_or(is_json_type)
    }

    /// Returns an attribute by its CloudEvents name.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        match name {
            "id" => Some(&self.id),
            "source" => Some(&self.source),
            "type" => Some(&self.kind),
            "subject" => self.subject.as_deref(),
            "time" => self.time.as_deref(),
            "datacontenttype" => self.content_type.as_deref(),
            "dataschema" => self.data_schema.as_deref(),
            extension => self.extensions.get(extension).map(String::as_str),
        }
    }

    /// Returns every attribute that is present, by its CloudEvents name.
    pub fn attributes(&self) -> Vec<(String, String)> {
        let optional = [
            ("subject", &self.subject),
            ("time", &self.time),
            ("datacontenttype", &self.content_type),
            ("dataschema", &self.data_schema),
        ];
        let required = [("id", &self.id), ("source", &self.source), ("type", &self.kind)];
        let message_key = |(name, value): (&str, &String)| (name.to_owned(), value.clone());
        required
            .into_iter()
            .map(message_key)
            .chain(optional.into_iter().filter_map(|(name, value)| Some(message_key((name, value.as_ref()?)))))
            .chain(self.extensions.iter().map(|(name, value)| (name.clone(), value.clone())))
            .collect()
    }

    /// Returns the message's own time in milliseconds since the Unix epoch: `time`, or 0 without a
    /// readable one.
    pub fn now_ms(&self) -> u64 {
        self.time.as_deref().and_then(parse_rfc3339_ms).unwrap_or(0)
    }
}

/// Returns `true` if a media type is JSON, regardless of its parameters.
pub fn is_json_type(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
        || essence.eq_ignore_ascii_case("text/json")
        || essence.as_bytes().last_chunk().is_some_and(|end: &[u8; 5]| end.eq_ignore_ascii_case(b"+json"))
}

/// Converts RFC 3339 to milliseconds since the Unix epoch; `None` if the text is not RFC 3339 or
/// lies before 1970.
pub fn parse_rfc3339_ms(text: &str) -> Option<u64> {
    Some(parse_rfc3339_ns(text)? / 1_000_000)
}

/// Converts RFC 3339 to nanoseconds since the Unix epoch; `None` if the text is not RFC 3339 or
/// lies before 1970 or after 2554.
pub fn parse_rfc3339_ns(text: &str) -> Option<u64> {
    let at = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    u64::try_from(at.unix_timestamp_nanos()).ok()
}
