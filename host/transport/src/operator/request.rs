//! What an operator can ask of a host, and what is answered; both ends of HTTP share it. Does nothing itself.

use futures_util::future::{BoxFuture, pending, ready};
use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// What is listed at one time, unless something else is asked for.
pub(crate) const LISTED: usize = 1_000;
/// What is listed or done at one time, at most.
pub(crate) const LISTED_MAX: usize = 10_000;

/// A question or an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorRequest {
    /// Kept messages: dead letters, and those that wait.
    Letters(HeldFilter),
    /// One of them, whole.
    Letter(String),
    /// Run dead letters again.
    Redrive(Selection),
    /// Forget kept messages.
    Discard(Selection),
    /// Deduplication records.
    Records(RecordFilter),
    /// One of them.
    Record(String),
    /// What happened to one of them, oldest first.
    History(String),
    /// Forget records before their time.
    Evict(Selection),
    /// What operators did.
    Audit(AuditFilter),
    /// Sagas.
    Sagas(SagaFilter),
    /// One of them: its messages, its steps, its log.
    Saga(String),
    /// Resume stuck sagas.
    ResumeSaga(SagaVerb, Selection),
    /// Entries of a processor's state: the processor, and which entries.
    State(String, EntryFilter),
    /// The value of one key of a processor's state: the processor, and the key.
    StateValue(String, String),
    /// Event streams of a processor: the processor, and which streams.
    Streams(String, EntryFilter),
    /// Events of one stream: the processor, the name of the stream, and which events.
    StreamEvents(String, String, EntryFilter),
}

/// Filter of the entries of a processor's state or event streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EntryFilter {
    /// Only keys that begin with this text; for state only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Only entries after this one: a key, the name of a stream, or a version of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Maximum number of entries.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

impl EntryFilter {
    /// Returns the maximum number of entries to list.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

/// Way to resume a stuck saga.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SagaVerb {
    /// Compensate the step at which it is stuck again.
    Retry,
    /// Go on with the step before it.
    Skip,
    /// All that was left is seen to.
    Resolve,
}

impl SagaVerb {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Skip => "skip",
            Self::Resolve => "resolve",
        }
    }
}

/// Which kept messages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldFilter {
    /// Of this processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// Of this CloudEvents `type`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Of this CloudEvents `source`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Whose error contains this text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Kept at this time or later: RFC 3339, or how long ago, such as `2h`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Kept before this time, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// With this hold reason.
    #[serde(rename = "standing", skip_serializing_if = "Option::is_none")]
    pub hold_reason: Option<StandingName>,
    /// So many, at most.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
    /// Those after this key; for lists only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// What a kept message waits for, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandingName {
    /// An operator.
    Dead,
    /// The message before it.
    Parked,
    /// Its processor: it is run again.
    Redriven,
}

/// Which records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordFilter {
    /// Of this processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// Those after this key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// So many, at most.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// Which sagas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SagaFilter {
    /// That stand so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<SagaStateName>,
    /// Those after this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// So many, at most.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// Where a saga stands, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SagaStateName {
    /// Its messages go forward.
    Open,
    /// There is no way back any more.
    Pivoted,
    /// It ended well.
    Completed,
    /// Its steps are being compensated.
    Compensating,
    /// A compensation failed for good: it waits for an operator.
    Stuck,
    /// Every step is compensated.
    Compensated,
    /// An operator ended it by hand.
    Resolved,
}

/// Which lines of the audit trail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditFilter {
    /// Of this processor.
    pub processor: String,
    /// From this time on: RFC 3339, or how long ago, such as `2h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// So many, at most.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// To what something is done, by whom, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// To what has these keys ...
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// ... or to every kept message that this finds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<HeldFilter>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Who does it.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// Why something was not answered or not done. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It was asked for in a way that cannot be right.
    #[error("{0}")]
    Invalid(String),
    /// It is not there.
    #[error("{0}")]
    NotFound(String),
    /// It may not be done as things are.
    #[error("{0}")]
    Refused(String),
    /// The store failed.
    #[error("{0}")]
    Unavailable(String),
    /// This host cannot do it.
    #[error("{0}")]
    NotThereYet(String),
}

impl RequestError {
    /// Its status and its `code` over HTTP.
    pub(crate) fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid"),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "absent"),
            Self::Refused(_) => (StatusCode::CONFLICT, "refused"),
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::NotThereYet(_) => (StatusCode::NOT_IMPLEMENTED, "not-there-yet"),
        }
    }

    /// The one that travelled as this `code`.
    pub(crate) fn of(code: &str, text: String) -> Option<Self> {
        Some(match code {
            "invalid" => Self::Invalid(text),
            "absent" => Self::NotFound(text),
            "refused" => Self::Refused(text),
            "unavailable" => Self::Unavailable(text),
            "not-there-yet" => Self::NotThereYet(text),
            _ => return None,
        })
    }
}

/// A part of the feed of events.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FeedPage {
    /// The events, oldest first.
    pub events: Vec<Value>,
    /// Where the next part begins: what `after` is then.
    pub next: String,
    /// Events between `after` and the first of these were forgotten meanwhile.
    pub truncated: bool,
}

/// What answers an operator.
pub trait Operations: Send + Sync + 'static {
    /// Answers or does it. Runs to its end although the client may have gone.
    fn perform(&self, ask: OperatorRequest) -> BoxFuture<'static, Result<Value, RequestError>>;

    /// Up to `limit` events of the feed after the cursor `after` (`None`: from the oldest there is); none if there are no more
    /// yet.
    fn events(&self, after: Option<String>, limit: usize) -> BoxFuture<'static, Result<FeedPage, RequestError>> {
        let _ = (after, limit);
        Box::pin(ready(Err(RequestError::NotThereYet("this host has no feed of events yet".into()))))
    }

    /// Completes with `true` when the feed may have grown since it was called (perhaps too early, never too late), with `false`
    /// when the host stops.
    fn feed_changed(&self) -> BoxFuture<'static, bool> {
        Box::pin(pending())
    }
}

/// How many are asked for.
pub(crate) fn limit(asked: Option<usize>, default: usize) -> Result<usize, RequestError> {
    match asked.unwrap_or(default) {
        0 => Err(RequestError::Invalid("limit: 0 asks for nothing; give 1 or more".into())),
        limit if limit <= LISTED_MAX => Ok(limit),
        limit => {
            let error = format!("limit: {limit} is more than {LISTED_MAX} at one time; go on after the last of them");
            Err(RequestError::Invalid(error))
        }
    }
}

impl HeldFilter {
    /// How many are listed, at most.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }

    /// To how many something is done, at most.
    pub fn done(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED_MAX)
    }
}

impl RecordFilter {
    /// How many are listed, at most.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

impl SagaFilter {
    /// How many are listed, at most.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

impl AuditFilter {
    /// How many are listed, at most.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

/// A number, or the digits of one: a query has text only.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let number = match &value {
        Value::Null => return Ok(None),
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().and_then(|number| usize::try_from(number).ok()),
    };
    number.map(Some).ok_or_else(|| serde::de::Error::custom(format!("{value} is no number of things")))
}
