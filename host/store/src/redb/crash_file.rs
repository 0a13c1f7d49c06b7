//! The file `running`: records the messages that are being run, in memory that the kernel keeps
//! when the process dies. Never synced during a message: a message does not cause the machine's own
//! failure.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use hapax_core::{CrashTracker, RecordKey};
use memmap2::MmapMut;
use parking_lot::Mutex;

/// Most runs that the file records at a time; a run beyond them is not counted if it kills the
/// process.
const PLACES: usize = 4_096;
/// A slot: digest of the record key (16 bytes), whether it runs (4), deaths of the process (4), and
/// the number of the opening that counted the last death (4); 4 to spare.
const PLACE_BYTES: usize = 32;

/// The crash marks of an open store.
#[derive(Debug)]
pub(crate) struct RunningFile {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    map: MmapMut,
    free: Vec<usize>,
    /// Slots of messages that were running when a process died.
    suspects: HashMap<u128, usize>,
    /// Number of this opening: greater than all that the slots state.
    opening: u32,
}

impl RunningFile {
    /// Opens the file or makes a new one. The process that ran the messages marked as running has
    /// died; each such message gets one death more.
    #[expect(unsafe_code, reason = "a memory map is what outlives the process without a system call a message")]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let length = PLACES * PLACE_BYTES;
        if file.metadata()?.len() != length as u64 {
            // Written, not only made long: a disk that is full says so here, and not by a signal at
            // the first message.
            file.set_len(0)?;
            file.write_all_at(&vec![0; length], 0)?;
        }
        // SAFETY: the file is the store's own, and the store is open, and so locked, in this
        // process alone; nobody else writes it or cuts it short while it is mapped. Every bit
        // pattern is a valid slot.
        let map = unsafe { MmapMut::map_mut(&file)? };
        let mut inner = Inner { map, free: Vec::new(), suspects: HashMap::new(), opening: 0 };
        let last_opening = (0..PLACES).map(|place| inner.number(place, 24)).max().unwrap_or(0);
        inner.opening = last_opening.saturating_add(1);
        for place in (0..PLACES).rev() {
            if inner.number(place, 16) != 0 {
                inner.set_number(place, 20, inner.number(place, 20).saturating_add(1));
                inner.set_number(place, 16, 0);
                inner.set_number(place, 24, inner.opening);
            }
            match inner.number(place, 20) {
                0 => inner.free.push(place),
                _ => drop(inner.suspects.insert(inner.digest(place), place)),
            }
        }
        Ok(Self { inner: Mutex::new(inner) })
    }
}

impl Inner {
    fn number(&self, place: usize, at: usize) -> u32 {
        let at = place * PLACE_BYTES + at;
        self.map[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
    }

    fn set_number(&mut self, place: usize, at: usize, number: u32) {
        let at = place * PLACE_BYTES + at;
        self.map[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }

    /// Takes a free slot. Where there is none, the suspect whose last death is longest ago is
    /// forgotten: it was never delivered again, and must not hold a slot for ever.
    fn take_free(&mut self) -> Option<usize> {
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        let idle = self.suspects.iter().filter(|(_, place)| self.number(**place, 16) == 0);
        let (digest, place) =
            idle.min_by_key(|(_, place)| self.number(**place, 24)).map(|(digest, place)| (*digest, *place))?;
        self.suspects.remove(&digest);
        self.set_number(place, 20, 0);
        self.set_number(place, 24, 0);
        Some(place)
    }

    fn digest(&self, place: usize) -> u128 {
        self.map[place * PLACE_BYTES..].first_chunk().map_or(0, |chunk| u128::from_le_bytes(*chunk))
    }
}

impl CrashTracker for RunningFile {
    fn begin(&self, key: &RecordKey) -> Option<usize> {
        let mut inner = self.inner.lock();
        let place = match inner.suspects.get(&key.digest()) {
            Some(place) => *place,
            None => {
                let place = inner.take_free()?;
                inner.map[place * PLACE_BYTES..][..16].copy_from_slice(&key.digest().to_le_bytes());
                place
            }
        };
        inner.set_number(place, 16, 1);
        Some(place)
    }

    fn end(&self, place: usize) {
        let mut inner = self.inner.lock();
        inner.set_number(place, 16, 0);
        if inner.number(place, 20) == 0 {
            inner.free.push(place);
        }
    }

    fn deaths(&self, key: &RecordKey) -> u32 {
        let inner = self.inner.lock();
        inner.suspects.get(&key.digest()).map_or(0, |place| inner.number(*place, 20))
    }

    fn forget(&self, key: &RecordKey) {
        let mut inner = self.inner.lock();
        if let Some(place) = inner.suspects.remove(&key.digest()) {
            inner.set_number(place, 20, 0);
            inner.set_number(place, 24, 0);
            inner.free.push(place);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use hapax_core::Scope;

    #[test]
    fn a_run_that_did_not_end_is_counted_until_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("running");
        let key = |name: &str| RecordKey::new(Scope::of("p"), "/s".into(), name.into());
        for deaths in 0..3 {
            let notes = RunningFile::open(&path).unwrap();
            assert_eq!(notes.deaths(&key("guilty")), deaths);
            assert_eq!(notes.deaths(&key("innocent")), 0);
            let innocent = notes.begin(&key("innocent")).unwrap();
            assert!(notes.begin(&key("guilty")).is_some());
            notes.end(innocent);
        }
        let notes = RunningFile::open(&path).unwrap();
        notes.forget(&key("guilty"));
        drop(notes);
        assert_eq!(RunningFile::open(&path).unwrap().deaths(&key("guilty")), 0);
    }

    #[test]
    fn more_runs_than_places_are_not_noted_and_places_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let notes = RunningFile::open(&folder.path().join("running")).unwrap();
        let key = |number: usize| RecordKey::new(Scope::of("p"), "/s".into(), number.to_string().into());
        let places: Vec<_> = (0..PLACES).map(|number| notes.begin(&key(number)).unwrap()).collect();
        assert_eq!(notes.begin(&key(PLACES)), None);
        notes.end(places[7]);
        assert_eq!(notes.begin(&key(PLACES)), Some(places[7]));
    }

    /// Proves G161.
    #[test]
    fn suspects_that_never_come_again_make_room_the_oldest_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("running");
        let key = |name: String| RecordKey::new(Scope::of("p"), "/s".into(), name.into());
        let old = RunningFile::open(&path).unwrap();
        assert!(old.begin(&key("oldest".into())).is_some());
        drop(old);
        let file = RunningFile::open(&path).unwrap();
        for number in 1..PLACES {
            assert!(file.begin(&key(number.to_string())).is_some());
        }
        drop(file);
        let file = RunningFile::open(&path).unwrap();
        assert_eq!((file.deaths(&key("oldest".into())), file.deaths(&key("1".into()))), (1, 1));
        let place = file.begin(&key("new".into())).unwrap();
        assert_eq!((file.deaths(&key("oldest".into())), file.deaths(&key("1".into()))), (0, 1));
        file.end(place);
        assert_eq!(file.begin(&key("newer".into())), Some(place), "the slot of one that is no suspect is free");
    }
}
