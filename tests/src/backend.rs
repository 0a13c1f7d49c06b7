//! A disk that loses power: of each of a store's two files, writes since its last sync may be there
//! or not, in whole or in part.

use std::io;
use std::sync::Arc;

use hapax_store::{OpenError, RedbStore, StoreOptions};
use parking_lot::Mutex;
use redb::StorageBackend;

/// One of a store's two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The database.
    Database,
    /// The journal.
    Journal,
}

/// Operations that a disk may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A write, or a change of the file's length.
    Change,
    /// A sync.
    Sync,
}

/// The disk under one store: its database and its journal, which lose power together. Cloning
/// shares it.
#[derive(Debug, Clone)]
pub struct LossyDisk {
    power: Arc<Mutex<Power>>,
    database: LossyFile,
    journal: LossyFile,
}

#[derive(Debug, Default)]
struct Power {
    /// Operations left until the power goes; `None`: it stays.
    left: Option<u64>,
    operations: u64,
    refusals: Vec<RequestError>,
}

/// An operation that is to fail once, with an error of this kind, after it has gone well so many
/// times more.
#[derive(Debug)]
struct RequestError {
    part: Part,
    operation: Operation,
    after: u64,
    kind: io::ErrorKind,
}

impl Power {
    /// Lets an operation pass, or says why it fails.
    fn pass(&mut self, part: Part, operation: Operation) -> io::Result<()> {
        match &mut self.left {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        let meant = |refusal: &RequestError| refusal.part == part && refusal.operation == operation;
        if let Some(at) = self.refusals.iter().position(meant) {
            if self.refusals[at].after == 0 {
                return Err(self.refusals.remove(at).kind.into());
            }
            self.refusals[at].after -= 1;
        }
        self.operations += 1;
        Ok(())
    }
}

/// A file in memory with a list of what was not synced yet; cloning shares it.
#[derive(Debug, Clone)]
struct LossyFile {
    part: Part,
    power: Arc<Mutex<Power>>,
    inner: Arc<Mutex<File>>,
}

#[derive(Debug, Default)]
struct File {
    /// Bytes that the disk certainly holds.
    synced: Vec<u8>,
    /// Bytes that a reader sees.
    seen: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

fn apply(file: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => file.resize(*length, 0),
        Change::Write { offset, data } => {
            let end = offset + data.len();
            if file.len() < end {
                file.resize(end, 0);
            }
            file[*offset..end].copy_from_slice(data);
        }
    }
}

impl Default for LossyDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl LossyDisk {
    /// A disk with nothing on it.
    pub fn new() -> Self {
        let power = Arc::<Mutex<Power>>::default();
        let file = |part| LossyFile { part, power: power.clone(), inner: Arc::default() };
        Self { database: file(Part::Database), journal: file(Part::Journal), power }
    }

    /// Opens the store on this disk, or makes one.
    pub fn open(&self) -> Result<RedbStore, OpenError> {
        self.open_with(StoreOptions::default())
    }

    /// The same, with options of the caller's.
    pub fn open_with(&self, options: StoreOptions) -> Result<RedbStore, OpenError> {
        RedbStore::open_backends(self.database.clone(), self.journal.clone(), options)
    }

    /// The power goes before the `operations`-th change or sync from now, whichever file it is of.
    pub fn fail_after(&self, operations: u64) {
        self.power.lock().left = Some(operations);
    }

    /// The power stays.
    pub fn stay(&self) {
        self.power.lock().left = None;
    }

    /// The `after`-th such operation on `part` from now, counted from 0, fails with an error of
    /// `kind`; those after it go well again.
    pub fn refuse_once(&self, part: Part, operation: Operation, after: u64, kind: io::ErrorKind) {
        self.power.lock().refusals.push(RequestError { part, operation, after, kind });
    }

    /// Drops a store as the death of its process would: what it wrote stays in the page cache,
    /// synced or not, and it writes nothing more.
    pub fn kill(&self, store: impl Sized) {
        self.fail_after(0);
        drop(store);
        self.stay();
    }

    /// Changes and syncs so far.
    pub fn operations(&self) -> u64 {
        self.power.lock().operations
    }

    /// Returns the bytes on the disk after a power failure; `seed` picks the fate of the unsynced
    /// writes.
    pub fn after_power_loss(&self, seed: u64) -> Self {
        let after = Self::new();
        for (seed, before, file) in [(seed, &self.database, &after.database), (!seed, &self.journal, &after.journal)] {
            *file.inner.lock() = before.after_power_loss(seed);
        }
        after
    }

    /// A disk of its own that holds what a reader sees on this one now.
    pub fn copy(&self) -> Self {
        let copy = Self::new();
        copy.set(Part::Database, self.bytes(Part::Database));
        copy.set(Part::Journal, self.bytes(Part::Journal));
        copy
    }

    /// The bytes of a file, to be looked at or damaged.
    pub fn bytes(&self, part: Part) -> Vec<u8> {
        self.file(part).inner.lock().seen.clone()
    }

    /// Replaces the bytes of a file.
    pub fn set(&self, part: Part, bytes: Vec<u8>) {
        *self.file(part).inner.lock() = File { synced: bytes.clone(), seen: bytes, unsynced: Vec::new() };
    }

    fn file(&self, part: Part) -> &LossyFile {
        match part {
            Part::Database => &self.database,
            Part::Journal => &self.journal,
        }
    }
}

impl LossyFile {
    /// Returns the synced bytes, and of the rest the writes that `seed` picks, in an order that it
    /// picks, a write perhaps torn at a sector of 512 bytes.
    fn after_power_loss(&self, seed: u64) -> File {
        let inner = self.inner.lock();
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut disk = inner.synced.clone();
        let mut changes = inner.unsynced.clone();
        for at in (1..changes.len()).rev() {
            changes.swap(at, (next() % (at as u64 + 1)) as usize);
        }
        for change in &mut changes {
            match next() % 4 {
                0 => continue,
                1 => {
                    if let Change::Write { data, .. } = change {
                        data.truncate((next() as usize % (data.len() / 512 + 1)) * 512);
                    }
                }
                _ => {}
            }
            // A file grows before it is written to; what is past its end is lost with its length.
            apply(&mut disk, change);
        }
        File { seen: disk.clone(), synced: disk, unsynced: Vec::new() }
    }

    fn operate(&self, operation: Operation, work: impl FnOnce(&mut File)) -> io::Result<()> {
        let mut power = self.power.lock();
        let passed = power.pass(self.part, operation);
        if passed.is_err() && operation == Operation::Sync && power.left != Some(0) {
            // As Linux does: what could not be written counts as clean. Readers see it, and no
            // later sync writes it.
            self.inner.lock().unsynced.clear();
        }
        passed?;
        work(&mut self.inner.lock());
        Ok(())
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.operate(Operation::Change, |file| {
            apply(&mut file.seen, &change);
            file.unsynced.push(change);
        })
    }
}

impl StorageBackend for LossyFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.lock().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.inner.lock();
        let start = offset as usize;
        let from = inner.seen.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(len as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.operate(Operation::Sync, |file| {
            for change in file.unsynced.drain(..) {
                apply(&mut file.synced, &change);
            }
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write { offset: offset as usize, data: data.to_vec() })
    }
}
