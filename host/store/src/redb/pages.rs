//! The file of the database, with a checksum for each of its pages: damage is found when a page is
//! read, before anything is answered from it. redb sees a file without checksums.
//!
//! The file begins with a page that names the format. Groups of 512 pages follow: a page of
//! checksums, then the 511 pages that they are of. A checksum covers the page's number, so that a
//! page in another's place is found too. `docs/internals/storage-format.md` has the layout.
//!
//! The first page of redb has no checksum here: redb writes parts of it in place, in an order that
//! survives a crash, and has checksums in it. Every other page that a committed transaction uses is
//! written and synced before the commit, and not again while it is used.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::sync::{Arc, OnceLock};

use hapax_core::fault;
use parking_lot::RwLock;
use redb::{BackendError, StorageBackend};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a page, as redb has them.
const PAGE: u64 = 4_096;
/// Pages that one page of checksums is for.
const GROUP: u64 = PAGE / 8 - 1;
/// Begins the file.
const MAGIC: &[u8; 8] = b"hapaxdb\n";
/// Version of this layout.
pub(crate) const FORMAT: u32 = 1;
/// Pages that a scrub reads at one time.
const SCRUBBED_AT_ONCE: u64 = 64;

/// A file of pages with checksums.
#[derive(Debug)]
pub(crate) struct Pages<B> {
    inner: Arc<Inner<B>>,
}

#[derive(Debug)]
struct Inner<B> {
    file: B,
    /// Read when redb has its locks: before, another process may be writing.
    sums: OnceLock<RwLock<Sums>>,
    /// The first damage that was found.
    damage: OnceLock<String>,
}

#[derive(Debug, Default)]
struct Sums {
    /// Checksum of each page; 0 for one that was never written, which reads as zeros.
    of_page: Vec<u64>,
    /// Groups whose checksums are not in the file yet.
    changed: BTreeSet<u64>,
}

/// Looks for damage where nobody reads.
pub(crate) trait Scrub: Send + Sync {
    /// Checks some pages from `page` on. Returns the next page to check, or `None` at the end.
    fn scrub(&self, page: u64) -> io::Result<Option<u64>>;
    /// Returns the first damage that was found.
    fn damage(&self) -> Option<&str>;
}

/// Returns the place of a page in the file.
fn place(page: u64) -> u64 {
    (1 + page / GROUP * (GROUP + 1) + 1 + page % GROUP) * PAGE
}

/// Returns the place of a group's page of checksums in the file.
fn place_of_sums(group: u64) -> u64 {
    (1 + group * (GROUP + 1)) * PAGE
}

/// Returns the length of a file of so many pages.
fn file_len(pages: u64) -> u64 {
    if pages == 0 { PAGE } else { place(pages - 1) + PAGE }
}

/// Returns the number of pages in a file of that length.
fn pages_in(length: u64) -> u64 {
    let rest = (length / PAGE).saturating_sub(1);
    rest / (GROUP + 1) * GROUP + (rest % (GROUP + 1)).saturating_sub(1)
}

/// Returns the checksum of a page, never 0.
fn sum(page: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, page).max(1)
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text.into())
}

impl<B: StorageBackend> Pages<B> {
    /// Returns the pages of `file`, which may be empty. Reads nothing yet.
    pub(crate) fn new(file: B) -> Self {
        Self { inner: Arc::new(Inner { file, sums: OnceLock::new(), damage: OnceLock::new() }) }
    }

    /// Returns the handle by which the pages are scrubbed.
    pub(crate) fn scrub(&self) -> Arc<dyn Scrub> {
        self.inner.clone()
    }
}

impl<B: StorageBackend> Inner<B> {
    fn sums(&self) -> io::Result<&RwLock<Sums>> {
        if let Some(sums) = self.sums.get() {
            return Ok(sums);
        }
        let read = self.read_sums()?;
        Ok(self.sums.get_or_init(|| RwLock::new(read)))
    }

    fn read_sums(&self) -> io::Result<Sums> {
        let length = self.file.len()?;
        if length == 0 {
            return Ok(Sums::default());
        }
        self.check_head(length)?;
        let pages = pages_in(length);
        let mut of_page = Vec::with_capacity(pages as usize);
        for group in 0..pages.div_ceil(GROUP) {
            let mut bytes = vec![0; PAGE as usize];
            self.file.read(place_of_sums(group), &mut bytes)?;
            let sums = bytes.chunks_exact(8).filter_map(|sum| sum.first_chunk().copied().map(u64::from_le_bytes));
            of_page.extend(sums.take(GROUP.min(pages - group * GROUP) as usize));
        }
        Ok(Sums { of_page, changed: BTreeSet::new() })
    }

