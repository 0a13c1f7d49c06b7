//! The fingerprint of a message: a digest of the parts that must be equal in every delivery. Also
//! holds canonical JSON.

use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::identity::Position;
use crate::message::key::hash;
use crate::message::strategy::Fields;

/// Digest of the parts of a message that must be equal in every delivery: its type and its payload.
///
/// Version 1: blake3 over `type` and `data`; JSON is taken in canonical form (members sorted by
/// name, no space between tokens, numbers as written), so that a producer that serialises again is
/// still recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the computation.
    pub version: u8,
    /// The digest.
    pub digest: [u8; 16],
}

impl Fingerprint {
    /// Returns the fingerprint of `message`.
    pub fn of(message: &Message) -> Self {
        let (length, kind) = ((message.kind.len() as u64).to_le_bytes(), message.kind.as_bytes());
        let hash = match message.is_json().then(|| canonical_json(&message.data)).flatten() {
            Some(canonical) => hash(&[&length, kind, &canonical]),
            None => hash(&[&length, kind, &message.data]),
        };
        Self::of_hash(1, &hash)
    }

    /// Returns the fingerprint of the content that a content hash covers: version 2, blake3 over
    /// `type` and the chosen part of a JSON payload in RFC 8785's canonical form, or over the bytes
    /// of any other payload.
    pub fn of_content(message: &Message, fields: &Fields) -> Self {
        let (length, kind) = ((message.kind.len() as u64).to_le_bytes(), message.kind.as_bytes());
        let hash = match message.is_json().then(|| chosen(&message.data, fields)).flatten() {
            Some(canonical) => hash(&[&length, kind, b"json", &canonical]),
            None => hash(&[&length, kind, b"bytes", &message.data]),
        };
        Self::of_hash(2, &hash)
    }

    /// Returns the fingerprint combined with the message's position: the same body at another
    /// position is another message.
    #[must_use]
    pub fn at(self, position: &Position) -> Self {
        Self::of_hash(self.version, &hash(&[&self.digest, position.to_string().as_bytes()]))
    }

    /// Returns the digest in 32 hex digits.
    pub fn hex(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.digest))
    }

    fn of_hash(version: u8, hash: &blake3::Hash) -> Self {
        let digest = *hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        Self { version, digest }
    }
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

    fn canonical(json: &str) -> String {
        String::from_utf8(chosen(json.as_bytes(), &Fields::All).expect("JSON")).expect("UTF-8")
    }

    /// The example of RFC 8785, 3.2.2 and 3.2.3; the order of its names is the one of 3.2.3.
    #[test]
    fn content_is_canonical_by_rfc_8785() {
        let example = r#"{
            "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
            "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
            "literals": [null, true, false]
        }"#;
        let expected = r#"{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}"#;
        assert_eq!(canonical(example), expected);
        // By UTF-16 code units: U+10000 comes before U+FB33.
        assert_eq!(
            canonical("{\"\u{fb33}\":1,\"\u{10000}\":2,\"1\":3,\"\\r\":4}"),
            "{\"\\r\":4,\"1\":3,\"\u{10000}\":2,\"\u{fb33}\":1}"
        );
    }

    #[test]
    fn numbers_are_doubles() {
        assert_eq!(canonical("[9007199254740993, 1.0, -0, 100e-2]"), "[9007199254740992,1,0,1]");
    }
}
