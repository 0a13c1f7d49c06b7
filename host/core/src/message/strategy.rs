//! Strategies: they decide which deliveries are the same message, and which of two is newer. Pure
//! functions of one message, computed once, at receipt; the record decides what follows from them
//! (`admission.rs`).

use crate::message::decimal::{Decimal, PLAIN_BYTES_MAX};
use crate::message::fingerprint::Fingerprint;
use crate::message::identity::{Identity, Position, Unidentified};
use crate::message::json::{Document, Kind, RepeatedName};
use crate::message::key::{RecordKey, Scope};
use crate::message::{Message, parse_rfc3339_ns};
use crate::support::clock::Clock;

/// Strategy by which a processor recognises its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Strategy {
    /// By an id: deliveries with the same source and id are the same message.
    MessageId {
        /// Source of the id's value.
        key: Select,
    },
    /// By the version of an entity: only greater versions run.
    Version {
        /// Source of the entity that the message is about.
        entity: Select,
        /// Source of the entity's version: a whole number.
        version: Select,
        /// Rule for gaps between versions.
        order: VersionOrder,
    },
    /// By time: only messages later than the last one run, in the total order (timestamp, id).
    Timestamp {
        /// Source of the entity that the message is about.
        entity: Select,
        /// Source of the timestamp: RFC 3339, or milliseconds since the Unix epoch.
        time: Select,
        /// Tolerance, in milliseconds: a timestamp further than this ahead of the host's clock is
        /// rejected, since it would make all later messages stale.
        max_future_skew_ms: u64,
    },
    /// By content: deliveries with the same source, type and content are the same message.
    ContentHash {
        /// Part of the JSON that counts; other content counts byte for byte.
        fields: Fields,
    },
}

impl Default for Strategy {
    fn default() -> Self {
        Self::MessageId { key: Select::Id }
    }
}

/// Place in a message from which a value is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Select {
    /// The `Idempotency-Key` given beside the message, else CloudEvents `id`.
    Id,
    /// An attribute by its CloudEvents name: `subject`, `time`, or an extension.
    Attribute(String),
    /// A header that the transport delivered beside the message; names are lower case.
    Header(String),
    /// A JSON pointer (RFC 6901) into the payload, to a string or a number.
    Pointer(String),
}

/// Rule for which versions may follow one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionOrder {
    /// Any version greater than the last.
    Monotonic,
    /// The last version + 1 only; a message that comes too early is parked.
    Strict(Gaps),
}

/// Rules for a message whose predecessor has not come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gaps {
    /// Version of an entity's first message.
    pub first: u64,
    /// Time for which a message is parked, in milliseconds.
    pub timeout_ms: u64,
    /// Action at the end of that time.
    pub then: GapPolicy,
}

/// Action on a parked message when its time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GapPolicy {
    /// The message runs: the missing ones are given up.
    Accept,
    /// The message becomes a dead letter.
    DeadLetter,
}

/// Part of a JSON payload that identifies a message. Pointers are RFC 6901.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fields {
    /// The whole payload.
    All,
    /// Only these parts; one that is absent counts as absent.
    Only(Vec<String>),
    /// The whole payload except these parts.
    Without(Vec<String>),
}

impl Strategy {
    /// Returns the identity of `message` at the processor `scope`; `clock` is the host's, and is
    /// read only where time decides.
    pub fn identify(&self, scope: &Scope, message: &Message, clock: &dyn Clock) -> Result<Identity, Unidentified> {
        match self {
            Self::MessageId { key: Select::Id } => Ok(Identity::by_message_id(scope, message)),
            Self::MessageId { key } => {
                let key = RecordKey::new(scope.clone(), message.source.as_str().into(), key.text(message)?.into());
                Ok(Identity::of_its_own(key, Fingerprint::of(message)))
            }
            Self::ContentHash { fields } => {
                let fingerprint = Fingerprint::of_content(message, fields);
                let key = RecordKey::new(scope.clone(), message.source.as_str().into(), fingerprint.hex().into());
                Ok(Identity::of_its_own(key, fingerprint))
            }
            Self::Version { entity, version, .. } => {
                let text = version.text(message)?;
                let version = text.parse().map_err(|_| {
                    Unidentified(format!(
                        "its version, {}, is {text:?}: write a whole number from 0 to {}",
                        version.name(),
                        u64::MAX
                    ))
                })?;
                Identity::of_entity(scope, message, entity, Position::Version(version))
            }
            Self::Timestamp { entity, time, max_future_skew_ms } => {
                let (at_ns, now_ms) = (timestamp_ns(time, message)?, clock.now_ms());
                let latest_ms = now_ms.saturating_add(*max_future_skew_ms);
                if at_ns / 1_000_000 > latest_ms {
                    let ahead_ms = at_ns / 1_000_000 - now_ms;
                    return Err(Unidentified(format!(
                        "its timestamp, {}, is {ahead_ms} ms ahead of the host's clock; max_future_skew_ms allows {max_future_skew_ms}",
                        time.name()
                    )));
                }
                Identity::of_entity(scope, message, entity, Position::Time { at_ns, id: message.id.clone() })
            }
        }
    }

