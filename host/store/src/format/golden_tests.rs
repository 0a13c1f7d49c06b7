//! Pins the stored format, byte by byte, to `golden/format-N.txt`: what this build writes is what
//! every build of that format reads.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fmt::Write as _;
use std::sync::Arc;

use hapax_core::{
    Commit, Cursor, Effects, Expected, FeedEntry, FeedEventKind, Fingerprint, HeldChange, HeldMessage, HistoryEntry,
    HoldReason, Message, OutboxPosition, Outgoing, Output, Position, Record, RecordChange, RecordEvent, RecordKey,
    RecordState, Scope,
};

use crate::format::frame::{Builder, ChecksumKey, Entry, Frame, HEADER_BYTES, Header};
use crate::format::layout::{self, Applied, FeedFacts};
use crate::format::seal::{Sealed, Seals};

const STORE: &str = "000102030405060708090a0b0c0d0e0f";
const GOLDEN: &str = include_str!("../../golden/format-4.txt");

fn key() -> RecordKey {
    RecordKey::new(Scope { tenant: "t\0t".into(), processor: "orders".into() }, "/shop".into(), "o-1".into())
}

fn record(state: RecordState, expires_ms: Option<u64>) -> Record {
    Record {
        state,
        epoch: 3,
        attempts: 2,
        fingerprint: Fingerprint { version: 1, digest: [0xf1; 16] },
        position: Some(Position::Version(4)),
        component: "c0ffee".into(),
        saga: Some("s".into()),
        received_ms: 1_700_000_000_000,
        changed_ms: 1_700_000_001_000,
        expires_ms,
        history: vec![HistoryEntry {
            event: RecordEvent::Failed { error: "e".into(), retry_at_ms: 1_700_000_000_500 },
            at_ms: 1_700_000_000_100,
            epoch: 2,
            attempts: 1,
            component: "c0ffee".into(),
            expires_ms: None,
        }],
    }
}

fn message() -> Message {
    let mut message = Message::new("o-1", "/shop", "order.placed").with_data("application/json", "{}");
    message.extensions.insert("partitionkey".into(), "c-1".into());
    message
}

fn completed() -> Record {
    let output = Output { content_type: Some("text/plain".into()), data: "done".into() };
    record(RecordState::Completed { output }, Some(1_700_604_801_000))
}

/// Every state, in the order of their stored numbers.
fn states() -> Vec<RecordState> {
    let error = || "e".to_owned();
    vec![
        RecordState::InProgress { owner: "o".into(), lease_end_ms: 9 },
        completed().state,
        RecordState::RetryDue { error: error(), at_ms: 9 },
        RecordState::DeadLettered { error: error() },
        RecordState::Compensating { error: error() },
        RecordState::Compensated { error: error() },
        RecordState::CompensationFailed { error: error() },
    ]
}

/// A duplicate was answered 300 times.
fn replayed() -> FeedEntry {
    let many = FeedEntry::of_many(FeedEventKind::Replayed, 300, 1_700_000_004_000);
    FeedEntry { digest: key().digest(), ..many }
}

/// Two events of the group 9, and one of the group 11.
fn block() -> Vec<(Cursor, FeedEntry)> {
    let swept = FeedEntry::of_many(FeedEventKind::Swept, 1_048_576, 1_700_604_900_000);
    let completed = Commit { record: RecordChange::Put(completed().into()), ..Commit::of(&key()) }.told().unwrap();
    let at = |sequence, index| Cursor { sequence, index };
    vec![(at(9, 0), completed), (at(9, 1), replayed()), (at(11, 0), swept)]
}

/// One frame with an entry of every kind.
fn frame() -> Frame {
    let commit = |expected, record, effects, held_message| Commit {
        expected,
        record: RecordChange::Put(Arc::new(record)),
        version: 7,
        effects,
        held_message,
        ..Commit::of(&key())
    };
    let outgoing = Outgoing { kind: "order.accepted".into(), data: "{}".into(), ..Outgoing::default() };
    let writes = [("kept".to_owned(), Some("v".into())), ("went".to_owned(), None)].into();
    let fingerprint = Fingerprint { version: 1, digest: [0xf2; 16] };
    let held_message = HeldMessage {
        message: message(),
        fingerprint,
        position: Some(Position::Version(4)),
        hold_reason: HoldReason::Parked { awaits: 3, until_ms: 1_700_000_009_000 },
        error: "e".into(),
        attempts: 5,
        component: "c0ffee".into(),
        at_ms: 1_700_000_002_000,
    };
    let due = record(RecordState::RetryDue { error: "e".into(), at_ms: 9 }, None);
    let mut builder = Builder::new(3);
    builder.push(&commit(Expected::Absent, completed(), Effects { writes, outgoing: vec![outgoing] }, None));
    builder.push(&commit(Expected::Epoch(3), due, Effects::default(), Some(HeldChange::Put(Box::new(held_message)))));
    let held_message = Some(HeldChange::Remove(fingerprint));
    let at_ms = 1_700_000_003_000;
    builder.push(&Commit { record: RecordChange::Remove, held_message, at_ms, ..Commit::of(&key()) });
    builder.push_sent(OutboxPosition { version: 5, index: 1 });
    builder.push_event(&replayed());
    builder.push_bucket_gone(3);
    builder.finish(4, 6, &ChecksumKey::new(STORE))
}

