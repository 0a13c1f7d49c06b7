//! Answer of a processed message. The host stores it and gives it to every duplicate, byte for
//! byte.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;

/// The answer to a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    pub(crate) content_type: Option<String>,
    pub(crate) data: Vec<u8>,
}

impl Outcome {
    /// Done; there is nothing to say.
    pub fn empty() -> Self {
        Self::default()
    }

    /// `value` as JSON. A result, so that it can be a processor's last line.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self, Failure> {
        Ok(Self { content_type: Some("application/json".to_owned()), data: serde_json::to_vec(value)? })
    }

    /// Plain text.
    pub fn text(text: impl Into<String>) -> Self {
        Self { content_type: Some("text/plain".to_owned()), data: text.into().into_bytes() }
    }

    /// Bytes of some content type.
    pub fn bytes(content_type: impl Into<String>, data: impl Into<Vec<u8>>) -> Self {
        Self { content_type: Some(content_type.into()), data: data.into() }
    }

    /// The content type, if there is one.
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// The bytes of the answer.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The answer, read as JSON: for tests.
    pub fn json_value<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        Ok(serde_json::from_slice(&self.data)?)
    }
}
