//! Every store passes the conformance suite; the redb folder is found again, or refused in words.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use hapax_core::{Ending, Stored};
use hapax_store::{MemoryStore, OpenError, RedbStore, StoreOptions};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::mutation::turns_red;
use hapax_tests::processors::Counter;
use hapax_tests::{backend::LossyDisk, conformance};

#[tokio::test]
async fn memory_conforms() {
    conformance::all(|| Arc::new(MemoryStore::default())).await;
}

#[tokio::test]
async fn redb_conforms() {
    conformance::all(|| Arc::new(LossyDisk::new().open().unwrap())).await;
}

/// Everything as small as it gets: each commit is a memtable and a transaction of its own, the journal goes round again and
/// again, and records stand in several buckets. So a read finds its answer at every depth of the store.
#[tokio::test]
async fn redb_conforms_at_every_depth() {
    for (filters, unapplied_bytes_max) in [(true, 1), (false, 1), (true, 4 << 10), (false, 4 << 10)] {
        let options = StoreOptions {
            memtable_bytes: 1,
            unapplied_bytes_max,
            bucket_rows_max: 2,
            journal_bytes: 8 << 10,
            filters,
            ..StoreOptions::default()
        };
        conformance::all(|| Arc::new(LossyDisk::new().open_with(options.clone()).unwrap())).await;
    }
}

#[tokio::test]
async fn records_are_found_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let counter = Counter::new();
    for round in 0..3 {
        let store = Arc::new(RedbStore::open(&path).unwrap());
        let bench = Bench::new("p", store, counter.clone(), quick()).await;
        let ending = bench.handle(message("m-1", "{}")).await;
        match (round, ending) {
            (0, Ending::Completed { output }) => assert_eq!(output.data, "1"),
            (1 | 2, Ending::Duplicate(Stored::Completed(output))) => assert_eq!(output.data, "1"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(counter.runs(), 1);
}

fn refusal(path: &Path) -> OpenError {
    RedbStore::open(path).err().expect("the store must be refused")
}

fn made(path: &Path) {
    RedbStore::open(path).unwrap();
}

#[test]
fn a_store_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let _open = RedbStore::open(folder.path()).unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::Locked(_)));
}

#[test]
fn a_lost_or_emptied_database_is_refused_and_not_recreated() {
    let folder = tempfile::tempdir().unwrap();
    made(folder.path());
    let database = folder.path().join("records.redb");
    std::fs::File::options().write(true).open(&database).unwrap().set_len(0).unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::Damaged { .. }));
    std::fs::remove_file(&database).unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::Damaged { .. }));
    assert!(!database.exists(), "refusing must not create an empty database");
}

#[test]
fn a_database_cut_short_or_overwritten_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    made(folder.path());
    let database = folder.path().join("records.redb");
    let whole = std::fs::read(&database).unwrap();
    std::fs::write(&database, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::Damaged { .. }), "cut short");
    std::fs::write(&database, vec![0x5a; whole.len()]).unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::Damaged { .. }), "overwritten");
    std::fs::write(&database, &whole).unwrap();
    made(folder.path());
}

#[test]
fn a_creation_cut_short_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("records.redb.1.new"), vec![0; 4096]).unwrap();
    made(folder.path());
    std::fs::remove_file(folder.path().join("STORE")).unwrap();
    made(folder.path());
    assert!(!folder.path().join("records.redb.1.new").exists());
}

#[test]
fn another_stores_database_is_refused() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    made(one.path());
    made(other.path());
    std::fs::copy(other.path().join("records.redb"), one.path().join("records.redb")).unwrap();
    let refusal = refusal(one.path());
    assert!(refusal.to_string().contains("belongs to store"), "{refusal}");
}

#[test]
fn another_format_is_refused_by_number() {
    let folder = tempfile::tempdir().unwrap();
    made(folder.path());
    hapax_tests::raw::set_format(folder.path(), 99);
    let refusal = refusal(folder.path());
    assert!(matches!(refusal, OpenError::Version { found: 99, .. }), "{refusal}");
}

#[test]
fn what_is_no_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    assert!(matches!(refusal(folder.path()), OpenError::NotAStore { .. }));
    assert!(matches!(refusal(&folder.path().join("thesis.txt")), OpenError::NotAStore { .. }));
    assert!(matches!(RedbStore::open_existing(&folder.path().join("none")).err(), Some(OpenError::Missing(_))));
}

#[test]
fn mutation_bucket_dropped_early_is_found() {
    turns_red("redb_conforms", "bucket-dropped-early");
}

#[test]
fn mutation_bloom_half_built_is_found() {
    turns_red("records_are_found_again_after_a_restart", "bloom-half-built");
}
