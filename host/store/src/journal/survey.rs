//! Reads a journal without changing it: the frames behind the last applied one, and what is wrong
//! with the file. Tells a torn end, which no commit rests on, from frames that are lost.

use std::io;

use bytes::Bytes;
use hapax_core::fault;
use redb::StorageBackend;

use crate::format::frame::{ALIGNMENT, ChecksumKey, Frame, HEADER_BYTES, Header};
use crate::format::layout::Applied;
use crate::journal::header::{self, Promises};
use crate::journal::{JournalError, START};

/// Contents of a journal's file behind the last applied frame.
#[derive(Debug)]
pub(crate) struct Survey {
    /// Whole frames in sequence, each with the offset after it.
    pub(crate) frames: Vec<(Frame, u64)>,
    /// Offset after the last of the frames.
    pub(crate) end: u64,
    /// Damage of the file, if it is more than a torn end.
    pub(crate) damage: Option<String>,
    /// Promises of the header; absent if the header was not read.
    pub(crate) promises: Option<Promises>,
}

/// Scans a journal without changing it.
pub(crate) fn survey(file: &dyn StorageBackend, store_id: &str, applied: &Applied) -> Result<Survey, JournalError> {
    let promises = header::read(file, store_id)?;
    let mut survey = survey_frames(file, store_id, applied, Some(promises))?;
    let length = file.len()?;
    if length < promises.length && !fault::mutated("journal-length-unchecked") {
        // Comes before other damage, which follows from it.
        survey.damage = Some(format!("it is cut short: {length} bytes are left of {}", promises.length));
    }
    Ok(survey)
}

/// Scans a journal by its frames alone: their checksums tell which store they belong to.
pub(crate) fn survey_frames(
    file: &dyn StorageBackend,
    store_id: &str,
    applied: &Applied,
    promises: Option<Promises>,
) -> io::Result<Survey> {
    let key = ChecksumKey::new(store_id);
    let reader = Reader { file, key: &key, length: file.len()? };
    let mut frames = Vec::new();
    let mut end = if applied.next_offset == 0 { START } else { applied.next_offset };
    let mut sequence = applied.sequence + 1;
    while let Some((frame, after)) = reader.next(end, sequence)? {
        sequence += 1;
        end = after;
        frames.push((frame, after));
    }
    let floor = promises.map_or(0, |promises| promises.floor);
    let damage = match reader.headers(sequence)? {
        Headers::Later { sequence: later, place } => Some(format!(
            "frame {sequence} at byte {end} is missing or unreadable, but frame {later} follows at byte {place}"
        )),
        Headers::UpTo(last) => {
            let last = last.max(floor);
            let older = frames.is_empty() && last < applied.sequence && !fault::mutated("journal-age-unchecked");
            older.then(|| {
                let tables = applied.sequence;
                format!(
                    "it ends with frame {last}, but the database has frame {tables}: it is an older copy or was emptied"
                )
            })
        }
    };
    Ok(Survey { frames, end, damage, promises })
}

/// Result of a search for the headers of frames.
enum Headers {
    /// A frame follows one that is missing. It was begun after the sync of that one, so its header
    /// alone proves damage.
    Later { sequence: u64, place: u64 },
    /// Highest sequence number of a header before the one searched for; 0 if there is none.
    UpTo(u64),
}

struct Reader<'a> {
    file: &'a dyn StorageBackend,
    key: &'a ChecksumKey,
    length: u64,
}

impl Reader<'_> {
    /// Returns the frame `sequence`, which lies at `offset` or, if the ring went round there, at
    /// the start.
    fn next(&self, offset: u64, sequence: u64) -> io::Result<Option<(Frame, u64)>> {
        for place in [offset, START] {
            if let Some(frame) = self.at(place)?.filter(|frame| frame.sequence == sequence) {
                let after = place + frame.bytes.len() as u64;
                return Ok(Some((frame, after)));
            }
        }
        Ok(None)
    }

    /// Returns the whole frame at `offset`, if there is one.
    fn at(&self, offset: u64) -> io::Result<Option<Frame>> {
        let fits = |bytes: usize| offset.checked_add(bytes as u64).is_some_and(|end| end <= self.length);
        if !fits(HEADER_BYTES) {
            return Ok(None);
        }
        let mut head = [0; HEADER_BYTES];
        self.file.read(offset, &mut head)?;
        let Some(header) = Header::read(&head, self.key).filter(|header| fits(header.length)) else { return Ok(None) };
        let mut bytes = vec![0; header.length];
        self.file.read(offset, &mut bytes)?;
        Ok(Frame::check(&header, Bytes::from(bytes), self.key))
    }

    /// Looks for headers in the whole file, in one pass. Reads the payload of a frame only if it
    /// has the number `sequence`: the few that were torn, and never one that a message made up.
    fn headers(&self, sequence: u64) -> io::Result<Headers> {
        const WINDOW: u64 = 1 << 20;
        let (mut from, mut last) = (START, 0);
        while from < self.length {
            let length = (WINDOW + HEADER_BYTES as u64).min(self.length - from);
            let mut window = vec![0; length as usize];
            self.file.read(from, &mut window)?;
            for at in (0..window.len().min(WINDOW as usize)).step_by(ALIGNMENT) {
                let Some(header) = Header::read(&window[at..], self.key) else { continue };
                let place = from + at as u64;
                let later = match header.sequence.cmp(&sequence) {
                    std::cmp::Ordering::Less => {
                        last = last.max(header.sequence);
                        false
                    }
                    std::cmp::Ordering::Equal => self.at(place)?.is_some(),
                    std::cmp::Ordering::Greater => true,
                };
                if later {
                    return Ok(Headers::Later { sequence: header.sequence, place });
                }
            }
            from += WINDOW;
        }
        Ok(Headers::UpTo(last))
    }
}
