//! Power is lost, syncs fail, disks fill: what was reported durable is there afterwards, and what
//! is there is whole.

use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;

use hapax_core::{Handling, Inspect as _, Outbox as _, Outcome, StoreError};
use hapax_store::{OpenError, RedbStore, StoreOptions};
use hapax_tests::backend::{LossyDisk, Operation, Part};
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::mutation::turns_red;
use hapax_tests::processors::{Counter, ledger};
use hapax_tests::random::Random;

/// Each commit is a memtable and a transaction of its own, so that transactions come between
/// appends; and the journal has room for three or four frames only, so that it goes round every few
/// messages.
fn tiny() -> StoreOptions {
    StoreOptions {
        memtable_bytes: 1,
        unapplied_bytes_max: 4 << 10,
        bucket_rows_max: 5,
        journal_bytes: (4 << 10) + 2_600,
        ..StoreOptions::default()
    }
}

/// Moves money, one message after the other; answers the numbers whose ending was reported, and the
/// store.
async fn transfers(
    disk: &LossyDisk,
    options: StoreOptions,
    numbers: Range<usize>,
) -> (Vec<usize>, Option<Arc<RedbStore>>) {
    let Ok(store) = disk.open_with(options) else { return (Vec::new(), None) };
    let store = Arc::new(store);
    let bench = Bench::new("ledger", store.clone(), ledger(), quick()).await;
    let mut acknowledged = Vec::new();
    for number in numbers {
        let data = format!(r#"{{"from":"a{}","to":"b","amount":{}}}"#, number % 3, number + 1);
        match bench.consumer.handle(message(&format!("t-{number}"), &data), Handling::default()).await {
            Ok(Outcome::Completed { .. } | Outcome::Duplicate(_)) => acknowledged.push(number),
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    (acknowledged, Some(store))
}

/// Every acknowledged transfer is there; record, state and outbox of each are there together or not
/// at all. Answers how many there are.
async fn check(disk: &LossyDisk, options: StoreOptions, acknowledged: &[usize], context: &str) -> usize {
    let store = match disk.open_with(options) {
        Ok(store) => store,
        Err(error) if acknowledged.is_empty() => {
            // Power lost while the store was being made: refusing is allowed, serving it as
            // something is not.
            assert!(matches!(error, OpenError::Damaged { .. } | OpenError::Io { .. }), "{context}: {error}");
            return 0;
        }
        Err(error) => panic!("{context}: {error}"),
    };
    let records = store.records(None, None, 1_000).await.unwrap();
    let numbers: Vec<usize> = records.iter().map(|(key, _)| key.key[2..].parse().unwrap()).collect();
    for number in acknowledged {
        assert!(numbers.contains(number), "{context}: t-{number} was acknowledged and is gone");
    }
    let expected: i64 = numbers.iter().map(|number| *number as i64 + 1).sum();
    let state = store.state_of(&hapax_core::Scope::of("ledger"), "account/", 100).unwrap();
    let amount = |row: &hapax_store::StateRow| std::str::from_utf8(&row.value).unwrap().parse::<i64>().unwrap();
    assert_eq!(state.iter().map(amount).sum::<i64>(), 0, "{context}: the ledger's sum");
    let credited = state.iter().find(|row| row.key == "account/b").map_or(0, amount);
    assert_eq!(credited, expected, "{context}: the state is not what the records say");
    assert_eq!(store.pending(None, 1_000).await.unwrap().len(), numbers.len(), "{context}: outbox");
    numbers.len()
}

const TRANSFERS: usize = 12;

/// Proves G7, G92, G93.
#[tokio::test]
async fn power_loss_at_every_operation_keeps_what_was_acknowledged() {
    let total = {
        let disk = LossyDisk::new();
        transfers(&disk, StoreOptions::default(), 0..TRANSFERS).await;
        disk.operations()
    };
    assert!(total > 50, "the run must be long enough to mean something, it had {total} operations");
    let mut lost_unacknowledged = 0;
    for operation in 0..total {
        let disk = LossyDisk::new();
        disk.fail_after(operation);
        let (acknowledged, _) = transfers(&disk, StoreOptions::default(), 0..TRANSFERS).await;
        for seed in 1..=3 {
            let after = disk.after_power_loss(seed * 1_000 + operation);
            let context = format!("operation {operation}, seed {seed}");
            lost_unacknowledged += TRANSFERS - check(&after, StoreOptions::default(), &acknowledged, &context).await;
        }
    }
    assert!(lost_unacknowledged > 0, "the backend never lost anything: it tests nothing");
}

/// Messages of the test below: enough for the journal to go round twice.
const FEW: usize = 7;

/// Two losses, one after the other, on a store whose journal goes round every few messages while
/// its tables are written; after the first every message is delivered again, and more follow.
#[tokio::test]
async fn power_lost_twice_while_the_journal_goes_round_keeps_what_was_acknowledged() {
    let total = {
        let disk = LossyDisk::new();
        transfers(&disk, tiny(), 0..FEW).await;
        disk.operations()
    };
    assert!(total > 60, "transactions must come between appends, there were {total} operations");
    for operation in 0..total {
        let disk = LossyDisk::new();
        disk.fail_after(operation);
        let (first, _) = transfers(&disk, tiny(), 0..FEW).await;
        for seed in 1..=2 {
            let context = format!("operation {operation}, seed {seed}");
            let mut random = Random::of(seed * 10_000 + operation);
            let after = disk.after_power_loss(random.below(u64::MAX));
            after.fail_after(random.below(2 * total));
            let (second, store) = transfers(&after, tiny(), 0..2 * FEW).await;
            if store.is_none() && first.is_empty() {
                continue;
            }
            drop(store);
            let mut acknowledged = first.clone();
            acknowledged.extend(second);
            let last = after.after_power_loss(random.below(u64::MAX));
            let present = check(&last, tiny(), &acknowledged, &format!("{context}, second loss")).await;
            let (third, _) = transfers(&last, tiny(), 0..2 * FEW).await;
            // What was refused at birth stays refused; everything else goes on to its end.
            assert!(third.len() == 2 * FEW || present == 0 && acknowledged.is_empty(), "{context}: {third:?}");
        }
    }
}

/// The process dies between an append and its sync; the next one reads the frame from the page
/// cache and answers duplicates by it. It must have made it durable first: if the power goes then,
/// the answer still holds, and the store still opens.
/// Proves G177.
#[tokio::test]
async fn what_a_restart_finds_unsynced_is_durable_before_anybody_hears_of_it() {
    let disk = LossyDisk::new();
    let (acknowledged, store) = transfers(&disk, StoreOptions::default(), 0..2).await;
    drop(store);
    let (mut answered, operations) = (0, 24);
    for operation in 0..operations {
        let disk = disk.copy();
        let store = Arc::new(disk.open().unwrap());
        let bench = Bench::new("ledger", store.clone(), ledger(), quick()).await;
        disk.refuse_once(Part::Journal, Operation::Sync, 0, ErrorKind::Other);
        let failed = bench.consumer.handle(message("t-2", TRANSFER_2), Handling::default()).await;
        assert!(failed.is_err(), "{failed:?}");
        drop(bench);
        disk.kill(store);
        // The next process may be stopped by a power loss of its own at any operation.
        disk.fail_after(operation);
        let (second, store) = transfers(&disk, StoreOptions::default(), 2..4).await;
        let mut all = acknowledged.clone();
        all.extend(&second);
        answered += usize::from(!second.is_empty());
        for seed in 1..=4 {
            let after = disk.after_power_loss(seed);
            check(&after, StoreOptions::default(), &all, &format!("operation {operation}, seed {seed}")).await;
        }
        drop(store);
    }
    assert!(answered > 0, "nothing was ever answered: it tests nothing");
}

const TRANSFER_2: &str = r#"{"from":"a2","to":"b","amount":3}"#;

/// Proves G18.
#[tokio::test]
async fn a_failed_sync_closes_the_store() {
    let disk = LossyDisk::new();
    let store = Arc::new(disk.open().unwrap());
    let counter = Counter::new();
    let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
    bench.handle(message("m-1", "{}")).await;
    // Once: the syncs after it would go well, and say nothing about what the failed one was to make
    // durable.
    disk.refuse_once(Part::Journal, Operation::Sync, 0, ErrorKind::Other);
    let error = bench.consumer.handle(message("m-2", "{}"), Handling::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::Io(_)), "{error}");
    for _ in 0..3 {
        let later = bench.consumer.handle(message("m-3", "{}"), Handling::default()).await;
        assert!(later.is_err(), "went on after a failed sync");
    }
    assert!(bench.committer.failure().is_some());
    drop(bench);
    disk.kill(store);
    let bench = Bench::new("p", Arc::new(disk.open().unwrap()), counter, quick()).await;
    assert!(matches!(bench.handle(message("m-1", "{}")).await, Outcome::Duplicate(_)));
    // Whether the second is there was not known; that it counts once is.
    bench.handle(message("m-2", "{}")).await;
    let Outcome::Completed { output } = bench.handle(message("m-3", "{}")).await else { panic!() };
    assert_eq!(output.data, "3");
}

#[tokio::test]
async fn a_disk_that_fills_in_the_middle_of_an_append_loses_nothing() {
    for after in 0..4 {
        let disk = LossyDisk::new();
        let store = Arc::new(disk.open().unwrap());
        let counter = Counter::new();
        let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
        disk.refuse_once(Part::Journal, Operation::Change, after, ErrorKind::StorageFull);
        let mut completed = 0;
        let error = loop {
            match bench.consumer.handle(message(&format!("m-{completed}"), "{}"), Handling::default()).await {
                Ok(Outcome::Completed { .. }) => completed += 1,
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StoreError::Full(_)), "{error}");
        assert!(error.to_string().contains("Free some space and start again"), "{error}");
        let later = bench.consumer.handle(message("later", "{}"), Handling::default()).await;
        assert!(matches!(later, Err(StoreError::Full(_))), "{later:?}");
        drop(bench);
        disk.kill(store);
        // Space was freed; the host was started again.
        let bench = Bench::new("p", Arc::new(disk.open().unwrap()), counter, quick()).await;
        for number in 0..completed {
            assert!(matches!(bench.handle(message(&format!("m-{number}"), "{}")).await, Outcome::Duplicate(_)));
        }
        let Outcome::Completed { output } = bench.handle(message("later", "{}")).await else { panic!() };
        assert_eq!(output.data, (completed + 1).to_string());
    }
}

/// The tables cannot be written: nothing is lost, since the journal has it, but the store says why
/// it closed.
#[tokio::test]
async fn an_applier_that_fails_closes_the_store_in_words() {
    let cases = [
        (Operation::Change, ErrorKind::StorageFull, "disk is full"),
        (Operation::Sync, ErrorKind::StorageFull, "disk is full"),
        (Operation::Change, ErrorKind::Other, "the store failed"),
        (Operation::Sync, ErrorKind::Other, "the store failed"),
    ];
    for (operation, kind, words) in cases {
        let disk = LossyDisk::new();
        let store = Arc::new(disk.open_with(tiny()).unwrap());
        let counter = Counter::new();
        let bench = Bench::new("p", store.clone(), counter.clone(), quick()).await;
        disk.refuse_once(Part::Database, operation, 0, kind);
        let mut completed = 0;
        let error = loop {
            match bench.consumer.handle(message(&format!("m-{completed}"), "{}"), Handling::default()).await {
                Ok(Outcome::Completed { .. }) => completed += 1,
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains(words), "{error}");
        assert!(store.flush().unwrap_err().to_string().contains(words));
        drop(bench);
        disk.kill(store);
        let bench = Bench::new("p", Arc::new(disk.open_with(tiny()).unwrap()), counter, quick()).await;
        for number in 0..completed {
            let outcome = bench.handle(message(&format!("m-{number}"), "{}")).await;
            assert!(matches!(outcome, Outcome::Duplicate(_)), "m-{number}: {outcome:?}");
        }
        assert!(matches!(bench.handle(message("later", "{}")).await, Outcome::Completed { .. }));
    }
}

#[test]
fn mutation_journal_not_synced_is_found() {
    turns_red(module_path!(), "power_loss_at_every_operation_keeps_what_was_acknowledged", "journal-not-synced");
}

hapax_tests::mutations! {
    mutation_a_journal_that_grows_over_frames_is_found: power_lost_twice_while_the_journal_goes_round_keeps_what_was_acknowledged is red with "journal-grows-over-frames";
    mutation_recovered_frames_that_are_not_rewritten_are_found: what_a_restart_finds_unsynced_is_durable_before_anybody_hears_of_it is red with "recovered-not-rewritten";
}
