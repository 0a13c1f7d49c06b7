//! From how many records on the bloom filters pay: keys that are there and keys that are not, with
//! filters and without.

use std::path::Path;
use std::time::Instant;

use hapax_core::{IdempotencyStorage as _, RecordKey, Scope};
use hapax_store::{RedbStore, StoreOptions};

use crate::measure::{Spread, settle};
use crate::pipeline::PROCESSOR;
use crate::report::Section;
use crate::work::{self, Ids, Item};
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "filters",
    about: "what a bloom filter a bucket spares and costs a look-up in the store, by number of records",
    by_default: true,
    run,
};

/// Times of one size in nanoseconds a look-up, round by round: filters on and off.
#[derive(Default)]
struct Times {
    absent: [Vec<f64>; 2],
    present: [Vec<f64>; 2],
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let sizes = bench.pick(
        vec![1_000, 4_000],
        vec![1_000, 10_000, 100_000, 1_000_000],
        vec![1_000, 10_000, 100_000, 1_000_000, 10_000_000],
    );
    let looks = bench.pick(1_000, 100_000, 100_000);
    section.text(format!(
        "{looks} keys a round, one after the other, straight at the store: no cache, no pipeline. A bucket holds up to a million \
         records; without filters every bucket is read for a key that is nowhere."
    ));
    section.table(&["records", "key", "with filters, ns", "without, ns", "with to without"]);
    for records in sizes {
        let folder = bench.filled(records);
        let mut times = Times::default();
        for _ in 0..bench.rounds(5) {
            for (column, filters) in [true, false].into_iter().enumerate() {
                let store = opened(folder.path(), filters);
                times.absent[column].push(look_up(&store, records..records + looks, false));
                times.present[column].push(look_up(&store, work::picked(looks, records), true));
            }
        }
        for (key, [with, without]) in [("absent", &times.absent), ("present", &times.present)] {
            section.row(vec![
                records.to_string(),
                key.into(),
                Spread::of(with.iter().copied()).to_string(),
                Spread::of(without.iter().copied()).to_string(),
                Spread::ratio(with, without).to_string(),
            ]);
        }
    }
    Ok(())
}

/// The store, once its filters are built.
fn opened(folder: &Path, filters: bool) -> RedbStore {
    let store = RedbStore::open_with(folder, StoreOptions { filters, ..StoreOptions::default() }).unwrap();
    settle();
    store
}

/// Nanoseconds a look-up, each of which must find a record or not, as said.
fn look_up(store: &RedbStore, numbers: impl Iterator<Item = u64>, present: bool) -> f64 {
    let key = |number| RecordKey::by_message_id(&Scope::of(PROCESSOR), &Item::new(Ids::Random, number).message());
    let keys: Vec<_> = numbers.map(key).collect();
    let since = Instant::now();
    for key in &keys {
        let found = futures_util::FutureExt::now_or_never(store.record(key)).expect("redb answers at once").unwrap();
        assert_eq!(found.is_some(), present);
    }
    since.elapsed().as_nanos() as f64 / keys.len() as f64
}
