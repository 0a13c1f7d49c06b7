//! The journal: one file used as a ring, into which every group is appended and synced before
//! anyone hears of it. The tables follow behind it. Knows frames as bytes with a sequence number,
//! not what is in them.
//!
//! Only one append is ever under way, and the next begins after its sync: so past a torn frame
//! there can be no whole one, and a whole one found there means that the journal was damaged.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use redb::StorageBackend;

use crate::format::frame::{ALIGNMENT, ChecksumKey, Frame, HEADER_BYTES, Header};

/// Offset of the first frame; the file's own header comes before it.
pub(crate) const START: u64 = 4096;
/// The file grows by this much at a time, filled with zeros: appends then change no metadata, and
/// sync faster.
const GROWTH_BYTES: u64 = 1 << 20;
/// Begins the file's header; then the format's version (4 bytes), the store's identity (32 hex
/// digits), a checksum.
const MAGIC: &[u8; 8] = b"HAPAXJNL";
pub(crate) const FORMAT: u32 = 1;
const IDENTITY_BYTES: usize = 32;

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
    key: ChecksumKey,
    /// Bytes of the file, all of them written at least once.
    allocated: u64,
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
        file.write(0, &header(store_id))?;
        file.sync_data()
    }

    /// Reads the frames after the last applied one, and continues behind them.
    pub(crate) fn recover(
        file: Box<dyn StorageBackend>,
        store_id: &str,
        capacity: u64,
        applied: &crate::format::layout::Applied,
    ) -> Result<Recovered, JournalError> {
        let Survey { frames, end, damage } = survey(&*file, store_id, applied)?;
        if let Some(damage) = damage {
            return Err(JournalError::Damaged(damage));
        }
        if !frames.is_empty() {
            // The last may have been written by a process that died before its sync. An answer that
            // was given from this frame must stay valid.
            file.sync_data()?;
        }
        let place = |(frame, after): &(Frame, u64)| (frame.sequence, after - frame.bytes.len() as u64);
        let journal = Self {
            key: ChecksumKey::new(store_id),
            allocated: file.len()?,
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
    pub(crate) fn append(&mut self, frame: crate::format::frame::Builder, offset: u64) -> io::Result<(Frame, u64)> {
        let frame = frame.finish(self.next_sequence, self.last_version, &self.key);
        let after = offset + frame.bytes.len() as u64;
        self.grow(after)?;
        self.file.write(offset, &frame.bytes)?;
        hapax_core::fault::point("journal-written");
        if !hapax_core::fault::mutated("journal-not-synced") {
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

    fn grow(&mut self, end: u64) -> io::Result<()> {
        if end <= self.allocated {
            return Ok(());
        }
        let target = end.next_multiple_of(GROWTH_BYTES).max((self.allocated * 2).min(self.capacity));
        let zeros = vec![0; GROWTH_BYTES as usize];
        while self.allocated < target {
            let bytes = (target - self.allocated).min(GROWTH_BYTES);
            self.file.set_len(self.allocated + bytes)?;
            self.file.write(self.allocated, &zeros[..bytes as usize])?;
            self.allocated += bytes;
        }
        Ok(())
    }
}

/// Contents of a journal's file behind the last applied frame.
#[derive(Debug)]
pub(crate) struct Survey {
    /// Whole frames in sequence, each with the offset after it.
    pub(crate) frames: Vec<(Frame, u64)>,
    /// Offset after the last of the frames.
    pub(crate) end: u64,
    /// Damage behind the last frame, if it is more than a torn end.
    pub(crate) damage: Option<String>,
}

/// Scans a journal without changing it.
pub(crate) fn survey(
    file: &dyn StorageBackend,
    store_id: &str,
    applied: &crate::format::layout::Applied,
) -> Result<Survey, JournalError> {
    check_header(file, store_id)?;
    Ok(survey_frames(file, store_id, applied)?)
}

/// Scans a journal without reading its header: the checksums of the frames tell which store they
/// belong to.
pub(crate) fn survey_frames(
    file: &dyn StorageBackend,
    store_id: &str,
    applied: &crate::format::layout::Applied,
) -> io::Result<Survey> {
    let key = ChecksumKey::new(store_id);
    let reader = Reader { file, key: &key, allocated: file.len()? };
    let mut frames = Vec::new();
    let mut end = if applied.next_offset == 0 { START } else { applied.next_offset };
    let mut sequence = applied.sequence + 1;
    while let Some((frame, after)) = reader.next(end, sequence)? {
        sequence += 1;
        end = after;
        frames.push((frame, after));
    }
    Ok(Survey { frames, end, damage: reader.later_frame(end, sequence)? })
}

/// Returns the bytes of a journal with these frames and nothing else.
pub(crate) fn rebuilt(store_id: &str, frames: &[(Frame, u64)]) -> Vec<u8> {
    let mut bytes = header(store_id);
    frames.iter().for_each(|(frame, _)| bytes.extend_from_slice(&frame.bytes));
    bytes
}

struct Reader<'a> {
    file: &'a dyn StorageBackend,
    key: &'a ChecksumKey,
    allocated: u64,
}

impl Reader<'_> {
    /// The frame `sequence`, which lies at `offset` or, if the ring went round there, at the start.
    fn next(&self, offset: u64, sequence: u64) -> io::Result<Option<(Frame, u64)>> {
        for place in [offset, START] {
            if let Some(frame) = self.at(place)?.filter(|frame| frame.sequence == sequence) {
                let after = place + frame.bytes.len() as u64;
                return Ok(Some((frame, after)));
            }
        }
        Ok(None)
    }

    /// The whole frame at `offset`, if there is one.
    fn at(&self, offset: u64) -> io::Result<Option<Frame>> {
        if offset + HEADER_BYTES as u64 > self.allocated {
            return Ok(None);
        }
        let mut head = [0; HEADER_BYTES];
        self.file.read(offset, &mut head)?;
        let Some(header) = Header::read(&head) else { return Ok(None) };
        if offset + header.length as u64 > self.allocated {
            return Ok(None);
        }
        let mut bytes = vec![0; header.length];
        self.file.read(offset, &mut bytes)?;
        Ok(Frame::check(&header, Bytes::from(bytes), self.key))
    }

    /// Reports a whole frame with a later number past the end of the journal: the end is then
    /// damage, not a torn frame.
    fn later_frame(&self, end: u64, sequence: u64) -> io::Result<Option<String>> {
        const WINDOW: u64 = 1 << 20;
        let mut from = START;
        while from < self.allocated {
            let length = (WINDOW + HEADER_BYTES as u64).min(self.allocated - from);
            let mut window = vec![0; length as usize];
            self.file.read(from, &mut window)?;
            for at in (0..window.len().min(WINDOW as usize)).step_by(ALIGNMENT) {
                let later = Header::read(&window[at..]).is_some_and(|header| header.sequence >= sequence);
                let place = from + at as u64;
                if later && let Some(frame) = self.at(place)? {
                    return Ok(Some(format!(
                        "frame {sequence} at byte {end} is missing or unreadable, but frame {} follows at byte {place}",
                        frame.sequence
                    )));
                }
            }
            from += WINDOW;
        }
        Ok(None)
    }
}

/// The header of a journal, in its whole length.
fn header(store_id: &str) -> Vec<u8> {
    let mut header = Vec::with_capacity(START as usize);
    header.extend(MAGIC);
    header.extend(FORMAT.to_le_bytes());
    header.extend(store_id.as_bytes());
    let checksum = blake3::hash(&header);
    header.extend(&checksum.as_bytes()[..16]);
    header.resize(START as usize, 0);
    header
}

fn check_header(file: &dyn StorageBackend, store_id: &str) -> Result<(), JournalError> {
    let length = 8 + 4 + IDENTITY_BYTES;
    let mut found = vec![0; length + 16];
    if file.len()? < START {
        return Err(JournalError::Damaged("it is cut short".into()));
    }
    file.read(0, &mut found)?;
    let (fields, checksum) = found.split_at(length);
    if fields[..8] != *MAGIC || blake3::hash(fields).as_bytes()[..16] != *checksum {
        return Err(JournalError::Damaged("its header cannot be read".into()));
    }
    let format = fields[8..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
    if format != FORMAT {
        return Err(JournalError::Format(format));
    }
    match &fields[12..] {
        id if id == store_id.as_bytes() => Ok(()),
        other => Err(JournalError::Damaged(format!("it belongs to store {}", String::from_utf8_lossy(other)))),
    }
}
