//! The end of an outbox file, as it is found at the start: a torn last line, and the ids that stand
//! there.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use hapax_core::{BATCH_BYTES_MAX, fault};

use crate::cloudevents;

/// Bytes of one line, at most: more than the JSON of the largest message has.
const LINE_BYTES_MAX: u64 = 256 << 20;

/// Ids that the file's end held when it was opened, by two hashes each: they are many, and they are
/// remembered until as much again was written behind them.
#[derive(Default)]
pub(super) struct WrittenIds {
    pub(super) ids: HashSet<u128>,
    hashers: [RandomState; 2],
    bytes_behind: usize,
}

impl WrittenIds {
    pub(super) fn insert(&mut self, id: &str) {
        self.ids.insert(self.hash(id));
    }

    pub(super) fn has(&self, id: &str) -> bool {
        !self.ids.is_empty() && self.ids.contains(&self.hash(id))
    }

    fn hash(&self, id: &str) -> u128 {
        let [high, low] = self.hashers.each_ref().map(|hasher| u128::from(hasher.hash_one(id)));
        high << 64 | low
    }

    /// Notes lines that were written behind those ids. No batch that began before them can come
    /// again once they are as many bytes as a batch has at most.
    pub(super) fn written_behind(&mut self, bytes: usize) {
        self.bytes_behind = self.bytes_behind.saturating_add(bytes);
        if self.bytes_behind > BATCH_BYTES_MAX {
            self.ids = HashSet::new();
        }
    }
}

/// Opens a regular file for append, creates it where it is absent, locks it, and adds the ids at
/// its end to `written`.
pub(super) fn open(path: &Path, written: &mut WrittenIds) -> io::Result<File> {
    let absent = !path.exists();
    let mut options = File::options();
    options.read(true).create(true);
    let mut file = match fault::mutated("outbox-not-for-append") {
        true => options.write(true).truncate(false).open(path)?,
        false => options.append(true).open(path)?,
    };
    // Two writers would mix their batches. A filesystem without locks cannot tell.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process writes to it"));
    }
    if absent {
        sync_folder(path)?;
    }
    read_end(&mut file, written)?;
    Ok(file)
}

/// A new file's name must outlive a power loss as its lines do.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Mends a torn last line, leaves the file at its end, and adds the ids that stand there to
/// `written`.
fn read_end(file: &mut File, written: &mut WrittenIds) -> io::Result<()> {
    let length = file.metadata()?.len();
    let (tail, start) = read_tail(file, length)?;
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let last = &tail[whole..];
    if cloudevents::parse(last).is_ok() {
        // Whole but for its end. It may have been marked as sent, if somebody has edited the file.
        file.seek(SeekFrom::End(0))?;
        file.write_all(b"\n").and_then(|()| file.sync_data())?;
    } else if !last.is_empty() {
        if !is_torn(last) {
            return Err(io::Error::other("its last line is no part of a CloudEvent: it is no outbox file"));
        }
        file.set_len(start + whole as u64)?;
    }
    file.seek(SeekFrom::End(0))?;
    let lines = tail.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    // The first line of the tail may begin in its middle; it is too old to matter. A torn last one
    // cannot be read.
    lines.filter_map(|line| cloudevents::parse(line).ok()).for_each(|message| written.insert(&message.id));
    *written = WrittenIds { bytes_behind: 0, ..std::mem::take(written) };
    Ok(())
}

/// Reads the end of the file: as much as a batch has at most and what a torn line may add to it,
/// and in any case the whole last line. Returns where it begins, too.
fn read_tail(file: &mut File, length: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut wanted = 2 * BATCH_BYTES_MAX as u64;
    loop {
        let start = length.saturating_sub(wanted);
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        io::Read::by_ref(file).take(length - start).read_to_end(&mut tail)?;
        let body = tail.strip_suffix(b"\n").unwrap_or(&tail);
        if start == 0 || body.contains(&b'\n') {
            return Ok((tail, start));
        }
        if wanted > LINE_BYTES_MAX {
            return Err(io::Error::other("its last line is longer than any message: it is no outbox file"));
        }
        wanted *= 2;
    }
}

/// Returns `true` if this may be the beginning of a line that a crash cut short. The check keeps a
/// file that is not an outbox from losing its last line. Zeros are what some filesystems leave of
/// an append that a power loss cut short.
fn is_torn(line: &[u8]) -> bool {
    let begin = cloudevents::LINE_BEGIN;
    let common = line.len().min(begin.len());
    line[..common] == begin[..common] || line.iter().all(|byte| *byte == 0)
}
