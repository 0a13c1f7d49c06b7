//! Every store passes the conformance suite; the redb folder is found again, or refused in words.
//!
//! Proves G9.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{IdempotencyStorage as _, Inspect as _, Outbox as _, Outcome, StoreError, StoredOutcome};
use hapax_store::{MemoryStore, OpenError, RedbStore, StoreOptions};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::mutation::turns_red;
use hapax_tests::processors::{Counter, ledger};
use hapax_tests::{backend::LossyDisk, conformance};

/// Proves G110.
#[tokio::test]
async fn memory_conforms() {
    conformance::all(|| Arc::new(MemoryStore::default())).await;
}

/// Proves G110, G124.
#[tokio::test]
async fn redb_conforms() {
    conformance::all(|| Arc::new(LossyDisk::new().open().unwrap())).await;
}

/// Everything as small as it gets: each commit is a memtable and a transaction of its own, the
/// journal goes round again and again, and records stand in several buckets. So a read finds its
/// answer at every depth of the store.
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
async fn a_full_feed_says_what_it_has_dropped_in_memory() {
    conformance::a_feed_that_is_full_says_what_it_has_dropped(&MemoryStore::keeping(8)).await;
}

/// Proves G53.
#[tokio::test]
async fn a_full_feed_says_what_it_has_dropped_on_redb() {
    for memtable_bytes in [1, 32 << 20] {
        let options = StoreOptions { events_max: 8, memtable_bytes, ..StoreOptions::default() };
        conformance::a_feed_that_is_full_says_what_it_has_dropped(&LossyDisk::new().open_with(options).unwrap()).await;
    }
}

/// Many at once on a store where each commit is a transaction of its own, while others page through
/// it, sweep it and flush it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_lose_nothing_while_the_tables_are_written_swept_and_read() {
    let options =
        StoreOptions { memtable_bytes: 1, bucket_rows_max: 7, journal_bytes: 16 << 10, ..StoreOptions::default() };
    let disk = LossyDisk::new();
    let store = Arc::new(disk.open_with(options.clone()).unwrap());
    let bench = Arc::new(Bench::new("ledger", store.clone(), ledger(), quick()).await);
    let transfers: Vec<_> = (0..300)
        .map(|number| {
            let bench = bench.clone();
            // Every message twice, between few accounts.
            let (id, number) = (format!("t-{}", number % 150), number % 150);
            let data = format!(r#"{{"from":"{}","to":"{}","amount":1}}"#, number % 3, 3 + number % 2);
            tokio::spawn(async move { bench.handle(message(&id, &data)).await })
        })
        .collect();
    let (stop, others) = (Arc::new(AtomicBool::new(false)), store.clone());
    let stopped = stop.clone();
    let reading = std::thread::spawn(move || {
        while !stopped.load(Ordering::SeqCst) {
            others.flush().unwrap();
            // Nothing has expired.
            assert_eq!(at_once(others.sweep(1)), 0);
            let records = at_once(others.records(None, None, 1_000)).len();
            assert!(at_once(others.records(None, None, 1_000)).len() >= records, "a record went");
        }
    });
    let mut completed = 0;
    for transfer in transfers {
        completed += usize::from(matches!(transfer.await.unwrap(), Outcome::Completed { .. }));
    }
    stop.store(true, Ordering::SeqCst);
    reading.join().unwrap();
    assert_eq!(completed, 150);
    drop((bench, store));
    let store = disk.open_with(options).unwrap();
    assert_eq!(store.records(None, None, 1_000).await.unwrap().len(), 150);
    assert_eq!(store.pending(None, 1_000).await.unwrap().len(), 150);
    let state = store.state_of(&hapax_core::Scope::of("ledger"), "account/", 10).unwrap();
    let amounts: Vec<_> = state.iter().map(|row| std::str::from_utf8(&row.value).unwrap()).collect();
    assert_eq!(amounts, ["-50", "-50", "-50", "75", "75"]);
}

/// The answer of a store, waited for on a thread without a runtime.
fn at_once<T: Send>(answer: BoxFuture<'_, Result<T, StoreError>>) -> T {
    let wait = || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(answer);
    std::thread::scope(|scope| scope.spawn(wait).join().unwrap()).unwrap()
}

#[tokio::test]
async fn records_are_found_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let counter = Counter::new();
    for round in 0..3 {
        let store = Arc::new(RedbStore::open(&path).unwrap());
        let bench = Bench::new("p", store, counter.clone(), quick()).await;
        let outcome = bench.handle(message("m-1", "{}")).await;
        match (round, outcome) {
            (0, Outcome::Completed { output }) => assert_eq!(output.data, "1"),
            (1 | 2, Outcome::Duplicate(StoredOutcome::Completed(output))) => assert_eq!(output.data, "1"),
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
    for format in [1, 2, 3, 99] {
        assert_ne!(hapax_tests::raw::set_format(folder.path(), format), format);
        let refusal = refusal(folder.path());
        assert!(matches!(refusal, OpenError::Version { found, expected: 4, .. } if found == format), "{refusal}");
        assert!(refusal.to_string().contains(&format!("has format {format}; this hapax reads format 4")), "{refusal}");
    }
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
    turns_red(module_path!(), "redb_conforms", "bucket-dropped-early");
}

#[test]
fn mutation_bloom_half_built_is_found() {
    turns_red(module_path!(), "records_are_found_again_after_a_restart", "bloom-half-built");
}

#[test]
fn mutation_feed_not_applied_is_found() {
    turns_red(module_path!(), "redb_conforms_at_every_depth", "feed-not-applied");
}

#[test]
fn mutation_feed_end_forgotten_is_found() {
    turns_red(module_path!(), "a_full_feed_says_what_it_has_dropped_on_redb", "feed-end-forgotten");
}

#[test]
fn mutation_open_counts_as_ended_is_found() {
    turns_red(module_path!(), "memory_conforms", "open-counts-as-ended");
    turns_red(module_path!(), "redb_conforms", "open-counts-as-ended");
}

#[test]
fn mutation_shared_state_that_is_not_checked_is_found() {
    turns_red(module_path!(), "redb_conforms", "shared-unchecked");
}