    /// Returns the names of the headers that the strategy reads.
    pub fn headers(&self) -> Vec<String> {
        let selects = match self {
            Self::MessageId { key } => vec![key],
            Self::Version { entity, version, .. } => vec![entity, version],
            Self::Timestamp { entity, time, .. } => vec![entity, time],
            Self::ContentHash { .. } => vec![],
        };
        let header = |select: &Select| match select {
            Select::Header(name) => Some(name.clone()),
            _ => None,
        };
        selects.into_iter().filter_map(header).collect()
    }

    /// Returns the rules for gaps, where there are any.
    pub fn gaps(&self) -> Option<&Gaps> {
        match self {
            Self::Version { order: VersionOrder::Strict(gaps), .. } => Some(gaps),
            _ => None,
        }
    }

    /// Returns `true` if messages have positions: their record holds the last one, and must outlive
    /// every late message.
    pub fn has_positions(&self) -> bool {
        matches!(self, Self::Version { .. } | Self::Timestamp { .. })
    }
}

impl Select {
    /// Returns the value in `message`, never empty.
    pub(super) fn text(&self, message: &Message) -> Result<String, Unidentified> {
        let found = match self {
            Self::Id => Some(message.idempotency_key.clone().unwrap_or_else(|| message.id.clone())),
            Self::Attribute(name) => message.attribute(name).map(str::to_owned),
            Self::Header(name) => message.headers.get(name).cloned(),
            Self::Pointer(pointer) => pointed(message, pointer)?,
        };
        found
            .filter(|text| !text.is_empty())
            .ok_or_else(|| Unidentified(format!("it has no {}, which the processor's strategy needs", self.name())))
    }

    /// Returns the name of this place for use in a sentence.
    fn name(&self) -> String {
        match self {
            Self::Id => "attribute `id`".into(),
            Self::Attribute(name) => format!("attribute `{name}`"),
            Self::Header(name) => format!("header `{name}`"),
            Self::Pointer(pointer) => format!("value at `{pointer}` of its payload"),
        }
    }
}

/// Returns the text of a string at a JSON pointer of the payload, or the decimal digits of a
/// number: every notation of one number gives the same text.
fn pointed(message: &Message, pointer: &str) -> Result<Option<String>, Unidentified> {
    let document = Document::parse(&message.data)
        .ok_or_else(|| Unidentified(format!("its payload is not JSON, and the strategy looks at `{pointer}` of it")))?;
    let found = document.at(pointer).map_err(|RepeatedName(name)| {
        Unidentified(format!(
            "its payload has more than one member `{name}`, and the strategy looks at `{pointer}` of it: send each member once"
        ))
    })?;
    let Some(node) = found else { return Ok(None) };
    let bytes = document.bytes(node);
    match document.kind(node) {
        Kind::Text | Kind::Decoded => Ok(Some(String::from_utf8_lossy(bytes).into_owned())),
        Kind::Number => Decimal::of(bytes).plain().map(Some).ok_or_else(|| {
            Unidentified(format!(
                "the number at `{pointer}` of its payload takes more than {PLAIN_BYTES_MAX} characters to write out: send it as a string"
            ))
        }),
        Kind::Literal | Kind::Array | Kind::Object => Ok(None),
    }
}

