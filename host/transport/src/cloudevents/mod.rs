//! CloudEvents 1.0 in JSON: one message to a line and back. Refuses what it cannot keep whole,
//! naming the field.

pub mod binary;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hapax_core::{Message, is_json_type};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Input that is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// It is not JSON.
    #[error("not JSON: {0}; write one CloudEvent as a JSON object")]
    NotJson(String),
    /// A field is missing or wrong.
    #[error("field \"{field}\": {reason}")]
    Field {
        /// The attribute's name.
        field: String,
        /// Reason, and what to do about it.
        reason: String,
    },
    /// It is larger than allowed.
    #[error(
        "the message has {bytes} bytes, over the limit of {limit}; raise `max_message_bytes` (`--max-message-bytes`), or \
         put the payload elsewhere and send a reference"
    )]
    TooLarge {
        /// Its size, as far as it was read.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

pub(crate) fn field(field: &str, reason: impl Into<String>) -> InvalidMessage {
    InvalidMessage::Field { field: field.to_owned(), reason: reason.into() }
}

/// The members of an object, each as written, and a name that came twice: which of the two was
/// meant is not known.
struct Members<'a> {
    by_name: ByName<'a>,
    twice: Option<String>,
}

type ByName<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// A member's name; copied only where it is written with escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Members { by_name: BTreeMap::new(), twice: None };
                while let Some((Name(name), value)) = map.next_entry::<Name<'_>, &RawValue>()? {
                    match members.by_name.entry(name) {
                        Entry::Vacant(free) => drop(free.insert(value)),
                        Entry::Occupied(taken) => members.twice = Some(taken.key().to_string()),
                    }
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(MembersVisitor)
    }
}

/// Reads one CloudEvent. `data` is kept byte for byte as written.
pub fn parse(bytes: &[u8]) -> Result<Message, InvalidMessage> {
    let Members { by_name: mut members, twice } =
        serde_json::from_slice(bytes).map_err(|error| InvalidMessage::NotJson(where_it_breaks(&error)))?;
    if let Some(name) = twice {
        return Err(field(&name, "comes twice; leave one of them"));
    }
    check_version(text(&mut members, "specversion")?.as_deref())?;
    let mut required = |name| {
        text(&mut members, name)?
            .filter(|value| !value.is_empty())
            .ok_or_else(|| field(name, "is missing or empty; every message needs `id`, `source` and `type`"))
    };
    let mut message = Message::new(required("id")?, required("source")?, required("type")?);
    message.subject = text(&mut members, "subject")?;
    message.time = text(&mut members, "time")?;
    check_time(message.time.as_deref())?;
    message.content_type = text(&mut members, "datacontenttype")?;
    message.data_schema = text(&mut members, "dataschema")?;
    message.data = data(&mut members, message.content_type.as_deref())?;
    for (name, value) in members {
        if let Some(value) = extension(&name, value)? {
            message.extensions.insert(name.into_owned(), value);
        }
    }
    Ok(message)
}

/// serde_json's words; of a text of one line, only the column says something.
fn where_it_breaks(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

/// Absent is fine, as the lines that people write have none; another version is not.
pub(crate) fn check_version(version: Option<&str>) -> Result<(), InvalidMessage> {
    match version {
        None | Some("1.0") => Ok(()),
        Some(other) => Err(field("specversion", format!("is {other}; this host reads 1.0"))),
    }
}

pub(crate) fn check_time(time: Option<&str>) -> Result<(), InvalidMessage> {
    match time {
        Some(time) if OffsetDateTime::parse(time, &Rfc3339).is_err() => {
            Err(field("time", format!("`{time}` is not RFC 3339, such as 2026-11-24T05:00:00Z")))
        }
        _ => Ok(()),
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), InvalidMessage> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        return Err(field(name, "is no attribute name: use lower-case letters and digits, or put it into `data`"));
    }
    Ok(())
}

/// A member that must be text; null counts as absent.
fn text(members: &mut ByName<'_>, name: &str) -> Result<Option<String>, InvalidMessage> {
    match members.remove(name) {
        None => Ok(None),
        Some(raw) => serde_json::from_str::<Option<String>>(raw.get()).map_err(|_| field(name, "must be a string")),
    }
}

