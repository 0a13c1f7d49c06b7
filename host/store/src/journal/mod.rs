//! The journal: one file used as a ring, into which every group is appended and synced before
//! anyone hears of it. The tables follow behind it. Knows frames as bytes with a sequence number,
//! not what is in them.
//!
//! Only one append is ever under way, and the next begins after its sync: so past a torn frame
//! there can be no whole one, and a whole one found there means that the journal was damaged.

mod header;
mod survey;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;

use hapax_core::fault;
use redb::StorageBackend;

use crate::format::frame::{Builder, ChecksumKey, Frame};
use crate::format::layout::Applied;
pub(crate) use crate::journal::header::FORMAT;
#[cfg(test)]
pub(crate) use crate::journal::header::HEADER_END;
use crate::journal::header::Promises;
pub(crate) use crate::journal::survey::{Survey, survey, survey_frames};

/// Offset of the first frame; the file's own header comes before it.
pub(crate) const START: u64 = 4096;
/// The file grows by this much at a time, filled with zeros: appends then change no metadata, and
/// sync faster.
const GROWTH_BYTES: u64 = 1 << 20;

/// Reason why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Damaged(String),
    #[error("it has format {0}, and this hapax reads format {FORMAT}")]
    Format(u32),
}

/// The journal of an open store; appends frames.
#[derive(Debug)]
pub(crate) struct Journal {
    file: Box<dyn StorageBackend>,
    store_id: String,
    key: ChecksumKey,
    /// Promises of the file's header. Its length is that of the file, all of it written at least
    /// once.
    promises: Promises,
    /// Size to which the file grows before appends start at [`START`] again, in bytes.
    capacity: u64,
    /// Offset of the next frame.
    head: u64,
    /// Sequence number and offset of the frames that are not yet applied, oldest first.
    unapplied: VecDeque<(u64, u64)>,
    next_sequence: u64,
    last_version: u64,
}

/// Result of a recovery.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) journal: Journal,
    /// Frames that are whole and not yet applied, each with the offset after it.
    pub(crate) frames: Vec<(Frame, u64)>,
}

impl Journal {
    /// Writes the header of a new journal.
    pub(crate) fn create(file: &dyn StorageBackend, store_id: &str) -> io::Result<()> {
        file.set_len(START)?;
        file.write(0, &header::encode(store_id, Promises { length: START, floor: 0 }))?;
        file.sync_data()
    }

    /// Reads the frames after the last applied one, and continues behind them.
    pub(crate) fn recover(
        file: Box<dyn StorageBackend>,
        store_id: &str,
        capacity: u64,
        applied: &Applied,
    ) -> Result<Recovered, JournalError> {
        let Survey { frames, end, damage, promises } = survey(&*file, store_id, applied)?;
        if let Some(damage) = damage {
            return Err(JournalError::Damaged(damage));
        }
        let promises = promises.unwrap_or(Promises { length: START, floor: 0 });
        make_durable(&*file, store_id, promises, &frames)?;
        let place = |(frame, after): &(Frame, u64)| (frame.sequence, after - frame.bytes.len() as u64);
        let journal = Self {
            store_id: store_id.to_owned(),
            key: ChecksumKey::new(store_id),
            promises,
            capacity,
            head: end,
            unapplied: frames.iter().map(place).collect(),
            next_sequence: applied.sequence + 1 + frames.len() as u64,
            last_version: frames.last().map_or(applied.last_version, |(frame, _)| frame.last_version),
            file,
        };
        Ok(Recovered { journal, frames })
    }

