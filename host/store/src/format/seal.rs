//! Seals: a checksum at the end of each stored value, keyed with the store, the table and the key,
//! so that a value that was changed, or that stands in another place, is never taken for what was
//! written. Found by accidents, not meant against forgers: 64 bits.

use hapax_core::{StoreError, fault};
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub(crate) const SEAL_BYTES: usize = 8;

/// Tables whose values are sealed, by the number that their seals are keyed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sealed {
    Meta = 1,
    Kept = 2,
    /// Rows of all buckets: keyed with the hash of the record key, not with the place.
    Rows = 3,
    /// Entries of all indexes. They carry no seal; their sum does.
    Index = 4,
    Buckets = 5,
    State = 6,
    Outbox = 7,
    Held = 8,
    Feed = 9,
    Sums = 10,
}

impl Sealed {
    fn name(self) -> &'static str {
        match self {
            Self::Meta => "a fact about the store",
            Self::Kept | Self::Rows => "a record",
            Self::Index => "an index",
            Self::Buckets => "a bucket",
            Self::State => "a state entry",
            Self::Outbox => "an outbox message",
            Self::Held => "a held message",
            Self::Feed => "a block of the feed",
            Self::Sums => "the sum of a table",
        }
    }
}

/// Makes and checks the seals of one store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seals {
    seed: u64,
}

impl Seals {
    pub(crate) fn new(store_id: &str) -> Self {
        Self { seed: xxh3_64_with_seed(store_id.as_bytes(), 0) }
    }

    /// Returns the seal of a value; the key may come in parts.
    pub(crate) fn of(&self, table: Sealed, key: &[&[u8]], value: &[u8]) -> u64 {
        let seed = self.seed.wrapping_add(table as u64);
        xxh3_64_with_seed(value, key.iter().fold(seed, |seed, part| xxh3_64_with_seed(part, seed)))
    }

    /// Writes a value and its seal to `out`, in place of what is there.
    pub(crate) fn seal<'a>(&self, table: Sealed, key: &[&[u8]], value: &[u8], out: &'a mut Vec<u8>) -> &'a [u8] {
        out.clear();
        out.extend_from_slice(value);
        out.extend(self.of(table, key, value).to_le_bytes());
        out
    }

    /// Returns the value that was sealed.
    pub(crate) fn open<'a>(&self, table: Sealed, key: &[&[u8]], sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
        let (value, seal) = sealed.split_last_chunk::<SEAL_BYTES>().ok_or_else(|| damaged(table))?;
        self.check(table, key, value, u64::from_le_bytes(*seal))?;
        Ok(value)
    }

    /// Fails if `seal` is not that of the value.
    pub(crate) fn check(&self, table: Sealed, key: &[&[u8]], value: &[u8], seal: u64) -> Result<(), StoreError> {
        let holds = fault::mutated("seals-unchecked") || self.of(table, key, value) == seal;
        if holds { Ok(()) } else { Err(damaged(table)) }
    }
}

/// Returns the seal at the end of a stored value.
pub(crate) fn seal_of(sealed: &[u8]) -> u64 {
    sealed.last_chunk().map_or(0, |seal| u64::from_le_bytes(*seal))
}

fn damaged(table: Sealed) -> StoreError {
    let name = table.name();
    let text = format!(
        "{name} is not what was written. Stop the host, run `hapax doctor`, and put back a backup of the folder"
    );
    StoreError::Damaged(text.into())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_refused_once_a_bit_its_key_its_table_or_its_store_is_another() {
        let seals = Seals::new("00112233445566778899aabbccddeeff");
        let mut out = Vec::new();
        let sealed = seals.seal(Sealed::State, &[b"scope", b"key"], b"value", &mut out).to_vec();
        assert_eq!(seals.open(Sealed::State, &[b"scope", b"key"], &sealed).unwrap(), b"value");
        for bit in 0..sealed.len() * 8 {
            let mut turned = sealed.clone();
            turned[bit / 8] ^= 1 << (bit % 8);
            assert!(seals.open(Sealed::State, &[b"scope", b"key"], &turned).is_err(), "bit {bit}");
        }
        assert!((0..sealed.len()).all(|end| seals.open(Sealed::State, &[b"scope", b"key"], &sealed[..end]).is_err()));
        assert!(seals.open(Sealed::State, &[b"scope", b"kex"], &sealed).is_err());
        assert!(seals.open(Sealed::State, &[b"scop", b"ekey"], &sealed).is_err());
        assert!(seals.open(Sealed::Kept, &[b"scope", b"key"], &sealed).is_err());
        let other = Seals::new("00112233445566778899aabbccddeefe");
        assert!(other.open(Sealed::State, &[b"scope", b"key"], &sealed).is_err());
    }
}
