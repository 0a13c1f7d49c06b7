//! Identity of a message: its record key, its fingerprint, and the ids derived from them. Pure
//! functions.

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::Hasher;
use std::str::FromStr;
use std::sync::Arc;

use crate::message::Message;
use crate::support::fault;

/// Owner of state and records: one processor of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope {
    /// The tenant; `default` where there is only one.
    pub tenant: Arc<str>,
    /// The processor's name.
    pub processor: Arc<str>,
}

/// Longest total length of parts that are hashed in one go.
const HASHED_TOGETHER: usize = 512;

impl Scope {
    /// Returns the scope of a processor of the default tenant.
    pub fn of(processor: &str) -> Self {
        Self { tenant: "default".into(), processor: processor.into() }
    }

    /// Returns the scope that belongs to no single processor: sagas and locks of the same tenant.
    /// No processor can have its name.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { tenant: self.tenant.clone(), processor: crate::state::RESERVED.to_string().into() }
    }
}

/// Key of a deduplication record: `tenant / processor / source namespace / idempotency key`. Cheap
/// to clone.
///
/// Its text form percent-encodes `%` and `/` inside a part, so that it can be split again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordKey(Arc<RecordKeyParts>);

/// Parts of a [`RecordKey`].
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordKeyParts {
    /// Tenant and processor.
    pub scope: Scope,
    /// Source namespace: CloudEvents `source`.
    pub source: Arc<str>,
    /// The idempotency key inside the source.
    pub key: Arc<str>,
    /// Digest of the key, see [`RecordKey::digest`].
    digest: u128,
}

impl std::ops::Deref for RecordKey {
    type Target = RecordKeyParts;

    fn deref(&self) -> &RecordKeyParts {
        &self.0
    }
}

impl std::hash::Hash for RecordKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.digest as u64);
    }
}

impl RecordKey {
    /// Returns a key from its parts.
    pub fn new(scope: Scope, source: Arc<str>, key: Arc<str>) -> Self {
        let hash = hash_of(&scope, &source, &key, b"record", 0);
        let digest = u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        Self(Arc::new(RecordKeyParts { scope, source, key, digest }))
    }

    /// Returns the key of `message` at the processor `scope`, by strategy message id.
    pub fn by_message_id(scope: &Scope, message: &Message) -> Self {
        let key = message.idempotency_key.as_ref().unwrap_or(&message.id);
        Self::new(scope.clone(), message.source.as_str().into(), key.as_str().into())
    }

    /// Returns a number that depends only on the key: the message's seed.
    pub fn seed(&self) -> u64 {
        (self.0.digest >> 64) as u64
    }

    /// Returns the stable id of the `position`-th outgoing message of this record: `hash(record
    /// key, position)`, 32 hex digits.
    pub fn outgoing_id(&self, position: usize) -> String {
        self.hash(b"outbox", position as u64).to_hex()[..32].to_owned()
    }

    /// Returns the stable id of the `position`-th event that this record's message appends:
    /// `hash(record key, position)`, 16 bytes.
    pub fn event_id(&self, position: usize) -> [u8; 16] {
        *self.hash(b"event", position as u64).as_bytes().first_chunk().expect("a hash has 32 bytes")
    }

    /// Returns the stable id of the `position`-th outbound call of this record's message, 32 hex
    /// digits.
    pub fn call_id(&self, position: u32) -> String {
        self.hash(b"call", u64::from(position)).to_hex()[..32].to_owned()
    }

    /// Returns the key for the compensation of this message's `step`-th step of `saga`: everything
    /// that the compensation does derives its ids from it. Its form is `key/saga/step/compensate`,
    /// and the first `/` is the one behind the key: in it, `/` and `%` are percent-encoded.
    #[must_use]
    pub fn compensation(&self, saga: &str, step: u32) -> Self {
        let key = if fault::mutated("derived-key-unescaped") { self.0.key.to_string() } else { escaped(&self.0.key) };
        let key = format!("{key}/{saga}/{step}/compensate");
        Self::new(self.0.scope.clone(), self.0.source.clone(), key.into())
    }

    /// Returns the name of the record in a store and in every table of the host: 128 bits of a
    /// cryptographic hash of the whole key, computed once.
    pub fn digest(&self) -> u128 {
        self.0.digest
    }

    fn hash(&self, purpose: &[u8], number: u64) -> blake3::Hash {
        hash_of(&self.scope, &self.source, &self.key, purpose, number)
    }
}

fn hash_of(scope: &Scope, source: &str, key: &str, purpose: &[u8], number: u64) -> blake3::Hash {
    let processor = if fault::mutated("key-without-processor") { "" } else { &*scope.processor };
    let parts = [purpose, scope.tenant.as_bytes(), processor.as_bytes(), source.as_bytes(), key.as_bytes()];
    let [a, b, c, d, e] = parts.map(|part| (part.len() as u64).to_le_bytes());
    let [purpose, tenant, processor, source, key] = parts;
    hash(&[&a, purpose, &b, tenant, &c, processor, &d, source, &e, key, &number.to_le_bytes()])
}

/// Returns blake3 over these parts, one after the other.
pub(super) fn hash(parts: &[&[u8]]) -> blake3::Hash {
    // For few bytes, feeding the parts one by one costs more than the hash.
    let mut together = ArrayVec::<u8, HASHED_TOGETHER>::new();
    if parts.iter().all(|part| together.try_extend_from_slice(part).is_ok()) {
        return blake3::hash(&together);
    }
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

/// Returns a part of a key in its text form.
pub(crate) fn escaped(part: &str) -> String {
    part.replace('%', "%25").replace('/', "%2F")
}

/// Hashes values that begin with a digest: a digest is as good as random, and its own low half
/// serves. A client that makes keys with equal halves, on purpose and at great cost, slows down
/// tables of messages that are in flight or not yet applied; no answer becomes wrong.
#[derive(Debug, Default)]
pub struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 ^= u64::from_le_bytes(word);
        }
    }

    fn write_u64(&mut self, digest: u64) {
        self.0 ^= digest;
    }

    fn write_u128(&mut self, digest: u128) {
        self.0 ^= digest as u64;
    }
}

/// Serialised as its text.
impl Serialize for RecordKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RecordKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [&self.scope.tenant, &self.scope.processor, &self.source, &self.key];
        for (index, part) in parts.into_iter().enumerate() {
            if index > 0 {
                f.write_str("/")?;
            }
            f.write_str(&escaped(part))?;
        }
        Ok(())
    }
}

/// Error: the text is not `tenant/processor/source/key`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a record key: write tenant/processor/source/key, with `/` inside a part as %2F and `%` as %25")]
pub struct ParseRecordKeyError(String);

impl FromStr for RecordKey {
    type Err = ParseRecordKeyError;

    fn from_str(text: &str) -> Result<Self, ParseRecordKeyError> {
        let parts: Vec<Arc<str>> =
            text.split('/').map(|part| part.replace("%2F", "/").replace("%25", "%").into()).collect();
        match <[Arc<str>; 4]>::try_from(parts) {
            Ok([tenant, processor, source, key]) => Ok(Self::new(Scope { tenant, processor }, source, key)),
            Err(_) => Err(ParseRecordKeyError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_hashed_as_one_text_however_long_they_are() {
        for length in [0, 1, HASHED_TOGETHER - 1, HASHED_TOGETHER, HASHED_TOGETHER + 1, 10 * HASHED_TOGETHER] {
            let bytes = vec![7; length];
            let (front, back) = bytes.split_at(length / 3);
            assert_eq!(hash(&[front, &[], back]), blake3::hash(&bytes), "{length}");
        }
    }
}