    /// Returns the offset at which a frame of `length` bytes fits without touching a frame later
    /// than `applied`; `None` if more must be applied first.
    pub(crate) fn room(&mut self, length: usize, applied: u64) -> Option<u64> {
        while self.unapplied.front().is_some_and(|(sequence, _)| *sequence <= applied) {
            self.unapplied.pop_front();
        }
        let length = length as u64;
        let fits_before_the_end = self.head + length <= self.capacity;
        match self.unapplied.front() {
            // A frame longer than the ring makes the file longer.
            None => Some(if fits_before_the_end { self.head } else { START }),
            // The frames lie between tail and head.
            Some((_, tail)) if *tail < self.head => match fits_before_the_end {
                true => Some(self.head),
                false => (START + length <= *tail).then_some(START),
            },
            // The ring went round: free is what lies between head and tail.
            Some((_, tail)) => (self.head + length <= *tail).then_some(self.head),
        }
    }

    /// Appends a frame at `offset`, as returned by [`Journal::room`], and syncs. Returns the offset
    /// after it.
    ///
    /// After an error nothing more may be appended, because the frame may or may not be on the
    /// disk.
    pub(crate) fn append(&mut self, frame: Builder, offset: u64) -> io::Result<(Frame, u64)> {
        let frame = frame.finish(self.next_sequence, self.last_version, &self.key);
        let after = offset + frame.bytes.len() as u64;
        self.grow(after)?;
        if offset < self.head && self.unapplied.is_empty() {
            self.raise_floor()?;
        }
        self.file.write(offset, &frame.bytes)?;
        fault::point("journal-written");
        if !fault::mutated("journal-not-synced") {
            self.file.sync_data()?;
        }
        self.head = after;
        self.unapplied.push_back((frame.sequence, offset));
        self.next_sequence += 1;
        self.last_version = frame.last_version;
        Ok((frame, after))
    }

    pub(crate) fn last_version(&self) -> u64 {
        self.last_version
    }

    /// Makes the file long enough for a frame that ends at `end`. The header promises the new
    /// length once it is durable, and before a frame rests on it.
    fn grow(&mut self, end: u64) -> io::Result<()> {
        let mut length = self.promises.length;
        if end <= length {
            return Ok(());
        }
        let target = end.next_multiple_of(GROWTH_BYTES).max((length * 2).min(self.capacity));
        let zeros = vec![0; GROWTH_BYTES as usize];
        while length < target {
            let bytes = (target - length).min(GROWTH_BYTES);
            self.file.set_len(length + bytes)?;
            self.file.write(length, &zeros[..bytes as usize])?;
            length += bytes;
        }
        self.file.sync_data()?;
        self.promises.length = length;
        // The sync of the frame makes it durable.
        header::write(&*self.file, &self.store_id, self.promises)
    }

    /// Promises all frames so far: the next one overwrites the last of them, by which recovery
    /// would otherwise see that the file is not older than the tables.
    fn raise_floor(&mut self) -> io::Result<()> {
        self.promises.floor = self.next_sequence - 1;
        header::write(&*self.file, &self.store_id, self.promises)?;
        self.file.sync_data()
    }
}

/// Makes recovered frames durable before an answer is given from them. Writes them again first:
/// after a sync that failed, a reader may see bytes that the disk does not have, and that another
/// sync would not write.
fn make_durable(
    file: &dyn StorageBackend,
    store_id: &str,
    promises: Promises,
    frames: &[(Frame, u64)],
) -> io::Result<()> {
    if frames.is_empty() {
        return Ok(());
    }
    if !fault::mutated("recovered-not-rewritten") {
        header::write(file, store_id, promises)?;
        for (frame, after) in frames {
            file.write(after - frame.bytes.len() as u64, &frame.bytes)?;
        }
    }
    file.sync_data()
}

/// Returns the bytes of a journal with these frames and nothing else, which follow the frames up to
/// `applied`.
pub(crate) fn rebuilt(store_id: &str, applied: u64, frames: &[(Frame, u64)]) -> Vec<u8> {
    let length = START + frames.iter().map(|(frame, _)| frame.bytes.len() as u64).sum::<u64>();
    let mut bytes = header::encode(store_id, Promises { length, floor: applied });
    frames.iter().for_each(|(frame, _)| bytes.extend_from_slice(&frame.bytes));
    bytes
}