/// Seals of several tables, 8 bytes each.
fn seals() -> Vec<u8> {
    let (seals, hash, mut row) = (Seals::new(STORE), key().digest(), Vec::new());
    layout::push_row(&mut row, &key(), &completed());
    let seals = [
        seals.of(Sealed::Rows, &[&hash.to_le_bytes()], &row),
        seals.of(Sealed::Kept, &[&hash.to_le_bytes()], &row),
        layout::entry_seal(&seals, hash, layout::location(2, 260)),
        layout::bucket_seal(&seals, 3, 9, 2),
        seals.of(Sealed::State, &[&layout::scope_prefix(&key().scope), b"kept"], b"v"),
    ];
    seals.iter().flat_map(|seal| seal.to_le_bytes()).collect()
}

/// The pinned items: name, description, bytes.
fn pinned() -> Vec<(String, &'static str, Vec<u8>)> {
    let mut row = Vec::new();
    layout::push_row(&mut row, &key(), &completed());
    let applied = Applied { sequence: 4, next_offset: 4_800, last_version: 7, next_block: 2 };
    let fingerprint = Fingerprint { version: 1, digest: [0xf2; 16] };
    let feed = FeedFacts { events: 1_000_000, dropped: Cursor { sequence: 8, index: 2 } };
    let mut events = Vec::new();
    for (cursor, entry) in block() {
        let mut event = Vec::new();
        layout::push_feed_entry(&mut event, &entry);
        layout::push_placed(&mut events, 9, cursor, &event);
    }
    let mut pinned = vec![
        ("format", "META `format`", layout::FORMAT.to_le_bytes().to_vec()),
        ("applied", "META `applied`: sequence 4, next offset 4800, last version 7, next block 2", applied.encode().to_vec()),
        ("feed", "META `feed`: 1000000 events, the last that was dropped is 8-2", feed.encode().to_vec()),
        ("scope", "the beginning of every key of tenant `t\\0t`, processor `orders`", layout::scope_prefix(&key().scope)),
        ("record-key", "source `/shop`, key `o-1`", layout::record_key(&key())),
        ("record-hash", "its hash, as tables and frames have it", key().digest().to_le_bytes().to_vec()),
        ("state-key", "the state key `kept`", layout::state_key(&layout::scope_prefix(&key().scope), "kept")),
        ("dead-letter-key", "its letter's key", layout::dead_letter_key(&layout::record_key(&key()), &fingerprint)),
        ("location", "block 2, offset 260", layout::location(2, 260).to_le_bytes().to_vec()),
        ("row", "the row of a completed record", row),
        ("seals", "of that row in a bucket; of it in the table `kept`; of an index's entry for it at that location; of bucket 3, which ends at 9 and has 2 rows; of state `kept` with the value `v`", seals()),
        ("window-end", "the end of its bucket's window", layout::window_end_ms(&completed()).unwrap().to_le_bytes().to_vec()),
        ("outbox-message", "a message as the outbox has it", layout::encode(&message())),
        ("feed-block", "a block of the feed that begins at 9-0: a message completed, 300 duplicates; at 11-0 a bucket was swept", events),
        ("frame", "frame 4 of the store: a record, a state entry, a deleted one, a message to send; a record again, a kept message; a record and a message that are kept no longer; the event of each of the three; a message that was sent, a note of duplicates, a bucket that is dropped", frame().bytes.to_vec()),
        ("journal-header", "the journal's first bytes; zeros follow to byte 4096", crate::journal::rebuilt(STORE, 4, &[])[..crate::journal::HEADER_END].to_vec()),
    ]
    .into_iter()
    .map(|(name, what, bytes)| (name.to_owned(), what, bytes))
    .collect::<Vec<_>>();
    for (number, state) in states().into_iter().enumerate() {
        let name = format!("record-{number}");
        pinned.push((name, state.name(), layout::encode(&record(state, None))));
    }
    pinned
}

