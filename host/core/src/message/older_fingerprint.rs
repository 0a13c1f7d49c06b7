//! Fingerprints as earlier versions computed them: a record that was stored with one still
//! recognises its duplicates. On no usual path; nothing is stored with these any more.

use crate::message::Message;
use crate::message::canonical;
use crate::message::decimal;
use crate::message::fingerprint::Fingerprint;
use crate::message::identity::Position;
use crate::message::json::{Document, Kind};
use crate::message::key::hash;
use crate::message::strategy::{Fields, Strategy};

impl Strategy {
    /// Returns the fingerprint of `message` by the rule of an earlier `version`. Returns `None` if
    /// there is no such rule.
    #[cold]
    pub(crate) fn older_fingerprint(
        &self,
        message: &Message,
        position: Option<&Position>,
        version: u8,
    ) -> Option<Fingerprint> {
        let fingerprint = match (version, self) {
            (1, _) => version_1(message),
            (2, Self::ContentHash { fields }) => version_2(message, fields),
            _ => return None,
        };
        Some(match position {
            Some(position) => fingerprint.at(position),
            None => fingerprint,
        })
    }
}

/// Returns `true` if the rules of versions 1 and 2 took every part of the message as it is. If not,
/// they gave it the fingerprint of messages with another body: they rounded numbers to doubles, and
/// took the last of the members with one name.
#[cold]
pub(crate) fn was_exact(message: &Message) -> bool {
    // Version 1 wrote a comma behind every item, and had one kind of digest for JSON and for bytes.
    let may_be_taken_for_json = [&b",}"[..], b",]"].iter().any(|end| message.data.ends_with(end));
    if !message.is_json() {
        return !may_be_taken_for_json;
    }
    let Some(document) = Document::parse(&message.data) else { return !may_be_taken_for_json };
    let numbers = document.nodes().filter(|node| document.kind(*node) == Kind::Number);
    let mut numbers = numbers.map(|node| document.bytes(node));
    canonical::of(&message.data, &Fields::All).is_some() && numbers.all(was_kept)
}

/// Returns `true` if a number of JSON kept its value: serde_json holds it as an integer of 64 bits
/// or as a double. One that is too large for that made the whole text count byte for byte.
fn was_kept(number: &[u8]) -> bool {
    let canonical = |text: &[u8]| {
        let mut out = Vec::new();
        decimal::write_canonical(text, &mut out);
        out
    };
    let held = serde_json::from_slice::<serde_json::Number>(number);
    held.map_or(true, |held| canonical(held.to_string().as_bytes()) == canonical(number))
}

/// Version 1: blake3 over `type` and `data`; JSON with its members sorted by name, no space between
/// tokens, integers of 64 bits as written and other numbers as the shortest text of a double.
fn version_1(message: &Message) -> Fingerprint {
    let (length, kind) = ((message.kind.len() as u64).to_le_bytes(), message.kind.as_bytes());
    let hash = match message.is_json().then(|| canonical_json(&message.data)).flatten() {
        Some(canonical) => hash(&[&length, kind, &canonical]),
        None => hash(&[&length, kind, &message.data]),
    };
    Fingerprint::of_hash(1, &hash)
}

/// Version 2: blake3 over `type` and the chosen part of a JSON payload in RFC 8785's canonical
/// form, or over the bytes of any other payload.
fn version_2(message: &Message, fields: &Fields) -> Fingerprint {
    let (length, kind) = ((message.kind.len() as u64).to_le_bytes(), message.kind.as_bytes());
    let hash = match message.is_json().then(|| chosen(&message.data, fields)).flatten() {
        Some(canonical) => hash(&[&length, kind, b"json", &canonical]),
        None => hash(&[&length, kind, b"bytes", &message.data]),
    };
    Fingerprint::of_hash(2, &hash)
}

/// Returns the chosen part of a JSON payload in canonical form; `None` if it is not JSON.
fn chosen(data: &[u8], fields: &Fields) -> Option<Vec<u8>> {
    let mut value: serde_json::Value = serde_json::from_slice(data).ok()?;
    let chosen = match fields {
        Fields::All => value,
        Fields::Only(pointers) => {
            let member = |pointer: &String| Some((pointer.clone(), value.pointer(pointer)?.clone()));
            serde_json::Value::Object(pointers.iter().filter_map(member).collect())
        }
        Fields::Without(pointers) => {
            pointers.iter().for_each(|pointer| remove(&mut value, pointer));
            value
        }
    };
    serde_json_canonicalizer::to_vec(&doubles(chosen)).ok()
}

