//! Outbound calls, over the standard `wasi:http`. The host makes them, if it has granted them: it
//! adds a stable idempotency key and keeps the answer, so that a re-run of the message is answered
//! without a second call.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;
use crate::host::{Backend, Host as _};

/// Begins calls; see [`crate::Context::http`].
pub struct Http<'a> {
    pub(crate) backend: &'a Backend,
}

/// A call in the making.
pub struct Calling<'a> {
    backend: &'a Backend,
    request: Request,
}

/// A call, as the test kit shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`, ...
    pub method: String,
    /// Absolute.
    pub url: String,
    /// Names in lower case. The value may hold `{{secret:NAME}}`, which the host replaces.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// The call's bound, beside the host's.
    pub timeout: Option<Duration>,
}

/// Response to a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpError {
    /// The host has not granted it: nothing was sent, and would not be next time.
    Denied,
    /// It is no call: nothing was sent.
    Invalid(String),
    /// It was not answered in time, or the connection failed; whether it was received is not always
    /// known.
    Unanswered(String),
}

impl<'a> Http<'a> {
    /// A `GET`.
    pub fn get(self, url: impl Into<String>) -> Calling<'a> {
        self.call("GET", url)
    }

    /// A `POST`.
    pub fn post(self, url: impl Into<String>) -> Calling<'a> {
        self.call("POST", url)
    }

    /// A `PUT`.
    pub fn put(self, url: impl Into<String>) -> Calling<'a> {
        self.call("PUT", url)
    }

    /// A `DELETE`.
    pub fn delete(self, url: impl Into<String>) -> Calling<'a> {
        self.call("DELETE", url)
    }

    /// Any method.
    pub fn call(self, method: &str, url: impl Into<String>) -> Calling<'a> {
        let request = Request { method: method.to_owned(), url: url.into(), ..Request::default() };
        Calling { backend: self.backend, request }
    }
}

impl Calling<'_> {
    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.request.headers.push((name.to_ascii_lowercase(), value.into()));
        self
    }

    /// `value` as a JSON body.
    pub fn json<T: Serialize + ?Sized>(self, value: &T) -> Result<Self, Failure> {
        let body = serde_json::to_vec(value)?;
        Ok(self.header("content-type", "application/json").body(body))
    }

    /// Any body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.request.body = body.into();
        self
    }

    /// Waits no longer than this.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.request.timeout = Some(timeout);
        self
    }

    /// Makes the call, and waits for the answer. Any status is an answer.
    pub fn send(self) -> Result<Response, HttpError> {
        self.backend.call(&self.request)
    }
}

impl Response {
    /// Returns true if the status is a success.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(of, _)| of.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::retry(format!("the answer is not as expected: {error}")))
    }
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied => write!(f, "the call is not granted to this processor (`http` in its settings)"),
            Self::Invalid(why) => write!(f, "the call cannot be made: {why}"),
            Self::Unanswered(why) => write!(f, "the call was not answered: {why}"),
        }
    }
}

impl std::error::Error for HttpError {}

/// Errors that may pass are retried; calls that are not granted are refused.
impl From<HttpError> for Failure {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Denied | HttpError::Invalid(_) => Self::reject(error.to_string()),
            HttpError::Unanswered(_) => Self::retry(error.to_string()),
        }
    }
}