fn timestamp_ns(time: &Select, message: &Message) -> Result<u64, Unidentified> {
    let text = time.text(message)?;
    let milliseconds = || text.parse::<u64>().ok()?.checked_mul(1_000_000);
    parse_rfc3339_ns(&text).or_else(milliseconds).ok_or_else(|| {
        let name = time.name();
        Unidentified(format!(
            "its timestamp, {name}, is {text:?}: write RFC 3339 or milliseconds since the Unix epoch, not before 1970"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_700_000_000_000;

    /// Clock that shows `NOW_MS`.
    struct Stopped;

    impl Clock for Stopped {
        fn now_ms(&self) -> u64 {
            NOW_MS
        }

        fn sleep(&self, _: u64) -> futures_util::future::BoxFuture<'static, ()> {
            Box::pin(std::future::pending())
        }
    }

    fn message(data: &str) -> Message {
        Message {
            subject: Some("e-1".into()),
            ..Message::new("m-1", "/s", "t").with_data("application/json", data.to_owned())
        }
    }

    fn identify(strategy: &Strategy, message: &Message) -> Result<Identity, String> {
        strategy.identify(&Scope::of("p"), message, &Stopped).map_err(|error| error.to_string())
    }

    fn key(strategy: &Strategy, message: &Message) -> String {
        identify(strategy, message).expect("it says all that is needed").record.key.to_string()
    }

    fn by(key: Select) -> Strategy {
        Strategy::MessageId { key }
    }

    fn version(version: Select) -> Strategy {
        Strategy::Version { entity: Select::Attribute("subject".into()), version, order: VersionOrder::Monotonic }
    }

    fn timestamp() -> Strategy {
        let (entity, time) = (Select::Attribute("subject".into()), Select::Attribute("time".into()));
        Strategy::Timestamp { entity, time, max_future_skew_ms: 1_000 }
    }

    fn content(fields: Fields) -> Strategy {
        Strategy::ContentHash { fields }
    }

    #[test]
    fn an_id_comes_from_where_it_is_said_to() {
        let mut message = message(r#"{"order":{"id":"o-1","number":7}}"#);
        message.headers.insert("x-request-id".into(), "r-1".into());
        assert_eq!(key(&Strategy::default(), &message), "m-1");
        assert_eq!(key(&by(Select::Attribute("subject".into())), &message), "e-1");
        assert_eq!(key(&by(Select::Header("x-request-id".into())), &message), "r-1");
        assert_eq!(key(&by(Select::Pointer("/order/id".into())), &message), "o-1");
        assert_eq!(key(&by(Select::Pointer("/order/number".into())), &message), "7");
        message.idempotency_key = Some("k-1".into());
        assert_eq!(key(&Strategy::default(), &message), "k-1");
    }

    #[test]
    fn what_is_missing_is_named() {
        let message = message(r#"{"order":{"id":""},"version":"x"}"#);
        let error = |strategy: &Strategy| identify(strategy, &message).expect_err("something is missing");
        assert!(error(&by(Select::Attribute("orderid".into()))).contains("attribute `orderid`"));
        assert!(error(&by(Select::Header("x-id".into()))).contains("header `x-id`"));
        assert!(error(&by(Select::Pointer("/order/id".into()))).contains("`/order/id`"), "an empty text is none");
        assert!(error(&version(Select::Pointer("/version".into()))).contains("whole number"));
        assert!(error(&version(Select::Attribute("version".into()))).contains("attribute `version`"));
        assert!(error(&timestamp()).contains("attribute `time`"));
        let text = Message::new("m", "/s", "t").with_data("text/plain", "no JSON");
        let error = identify(&by(Select::Pointer("/id".into())), &text).expect_err("not JSON");
        assert!(error.contains("not JSON"), "{error}");
    }

    #[test]
    fn a_number_in_the_payload_is_its_exact_value() {
        let position = |data: &str| {
            identify(&version(Select::Pointer("/v".into())), &message(data)).map(|identity| identity.position)
        };
        for data in [r#"{"v":10}"#, r#"{"v":10.0}"#, r#"{"v":1e1}"#, r#"{"v":"10"}"#, r#"{"v":100e-1,"w":1,"w":2}"#] {
            assert_eq!(position(data), Ok(Some(Position::Version(10))), "{data}");
        }
        assert_eq!(position(r#"{"v":-0}"#), Ok(Some(Position::Version(0))));
        assert_eq!(position(r#"{"v":18446744073709551615}"#), Ok(Some(Position::Version(u64::MAX))));
        for data in [r#"{"v":18446744073709551616}"#, r#"{"v":36893488147419103233}"#, r#"{"v":1.5}"#, r#"{"v":-1}"#] {
            let error = position(data).expect_err(data);
            assert!(error.contains("a whole number from 0 to 18446744073709551615"), "{error}");
        }
        let error = position(r#"{"v":1e999999999}"#).expect_err("nobody holds that");
        assert!(error.contains("512 characters") && error.contains("as a string"), "{error}");
        let error = position(r#"{"v":1,"v":1}"#).expect_err("which?");
        assert!(error.contains("more than one member `v`") && error.contains("once"), "{error}");
        let key = |data: &str| key(&by(Select::Pointer("/v".into())), &message(data));
        assert_eq!(key(r#"{"v":36893488147419103233}"#), "36893488147419103233");
        assert_eq!([key(r#"{"v":1.50}"#), key(r#"{"v":15E-1}"#)], ["1.5", "1.5"]);
    }

    #[test]
    fn versions_share_a_record_and_keep_their_own_keys() {
        let strategy = version(Select::Pointer("/v".into()));
        let [one, two] =
            [r#"{"v":1}"#, r#"{"v":2}"#].map(|data| identify(&strategy, &message(data)).expect("a version"));
        assert_eq!(one.record, two.record);
        assert_ne!(one.message_key, two.message_key, "ids of what they send are derived from it");
        assert!(one.position < two.position);
    }

    #[test]
    fn the_same_body_at_another_version_is_another_message() {
        let strategy = version(Select::Attribute("version".into()));
        let at = |version: &str| {
            let mut message = message("{}");
            message.extensions.insert("version".into(), version.into());
            identify(&strategy, &message).expect("a version")
        };
        assert_eq!(at("1"), at("1"));
        assert_ne!(at("1").fingerprint, at("2").fingerprint);
    }

    #[test]
    fn times_are_ordered_by_time_and_then_by_id() {
        let at = |time: &str, id: &str| {
            let message = Message { time: Some(time.into()), id: id.into(), ..message("{}") };
            identify(&timestamp(), &message).map(|identity| identity.position)
        };
        let position = |time, id| at(time, id).expect("a time");
        assert!(position("2023-11-14T22:13:19.000000001Z", "a") > position("2023-11-14T22:13:19Z", "b"));
        assert!(position("2023-11-14T22:13:19Z", "b") > position("2023-11-14T22:13:19Z", "a"));
        assert_eq!(position("2023-11-14T23:13:19+01:00", "a"), position("1699999999000", "a"));
        assert!(at("2023-11-14T22:13:21Z", "a").is_ok(), "a second ahead is allowed");
        let error = at("2023-11-14T22:13:22Z", "a").expect_err("two are not");
        assert!(error.contains("2000 ms ahead") && error.contains("max_future_skew_ms"), "{error}");
        assert!(at("yesterday", "a").expect_err("no time").contains("RFC 3339"));
    }

    #[test]
    fn content_is_compared_in_canonical_form() {
        let hash = |fields: Fields, data: &str| key(&content(fields), &message(data));
        let all = |data| hash(Fields::All, data);
        assert_eq!(all(r#"{"a":1.0,"b":"\u00e9","c":1e2}"#), all(r#"{ "c":100, "b":"é", "a":1 }"#));
        assert_ne!(all(r#"{"a":null}"#), all("{}"));
        let only = |data| hash(Fields::Only(vec!["/a".into(), "/c/0".into()]), data);
        assert_eq!(only(r#"{"a":1,"b":2,"c":[3,4]}"#), only(r#"{"a":1,"b":9,"c":[3]}"#));
        assert_ne!(only(r#"{"a":1}"#), only(r#"{"a":2}"#));
        assert_ne!(only(r#"{"a":null}"#), only("{}"), "absent is not null");
        let without = |data| hash(Fields::Without(vec!["/at".into(), "/list/1".into(), "/no/such".into()]), data);
        assert_eq!(without(r#"{"a":1,"at":5,"list":[1,2,3]}"#), without(r#"{"a":1,"list":[1,9,3]}"#));
        assert_ne!(without(r#"{"a":1}"#), without(r#"{"a":2}"#));
    }

    #[test]
    fn other_content_counts_byte_for_byte_and_by_source_and_type() {
        let text = |data: &str| Message::new("m", "/s", "t").with_data("text/plain", data.to_owned());
        let of = |message: &Message| identify(&content(Fields::All), message).expect("content").record;
        assert_eq!(of(&text("a")), of(&Message { id: "other".into(), ..text("a") }));
        assert_ne!(of(&text("a")), of(&text("a ")));
        assert_ne!(of(&text("a")), of(&Message { kind: "other".into(), ..text("a") }));
        assert_ne!(of(&text("a")), of(&Message { source: "/other".into(), ..text("a") }));
    }
}
