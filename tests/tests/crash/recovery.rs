//! Damaged stores: each kind of damage is told in words and with its exit code, changes nothing,
//! and has a way out that keeps what can be kept. Most of it over the real binary.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use hapax_core::{Handling, Outcome};
use hapax_store::{OpenError, RedbStore, doctor};
use hapax_tests::backend::{LossyDisk, Part};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::mutation::turns_red;
use hapax_tests::process::{guest, hapax};
use hapax_tests::processors::Counter;
use hapax_tests::random::Random;
use serde_json::Value;

/// Where frames begin, by `docs/internals/storage-format.md`.
const START: usize = 4096;

/// Begin and length of every frame of a journal that has not gone round; without the zeros between
/// frames.
fn frames(journal: &[u8]) -> Vec<(usize, usize)> {
    let mut frames = Vec::new();
    let mut at = START;
    while journal.get(at..at + 4) == Some(b"HPXF") {
        let payload = u32::from_le_bytes(journal[at + 4..at + 8].try_into().unwrap()) as usize;
        frames.push((at, 48 + payload));
        at += (48 + payload).next_multiple_of(8);
    }
    frames
}

/// A disk whose tables have nothing, and whose journal has a frame each of `count` messages.
async fn journalled(count: usize) -> LossyDisk {
    let disk = LossyDisk::new();
    drop(disk.open().unwrap());
    let tables = disk.bytes(Part::Database);
    let bench = Bench::new("p", Arc::new(disk.open().unwrap()), Counter::new(), quick()).await;
    for number in 0..count {
        bench.handle(message(&format!("m-{number}"), "{}")).await;
    }
    drop(bench);
    disk.set(Part::Database, tables);
    assert_eq!(frames(&disk.bytes(Part::Journal)).len(), count);
    disk
}

/// How many of the messages are there, from the first on; then one more is handled, and found again
/// after a restart.
async fn present(disk: &LossyDisk, context: &str) -> usize {
    let store = Arc::new(disk.open().unwrap_or_else(|error| panic!("{context}: {error}")));
    let counter = Counter::new();
    let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
    let mut present = 0;
    while let Outcome::Duplicate(_) = bench.handle(message(&format!("m-{present}"), "{}")).await {
        present += 1;
    }
    drop(bench);
    disk.kill(store);
    let bench = Bench::new("p", Arc::new(disk.open().unwrap()), counter, quick()).await;
    let again = bench.handle(message(&format!("m-{present}"), "{}")).await;
    assert!(matches!(again, Outcome::Duplicate(_)), "{context}: what was appended after the damage is gone: {again:?}");
    present
}

#[tokio::test]
async fn a_torn_tail_opens_with_everything_before_it() {
    let disk = journalled(4).await;
    let journal = disk.bytes(Part::Journal);
    let (begins, length) = *frames(&journal).last().unwrap();
    for cut in 0..=length {
        // Every torn end with zeros behind it or with garbage. A file is never cut: it grows before
        // a frame is written.
        let mut random = Random::of(cut as u64);
        let mut zeros = journal[..begins + cut].to_vec();
        zeros.resize(journal.len(), 0);
        let mut garbage = zeros.clone();
        garbage[begins + cut..][..2_000].iter_mut().for_each(|byte| *byte = random.below(256) as u8);
        // A header cut short is another case than a payload cut short: all kinds of the first, one
        // after the other of the rest.
        let kinds = [("zeros", zeros), ("garbage", garbage)];
        let rest = cut > 56 && cut < length;
        for (_, (kind, bytes)) in (0..).zip(kinds).filter(|(number, _)| !rest || cut % 3 == *number) {
            let torn = disk.copy();
            torn.set(Part::Journal, bytes);
            let expected = if cut == length { 4 } else { 3 };
            let context = format!("cut after {cut} of {length} bytes, {kind}");
            assert_eq!(present(&torn, &context).await, expected, "{context}");
        }
    }
}