    fn check_head(&self, length: u64) -> io::Result<()> {
        let mut head = [0; 20];
        self.file.read(0, &mut head[..20.min(length as usize)])?;
        match head {
            head if head == self::head() => Ok(()),
            _ => Err(invalid("the first page of the database is not what was written")),
        }
    }

    /// Remembers damage, and returns it as an error.
    fn damaged(&self, page: u64) -> io::Error {
        let text = format!("page {page} of the database is not what was written");
        tracing::error!("store: {text}");
        invalid(self.damage.get_or_init(|| text).clone())
    }

    /// Reads whole pages from `first` on, and checks them.
    fn read_pages(&self, sums: &Sums, first: u64, out: &mut [u8]) -> io::Result<()> {
        let pages = (out.len() as u64) / PAGE;
        if first + pages > sums.of_page.len() as u64 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let (mut page, mut rest) = (first, out);
        while !rest.is_empty() {
            // As many as stand together in the file.
            let together = (GROUP - page % GROUP).min(rest.len() as u64 / PAGE);
            let (now, later) = rest.split_at_mut((together * PAGE) as usize);
            self.file.read(place(page), now)?;
            for (number, bytes) in (page..).zip(now.chunks_exact(PAGE as usize)) {
                self.check(sums, number, bytes)?;
            }
            (page, rest) = (page + together, later);
        }
        Ok(())
    }

    fn check(&self, sums: &Sums, page: u64, bytes: &[u8]) -> io::Result<()> {
        let whole = match sums.of_page[page as usize] {
            _ if page == 0 || fault::mutated("damage-is-served") => true,
            0 => bytes.iter().all(|byte| *byte == 0),
            expected => sum(page, bytes) == expected,
        };
        if whole { Ok(()) } else { Err(self.damaged(page)) }
    }

    /// Writes whole pages from `first` on.
    fn write_pages(&self, sums: &mut Sums, first: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut page, mut rest) = (first, bytes);
        while !rest.is_empty() {
            let together = (GROUP - page % GROUP).min(rest.len() as u64 / PAGE);
            let (now, later) = rest.split_at((together * PAGE) as usize);
            for (number, bytes) in (page..).zip(now.chunks_exact(PAGE as usize)) {
                sums.of_page[number as usize] = sum(number, bytes);
            }
            sums.changed.insert(page / GROUP);
            self.file.write(place(page), now)?;
            (page, rest) = (page + together, later);
        }
        Ok(())
    }

    fn write_sums(&self, sums: &mut Sums) -> io::Result<()> {
        for group in std::mem::take(&mut sums.changed) {
            let first = (group * GROUP) as usize;
            let last = sums.of_page.len().min(first + GROUP as usize);
            let mut bytes: Vec<u8> = sums.of_page[first..last].iter().flat_map(|sum| sum.to_le_bytes()).collect();
            bytes.resize(PAGE as usize, 0);
            self.file.write(place_of_sums(group), &bytes)?;
        }
        Ok(())
    }

    /// Returns the pages that the bytes from `offset` on lie in: the first, and the one after the
    /// last.
    fn covering(offset: u64, length: usize) -> (u64, u64) {
        (offset / PAGE, (offset + length as u64).div_ceil(PAGE))
    }
}

/// Returns the beginning of the file's first page.
fn head() -> [u8; 20] {
    let mut head = [0; 20];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    let sum = sum(u64::MAX, &head[..12]);
    head[12..].copy_from_slice(&sum.to_le_bytes());
    head
}

impl<B: StorageBackend> StorageBackend for Pages<B> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.sums()?.read().of_page.len() as u64 * PAGE)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = &*self.inner;
        let sums = inner.sums()?.read();
        let (first, last) = Inner::<B>::covering(offset, out.len());
        if offset.is_multiple_of(PAGE) && (out.len() as u64).is_multiple_of(PAGE) {
            return inner.read_pages(&sums, first, out);
        }
        let mut pages = vec![0; ((last - first) * PAGE) as usize];
        inner.read_pages(&sums, first, &mut pages)?;
        let start = (offset - first * PAGE) as usize;
        out.copy_from_slice(&pages[start..start + out.len()]);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let inner = &*self.inner;
        let mut sums = inner.sums()?.write();
        let (before, after) = (sums.of_page.len() as u64, length.div_ceil(PAGE));
        inner.file.set_len(file_len(after))?;
        if inner.file.len()? == PAGE || before == 0 {
            inner.file.write(0, &head())?;
        }
        sums.of_page.resize(after as usize, 0);
        // What was cut off has no checksums any more, should the file grow again.
        let last_group = after.saturating_sub(1) / GROUP;
        sums.changed.retain(|group| *group <= last_group && after > 0);
        if after < before && after > 0 {
            sums.changed.insert(last_group);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let inner = &*self.inner;
        inner.write_sums(&mut inner.sums()?.write())?;
        inner.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let inner = &*self.inner;
        let mut sums = inner.sums()?.write();
        let (first, last) = Inner::<B>::covering(offset, data.len());
        if last > sums.of_page.len() as u64 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if offset.is_multiple_of(PAGE) && (data.len() as u64).is_multiple_of(PAGE) {
            return inner.write_pages(&mut sums, first, data);
        }
        if last == 1 {
            // Parts of the first page are written in place: not the rest of it with them.
            return inner.file.write(place(0) + offset, data);
        }
        let mut pages = vec![0; ((last - first) * PAGE) as usize];
        inner.read_pages(&sums, first, &mut pages)?;
        let start = (offset - first * PAGE) as usize;
        pages[start..start + data.len()].copy_from_slice(data);
        inner.write_pages(&mut sums, first, &pages)
    }

    fn close(&self) -> io::Result<()> {
        let inner = &*self.inner;
        if let Some(sums) = inner.sums.get() {
            inner.write_sums(&mut sums.write())?;
        }
        inner.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.file.query_lock_range(start, end)
    }
}