/// Converts integers to the doubles that RFC 8785 takes them for, where they are not exact as
/// doubles.
fn doubles(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    /// Beyond this, not every integer is a double.
    const EXACT: u64 = 1 << 53;
    match value {
        Value::Array(items) => items.into_iter().map(doubles).collect(),
        Value::Object(members) => members.into_iter().map(|(name, member)| (name, doubles(member))).collect(),
        Value::Number(number) if number.as_i64().map_or(number.is_u64(), |number| number.unsigned_abs() > EXACT) => {
            Value::from(number.as_f64())
        }
        scalar => scalar,
    }
}

/// Removes the value under a JSON pointer, if it is there.
fn remove(value: &mut serde_json::Value, pointer: &str) {
    let Some((parent, name)) = pointer.rsplit_once('/') else { return };
    let name = name.replace("~1", "/").replace("~0", "~");
    match value.pointer_mut(parent) {
        Some(serde_json::Value::Object(members)) => drop(members.remove(&name)),
        // A removed item leaves a hole: the other items keep their indexes.
        Some(serde_json::Value::Array(items)) => {
            if let Some(item) = name.parse().ok().and_then(|index: usize| items.get_mut(index)) {
                *item = serde_json::Value::Null;
            }
        }
        _ => {}
    }
}

/// Returns JSON with members sorted and white space removed; `None` if it is not JSON.
fn canonical_json(data: &[u8]) -> Option<Vec<u8>> {
    let value: serde_json::Value = serde_json::from_slice(data).ok()?;
    let mut out = Vec::with_capacity(data.len());
    write_canonical(&value, &mut out);
    Some(out)
}

fn write_canonical(value: &serde_json::Value, out: &mut Vec<u8>) {
    use serde_json::Value;
    match value {
        Value::Object(members) => {
            // Sorted here, not left to the map: another crate may switch serde_json to insertion
            // order.
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by_key(|(name, _)| *name);
            out.push(b'{');
            for (name, member) in members {
                out.extend(serde_json::Value::from(name.as_str()).to_string().bytes());
                out.push(b':');
                write_canonical(member, out);
                out.push(b',');
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for item in items {
                write_canonical(item, out);
                out.push(b',');
            }
            out.push(b']');
        }
        scalar => out.extend(scalar.to_string().bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(media_type: &str, data: &str) -> Message {
        Message::new("m", "/s", "order.placed").with_data(media_type, data.to_owned())
    }

    /// Digests that a host of those versions has computed.
    #[test]
    fn fingerprints_are_those_of_the_hosts_that_stored_them() {
        let content = Strategy::ContentHash { fields: Fields::All };
        for (media_type, data, of, at_7, of_content) in [
            (
                "application/json",
                r#"{"b": [1, 2.5, "x\u00e9"], "a": {"z": null, "y": true}}"#,
                "93b54fcdb48b6c238125298e38e2e7d2",
                "09ebe5cac9d23d6ab7efd60a3443d033",
                "20eb36c75e81186f833b9f5fdbc531e5",
            ),
            (
                "application/json",
                "100000000000000000000",
                "919d0abea8efcc827a9b8b0bb5c8915c",
                "86d8ef4c2e7f7c57e42bffb8f11f4277",
                "e668f330e7a3b558c89b502b690c87e8",
            ),
            (
                "text/plain",
                "a b",
                "bf4c292e48e44c70a6d69679700934f8",
                "7055b83aaf729dbec4071c0a5bda94c7",
                "7a032114a3c32f22af7520cc70db97e7",
            ),
        ] {
            let message = message(media_type, data);
            let hex = |position, version| {
                content.older_fingerprint(&message, position, version).map(|fingerprint| fingerprint.hex())
            };
            assert_eq!(hex(None, 1).as_deref(), Some(of), "{data}");
            assert_eq!(hex(Some(&Position::Version(7)), 1).as_deref(), Some(at_7), "{data}");
            assert_eq!(hex(None, 2).as_deref(), Some(of_content), "{data}");
            assert_eq!(hex(None, 9), None);
            // The key of ordinary content stays as it is.
            assert_eq!(Fingerprint::of(&message).hex(), of_content, "{data}");
        }
    }

    #[test]
    fn what_earlier_versions_rounded_or_dropped_is_known() {
        let exact = |data: &str| was_exact(&message("application/json", data));
        for data in ["{}", "[1, 1.0, 0.1, -0, 18446744073709551615, 1e300, 1e20, 5e-324]", "1e400", "{", r#""\ud800""#]
        {
            assert!(exact(data), "{data}");
        }
        for data in
            ["[18446744073709551617]", "0.10000000000000001", "1e-400", r#"{"a":1,"a":1}"#, r#"{"a":1,}"#, "[1,]"]
        {
            assert!(!exact(data), "{data}");
        }
        assert!(was_exact(&message("text/plain", "0.10000000000000001")));
        assert!(!was_exact(&message("text/plain", "[1,]")));
    }
}
