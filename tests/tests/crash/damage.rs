//! Damage that a running store meets: it is refused, closes the store, and is told; nothing else is
//! answered from a store that was seen to be damaged.

use std::sync::Arc;

use hapax_core::{Handling, Outbox as _, StoreError};
use hapax_tests::backend::{LossyDisk, Part};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::processors::{Counter, ledger};

/// A disk with messages in its tables.
async fn filled() -> LossyDisk {
    let disk = LossyDisk::new();
    let store = Arc::new(disk.open().unwrap());
    let bench = Bench::new("ledger", store.clone(), ledger(), quick()).await;
    for number in 0..20 {
        let data = format!(r#"{{"from":"a{}","to":"b","amount":{}}}"#, number % 3, number + 1);
        bench.handle(message(&format!("t-{number}"), &data)).await;
    }
    store.flush().unwrap();
    drop((bench, store));
    disk
}

/// Turns a bit of every byte sequence of the database that is the needle, `past` bytes behind its
/// beginning.
fn rot(disk: &LossyDisk, needle: &[u8], past: usize) {
    let mut bytes = disk.bytes(Part::Database);
    let places: Vec<_> = (0..bytes.len() - needle.len()).filter(|at| bytes[*at..].starts_with(needle)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|at| bytes[at + past] ^= 1);
    disk.set(Part::Database, bytes);
}

/// A state entry's value has one bit more: a processor that read it would book another amount.
#[tokio::test]
async fn the_first_damaged_read_closes_the_store() {
    let disk = filled().await;
    // The balance of the account, behind its key and the version of 8 bytes.
    rot(&disk, b"account/b", 9 + 8);
    let store = Arc::new(disk.open().unwrap());
    let bench = Bench::new("ledger", store.clone(), ledger(), quick()).await;
    assert!(bench.committer.failure().is_none());
    let data = r#"{"from":"a0","to":"b","amount":1}"#;
    let error = bench.consumer.handle(message("later", data), Handling::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged(_)), "{error}");
    assert!(error.to_string().contains("hapax doctor"), "{error}");
    let failure = bench.committer.failure().expect("the damage is told").to_string();
    assert_eq!(failure, error.to_string());
    assert!(store.pending(None, 1).await.is_err(), "something else was answered");
    let later = bench.consumer.handle(message("another", "{}"), Handling::default()).await;
    assert!(later.is_err(), "{later:?}");
}

/// No read has met it yet: the scrub tells.
#[tokio::test]
async fn damage_that_nobody_has_read_is_found_by_the_scrub() {
    let disk = filled().await;
    disk.open().unwrap().scrub().unwrap();
    rot(&disk, b"account/a1", 10 + 8);
    let store = Arc::new(disk.open().unwrap());
    let bench = Bench::new("p", store.clone(), Counter::new(), quick()).await;
    assert!(bench.committer.failure().is_none());
    assert!(matches!(store.scrub(), Err(StoreError::Damaged(_))));
    assert!(bench.committer.failure().is_some());
}

hapax_tests::mutations! {
    mutation_seals_that_are_not_checked_are_found: the_first_damaged_read_closes_the_store is red with "seals-unchecked";
    mutation_damage_that_closes_nothing_is_found: the_first_damaged_read_closes_the_store is red with "damage-closes-nothing";
}