#[tokio::test]
async fn a_turned_bit_in_the_middle_is_refused_with_its_place() {
    let disk = journalled(5).await;
    let journal = disk.bytes(Part::Journal);
    let all = frames(&journal);
    for (number, (begins, length)) in all[..4].iter().enumerate() {
        for at in [0, 5, 10, 20, 30, length / 2, length - 1] {
            let mut bytes = journal.clone();
            bytes[begins + at] ^= 0x10;
            disk.set(Part::Journal, bytes.clone());
            let error = disk.open().err().expect("a damaged journal must be refused");
            assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
            let (text, frame) = (error.to_string(), number + 1);
            for words in [
                &*format!("frame {frame} at byte {begins} is missing or unreadable"),
                "hapax doctor",
                "Nothing was changed",
            ] {
                assert!(text.contains(words), "`{words}` is not in: {text}");
            }
            assert_eq!(disk.bytes(Part::Journal), bytes, "refusing changes nothing");
        }
    }
}

/// What the tables have is not brought into them again: a record that was swept would come back,
/// for one.
/// Proves G95.
#[tokio::test]
async fn what_the_tables_have_is_not_applied_again() {
    let folder = tempfile::tempdir().unwrap();
    for round in 1..=3 {
        let store = Arc::new(RedbStore::open(folder.path()).unwrap());
        let bench = Bench::new("p", store, Counter::new(), quick()).await;
        assert!(matches!(bench.handle(message(&format!("m-{round}"), "{}")).await, Outcome::Completed { .. }));
        drop(bench);
        let found = doctor::examine(folder.path()).unwrap();
        assert_eq!((found.applied_frames, found.unapplied_frames), (round, 0), "{found:?}");
    }
    let store = RedbStore::open(folder.path()).unwrap();
    hapax_core::IdempotencyStorage::sweep(&store, u64::MAX).await.unwrap();
    drop(store);
    use hapax_core::Inspect as _;
    let left = RedbStore::open(folder.path()).unwrap().records(None, None, 10).await.unwrap();
    assert_eq!(left, [], "what was swept came back");
}

#[test]
fn mutation_apply_without_sequence_is_found() {
    turns_red(module_path!(), "what_the_tables_have_is_not_applied_again", "apply-without-sequence");
}

/// Every page of the database in turn is damaged: opening and the doctor answer in words.
#[tokio::test]
async fn damage_in_any_page_of_the_database_is_told_by_the_doctor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let bench = Bench::new("p", Arc::new(RedbStore::open(&path).unwrap()), Counter::new(), quick()).await;
    for number in 0..40 {
        bench.consumer.handle(message(&format!("message-{number}"), "{}"), Handling::default()).await.unwrap();
    }
    drop(bench);
    let file = path.join("records.redb");
    let whole = std::fs::read(&file).unwrap();
    assert!(doctor::examine(&path).unwrap().database_is_whole);
    let needle = b"message-17";
    let places: Vec<_> = whole.windows(needle.len()).enumerate().filter(|(_, bytes)| bytes == needle).collect();
    assert!(!places.is_empty());
    let mut rotten = whole.clone();
    places.iter().for_each(|(at, _)| rotten[at + 8] ^= 1);
    std::fs::write(&file, &rotten).unwrap();
    assert!(told(&path), "a bit turned in a record was not told");
    let mut told_pages = 0;
    for page in (0..whole.len()).step_by(4096) {
        for at in [1, 200] {
            let mut rotten = whole.clone();
            rotten[page + at] ^= 0xff;
            std::fs::write(&file, &rotten).unwrap();
            told_pages += usize::from(told(&path));
            // Opening does not look at everything; what it does see it tells. It may mend the file:
            // the rotten one again.
            std::fs::write(&file, &rotten).unwrap();
            if let Err(error) = RedbStore::open(&path) {
                assert!(is_of_damage(&error), "{error:?}");
            }
        }
    }
    assert!(told_pages > 4, "only {told_pages} damages were told");
    std::fs::write(&file, &whole).unwrap();
    assert!(!told(&path));
}

/// Whether the doctor says that the database is damaged.
fn told(store: &Path) -> bool {
    match doctor::examine(store) {
        Ok(found) => !found.database_is_whole,
        Err(error) => {
            assert!(is_of_damage(&error), "{error:?}");
            true
        }
    }
}

fn is_of_damage(error: &OpenError) -> bool {
    matches!(error, OpenError::Damaged { .. } | OpenError::Version { .. } | OpenError::Io { .. })
}

/// A store of the real binary: tables as they were before the first order, and a journal with every
/// order.
struct Shop {
    folder: tempfile::TempDir,
    orders: usize,
}

