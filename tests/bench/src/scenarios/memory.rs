//! Resident memory of a process that wrote all its records itself.

use hapax_core::Options;
use hapax_store::StoreOptions;

use crate::child::Child;
use crate::measure::{folder_bytes, memory_of, short};
use crate::report::{Met, Section};
use crate::workbench::{Size, Workbench};
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "memory",
    about: "resident memory after 1 million, or (--long) 10 million, records",
    by_default: true,
    run,
};

/// Memory that a host may use beyond the configured amount.
const OWN_BYTES: u64 = 64 << 20;

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let most = bench.pick(2_000, 1_000_000, 10_000_000);
    section.table(&["records", "VmRSS MiB", "VmHWM MiB", "store on disk MiB"]);
    let mut last = (0, 0);
    for records in [most / 10, most] {
        let folder = tempfile::tempdir_in(bench.folder()).unwrap();
        let path = folder.path().join("store");
        let child = Child::start("memory", &path, 0, records).wait_for("ready");
        last = (memory_of(child.id(), "VmRSS"), memory_of(child.id(), "VmHWM"));
        let disk = folder_bytes(&path);
        child.end();
        section.row(vec![records.to_string(), mebi(last.0), mebi(last.1), mebi(disk)]);
    }
    let store = StoreOptions::default();
    let granted = [Options::default().cache_bytes, store.page_cache_bytes as u64, store.unapplied_bytes_max as u64]
        .map(|bytes| bytes >> 20);
    let configured = granted.iter().sum::<u64>() << 20;
    section.text(format!(
        "Configured: {} MiB for the cache of terminal records, {} MiB for redb's pages, {} MiB for what is journalled and not yet \
         applied. The process filled its store through the committer, then processed a twentieth more at 1,024 in flight and \
         answered as many duplicates; the load generator's memory is in the figures.",
        granted[0], granted[1], granted[2],
    ));
    let measured =
        format!("{} MiB, at most {} MiB; {} MiB are configured", mebi(last.0), mebi(last.1), configured >> 20);
    if bench.size == Size::Long {
        section.judge("memory", measured, last.1 <= configured + OWN_BYTES);
    } else {
        section.judge("memory", format!("{measured}; at a tenth of the records"), Met::NotJudged);
    }
    Ok(())
}

fn mebi(bytes: u64) -> String {
    short(bytes as f64 / f64::from(1 << 20))
}