impl<B: StorageBackend> Scrub for Inner<B> {
    fn scrub(&self, page: u64) -> io::Result<Option<u64>> {
        // Under the lock, so that no page is half written meanwhile.
        let sums = self.sums()?.read();
        let end = (sums.of_page.len() as u64).min(page + SCRUBBED_AT_ONCE);
        let mut bytes = vec![0; (end.saturating_sub(page) * PAGE) as usize];
        self.read_pages(&sums, page, &mut bytes)?;
        Ok((end < sums.of_page.len() as u64).then_some(end))
    }

    fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A file in memory, which a test may damage.
    #[derive(Debug, Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl StorageBackend for Memory {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.lock().unwrap().len() as u64)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let bytes = self.0.lock().unwrap();
            let range = bytes.get(offset as usize..offset as usize + out.len());
            out.copy_from_slice(range.ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        }

        fn set_len(&self, length: u64) -> io::Result<()> {
            self.0.lock().unwrap().resize(length as usize, 0);
            Ok(())
        }

        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    fn page_of(number: u64) -> Vec<u8> {
        (0..PAGE).map(|at| (number * 31 + at * 7) as u8).collect()
    }

    fn read(pages: &Pages<Memory>, number: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE as usize];
        pages.read(number * PAGE, &mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn pages_come_back_across_groups_also_in_parts() {
        let file = Memory::default();
        let count = 2 * GROUP + 3;
        let pages = Pages::new(file.clone());
        pages.set_len(count * PAGE).unwrap();
        let all: Vec<u8> = (0..count).flat_map(page_of).collect();
        pages.write(0, &all).unwrap();
        pages.write((GROUP - 1) * PAGE + 100, &[9; 5_000]).unwrap();
        pages.sync_data().unwrap();
        let again = Pages::new(file.clone());
        assert_eq!(again.len().unwrap(), count * PAGE);
        let mut expected = all;
        let start = ((GROUP - 1) * PAGE + 100) as usize;
        expected[start..start + 5_000].fill(9);
        let mut found = vec![0; expected.len()];
        again.read(0, &mut found).unwrap();
        assert!(found == expected);
        again.set_len((GROUP + 1) * PAGE).unwrap();
        again.set_len(count * PAGE).unwrap();
        again.sync_data().unwrap();
        assert_eq!(read(&Pages::new(file), count - 1).unwrap(), vec![0; PAGE as usize], "cut off, and grown again");
    }

    #[test]
    fn ten_thousand_turned_bits_are_found_or_do_not_matter() {
        let file = Memory::default();
        let count = 8;
        let pages = Pages::new(file.clone());
        pages.set_len(count * PAGE).unwrap();
        (0..count).for_each(|number| pages.write(number * PAGE, &page_of(number)).unwrap());
        pages.sync_data().unwrap();
        let length = file.0.lock().unwrap().len();
        let (mut state, mut found) = (12_345_u64, 0);
        for _ in 0..10_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (at, bit) = ((state >> 33) as usize % length, (state >> 20) as u8 % 8);
            // redb's first page has its own checksums.
            if (place(0)..place(1)).contains(&(at as u64)) {
                continue;
            }
            file.0.lock().unwrap()[at] ^= 1 << bit;
            let damaged = Pages::new(file.clone());
            let wrong = (1..count).find(|number| match read(&damaged, *number) {
                Ok(bytes) => bytes != page_of(*number),
                Err(_) => {
                    found += 1;
                    false
                }
            });
            assert_eq!(wrong, None, "bit {bit} of byte {at}");
            file.0.lock().unwrap()[at] ^= 1 << bit;
        }
        assert!(found > 5_000, "{found} found");
    }
}