impl Shop {
    fn new(orders: usize) -> Self {
        let shop = Self { folder: tempfile::tempdir().unwrap(), orders };
        std::fs::write(shop.path("none.jsonl"), "").unwrap();
        let line = |number| {
            format!(
                r#"{{"specversion":"1.0","id":"o-{number}","source":"/shop","type":"order.placed","data":{{"order_id":"o-{number}","customer":"c","amount_cents":1}}}}"#
            ) + "\n"
        };
        std::fs::write(shop.path("orders.jsonl"), (0..orders).map(line).collect::<String>()).unwrap();
        assert!(shop.run("none.jsonl", None).status.success());
        std::fs::copy(shop.path("store/journal"), shop.path("first-journal")).unwrap();
        std::fs::copy(shop.path("store/records.redb"), shop.path("tables")).unwrap();
        let output = shop.run("orders.jsonl", None);
        assert!(output.status.success(), "{output:?}");
        std::fs::copy(shop.path("tables"), shop.path("store/records.redb")).unwrap();
        shop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn journal(&self) -> Vec<u8> {
        std::fs::read(self.path("store/journal")).unwrap()
    }

    fn set_journal(&self, bytes: &[u8]) {
        std::fs::write(self.path("store/journal"), bytes).unwrap();
    }

    /// One message at a time: one frame each.
    fn run(&self, input: &str, fault: Option<&str>) -> Output {
        let mut command = hapax();
        command.args(["run", "--json", "--concurrency", "1", "--component"]).arg(guest("order-intake"));
        command.arg("--input").arg(self.path(input)).arg("--store").arg(self.path("store"));
        command.envs(fault.map(|fault| ("HAPAX_FAULT", fault)));
        command.output().unwrap()
    }

    fn doctor(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = hapax().arg("doctor").arg("--store").arg(self.path("store")).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!text.contains("panicked"), "{text}");
        (output.status.code(), text)
    }

    /// Opening refuses in these words, and changes nothing; the doctor says the same.
    fn is_refused(&self, words: &str) {
        let before = std::fs::read(self.path("store/journal")).ok();
        let output = self.run("orders.jsonl", None);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{text}");
        assert!(text.contains(words) && text.contains("hapax doctor"), "`{words}` is not in: {text}");
        let (code, text) = self.doctor(&[]);
        assert_eq!(code, Some(5), "{text}");
        assert!(text.contains("DAMAGED") && text.contains("hapax doctor --cut-journal"), "{text}");
        assert_eq!(std::fs::read(self.path("store/journal")).ok(), before, "nothing was to be changed");
    }

    /// Cuts the journal; then the store is whole with the first `kept` orders, works, and outlives
    /// another death.
    fn is_mended(&self, kept: usize) {
        let damaged = std::fs::read(self.path("store/journal")).ok();
        let (code, text) = self.doctor(&["--cut-journal"]);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains(&format!("the journal was cut after {kept} frames")), "{text}");
        assert_eq!(std::fs::read(self.path("store/journal.damaged-1")).ok(), damaged, "the damaged journal is kept");
        let (code, text) = self.doctor(&["--cut-journal"]);
        assert!(code == Some(0) && text.contains("nothing was cut"), "{text}");
        // The next appends are in the journal only when the host dies.
        let output = self.run("orders.jsonl", Some("applied:1"));
        assert_eq!(output.status.code(), None, "it was to die: {output:?}");
        let first = counts(&output);
        assert!(first.1 <= kept, "{first:?}");
        let output = self.run("orders.jsonl", None);
        assert!(output.status.success(), "{output:?}");
        let last = counts(&output);
        assert!(last.1 >= kept.max(first.0 + first.1), "acknowledged before the death and gone: {first:?}, {last:?}");
        assert_eq!(last.0 + last.1, self.orders);
        let state =
            hapax().args(["state", "get", "order-intake", "balance/c", "--store"]).arg(self.path("store")).output();
        assert_eq!(String::from_utf8_lossy(&state.unwrap().stdout).trim(), self.orders.to_string());
        assert_eq!(self.doctor(&[]).0, Some(0));
    }
}

/// Orders reported as completed, and as duplicates.
fn counts(output: &Output) -> (usize, usize) {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |outcome: &str| lines.iter().filter(|line| line["outcome"] == outcome).count();
    (of("completed"), of("duplicate"))
}

const ORDERS: usize = 12;

