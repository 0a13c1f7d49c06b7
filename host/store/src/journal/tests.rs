//! The journal against a model: whatever is appended, applied, torn and opened again, what is
//! recovered is what was synced and not yet applied, in order. Knows nothing of what frames hold.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use hapax_core::{Commit, Effects, Message, RecordKey, Scope};
use parking_lot::Mutex;
use proptest::prelude::*;
use redb::StorageBackend;

use crate::format::frame::{ALIGNMENT, Builder, HEADER_BYTES};
use crate::format::layout::Applied;
use crate::journal::{Journal, JournalError, Recovered, START};

const STORE: &str = "00112233445566778899aabbccddeeff";

#[derive(Debug, Clone, Default)]
struct File(Arc<Mutex<Vec<u8>>>, Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    /// Bytes read so far.
    read: u64,
    /// Part of the next frame that is written, in thousandths, if not all of it.
    cut: Option<usize>,
}

impl StorageBackend for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock();
        self.1.lock().read += out.len() as u64;
        let from = bytes.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        if data.starts_with(b"HPXF")
            && let Some(cut) = self.1.lock().cut.take()
        {
            // Short of the payload's end, which lies less than an alignment before the frame's.
            data = &data[..(data.len() - ALIGNMENT) * cut / 1_000];
        }
        let mut bytes = self.0.lock();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }
}

/// A frame as the model remembers it.
#[derive(Clone, PartialEq)]
struct Synced {
    sequence: u64,
    bytes: Vec<u8>,
    after: u64,
}

impl std::fmt::Debug for Synced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "frame {} of {} bytes before {}", self.sequence, self.bytes.len(), self.after)
    }
}

/// A journal with what must be in it.
struct Model {
    file: File,
    capacity: u64,
    journal: Journal,
    applied: Applied,
    unapplied: VecDeque<Synced>,
    appended: u64,
    /// Frames made, torn ones as well: no two have the same bytes.
    made: u64,
}

/// A frame of about `size` bytes, none of them zero at its end: a missing one shows.
fn frame(number: u64, fill: u64, size: usize) -> Builder {
    let value = vec![(fill % 127) as u8 | 0x80; size];
    let mut builder = Builder::new(1);
    builder.push(&Commit {
        version: number,
        effects: Effects { writes: [("k".to_owned(), Some(value.into()))].into(), outgoing: Vec::new() },
        ..Commit::of(&RecordKey::by_message_id(&Scope::of("p"), &Message::new("m", "/s", "t")))
    });
    builder
}

impl Model {
    fn new(capacity: u64) -> Self {
        let file = File::default();
        Journal::create(&file, STORE).unwrap();
        let applied = Applied::default();
        let Recovered { journal, frames } =
            Journal::recover(Box::new(file.clone()), STORE, capacity, &applied).unwrap();
        assert!(frames.is_empty());
        Self { file, capacity, journal, applied, unapplied: VecDeque::new(), appended: 0, made: 0 }
    }

    /// The tables have the oldest frame.
    fn apply_one(&mut self) {
        if let Some(frame) = self.unapplied.pop_front() {
            self.applied.sequence = frame.sequence;
            self.applied.next_offset = frame.after;
            self.applied.last_version = frame.sequence;
        }
    }

    /// Where a frame of that length goes; applies as much as it takes, and no more.
    fn room(&mut self, length: usize) -> u64 {
        loop {
            if let Some(offset) = self.journal.room(length, self.applied.sequence) {
                return self.checked(offset, length as u64);
            }
            assert!(!self.unapplied.is_empty(), "there is no room for {length} bytes, and nothing left to apply");
            self.apply_one();
        }
    }

    fn checked(&self, offset: u64, length: u64) -> u64 {
        assert!(offset >= START && offset.is_multiple_of(ALIGNMENT as u64), "a frame at {offset}");
        let too_long = START + length > self.capacity && self.unapplied.is_empty();
        assert!(offset + length <= self.capacity || too_long, "{length} bytes at {offset} make the file longer");
        for other in &self.unapplied {
            let begins = other.after - other.bytes.len() as u64;
            assert!(offset + length <= begins || other.after <= offset, "a frame at {offset} overwrites {other:?}");
        }
        offset
    }

