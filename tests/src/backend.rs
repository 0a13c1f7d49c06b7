//! A redb backend that loses power: writes since the last sync may each be there or not, in whole or in part.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::StorageBackend;

/// A file in memory with a list of what was not synced yet; cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct LossyFile {
    inner: Arc<Mutex<File>>,
}

#[derive(Debug, Default)]
struct File {
    /// What the disk certainly holds.
    synced: Vec<u8>,
    /// What a reader sees.
    seen: Vec<u8>,
    unsynced: Vec<Change>,
    /// Operations left until the power goes; `None`: it stays.
    left: Option<u64>,
    operations: u64,
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

impl LossyFile {
    /// The power goes before the `operations`-th change or sync from now.
    pub fn fail_after(&self, operations: u64) {
        self.inner.lock().left = Some(operations);
    }

    /// Changes and syncs so far.
    pub fn operations(&self) -> u64 {
        self.inner.lock().operations
    }

    /// What the disk holds after the power went: what was synced, and of the rest what `seed` picks, in an order that it
    /// picks, a write perhaps torn at a sector of 512 bytes.
    pub fn after_power_loss(&self, seed: u64) -> Self {
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
        Self { inner: Arc::new(Mutex::new(File { seen: disk.clone(), synced: disk, ..File::default() })) }
    }

    fn operate(&self, operation: impl FnOnce(&mut File)) -> io::Result<()> {
        let mut inner = self.inner.lock();
        match &mut inner.left {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        inner.operations += 1;
        operation(&mut inner);
        Ok(())
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.operate(|file| {
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
        self.operate(|file| {
            file.synced = file.seen.clone();
            file.unsynced.clear();
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write { offset: offset as usize, data: data.to_vec() })
    }
}
