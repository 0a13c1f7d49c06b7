//! The scrub: walks all tables, slowly, on a thread of its own, and closes the store at the first
//! damage. Finds what no read of one row can tell: rows that are lost, and pages that lead astray.

use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hapax_core::StoreError;
use redb::{Key, ReadOnlyTable, ReadableTable as _, ReadableTableMetadata as _, Value};

use crate::format::layout;
use crate::format::seal::{Sealed, Seals, seal_of};
use crate::redb::core::Core;
use crate::redb::open::running_error;
use crate::redb::view::{BucketTables, Snapshot};
use crate::redb::{read, sums};

/// Rows that are checked between two pauses, and under one snapshot: a snapshot that is held keeps
/// redb from using freed pages again.
const CHUNK_ROWS: usize = 64;
/// Pause after each chunk.
const PAUSE: Duration = Duration::from_millis(10);
/// Largest table whose sum is checked, in rows: that is done in one go, under one snapshot.
const SUMMED_ROWS_MAX: u64 = 4 << 20;
/// Rest before each pass.
const REST: Duration = Duration::from_secs(300);

/// Scrubs until the store closes.
pub(crate) fn run(core: &Core) {
    while rest(core, REST) {
        let paused = &|| rest(core, PAUSE);
        let pass = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pass(core, paused)));
        // redb panics on some damage, as if it were a bug of its own.
        let contradicts = || Err(StoreError::Damaged("the pages of the database contradict each other".into()));
        if let Err(error) = pass.unwrap_or_else(|_| contradicts()) {
            return core.fail(error);
        }
    }
}

/// Waits; returns false at once when the store closes.
fn rest(core: &Core, time: Duration) -> bool {
    let end = Instant::now() + time;
    let mut progress = core.progress.lock();
    while !(progress.closing || progress.failed.is_some()) {
        if core.stopping.wait_until(&mut progress, end).timed_out() {
            return true;
        }
    }
    false
}

/// Checks every row of every table once. Stops where `pause` returns false.
pub(crate) fn pass(core: &Core, pause: &dyn Fn() -> bool) -> Result<(), StoreError> {
    let seals = core.seals;
    let scrub = Scrub { core, pause };
    scrub.table("kept", |snapshot| Some(&snapshot.kept), &sealed(seals, Sealed::Kept))?;
    scrub.table("outbox", |snapshot| Some(&snapshot.outbox), &sealed(seals, Sealed::Outbox))?;
    scrub.table("dead_letters", |snapshot| Some(&snapshot.held_under), &sealed(seals, Sealed::Held))?;
    scrub.table("feed", |snapshot| Some(&snapshot.feed), &sealed(seals, Sealed::Feed))?;
    let snapshot = scrub.snapshot();
    let (scopes, buckets): (Vec<Vec<u8>>, Vec<u64>) = (
        snapshot.scopes().map(<[u8]>::to_vec).collect(),
        snapshot.buckets.iter().map(|tables| tables.bucket.id).collect(),
    );
    tables_are_there(&snapshot)?;
    drop(snapshot);
    for prefix in scopes {
        let Some((scope, _)) = layout::parse_scope(&prefix) else { continue };
        let seal = |_: &Snapshot, key: &[u8], value: &[u8]| {
            seals.open(Sealed::State, &[&prefix, key], value).map(|_| seal_of(value))
        };
        scrub.table(&layout::state_name(&scope), |snapshot| snapshot.state(&prefix), &seal)?;
    }
    for id in buckets {
        let seal = |_: &Snapshot, key: &[u8], value: &[u8]| Ok(seals.of(Sealed::Index, &[key], value));
        scrub.sum(&layout::index_name(id), |snapshot| snapshot.bucket(id).map(|tables| &tables.index), &seal)?;
        let row = |snapshot: &Snapshot, key: &[u8], value: &[u8]| match snapshot.bucket(id) {
            Some(tables) => row_is_there(snapshot, tables, key, value),
            None => Ok(0),
        };
        scrub.rows(|snapshot| snapshot.bucket(id).map(|tables| &tables.index), &row)?;
    }
    Ok(())
}

/// Checks that each table that has rows by its sum is there.
fn tables_are_there(snapshot: &Snapshot) -> Result<(), StoreError> {
    let fixed = ["kept", "outbox", "dead_letters", "feed", "buckets"];
    for row in snapshot.sums.iter().map_err(running_error)? {
        let (name, _) = row.map_err(running_error)?;
        let name = name.value();
        let there = fixed.contains(&name)
            || sums::read(&snapshot.sums, &snapshot.seals, name)? == 0
            || layout::parse_state_name(name)
                .is_some_and(|scope| snapshot.state(&layout::scope_prefix(&scope)).is_some())
            || snapshot.buckets.iter().any(|tables| layout::index_name(tables.bucket.id) == name);
        if !there {
            return Err(astray(name));
        }
    }
    Ok(())
}

