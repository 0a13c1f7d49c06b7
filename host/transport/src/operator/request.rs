//! Requests of operators to a host, their filters and errors. Both ends of HTTP share them. Nothing
//! is performed here.

use futures_util::future::{BoxFuture, pending};
use hapax_core::{HoldKind, SagaAction, SagaState};
use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Number of items in a list, unless the request says otherwise.
pub(crate) const LISTED: usize = 1_000;
/// Maximum number of items in a list, or of messages in one action.
pub(crate) const LISTED_MAX: usize = 10_000;

/// Request of an operator: a question or an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorRequest {
    /// List held messages: dead letters, and those that wait.
    Letters(HeldFilter),
    /// Show one held message as a whole, by its key.
    Letter(String),
    /// Redrive dead letters.
    Redrive(Selection),
    /// Discard held messages.
    Discard(Selection),
    /// List deduplication records.
    Records(RecordFilter),
    /// Show one record, by its key.
    Record(String),
    /// Show the history of one record, oldest event first.
    History(String),
    /// Evict records: forget them before their retention ends.
    Evict(Selection),
    /// Give up unfinished messages: no delivery of them will come any more.
    GiveUp(Selection),
    /// List the audit trail.
    Audit(AuditFilter),
    /// List sagas.
    Sagas(SagaFilter),
    /// Show one saga, by its id: its messages, its steps, its log.
    Saga(String),
    /// Resume stuck sagas.
    ResumeSaga(SagaAction, Selection),
    /// List outgoing messages that their destination refused.
    RefusedMessages(HeldFilter),
    /// Show one refused message as a whole, by its id.
    RefusedMessage(String),
    /// Put refused messages back into the outbox.
    RedriveOutgoing(Selection),
    /// Discard refused messages.
    DiscardOutgoing(Selection),
    /// List entries of a processor's state: the processor, and the filter.
    State(String, EntryFilter),
    /// Show one value of a processor's state: the processor, and the key.
    StateValue(String, String),
    /// List event streams of a processor: the processor, and the filter.
    Streams(String, EntryFilter),
    /// List events of one stream: the processor, the name of the stream, and the filter.
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

/// Filter of held messages, and of refused ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldFilter {
    /// Only those of this processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// Only those of this CloudEvents `type`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Only those of this CloudEvents `source`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Only those with an error that contains this text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Only those held at this time or later: RFC 3339, or a time span before now, such as `2h`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Only those held before this time, written as `since` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// Only those with this kind of hold reason. Refused messages have none.
    #[serde(rename = "standing", skip_serializing_if = "Option::is_none")]
    pub hold_reason: Option<HoldKind>,
    /// Maximum number of items.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
    /// Only those after this key. For lists only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// Filter of records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordFilter {
    /// Only those of this processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// Only those after this key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Only unfinished messages whose time is over, the oldest first: their claim has ended, or
    /// their retry is due, and no delivery has come. Does not go with `after`.
    #[serde(skip_serializing_if = "std::ops::Not::not", deserialize_with = "flag")]
    pub overdue: bool,
    /// Maximum number of items.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// Filter of sagas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SagaFilter {
    /// Only those in this state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<SagaState>,
    /// Only those after this id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Maximum number of items.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// Filter of the audit trail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditFilter {
    /// Only those of this processor.
    pub processor: String,
    /// Only entries from this time on: RFC 3339, or a time span before now, such as `2h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Maximum number of items.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub limit: Option<usize>,
}

/// Selection of the items of an action, with its operator and its reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// Items by their keys. Either these are given or `filter` is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Every held message that this filter selects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<HeldFilter>,
    /// Check the action and report it, without performing it.
    pub dry_run: bool,
    /// Name of the operator.
    pub actor: String,
    /// Reason for the action.
    pub reason: String,
}

/// Error of a request. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The request is wrong in itself.
    #[error("{0}")]
    Invalid(String),
    /// The item of the request does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The action is not legal in the present state.
    #[error("{0}")]
    Refused(String),
    /// The store failed.
    #[error("{0}")]
    Unavailable(String),
}

impl RequestError {
    /// Returns the status and the `code` over HTTP.
    pub(crate) fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid"),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "absent"),
            Self::Refused(_) => (StatusCode::CONFLICT, "refused"),
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        }
    }

    /// Returns the error that travelled as this `code`.
    pub(crate) fn of(code: &str, text: String) -> Option<Self> {
        Some(match code {
            "invalid" => Self::Invalid(text),
            "absent" => Self::NotFound(text),
            "refused" => Self::Refused(text),
            "unavailable" => Self::Unavailable(text),
            _ => return None,
        })
    }
}

/// Page of the feed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FeedPage {
    /// Events of the page, oldest first.
    pub events: Vec<Value>,
    /// Cursor at which the next page begins: the next `after`.
    pub next: String,
    /// Events between `after` and the first of these were forgotten before they were read.
    pub truncated: bool,
}

/// Answers the requests of operators.
pub trait Operations: Send + Sync + 'static {
    /// Answers the request or performs its action. Runs to its end although the client may have
    /// gone.
    fn perform(&self, ask: OperatorRequest) -> BoxFuture<'static, Result<Value, RequestError>>;

    /// Returns up to `limit` events of the feed after the cursor `after` (`None`: from the oldest
    /// event); none if no more have come yet.
    fn events(&self, after: Option<String>, limit: usize) -> BoxFuture<'static, Result<FeedPage, RequestError>>;

    /// Completes with `true` when the feed may have grown since the call (perhaps too early, never
    /// too late), and with `false` when the host stops.
    fn feed_changed(&self) -> BoxFuture<'static, bool> {
        Box::pin(pending())
    }
}

/// Returns the requested number of items, or `default`; an error if it is 0 or too large.
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
    /// Returns the maximum number of items to list.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }

    /// Returns the maximum number of messages to act on.
    pub fn done(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED_MAX)
    }
}

impl RecordFilter {
    /// Returns the maximum number of items to list.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

impl SagaFilter {
    /// Returns the maximum number of items to list.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

impl AuditFilter {
    /// Returns the maximum number of items to list.
    pub fn listed(&self) -> Result<usize, RequestError> {
        limit(self.limit, LISTED)
    }
}

/// Reads a truth value, or its text: a query has text only.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Bool(flag) => Ok(flag),
        Value::String(text) if text == "true" => Ok(true),
        Value::String(text) if text == "false" => Ok(false),
        other => Err(serde::de::Error::custom(format!("{other} is neither true nor false"))),
    }
}

/// Reads a number, or the digits of one: a query has text only.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let number = match &value {
        Value::Null => return Ok(None),
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().and_then(|number| usize::try_from(number).ok()),
    };
    number.map(Some).ok_or_else(|| serde::de::Error::custom(format!("{value} is no number of things")))
}