    fn append(&mut self, size: usize) {
        self.appended += 1;
        self.made += 1;
        let frame = frame(self.appended, self.made, size);
        let offset = self.room(frame.len());
        let (frame, after) = self.journal.append(frame, offset).unwrap();
        assert_eq!(after, offset + frame.bytes.len() as u64);
        self.unapplied.push_back(Synced { sequence: frame.sequence, bytes: frame.bytes.to_vec(), after });
    }

    /// A process died while it appended: only the first bytes of a frame are there, `cut` of 1,000
    /// of them. The journal must be opened again.
    fn tear(&mut self, size: usize, cut: usize) {
        self.made += 1;
        let next = frame(self.appended + 1, self.made, size);
        let offset = self.room(next.len());
        self.file.1.lock().cut = Some(cut);
        self.journal.append(next, offset).unwrap();
    }

    fn recover(&self) -> Result<Recovered, JournalError> {
        Journal::recover(Box::new(self.file.clone()), STORE, self.capacity, &self.applied)
    }

    /// Opens it again: exactly what was synced and not applied must be there.
    fn reopen(&mut self) {
        let Recovered { journal, frames } = self.recover().unwrap();
        let found: VecDeque<_> = frames
            .iter()
            .map(|(frame, after)| Synced { sequence: frame.sequence, bytes: frame.bytes.to_vec(), after: *after })
            .collect();
        assert_eq!(found, self.unapplied);
        assert_eq!(journal.last_version(), self.appended, "versions only grow");
        self.journal = journal;
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    Apply(usize),
    Reopen,
    /// Size of the frame that is torn, and how much of it is there, in thousandths.
    Tear(usize, usize),
}

fn sizes() -> impl Strategy<Value = usize> {
    // Most are smaller than the ring of 2 KiB, some about as large, a few larger.
    prop_oneof![8 => 0..600usize, 2 => 600..2_048usize, 1 => 2_048..7_000usize]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => sizes().prop_map(Step::Append),
        3 => (1..4usize).prop_map(Step::Apply),
        2 => Just(Step::Reopen),
        2 => (sizes(), 0..=1_000usize).prop_map(|(size, cut)| Step::Tear(size, cut)),
    ];
    proptest::collection::vec(step, 1..40)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_is_recovered_is_what_was_synced_and_not_applied(steps in steps()) {
        let mut model = Model::new(START + 2_048);
        for step in steps {
            match step {
                Step::Append(size) => model.append(size),
                Step::Apply(frames) => (0..frames).for_each(|_| model.apply_one()),
                Step::Reopen => model.reopen(),
                Step::Tear(size, cut) => {
                    model.tear(size, cut);
                    model.reopen();
                }
            }
        }
        model.reopen();
    }

    /// One bit turned anywhere in a frame that is not the last: refused, and the frame named. What
    /// was written past the last frame changes nothing.
    #[test]
    fn a_turned_bit_is_told_with_its_place(
        sizes in proptest::collection::vec(0..600usize, 2..8),
        applied in 0..3usize,
        victim in any::<prop::sample::Index>(),
        byte in any::<prop::sample::Index>(),
        bit in 0..8u32,
        garbage in proptest::collection::vec(any::<u8>(), 0..2_000),
    ) {
        let mut model = Model::new(START + (1 << 20));
        sizes.iter().for_each(|size| model.append(*size));
        (0..applied.min(sizes.len() - 2)).for_each(|_| model.apply_one());
        let end = model.unapplied.back().unwrap().after;
        model.file.write(end, &garbage).unwrap();
        model.reopen();

        let victim = model.unapplied[victim.index(model.unapplied.len() - 1)].clone();
        let begins = victim.after as usize - victim.bytes.len();
        // The zeros to the next frame carry nothing.
        let payload = u32::from_le_bytes(victim.bytes[4..8].try_into().unwrap()) as usize;
        let at = begins + byte.index(HEADER_BYTES + payload);
        model.file.0.lock()[at] ^= 1 << bit;
        let told = model.recover().unwrap_err().to_string();
        let words = format!("frame {} at byte {begins} is missing or unreadable", victim.sequence);
        prop_assert!(told.contains(&words), "{}", told);
        model.file.0.lock()[at] ^= 1 << bit;
        model.reopen();
    }
}