/// Checks the row of a record to which an entry of an index points.
fn row_is_there(snapshot: &Snapshot, tables: &BucketTables, key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
    let entry = (<u128 as Value>::from_bytes(key), <u64 as Value>::from_bytes(value));
    read::with_row(snapshot, tables, entry, |_| Ok(0))
}

/// Checks one row, and returns its seal.
type Check<'a> = dyn Fn(&Snapshot, &[u8], &[u8]) -> Result<u64, StoreError> + 'a;

/// Returns the check of a table whose values end with their seals.
fn sealed(seals: Seals, table: Sealed) -> impl Fn(&Snapshot, &[u8], &[u8]) -> Result<u64, StoreError> {
    move |_, key, value| seals.open(table, &[key], value).map(|_| seal_of(value))
}

struct Scrub<'a> {
    core: &'a Core,
    pause: &'a dyn Fn() -> bool,
}

impl Scrub<'_> {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.core.view.read().snapshot.clone()
    }

    fn table<K: Key + 'static, V: Value + 'static>(
        &self,
        name: &str,
        table: impl Fn(&Snapshot) -> Option<&ReadOnlyTable<K, V>>,
        check: &Check<'_>,
    ) -> Result<(), StoreError> {
        self.sum(name, &table, check)?;
        self.rows(table, check)
    }

    /// Compares the sum of a table with the stored one: no row is lost, doubled or made up.
    fn sum<K: Key + 'static, V: Value + 'static>(
        &self,
        name: &str,
        table: impl Fn(&Snapshot) -> Option<&ReadOnlyTable<K, V>>,
        seal: &Check<'_>,
    ) -> Result<(), StoreError> {
        let snapshot = self.snapshot();
        let Some(table) = table(&snapshot) else { return Ok(()) };
        if table.len().map_err(running_error)? > SUMMED_ROWS_MAX {
            return Ok(());
        }
        let (mut sum, mut count) = (0, 0);
        for (number, row) in table.iter().map_err(running_error)?.enumerate() {
            if number % 65_536 == 65_535 && !(self.pause)() {
                return Ok(());
            }
            let (key, value) = row.map_err(running_error)?;
            count += 1;
            sum ^= seal(&snapshot, K::as_bytes(&key.value()).as_ref(), V::as_bytes(&value.value()).as_ref())?;
        }
        let same = sum == sums::read(&snapshot.sums, &snapshot.seals, name)?;
        if !same || count != table.len().map_err(running_error)? {
            return Err(astray(name));
        }
        Ok(())
    }

    /// Checks each row of a table, and that it is found by its key.
    fn rows<K: Key + 'static, V: Value + 'static>(
        &self,
        table: impl Fn(&Snapshot) -> Option<&ReadOnlyTable<K, V>>,
        check: &Check<'_>,
    ) -> Result<(), StoreError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let snapshot = self.snapshot();
            let Some(table) = table(&snapshot) else { return Ok(()) };
            let start = after.as_deref().map_or(Bound::Unbounded, |after| Bound::Excluded(K::from_bytes(after)));
            let rows = table.range::<K::SelfType<'_>>((start, Bound::Unbounded)).map_err(running_error)?;
            let mut last = None;
            for row in rows.take(CHUNK_ROWS) {
                let (key, value) = row.map_err(running_error)?;
                let (key, value) = (key.value(), value.value());
                let (key_bytes, value) = (K::as_bytes(&key).as_ref().to_vec(), V::as_bytes(&value));
                check(&snapshot, &key_bytes, value.as_ref())?;
                let found = table.get(&key).map_err(running_error)?;
                if found.is_none_or(|found| V::as_bytes(&found.value()).as_ref() != value.as_ref()) {
                    return Err(astray("a table"));
                }
                last = Some(key_bytes);
            }
            if last.is_none() || !(self.pause)() {
                return Ok(());
            }
            after = last;
        }
    }
}

fn astray(table: &str) -> StoreError {
    let text = format!(
        "the rows of {table} are not those that were written. Stop the host, run `hapax doctor`, and put back a backup of \
         the folder"
    );
    StoreError::Damaged(text.into())
}
