//! A message to send. Its id and source are the host's, so that they stay the same however often it
//! is sent.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;

/// A message to send once the one in hand has committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    pub(crate) kind: String,
    pub(crate) subject: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) data: Vec<u8>,
    pub(crate) extensions: Vec<(String, String)>,
}

impl Outgoing {
    /// A message of type `kind`, without data.
    pub fn new(kind: impl Into<String>) -> Self {
        Self { kind: kind.into(), subject: None, content_type: None, data: Vec::new(), extensions: Vec::new() }
    }

    /// Subject of the message.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// `value` as JSON.
    pub fn json<T: Serialize + ?Sized>(self, value: &T) -> Result<Self, Failure> {
        Ok(self.data("application/json", serde_json::to_vec(value)?))
    }

    /// Plain text.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        self.data("text/plain", text.into())
    }

    /// Bytes of some content type.
    #[must_use]
    pub fn data(mut self, content_type: impl Into<String>, data: impl Into<Vec<u8>>) -> Self {
        self.content_type = Some(content_type.into());
        self.data = data.into();
        self
    }

    /// A CloudEvents extension attribute: lower-case letters and digits in its name.
    #[must_use]
    pub fn extension(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.extensions.push((name.into(), value.into()));
        self
    }

    /// The message's type.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Returns the subject, if there is one.
    pub fn about(&self) -> Option<&str> {
        self.subject.as_deref()
    }

    /// Its content type, if it has data.
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// Its data.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// Its data, read as JSON: for tests.
    pub fn json_value<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        Ok(serde_json::from_slice(&self.data)?)
    }

    /// Its extension attributes, in the order given.
    pub fn extensions(&self) -> &[(String, String)] {
        &self.extensions
    }
}
