//! The identity of a message at its processor: its record key, its own key, its fingerprint and its
//! position.

use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::fingerprint::Fingerprint;
use crate::message::key::{RecordKey, Scope};
use crate::message::strategy::Select;
use crate::support::fault;

/// Position of a message among those of its entity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Position {
    /// Position by version.
    Version(u64),
    /// Position by time, and among equal times by id.
    Time {
        /// Nanoseconds since the Unix epoch.
        at_ns: u64,
        /// The message's id.
        id: String,
    },
}

impl Position {
    /// Returns the own key of the message at this position of the entity `record`:
    /// `entity@position`. The last `@` is the one between the two: in an id, `@` and `%` are
    /// percent-encoded. Entities stay as they are, since sagas and calls under way over an upgrade
    /// are found by this text.
    pub(crate) fn message_key(&self, record: &RecordKey) -> RecordKey {
        let key = match self {
            Self::Time { at_ns, id } if !fault::mutated("derived-key-unescaped") => {
                format!("{}@{at_ns}-{}", record.key, id.replace('%', "%25").replace('@', "%40"))
            }
            _ => format!("{}@{self}", record.key),
        };
        RecordKey::new(record.scope.clone(), record.source.clone(), key.into())
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => write!(f, "{version}"),
            Self::Time { at_ns, id } => write!(f, "{at_ns}-{id}"),
        }
    }
}

/// Identity of a message at its processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Key of the message's record: one per message, or one per entity where messages have
    /// positions.
    pub record: RecordKey,
    /// The message's own key, from which its seed and the ids of the messages it sends are derived.
    /// It is the record's key where each message has a record of its own.
    pub message_key: RecordKey,
    /// Fingerprint, which must be equal in every delivery.
    pub fingerprint: Fingerprint,
    /// Position among the messages of its record.
    pub position: Option<Position>,
}

/// Error: the message lacks a value that the strategy needs, so it can never run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unidentified(pub(super) String);

impl Identity {
    /// Returns the key under which the store holds the message, if it is held.
    pub fn held_key(&self) -> HeldKey {
        HeldKey { record: self.record.clone(), fingerprint: self.fingerprint.digest }
    }

    /// Returns the identity by strategy message id, with nothing set.
    pub(crate) fn by_message_id(scope: &Scope, message: &Message) -> Self {
        Self::of_its_own(RecordKey::by_message_id(scope, message), Fingerprint::of(message))
    }

    pub(super) fn of_its_own(key: RecordKey, fingerprint: Fingerprint) -> Self {
        Self { message_key: key.clone(), record: key, fingerprint, position: None }
    }

    pub(super) fn of_entity(
        scope: &Scope,
        message: &Message,
        entity: &Select,
        position: Position,
    ) -> Result<Self, Unidentified> {
        let entity = entity.text(message)?;
        let source: std::sync::Arc<str> = message.source.as_str().into();
        let record = RecordKey::new(scope.clone(), source, entity.into());
        Ok(Self {
            message_key: position.message_key(&record),
            record,
            fingerprint: Fingerprint::of(message).at(&position),
            position: Some(position),
        })
    }
}

/// Key of a held message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeldKey {
    /// Record that the message belongs to.
    pub record: RecordKey,
    /// Digest of the message's fingerprint.
    pub fingerprint: [u8; 16],
}

/// `tenant/processor/source/key#fingerprint`.
impl std::fmt::Display for HeldKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}#{:032x}", self.record, u128::from_be_bytes(self.fingerprint))
    }
}

/// Error: the text is not the key of a held message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not the key of a dead letter: take one from `hapax dlq list`, tenant/processor/source/key#fingerprint"
)]
pub struct ParseHeldKeyError(String);

impl std::str::FromStr for HeldKey {
    type Err = ParseHeldKeyError;

    fn from_str(text: &str) -> Result<Self, ParseHeldKeyError> {
        let parse = || {
            let (record, fingerprint) = text.rsplit_once('#').filter(|(_, hex)| hex.len() == 32)?;
            let fingerprint = u128::from_str_radix(fingerprint, 16).ok()?.to_be_bytes();
            Some(Self { record: record.parse().ok()?, fingerprint })
        };
        parse().ok_or_else(|| ParseHeldKeyError(text.to_owned()))
    }
}
