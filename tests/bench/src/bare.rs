//! The bare loops: what the disk and redb can do with the same bytes and the same durability, and nothing else.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use redb::{Database, ReadableTable as _, TableDefinition};

use crate::{Latencies, Measured};

const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
const STATE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("state");

/// A 64-byte record key that lands anywhere in the table.
pub(crate) fn key(number: usize) -> [u8; 64] {
    let mut key = [b'k'; 64];
    let spread = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key[..16].copy_from_slice(format!("{spread:016x}").as_bytes());
    key
}

/// One transaction a group: for each message a record of 100 bytes and a state write of 16, synced.
pub(crate) fn redb(folder: &Path, group: usize, messages: usize) -> Measured {
    let folder = tempfile::tempdir_in(folder).unwrap();
    let mut builder = Database::builder();
    builder.set_cache_size(64 << 20);
    let database = builder.create(folder.path().join("bare.redb")).unwrap();
    let mut latencies = Latencies::default();
    let since = Instant::now();
    for first in (0..messages).step_by(group) {
        let begun = Instant::now();
        let txn = database.begin_write().unwrap();
        {
            let mut records = txn.open_table(RECORDS).unwrap();
            let mut state = txn.open_table(STATE).unwrap();
            for number in first..(first + group).min(messages) {
                let key = key(number);
                // The pipeline looks before it writes; so does this.
                assert!(records.get(&key[..]).unwrap().is_none());
                records.insert(&key[..], &[7; 100][..]).unwrap();
                state.insert(&key[..40], &[7; 16][..]).unwrap();
            }
        }
        txn.commit().unwrap();
        latencies.0.push(begun.elapsed());
    }
    let (elapsed, groups) = (since.elapsed(), latencies.0.len());
    latencies.measured(messages, elapsed, messages as f64 / groups as f64)
}

/// One append of 256 bytes a message and one `fdatasync` a group: the floor.
pub(crate) fn append(folder: &Path, group: usize, messages: usize) -> Measured {
    let folder = tempfile::tempdir_in(folder).unwrap();
    let mut file = File::create(folder.path().join("append")).unwrap();
    let mut latencies = Latencies::default();
    let since = Instant::now();
    for first in (0..messages).step_by(group) {
        let begun = Instant::now();
        file.write_all(&vec![7; 256 * group.min(messages - first)]).unwrap();
        file.sync_data().unwrap();
        latencies.0.push(begun.elapsed());
    }
    let (elapsed, groups) = (since.elapsed(), latencies.0.len());
    latencies.measured(messages, elapsed, messages as f64 / groups as f64)
}
