//! The messages that the reference is given: which there are, by which strategies they are told
//! apart, and how each fares.

use hapax_core::{Fields, GapPolicy, Gaps, Identity, Message, Options, Scope, Select, Strategy, VersionOrder};

use super::{ATTEMPTS_MAX, FIRST, HORIZON_MS, RETENTION_MS, SKEW_MS, START_MS, TIMEOUT_MS};
use crate::clock::SimulatedClock;

/// The strategies that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// Message id.
    MessageId,
    /// Version, any greater one.
    Version,
    /// Version, last + 1; what is missing is given up in the end.
    StrictAccept,
    /// Version, last + 1; what waits is given up in the end.
    StrictDeadLetter,
    /// Timestamp and id.
    Timestamp,
    /// Content, but for a field.
    ContentHash,
}

/// One delivery: which message, and which of its two bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Input {
    /// Number of the message; below [`KEYS`](super::KEYS).
    pub key: u8,
    /// Number of the body.
    pub other_body: bool,
}

/// Behaviour of a message's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Fine,
    Reject,
    FailsOnce,
    Fails,
}

impl By {
    /// The options that a consumer with this strategy has.
    pub fn options(self, cache_bytes: u64) -> Options {
        Options {
            strategy: self.strategy(),
            attempts_max: ATTEMPTS_MAX,
            retention_ms: RETENTION_MS,
            redelivery_horizon_ms: HORIZON_MS,
            ordering: hapax_core::Ordering::Subject,
            cache_bytes,
            ..Options::default()
        }
    }

    fn strategy(self) -> Strategy {
        let entity = Select::Attribute("subject".into());
        let version =
            |order| Strategy::Version { entity: entity.clone(), version: Select::Attribute("v".into()), order };
        let strict = |then| version(VersionOrder::Strict(Gaps { first: FIRST, timeout_ms: TIMEOUT_MS, then }));
        match self {
            Self::MessageId => Strategy::default(),
            Self::Version => version(VersionOrder::Monotonic),
            Self::StrictAccept => strict(GapPolicy::Accept),
            Self::StrictDeadLetter => strict(GapPolicy::DeadLetter),
            Self::Timestamp => {
                Strategy::Timestamp { entity, time: Select::Attribute("time".into()), max_future_skew_ms: SKEW_MS }
            }
            Self::ContentHash => Strategy::ContentHash { fields: Fields::Without(vec!["/noise".into()]) },
        }
    }

    /// Returns true if an entity has one record, of its last message.
    pub fn has_positions(self) -> bool {
        !matches!(self, Self::MessageId | Self::ContentHash)
    }

    /// Returns true if gaps are possible.
    pub fn is_strict(self) -> bool {
        matches!(self, Self::StrictAccept | Self::StrictDeadLetter)
    }
}

impl Input {
    pub(super) fn entity(self) -> u8 {
        self.key % 2
    }

    pub(super) fn version(self) -> u64 {
        u64::from(self.key / 2)
    }

    /// Two messages each share a time; the last is hours ahead at first.
    pub(super) fn time_ms(self) -> u64 {
        START_MS + self.version() / 2 * 10_000 + if self.version() == 5 { 7_200_000 } else { 0 }
    }

    fn id(self, by: By) -> String {
        let other = if self.other_body { "b" } else { "a" };
        match by {
            By::MessageId | By::Timestamp => format!("m{:02}", self.key),
            _ => format!("m{:02}{other}", self.key),
        }
    }

    /// Returns the message's position among those of its entity.
    pub(super) fn position(self, by: By) -> Option<(u64, String)> {
        match by {
            By::MessageId | By::ContentHash => None,
            By::Timestamp => Some((self.time_ms(), self.id(by))),
            _ => Some((self.version(), String::new())),
        }
    }

    pub(super) fn mood(self, by: By) -> Mood {
        let other = u8::from(self.other_body && by != By::ContentHash);
        match (self.key + other) % 8 {
            2 => Mood::FailsOnce,
            5 => Mood::Reject,
            6 if self.key > 6 => Mood::Fails,
            7 => Mood::Fails,
            _ => Mood::Fine,
        }
    }

    /// Returns the name of the input in the state and in the results.
    pub(super) fn label(self, by: By) -> String {
        let other = if self.other_body && by != By::ContentHash { "b" } else { "a" };
        format!("{}{other}", self.key)
    }

    /// The message that is delivered.
    pub fn message(self, by: By) -> Message {
        let kind = match self.mood(by) {
            Mood::Fine => "fine",
            Mood::Reject => "reject",
            Mood::FailsOnce => "fails-once",
            Mood::Fails => "fails",
        };
        let data = format!(r#"{{"label":"{}","noise":{}}}"#, self.label(by), self.other_body);
        let mut message = Message::new(self.id(by), "/test", kind).with_data("application/json", data);
        message.subject = Some(format!("e{}", self.entity()));
        message.time = Some(self.time_ms().to_string());
        message.extensions.insert("v".into(), self.version().to_string());
        message
    }

    /// Its names.
    pub fn identity(self, by: By) -> Identity {
        let message = self.message(by);
        by.strategy().identify(&Scope::of("p"), &message, &SimulatedClock::at(u64::MAX / 2)).unwrap()
    }

    /// Its names where the strategy refuses it.
    pub(super) fn identity_of_refused(self, by: By) -> Identity {
        Strategy::default().identify(&Scope::of("p"), &self.message(by), &SimulatedClock::at(START_MS)).unwrap()
    }
}
