//! The message as a processor reads it: CloudEvents attributes and data. Never changes.

use std::ops::Deref;

use serde::de::DeserializeOwned;

use crate::Failure;

/// One delivery of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub(crate) attributes: Vec<(String, String)>,
    pub(crate) data: Vec<u8>,
    pub(crate) idempotency_key: String,
    pub(crate) attempt: u32,
    pub(crate) now_ms: u64,
    pub(crate) seed: u64,
    pub(crate) step_key: Option<String>,
}

impl Message {
    /// The CloudEvents `id`.
    pub fn id(&self) -> &str {
        self.attribute("id").unwrap_or_default()
    }

    /// The CloudEvents `source`.
    pub fn source(&self) -> &str {
        self.attribute("source").unwrap_or_default()
    }

    /// The CloudEvents `type`.
    pub fn kind(&self) -> &str {
        self.attribute("type").unwrap_or_default()
    }

    /// The CloudEvents `subject`.
    pub fn subject(&self) -> Option<&str> {
        self.attribute("subject")
    }

    /// The CloudEvents `time`, as it was received.
    pub fn time(&self) -> Option<&str> {
        self.attribute("time")
    }

    /// The CloudEvents `datacontenttype`.
    pub fn content_type(&self) -> Option<&str> {
        self.attribute("datacontenttype")
    }

    /// Any attribute, extensions too, by its CloudEvents name.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    /// Every attribute that is present.
    pub fn attributes(&self) -> &[(String, String)] {
        &self.attributes
    }

    /// The payload, byte for byte as received.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Returns the key under which two deliveries are the same message to this processor.
    pub fn idempotency_key(&self) -> &str {
        &self.idempotency_key
    }

    /// 1 for the first attempt.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The payload as `T`. If it is none, the failure names the field, and is for good.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        let mut reader = serde_json::Deserializer::from_slice(&self.data);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let path = error.path().to_string();
            let place = if path == "." { String::new() } else { format!(".{path}") };
            Failure::invalid(format!("data{place}: {}", error.inner()))
        })?;
        reader.end().map_err(|error| Failure::invalid(format!("data: {error}")))?;
        Ok(value)
    }
}

/// Types that a processor may take as its first argument.
#[diagnostic::on_unimplemented(
    message = "a processor cannot take `{Self}`",
    label = "take `Message`, or `Json<T>` with a `T` that serde can read"
)]
pub trait FromMessage: Sized {
    /// Reads it from the message.
    fn from_message(message: Message) -> Result<Self, Failure>;
}

impl FromMessage for Message {
    fn from_message(message: Message) -> Result<Self, Failure> {
        Ok(message)
    }
}

/// The payload, read as JSON. One that is no `T` never reaches the processor: it is answered as
/// invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromMessage for Json<T> {
    fn from_message(message: Message) -> Result<Self, Failure> {
        message.json().map(Self)
    }
}

impl<T> Deref for Json<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::testing::message;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Order {
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Line {
        amount: i64,
    }

    fn invalid(text: &str) -> String {
        let message: Message = message("t").data("application/json", text).into();
        match message.json::<Order>() {
            Err(Failure::Invalid(reason)) => reason,
            other => panic!("expected invalid, got {other:?}"),
        }
    }

    #[test]
    fn a_wrong_field_is_named() {
        assert_eq!(
            invalid(r#"{"lines":[{"amount":1},{"amount":"x"}]}"#),
            "data.lines[1].amount: invalid type: string \"x\", expected i64 at line 1 column 36"
        );
        assert_eq!(invalid("{}"), "data: missing field `lines` at line 1 column 2");
        assert_eq!(invalid(r#"{"lines":[]} x"#), "data: trailing characters at line 1 column 14");
        assert!(invalid("").starts_with("data: EOF"), "{}", invalid(""));
    }

    #[test]
    fn attributes_by_name() {
        let message: Message = message("order.placed").id("m-1").subject("s").attribute("partitionkey", "p").into();
        assert_eq!((message.id(), message.kind(), message.subject()), ("m-1", "order.placed", Some("s")));
        assert_eq!((message.attribute("partitionkey"), message.attribute("absent")), (Some("p"), None));
        assert_eq!((message.idempotency_key(), message.attempt()), ("m-1", 1));
    }
}