fn data(members: &mut ByName<'_>, content_type: Option<&str>) -> Result<Bytes, InvalidMessage> {
    let encoded = text(members, "data_base64")?;
    let raw = members.remove("data");
    match (raw, encoded) {
        (Some(_), Some(_)) => Err(field("data_base64", "stands beside `data`; give one of them")),
        (None, None) => Ok(Bytes::new()),
        (None, Some(encoded)) => {
            STANDARD.decode(encoded).map(Bytes::from).map_err(|error| field("data_base64", error.to_string()))
        }
        (Some(raw), None) if content_type.is_none_or(is_json_type) => Ok(Bytes::copy_from_slice(raw.get().as_bytes())),
        (Some(raw), None) => match serde_json::from_str::<String>(raw.get()) {
            Ok(text) => Ok(text.into()),
            Err(_) => Ok(Bytes::copy_from_slice(raw.get().as_bytes())),
        },
    }
}

fn extension(name: &str, value: &RawValue) -> Result<Option<String>, InvalidMessage> {
    check_name(name)?;
    match serde_json::from_str(value.get()) {
        Ok(Value::Null) => Ok(None),
        Ok(Value::String(text)) => Ok(Some(text)),
        Ok(Value::Bool(_) | Value::Number(_)) => Ok(Some(value.get().to_owned())),
        _ => Err(field(name, "an attribute is a string, a number or a boolean; put structure into `data`")),
    }
}

/// Beginning of every line of [`to_json`].
pub(crate) const LINE_BEGIN: &[u8] = br#"{"specversion":"1.0""#;

/// One CloudEvent as one line of JSON, without its end of line.
pub fn to_json(message: &Message) -> Vec<u8> {
    let mut out = LINE_BEGIN.to_vec();
    let mut member = |name: &str, value: &str| {
        out.push(b',');
        out.extend(Value::from(name).to_string().bytes());
        out.push(b':');
        out.extend(value.bytes());
    };
    for (name, value) in message.attributes() {
        member(&name, &Value::from(value).to_string());
    }
    if !message.data.is_empty() {
        let text = std::str::from_utf8(&message.data).ok();
        match text
            .map(|text| if message.is_json() { one_line(text) } else { Some(Value::from(text).to_string().into()) })
        {
            Some(Some(json)) => member("data", &json),
            _ => member("data_base64", &Value::from(STANDARD.encode(&message.data)).to_string()),
        }
    }
    out.push(b'}');
    out
}

/// JSON on one line, as it is written but for white space where it had line ends; `None` if it is
/// not JSON.
fn one_line(text: &str) -> Option<Cow<'_, str>> {
    serde_json::from_str::<&RawValue>(text).ok()?;
    Some(if text.contains(['\n', '\r']) { compact(text).into() } else { text.into() })
}

