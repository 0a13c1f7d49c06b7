//! The stored format, version 1: tables, keys, values. `docs/STORAGE.md` says the same in words; change both together.

use hapax_core::context::Version;
use hapax_core::key::{Fingerprint, RecordKey, Scope};
use redb::TableDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version of the format that this build reads and writes.
pub const FORMAT: u32 = 1;

/// Facts about the store: [`META_FORMAT`], [`META_STORE_ID`], [`META_LAST_VERSION`].
pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Deduplication records: encoded record key to encoded record.
pub(crate) const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
/// State: encoded scope and the key's text, to version (8 bytes, little endian) and value.
pub(crate) const STATE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("state");
/// Messages to send: version of the commit and place in it, to the encoded message.
pub(crate) const OUTBOX: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("outbox");
/// Dead letters: encoded record key and fingerprint digest, to the encoded letter.
pub(crate) const DEAD_LETTERS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("dead_letters");

/// In [`META`]: the format's version, 4 bytes, little endian.
pub(crate) const META_FORMAT: &str = "format";
/// In [`META`]: the store's identity, 32 hex digits; the file `STORE` beside the database holds the same.
pub(crate) const META_STORE_ID: &str = "store-id";
/// In [`META`]: a version that no commit has exceeded, 8 bytes, little endian.
pub(crate) const META_LAST_VERSION: &str = "last-version";

/// Ends a part of a key. Sorts before every byte of a part, escaped as `00 FF`, so that keys sort as their parts do.
const PART_END: [u8; 2] = [0, 1];

fn push_part(out: &mut Vec<u8>, part: &str) {
    for byte in part.bytes() {
        out.push(byte);
        if byte == 0 {
            out.push(0xff);
        }
    }
    out.extend(PART_END);
}

fn split_part(bytes: &[u8]) -> Option<(String, &[u8])> {
    let mut part = Vec::new();
    let mut at = 0;
    loop {
        match (*bytes.get(at)?, bytes.get(at + 1)) {
            (0, Some(0xff)) => {
                part.push(0);
                at += 2;
            }
            (0, Some(1)) => return Some((String::from_utf8(part).ok()?, &bytes[at + 2..])),
            (0, _) => return None,
            (byte, _) => {
                part.push(byte);
                at += 1;
            }
        }
    }
}

/// The common beginning of everything of one scope.
pub(crate) fn scope_prefix(scope: &Scope) -> Vec<u8> {
    let mut out = Vec::with_capacity(scope.tenant.len() + scope.processor.len() + 4);
    push_part(&mut out, &scope.tenant);
    push_part(&mut out, &scope.processor);
    out
}

pub(crate) fn record_key(key: &RecordKey) -> Vec<u8> {
    let mut out = scope_prefix(&key.scope);
    push_part(&mut out, &key.source);
    push_part(&mut out, &key.key);
    out
}

pub(crate) fn parse_record_key(bytes: &[u8]) -> Option<RecordKey> {
    let (tenant, rest) = split_part(bytes)?;
    let (processor, rest) = split_part(rest)?;
    let (source, rest) = split_part(rest)?;
    let (key, _) = split_part(rest)?;
    let scope = Scope { tenant: tenant.into(), processor: processor.into() };
    Some(RecordKey { scope, source: source.into(), key: key.into() })
}

pub(crate) fn state_key(prefix: &[u8], key: &str) -> Vec<u8> {
    [prefix, key.as_bytes()].concat()
}

pub(crate) fn parse_state_key(bytes: &[u8]) -> Option<(Scope, String)> {
    let (tenant, rest) = split_part(bytes)?;
    let (processor, rest) = split_part(rest)?;
    let scope = Scope { tenant: tenant.into(), processor: processor.into() };
    Some((scope, std::str::from_utf8(rest).ok()?.to_owned()))
}

pub(crate) fn dead_letter_key(record_key: &[u8], fingerprint: &Fingerprint) -> Vec<u8> {
    [record_key, &fingerprint.digest[..]].concat()
}

/// A state value with its version in front.
pub(crate) fn state_value(version: Version, value: &[u8]) -> Vec<u8> {
    [&version.to_le_bytes()[..], value].concat()
}

pub(crate) fn parse_state_value(bytes: &[u8]) -> Option<(Version, &[u8])> {
    let (version, value) = bytes.split_first_chunk::<8>()?;
    Some((Version::from_le_bytes(*version), value))
}

/// A value in postcard's encoding, which is specified and stable since its version 1.0.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("what is stored has no map of unknown length and no custom serializer")
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}

/// The first key after everything that begins with `prefix`; prefixes end in [`PART_END`], so it is always there.
pub(crate) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_keys_come_back_and_sort_as_their_parts() {
        let key = |source: &str, key: &str| RecordKey { scope: Scope::of("p"), source: source.into(), key: key.into() };
        let keys = [key("a", "z"), key("a\0", "b"), key("a\0b", "a"), key("ab", "a"), key("b", "")];
        let encoded: Vec<_> = keys.iter().map(record_key).collect();
        assert!(encoded.is_sorted(), "{encoded:?}");
        for (key, bytes) in keys.iter().zip(&encoded) {
            assert_eq!(parse_record_key(bytes).as_ref(), Some(key));
        }
        assert_eq!(parse_record_key(&encoded[0][..5]), None);
    }
}