#[test]
fn a_frame_larger_than_the_ring_makes_the_file_longer_and_the_ring_goes_on() {
    let mut model = Model::new(START + 2_048);
    for round in 0..3 {
        (0..5).for_each(|_| model.append(500));
        model.append(5_000 + round);
        model.reopen();
        (0..5).for_each(|_| model.append(500));
        model.reopen();
    }
}

/// A message may hold bytes that look like a frame's header at every place where one may begin,
/// each with a length that reaches to the file's end.
/// Proves G173.
#[test]
fn look_alikes_of_frames_in_a_message_cost_a_recovery_nothing() {
    let mut model = Model::new(START + (4 << 20));
    let mut header = b"HPXF".to_vec();
    header.extend(300_000u32.to_le_bytes());
    // Frames begin at multiples of 8: one of the shifts has the headers there.
    let shifted = |shift| [&vec![b'x'; shift][..], &header.repeat(16 << 10)].concat();
    let body: Vec<u8> = (0..8).flat_map(|_| shifted(1)).collect();
    model.append(10);
    let mut builder = Builder::new(1);
    let writes = [("k".to_owned(), Some(body.into()))].into();
    builder.push(&Commit {
        version: 2,
        effects: Effects { writes, outgoing: Vec::new() },
        ..Commit::of(&RecordKey::by_message_id(&Scope::of("p"), &Message::new("m", "/s", "t")))
    });
    model.appended += 1;
    model.made += 1;
    let offset = model.room(builder.len());
    let (frame, after) = model.journal.append(builder, offset).unwrap();
    model.unapplied.push_back(Synced { sequence: frame.sequence, bytes: frame.bytes.to_vec(), after });
    model.tear(3_000, 500);
    let before = model.file.1.lock().read;
    model.reopen();
    let read = model.file.1.lock().read - before;
    let length = model.file.len().unwrap();
    assert!(read < 2 * length, "{read} bytes were read of a file of {length}");
}

/// A file is never shorter than its header says, wherever it was cut: not a torn end.
/// Proves G174.
#[test]
fn a_journal_cut_short_anywhere_is_refused_and_nothing_changed() {
    let mut model = Model::new(START + 2_048);
    (0..3).for_each(|_| model.append(300));
    (0..2).for_each(|_| model.apply_one());
    let whole = model.file.0.lock().clone();
    for length in (0..whole.len()).filter(|length| *length < 6_000 || length.is_multiple_of(4_099)) {
        model.file.0.lock().truncate(length);
        let told = model.recover().unwrap_err().to_string();
        assert!(told.contains("it is cut short"), "{length} bytes: {told}");
        assert_eq!(model.file.0.lock()[..], whole[..length]);
        model.file.0.lock().clone_from(&whole);
    }
    model.reopen();
}

/// The tables have frames that the file never had.
/// Proves G175.
#[test]
fn an_older_copy_of_a_journal_is_refused() {
    let mut model = Model::new(START + 2_048);
    model.append(100);
    let mut copies = vec![model.file.0.lock().clone()];
    for round in 0..20 {
        model.append(400);
        model.apply_one();
        model.apply_one();
        let newest = model.file.0.lock().clone();
        for (number, older) in copies.iter().enumerate() {
            model.file.0.lock().clone_from(older);
            let told = model.recover().expect_err(&format!("round {round}, copy {number}")).to_string();
            assert!(told.contains("it is an older copy"), "{told}");
        }
        model.file.0.lock().clone_from(&newest);
        model.reopen();
        copies.push(newest);
    }
    // A file of the same length that was emptied.
    model.file.0.lock()[START as usize..].fill(0);
    assert!(model.recover().unwrap_err().to_string().contains("was emptied"));
}

crate::mutations! {
    mutation_headers_that_are_not_checked_are_found: look_alikes_of_frames_in_a_message_cost_a_recovery_nothing is red with "frame-header-unchecked";
    mutation_a_journal_of_any_age_is_found: an_older_copy_of_a_journal_is_refused is red with "journal-age-unchecked";
    mutation_a_journal_of_any_length_is_found: a_journal_cut_short_anywhere_is_refused_and_nothing_changed is red with "journal-length-unchecked";
}