#[test]
fn a_whole_journal_is_applied_at_the_next_start() {
    let shop = Shop::new(ORDERS);
    let (code, text) = shop.doctor(&[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(&format!("0 frames are in the tables, {ORDERS} follow at the next start")), "{text}");
    let (_, json) = shop.doctor(&["--json"]);
    let found: Value = serde_json::from_str(json.trim()).unwrap();
    assert_eq!((&found["ok"], &found["unapplied_frames"]), (&true.into(), &ORDERS.into()));
    let output = shop.run("orders.jsonl", None);
    assert_eq!(counts(&output), (0, ORDERS), "{output:?}");
}

#[test]
fn a_torn_frame_is_no_damage_to_the_doctor() {
    let shop = Shop::new(ORDERS);
    let journal = shop.journal();
    let (begins, length) = *frames(&journal).last().unwrap();
    let mut torn = journal.clone();
    torn[begins + length / 2..].fill(0);
    shop.set_journal(&torn);
    let (code, text) = shop.doctor(&[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(&format!("{} follow at the next start", ORDERS - 1)), "{text}");
    assert_eq!(counts(&shop.run("orders.jsonl", None)), (1, ORDERS - 1));
}

#[test]
fn bit_rot_in_the_journal_is_refused_and_cut() {
    let shop = Shop::new(ORDERS);
    let mut journal = shop.journal();
    let (begins, length) = frames(&journal)[4];
    journal[begins + length / 2] ^= 4;
    shop.set_journal(&journal);
    shop.is_refused(&format!("frame 5 at byte {begins} is missing or unreadable, but frame 6 follows at byte"));
    shop.is_mended(4);
}

/// The limit of a file's size stands in for a full disk: at the first append the journal has to
/// grow, and cannot.
#[test]
fn a_journal_that_cannot_grow_stops_the_host_and_goes_on_when_there_is_room() {
    let shop = Shop::new(ORDERS);
    // As a store is before its first message.
    shop.set_journal(&std::fs::read(shop.path("first-journal")).unwrap());
    let mut limited = std::process::Command::new("bash");
    // Blocks of 1,024 bytes; the journal grows by 1 MiB.
    limited.arg("-c").arg("trap '' XFSZ; ulimit -f 512; exec \"$@\"").arg("bash").arg(hapax().get_program());
    limited.args(["run", "--json", "--concurrency", "1", "--component"]).arg(guest("order-intake"));
    limited.arg("--input").arg(shop.path("orders.jsonl")).arg("--store").arg(shop.path("store"));
    for _ in 0..2 {
        let output = limited.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(7), "{text}");
        assert!(text.contains("disk is full") && text.contains("Free some space and start again"), "{text}");
        assert_eq!(counts(&output), (0, 0), "acknowledged what cannot be on the disk");
        assert_eq!(shop.doctor(&[]).0, Some(0), "an append that was cut short is no damage");
    }
    assert_eq!(counts(&shop.run("orders.jsonl", None)), (ORDERS, 0));
    assert_eq!(counts(&shop.run("orders.jsonl", None)), (0, ORDERS));
}

#[test]
fn a_missing_journal_is_refused_and_made_anew() {
    let shop = Shop::new(ORDERS);
    std::fs::remove_file(shop.path("store/journal")).unwrap();
    shop.is_refused("the journal is missing, and with it what was acknowledged last");
    shop.is_mended(0);
}

/// The identity is lost with the journal: what the database knows is enough to tell that there was
/// one.
/// Proves G176.
#[test]
fn a_journal_lost_with_the_identity_is_refused_and_never_made_anew() {
    let shop = Shop::new(ORDERS);
    std::fs::remove_file(shop.path("store/journal")).unwrap();
    std::fs::remove_file(shop.path("store/STORE")).unwrap();
    shop.is_refused("the journal is missing, and with it what was acknowledged last");
    assert!(!shop.path("store/journal").exists());
    shop.is_mended(0);
}

/// Every length below that which the journal had: refused, and what is left of it is kept.
/// Proves G174.
#[test]
fn a_journal_cut_short_is_refused_with_its_length_and_cut() {
    let shop = Shop::new(ORDERS);
    let journal = shop.journal();
    let all = frames(&journal);
    for (length, kept) in [(START, 0), (all[3].0, 3), (all[5].0 + 20, 5), (journal.len() - 1, ORDERS)] {
        shop.set_journal(&journal[..length]);
        shop.is_refused(&format!("it is cut short: {length} bytes are left of {}", journal.len()));
        let (code, text) = shop.doctor(&[]);
        assert!(code == Some(5) && text.contains(&format!("{kept} frames before that can be read")), "{text}");
    }
    shop.set_journal(&journal[..all[5].0 + 20]);
    shop.is_mended(5);
}

/// The process dies between the two steps of a cut; the cut is asked for again.
/// Proves G178.
#[test]
fn a_cut_that_is_killed_between_its_steps_loses_no_frame_when_it_is_repeated() {
    let shop = Shop::new(ORDERS);
    let mut journal = shop.journal();
    let (begins, length) = frames(&journal)[4];
    journal[begins + length / 2] ^= 4;
    shop.set_journal(&journal);
    let mut cut = hapax();
    cut.args(["doctor", "--cut-journal", "--store"]).arg(shop.path("store")).env("HAPAX_FAULT", "journal-kept");
    assert_eq!(cut.output().unwrap().status.code(), None, "it was to die");
    shop.is_refused("frame 5 at byte");
    let (code, text) = shop.doctor(&["--cut-journal"]);
    assert!(code == Some(0) && text.contains("the journal was cut after 4 frames"), "{text}");
    assert_eq!(counts(&shop.run("orders.jsonl", None)), (ORDERS - 4, 4));
}

#[test]
fn the_journal_of_another_store_is_refused_and_replaced() {
    let (shop, other) = (Shop::new(ORDERS), Shop::new(2));
    shop.set_journal(&other.journal());
    shop.is_refused("it belongs to store");
    shop.is_mended(0);
}

#[test]
fn a_damaged_header_of_the_journal_is_refused_and_its_frames_are_kept() {
    let shop = Shop::new(ORDERS);
    let mut journal = shop.journal();
    journal[3] ^= 1;
    shop.set_journal(&journal);
    shop.is_refused("its header cannot be read");
    shop.is_mended(ORDERS);
}

#[test]
fn a_journal_cut_inside_its_header_is_refused() {
    let shop = Shop::new(ORDERS);
    shop.set_journal(&shop.journal()[..100]);
    shop.is_refused("it is cut short");
    shop.is_mended(0);
}

/// Its frames may be whole and mean something else: whoever wrote it must read it.
#[test]
fn a_journal_of_another_format_is_refused_by_number_and_never_cut() {
    let shop = Shop::new(ORDERS);
    let mut journal = shop.journal();
    journal[8..12].copy_from_slice(&7u32.to_le_bytes());
    let checksum = *blake3::hash(&journal[..44]).as_bytes();
    journal[44..60].copy_from_slice(&checksum[..16]);
    shop.set_journal(&journal);
    let output = shop.run("orders.jsonl", None);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(5) && text.contains("format 7"), "{text}");
    for arguments in [&[][..], &["--cut-journal"]] {
        let (code, text) = shop.doctor(arguments);
        assert!(code == Some(5) && text.contains("format 7"), "{text}");
        assert_eq!(shop.journal(), journal);
    }
}

#[test]
fn a_database_with_turned_bits_is_told_by_the_doctor() {
    let shop = Shop::new(ORDERS);
    assert!(shop.run("orders.jsonl", None).status.success());
    let file = shop.path("store/records.redb");
    let mut bytes = std::fs::read(&file).unwrap();
    let needle = b"o-11";
    let places: Vec<_> = (0..bytes.len() - needle.len()).filter(|at| bytes[*at..].starts_with(needle)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|at| bytes[*at] ^= 1);
    std::fs::write(&file, &bytes).unwrap();
    let (code, text) = shop.doctor(&[]);
    assert_eq!(code, Some(5), "{text}");
    assert!(text.to_lowercase().contains("damaged"), "{text}");
}

hapax_tests::mutations! {
    mutation_a_journal_of_any_length_is_found: a_journal_cut_short_is_refused_with_its_length_and_cut is red with "journal-length-unchecked";
    mutation_a_journal_made_anew_is_found: a_journal_lost_with_the_identity_is_refused_and_never_made_anew is red with "journal-made-anew";
    mutation_a_cut_that_renames_the_journal_is_found: a_cut_that_is_killed_between_its_steps_loses_no_frame_when_it_is_repeated is red with "cut-renames-the-journal";
}
