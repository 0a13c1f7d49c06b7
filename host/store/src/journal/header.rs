//! The header of a journal's file: format and identity, which never change, and what the file
//! promises to hold. A file that is shorter or older than promised has lost frames.

use std::io;

use redb::StorageBackend;

use crate::journal::{JournalError, START};

/// Begins the file. Then the format (4 bytes), the store's identity (32 hex digits), a checksum of
/// both (16); the promises: length and floor (8 each), a checksum of all before it (16).
const MAGIC: &[u8; 8] = b"HAPAXJNL";
pub(crate) const FORMAT: u32 = 2;
/// Offset of the checksum of format and identity. Every format has them at these places.
const IDENTITY_END: usize = 8 + 4 + 32;
/// Offset of the promises.
const PROMISES: usize = IDENTITY_END + 16;
const PROMISES_END: usize = PROMISES + 8 + 8;
pub(crate) const HEADER_END: usize = PROMISES_END + 16;

/// Promises of a journal's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Promises {
    /// The file has at least this many bytes.
    pub(crate) length: u64,
    /// Every frame up to this sequence number was in the file once.
    pub(crate) floor: u64,
}

/// Returns the header of a journal, in its whole length.
pub(super) fn encode(store_id: &str, promises: Promises) -> Vec<u8> {
    let mut header = Vec::with_capacity(START as usize);
    header.extend(MAGIC);
    header.extend(FORMAT.to_le_bytes());
    header.extend(store_id.as_bytes());
    push_checksum(&mut header);
    header.extend(promises.length.to_le_bytes());
    header.extend(promises.floor.to_le_bytes());
    push_checksum(&mut header);
    header.resize(START as usize, 0);
    header
}

fn push_checksum(header: &mut Vec<u8>) {
    let checksum = blake3::hash(header);
    header.extend_from_slice(&checksum.as_bytes()[..16]);
}

/// Writes the header, without a sync. It lies within one sector, so it is there whole or not at
/// all.
pub(super) fn write(file: &dyn StorageBackend, store_id: &str, promises: Promises) -> io::Result<()> {
    file.write(0, &encode(store_id, promises)[..HEADER_END])
}

/// Reads the header, which must be that of the store and of this format.
pub(super) fn read(file: &dyn StorageBackend, store_id: &str) -> Result<Promises, JournalError> {
    if file.len()? < START {
        return Err(JournalError::Damaged("it is cut short".into()));
    }
    let mut found = vec![0; HEADER_END];
    file.read(0, &mut found)?;
    if found[..8] != *MAGIC || !checks(&found[..PROMISES]) {
        return Err(JournalError::Damaged("its header cannot be read".into()));
    }
    let format = found[8..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
    if format != FORMAT {
        return Err(JournalError::Format(format));
    }
    match &found[12..IDENTITY_END] {
        id if id == store_id.as_bytes() => {}
        other => {
            return Err(JournalError::Damaged(format!("it belongs to store {}", String::from_utf8_lossy(other))));
        }
    }
    if !checks(&found) {
        return Err(JournalError::Damaged("its header cannot be read".into()));
    }
    let number = |at: usize| found[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk));
    Ok(Promises { length: number(PROMISES), floor: number(PROMISES + 8) })
}

/// Returns true if the bytes end with the checksum of those before it.
fn checks(bytes: &[u8]) -> bool {
    let (fields, checksum) = bytes.split_at(bytes.len() - 16);
    blake3::hash(fields).as_bytes()[..16] == *checksum
}
