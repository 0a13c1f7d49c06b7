//! Every store passes the conformance suite; the redb folder is found again, or refused in words.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use hapax_core::{Ending, Stored};
use hapax_store::{MemoryStore, OpenError, RedbStore};
use hapax_tests::bench::{Bench, message, quick};
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

/// Power is lost at every operation of a run; what was reported durable must be there, and what is there must be whole.
#[tokio::test]
async fn power_loss_at_every_operation_keeps_what_was_acknowledged() {
    let total = {
        let file = LossyDisk::new();
        transfers(&file).await;
        file.operations()
    };
    assert!(total > 50, "the run must be long enough to mean something, it had {total} operations");
    let mut lost_unacknowledged = 0;
    for operation in 0..total {
        let file = LossyDisk::new();
        file.fail_after(operation);
        let acknowledged = transfers(&file).await;
        for seed in 1..=3 {
            let disk = file.after_power_loss(seed * 1_000 + operation);
            let present = check(&disk, &acknowledged, &format!("operation {operation}, seed {seed}")).await;
            lost_unacknowledged += TRANSFERS - present;
        }
    }
    assert!(lost_unacknowledged > 0, "the backend never lost anything: it tests nothing");
}

const TRANSFERS: usize = 12;

/// Moves money one message after the other; answers the ids whose ending was reported.
async fn transfers(file: &LossyDisk) -> Vec<String> {
    let Ok(store) = file.open() else { return Vec::new() };
    let bench = Bench::new("ledger", Arc::new(store), hapax_tests::processors::ledger(), quick()).await;
    let mut acknowledged = Vec::new();
    for number in 0..TRANSFERS {
        let id = format!("t-{number}");
        let data = format!(r#"{{"from":"a{}","to":"b","amount":{}}}"#, number % 3, number + 1);
        match bench.consumer.handle(message(&id, &data), hapax_core::Handling::default()).await {
            Ok(Ending::Completed { .. }) => acknowledged.push(id),
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    acknowledged
}

/// Every acknowledged transfer is there; record, state and outbox of each are there together or not at all.
async fn check(disk: &LossyDisk, acknowledged: &[String], context: &str) -> usize {
    let store = match disk.open() {
        Ok(store) => store,
        Err(error) if acknowledged.is_empty() => {
            // Power lost while the store was being made: refusing is allowed, serving it as something is not.
            assert!(matches!(error, OpenError::Damaged { .. } | OpenError::Io { .. }), "{context}: {error}");
            return 0;
        }
        Err(error) => panic!("{context}: {error}"),
    };
    use hapax_core::storage::{Inspect as _, Outbox as _};
    let records = store.records(None, None, 1_000).await.unwrap();
    let ids: Vec<String> = records.iter().map(|(key, _)| key.key.to_string()).collect();
    for id in acknowledged {
        assert!(ids.contains(id), "{context}: {id} was acknowledged and is gone");
    }
    let expected: i64 = ids.iter().map(|id| id[2..].parse::<i64>().unwrap() + 1).sum();
    let state = store.state_of(&hapax_core::Scope::of("ledger"), "account/", 100).unwrap();
    let amount = |row: &hapax_store::StateRow| std::str::from_utf8(&row.value).unwrap().parse::<i64>().unwrap();
    assert_eq!(state.iter().map(amount).sum::<i64>(), 0, "{context}: the ledger's sum");
    let credited = state.iter().find(|row| row.key == "account/b").map_or(0, amount);
    assert_eq!(credited, expected, "{context}: the state is not what the records say");
    assert_eq!(store.pending(None, 1_000).await.unwrap().len(), ids.len(), "{context}: outbox");
    ids.len()
}

#[tokio::test]
async fn a_failed_sync_closes_the_store() {
    let file = LossyDisk::new();
    let store = Arc::new(file.open().unwrap());
    let bench = Bench::new("p", store.clone(), Counter::new(), quick()).await;
    bench.handle(message("m-1", "{}")).await;
    file.fail_after(0);
    let handling = hapax_core::Handling::default();
    assert!(bench.consumer.handle(message("m-2", "{}"), handling).await.is_err());
    file.fail_after(u64::MAX);
    assert!(bench.consumer.handle(message("m-3", "{}"), handling).await.is_err(), "went on after a failed commit");
    assert!(bench.committer.failure().is_some());
}