fn text() -> String {
    // The file keeps the name that its document had when it was written:
    // docs/internals/storage-format.md today.
    let mut text = format!(
        "# The stored format, version {}, byte by byte: hexadecimal, 32 bytes a line. Store id {STORE}.\n\
         # A test of host/store compares. docs/STORAGE.md says in words what the bytes are.\n",
        layout::FORMAT
    );
    for (name, what, bytes) in pinned() {
        writeln!(text, "\n# {what}\n{name}:").unwrap();
        for line in bytes.chunks(32) {
            let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(text, "  {hex}").unwrap();
        }
    }
    text
}

#[test]
fn the_format_is_what_the_golden_file_says() {
    let written = text();
    if written == GOLDEN {
        return;
    }
    let first = written.lines().zip(GOLDEN.lines()).position(|(written, golden)| written != golden);
    let path = std::env::temp_dir().join(format!("hapax-format-{}.txt", layout::FORMAT));
    std::fs::write(&path, &written).unwrap();
    panic!(
        "the stored bytes differ from golden/format-4.txt, first at line {}. Stores that exist could not be read any more. \
         If that was not meant, undo it. If it was: give layout::FORMAT the next number, have the old format migrated or \
         refused by name, describe it in docs/internals/storage-format.md, and add a golden file of the new number beside \
         the old one. What this build writes is in {}",
        first.map_or(0, |line| line + 1),
        path.display()
    );
}

/// The golden bytes, not those of this build's writer, are read back.
#[test]
fn the_golden_frame_is_read_entry_by_entry() {
    let bytes = golden("frame");
    let header = Header::read(&bytes[..HEADER_BYTES], &ChecksumKey::new(STORE)).unwrap();
    let frame = Frame::check(&header, bytes.into(), &ChecksumKey::new(STORE)).unwrap();
    assert_eq!((frame.sequence, frame.last_version), (4, 7));
    let entries: Vec<Entry> = frame.entries().map(Option::unwrap).collect();
    let [
        Entry::Record { hash, end_ms: Some(_), replaces: false, row },
        state,
        deleted,
        sending,
        Entry::Event(first),
        again,
        held_message,
        Entry::Event(second),
        gone,
        letter_gone,
        Entry::Event(third),
        sent,
        Entry::Event(noted),
        bucket,
    ] = &entries[..]
    else {
        panic!("{entries:?}")
    };
    assert_eq!(*hash, key().digest());
    let (stored, record) = layout::split_row(row).unwrap();
    assert_eq!(layout::parse_record_key(stored), Some(key()));
    assert_eq!(layout::decode::<Record>(record), Some(completed()));
    assert!(
        matches!(state, Entry::State { value: Some(value), .. } if layout::parse_state_value(value) == Some((7, b"v")))
    );
    assert!(matches!(deleted, Entry::State { value: None, .. }));
    assert!(matches!(sending, Entry::Outgoing { position: OutboxPosition { version: 7, index: 0 }, .. }));
    assert!(matches!(again, Entry::Record { end_ms: None, replaces: true, .. }));
    assert!(
        matches!(held_message, Entry::HeldMessage { held_message: Some(held_message), .. } if layout::decode::<HeldMessage>(held_message).is_some())
    );
    assert_eq!(*gone, Entry::RecordGone { hash: key().digest() });
    assert!(matches!(letter_gone, Entry::HeldMessage { held_message: None, .. }));
    assert_eq!(*sent, Entry::Sent(OutboxPosition { version: 5, index: 1 }));
    let [first, second, third, noted] =
        [first, second, third, noted].map(|at| layout::take_feed_entry(&frame.bytes[at.clone()]).unwrap().0);
    assert_eq!(
        [first.kind, second.kind, third.kind],
        [FeedEventKind::Completed, FeedEventKind::Failed, FeedEventKind::Evicted]
    );
    assert_eq!((first.digest, first.at_ms, first.attempts, first.epoch), (key().digest(), 1_700_000_001_000, 2, 3));
    assert_eq!((noted, bucket.clone()), (replayed(), Entry::BucketGone { id: 3 }));
}

/// The bytes of the golden file under `name`.
fn golden(name: &str) -> Vec<u8> {
    let begin = format!("{name}:");
    let lines = GOLDEN.lines().skip_while(|line| *line != begin).skip(1).take_while(|line| line.starts_with("  "));
    let hex: String = lines.map(str::trim).collect();
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn the_golden_feed_is_read_event_by_event() {
    assert_eq!(layout::parse_block(9, &golden("feed-block")), Some(block()));
    let feed = FeedFacts { events: 1_000_000, dropped: Cursor { sequence: 8, index: 2 } };
    assert_eq!(FeedFacts::decode(&golden("feed")), Some(feed));
    let block = golden("feed-block");
    assert!((1..block.len()).all(|end| layout::parse_block(9, &block[..end]).is_none_or(|events| events.len() < 3)));
}
