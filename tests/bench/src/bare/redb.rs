//! redb with nothing around it: one transaction a group, or one read a duplicate. Its tables are
//! the plainest that do the job.

use std::path::Path;
use std::time::{Duration, Instant};

use redb::{Database, ReadOnlyTable, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tempfile::TempDir;

use crate::measure::{Run, Sample};
use crate::work::{self, Ids, Item, RECORD, VALUE};

const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
const STATE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("state");
/// Bytes of redb's page cache: as many as the store gives its own.
pub(crate) const PAGE_CACHE_BYTES: usize = 128 << 20;
/// Records a transaction while filling.
const FILL_GROUP: usize = 10_000;

/// A bare database with records in it.
pub(crate) struct Bare {
    database: Database,
    ids: Ids,
    /// Records that are there.
    pub(crate) records: u64,
    _folder: TempDir,
}

impl Bare {
    /// A database with the first `records` items.
    pub(crate) fn filled(folder: &Path, ids: Ids, records: u64) -> Self {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let mut builder = Database::builder();
        builder.set_cache_size(PAGE_CACHE_BYTES);
        let database = builder.create(folder.path().join("bare.redb")).unwrap();
        let mut bare = Self { database, ids, records: 0, _folder: folder };
        let items = work::sorted(ids, records);
        items.chunks(FILL_GROUP).for_each(|chunk| bare.write(chunk.iter().copied()));
        bare
    }

    /// One transaction a group, synced: for each message a look, a record and a state write.
    pub(crate) fn run(&mut self, group: u64, messages: u64) -> Run {
        let mut samples = Vec::with_capacity((messages / group) as usize);
        let since = Instant::now();
        for _ in 0..(messages / group).max(1) {
            let began = Instant::now();
            let ids = self.ids;
            self.write((self.records..self.records + group).map(|number| Item::new(ids, number)));
            samples.push(Sample::of(since, began));
        }
        let messages = samples.len() as u64 * group;
        Run::new(samples, messages, since.elapsed(), group as f64)
    }

    fn write(&mut self, items: impl Iterator<Item = Item>) {
        let txn = self.database.begin_write().unwrap();
        {
            let mut records = txn.open_table(RECORDS).unwrap();
            let mut state = txn.open_table(STATE).unwrap();
            for item in items {
                let key = item.record_key();
                // The pipeline looks before it writes; so does this.
                assert!(records.get(&key[..]).unwrap().is_none());
                records.insert(&key[..], &RECORD[..]).unwrap();
                state.insert(&item.state_key()[..], &VALUE[..]).unwrap();
                self.records += 1;
            }
        }
        txn.commit().unwrap();
    }

    /// Reads records, each in a transaction of its own: it sees every commit before it, as an
    /// answer to a duplicate must.
    pub(crate) fn read_each(&self, keys: &[Vec<u8>]) -> Duration {
        let since = Instant::now();
        for key in keys {
            let txn = self.database.begin_read().unwrap();
            read(&txn.open_table(RECORDS).unwrap(), key);
        }
        since.elapsed()
    }

    /// Reads them all in one transaction: the least that redb can do, blind to what is written
    /// meanwhile.
    pub(crate) fn read_in_one(&self, keys: &[Vec<u8>]) -> Duration {
        let txn = self.database.begin_read().unwrap();
        let table = txn.open_table(RECORDS).unwrap();
        let since = Instant::now();
        keys.iter().for_each(|key| read(&table, key));
        since.elapsed()
    }
}

fn read(table: &ReadOnlyTable<&[u8], &[u8]>, key: &[u8]) {
    let value = table.get(key).unwrap().unwrap().value().to_vec();
    assert_eq!(value.len(), RECORD.len());
}
