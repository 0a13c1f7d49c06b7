//! The fingerprint of a message: a digest of the parts that must be equal in every delivery.

use serde::{Deserialize, Serialize};

use crate::message::identity::Position;
use crate::message::key::hash;
use crate::message::strategy::Fields;
use crate::message::{Message, canonical};

/// Digest of the parts of a message that must be equal in every delivery: its type and its payload.
///
/// Version 3: blake3 over `type` and the payload. JSON is taken in canonical form (`canonical.rs`):
/// the order of members, white space, escapes in strings and the notation of numbers make no
/// difference, so that a producer that serialises again is still recognised. A number is its exact
/// decimal value: `10`, `10.0` and `1e1` are one number, and `-0` is `0`. JSON with a repeated
/// member name, and any other payload, count byte for byte.
///
/// `older_fingerprint.rs` has the rules of versions 1 and 2, which stand in records of that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the computation.
    pub version: u8,
    /// The digest.
    pub digest: [u8; 16],
}

impl Fingerprint {
    /// Version of the fingerprints that are computed now.
    pub const VERSION: u8 = 3;

    /// Returns the fingerprint of `message`.
    pub fn of(message: &Message) -> Self {
        Self::of_content(message, &Fields::All)
    }

    /// Returns the fingerprint of the content that a content hash covers: `type` and the chosen
    /// part of a JSON payload, or all of any other payload.
    pub fn of_content(message: &Message, fields: &Fields) -> Self {
        let (length, kind) = ((message.kind.len() as u64).to_le_bytes(), message.kind.as_bytes());
        let hash = match message.is_json().then(|| canonical::of(&message.data, fields)).flatten() {
            Some(canonical) => hash(&[&length, kind, b"json", &canonical]),
            None => hash(&[&length, kind, b"bytes", &message.data]),
        };
        Self::of_hash(Self::VERSION, &hash)
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

    pub(super) fn of_hash(version: u8, hash: &blake3::Hash) -> Self {
        let digest = *hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        Self { version, digest }
    }
}