/// JSON without the white space between its tokens. Numbers and strings keep every character: a
/// number that was read and written again might become another.
fn compact(json: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    let stays = |&character: &char| {
        if !in_string {
            in_string = character == '"';
            return !matches!(character, ' ' | '\t' | '\n' | '\r');
        }
        in_string = escaped || character != '"';
        escaped = !escaped && character == '\\';
        true
    };
    json.chars().filter(stays).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let json = Message::new("i", "/s", "t").with_data("application/json", r#"{"b": 1, "a":[2.0]}"#);
        let text = Message::new("i\"", "/s", "t").with_data("text/plain", "two\nlines");
        let bytes = Message::new("i", "/s", "t").with_data("application/octet-stream", vec![0xff, 0]);
        let mut plain = Message::new("i", "/s", "t");
        plain.subject = Some("s".into());
        plain.time = Some("2026-11-24T05:00:00Z".into());
        plain.extensions.insert("partitionkey".into(), "p".into());
        for message in [json, text, bytes, plain] {
            let line = to_json(&message);
            assert!(!line.contains(&b'\n'));
            assert_eq!(parse(&line).as_ref(), Ok(&message), "{}", String::from_utf8_lossy(&line));
        }
    }

    #[test]
    fn json_over_several_lines_is_written_on_one_with_its_numbers_and_strings_as_they_were() {
        for (written, expected) in [
            ("{\n}", "{}"),
            ("{\r\n\t\"a b\" : [ 1e400,\n 12345678901234567890.0 ] }", r#"{"a b":[1e400,12345678901234567890.0]}"#),
            ("[\n\"a \\\" b\", \"\\\\\" , \" \\n \"]", r#"["a \" b","\\"," \n "]"#),
            ("\n-0.10", "-0.10"),
        ] {
            let line = to_json(&Message::new("i", "/s", "t").with_data("application/json", written));
            assert!(!line.contains(&b'\n') && !line.contains(&b'\r'), "{written}");
            let line = String::from_utf8(line).expect("text");
            assert!(line.ends_with(&format!(",\"data\":{expected}}}")), "{written}: {line}");
            assert_eq!(parse(line.as_bytes()).expect(&line).data, expected);
        }
    }

    #[test]
    fn what_is_called_json_and_is_none_is_written_as_bytes() {
        let line = to_json(&Message::new("i", "/s", "t").with_data("application/json", "{\n"));
        assert!(line.ends_with(br#""data_base64":"ewo="}"#), "{}", String::from_utf8_lossy(&line));
    }

    #[test]
    fn every_text_comes_back_in_every_place() {
        let texts =
            ["x", "\"", "\\u0041", "a\nb\r\u{0}", "\u{2028}ö😀", "{}", " null ", "1e400", "[1, 2", "%41", "\u{feff}"];
        let types = [None, Some("application/json"), Some("a/b+json; x=y"), Some("text/plain"), Some("image/png")];
        for (text, media_type) in texts.iter().flat_map(|text| types.map(|media_type| (*text, media_type))) {
            for data in [Vec::new(), text.into(), [text.as_bytes(), &[0xff]].concat()] {
                let mut message = Message::new(text, text, text);
                message.subject = Some(text.into());
                message.data_schema = Some(text.into());
                message.content_type = media_type.map(str::to_owned);
                message.extensions.insert("x9".into(), text.into());
                message.data = data.into();
                let line = to_json(&message);
                assert!(!line.contains(&b'\n') && !line.contains(&b'\r'), "{message:?}");
                let mut read = parse(&line).expect("its own line");
                // White space around JSON is no part of it.
                if message.is_json() && read.data == message.data.trim_ascii() {
                    read.data = message.data.clone();
                }
                assert_eq!(read, message, "{}", String::from_utf8_lossy(&line));
            }
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (input, word) in [
            ("", "not JSON"),
            ("{\"id\":}", "at column 7"),
            ("[]", "object"),
            (r#"{"id":"i","id":"i"}"#, "\"id\": comes twice"),
            (r#"{"source":"/s","type":"t"}"#, "\"id\""),
            (r#"{"id":"","source":"/s","type":"t"}"#, "\"id\""),
            (r#"{"id":7,"source":"/s","type":"t"}"#, "\"id\": must be a string"),
            (r#"{"id":"i","type":"t"}"#, "\"source\""),
            (r#"{"id":"i","source":"/s"}"#, "\"type\""),
            (r#"{"id":"i","source":"/s","type":"t","specversion":"0.3"}"#, "0.3"),
            (r#"{"id":"i","source":"/s","type":"t","time":"noon"}"#, "RFC 3339"),
            (r#"{"id":"i","source":"/s","type":"t","data":1,"data_base64":"AA=="}"#, "beside"),
            (r#"{"id":"i","source":"/s","type":"t","data_base64":"?"}"#, "data_base64"),
            (r#"{"id":"i","source":"/s","type":"t","Extra":"x"}"#, "\"Extra\""),
            (r#"{"id":"i","source":"/s","type":"t","extra":{}}"#, "\"extra\""),
        ] {
            let error = parse(input.as_bytes()).expect_err(input).to_string();
            assert!(error.contains(word), "{input}: {error}");
        }
    }

    #[test]
    fn any_rfc_3339_time_is_taken() {
        for time in ["1969-07-20T20:17:40Z", "2026-11-24t05:00:00.123456789z", "2026-11-24T05:00:00-23:59"] {
            let line = format!(r#"{{"id":"i","source":"/s","type":"t","time":"{time}"}}"#);
            assert_eq!(parse(line.as_bytes()).expect(time).time.as_deref(), Some(time));
        }
    }

    #[test]
    fn data_is_kept_as_written() {
        let of = |rest: &str| parse(format!(r#"{{"id":"i","source":"/s","type":"t",{rest}}}"#).as_bytes()).expect(rest);
        assert_eq!(of(r#""data":{ "n" : 1e0 }"#).data, r#"{ "n" : 1e0 }"#);
        assert_eq!(of(r#""datacontenttype":"text/plain","data":"a\nb""#).data, "a\nb");
        assert_eq!(of(r#""data_base64":"/wA=""#).data, vec![0xff, 0]);
        assert_eq!(of(r#""n":7,"no":null"#).extensions, BTreeMap::from([("n".into(), "7".into())]));
    }
}
