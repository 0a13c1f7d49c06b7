//! Resources that the scenarios share: the folder of stores, the amount of work, the machine,
//! filled stores. Measures nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::report::Stamp;
use crate::{Missing, child, measure};

/// Amount of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// Seconds: shows that it works.
    Quick,
    /// Minutes.
    Normal,
    /// As many records as the targets ask about.
    Long,
}

/// Resources that the scenarios share.
pub(crate) struct Workbench {
    pub(crate) size: Size,
    folder: TempDir,
    rounds: Option<usize>,
    /// The bench of another build.
    pub(crate) against: Option<PathBuf>,
    /// Stores that were filled once, by how many records they hold.
    filled: RefCell<BTreeMap<u64, PathBuf>>,
}

impl Workbench {
    pub(crate) fn new(folder: &Path, size: Size, rounds: Option<usize>) -> Result<Self, Missing> {
        on_a_disk(folder)?;
        let folder = tempfile::Builder::new().prefix("hapax-bench-").tempdir_in(folder);
        let folder = folder.map_err(|error| Missing(format!("no stores can be made there: {error}; see --store")))?;
        Ok(Self { size, folder, rounds, against: None, filled: RefCell::default() })
    }

    /// Returns this workbench with the bench of another build.
    pub(crate) fn against(self, against: Option<PathBuf>) -> Self {
        Self { against, ..self }
    }

    /// Returns the folder of the stores.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// One of three, by how much is to be done.
    pub(crate) fn pick<T>(&self, quick: T, normal: T, long: T) -> T {
        match self.size {
            Size::Quick => quick,
            Size::Normal => normal,
            Size::Long => long,
        }
    }

    /// Rounds of a scenario that wants `usual`; two in the quick form.
    pub(crate) fn rounds(&self, usual: usize) -> usize {
        self.rounds.unwrap_or_else(|| self.pick(2, usual, usual))
    }

    /// The disk's sync time, just now, in milliseconds.
    pub(crate) fn sync_ms(&self) -> f64 {
        measure::sync_ms(self.folder())
    }

    /// When, where and how.
    pub(crate) fn stamp(&self) -> Stamp {
        let size = self.pick("quick", "normal", "long").into();
        Stamp { commit: commit(), day: day(), machine: machine(), size, sync_ms: self.sync_ms() }
    }

    /// A copy of a store with `records` records that is the caller's own; filled once a run, by a
    /// process of its own.
    pub(crate) fn filled(&self, records: u64) -> TempDir {
        let mut filled = self.filled.borrow_mut();
        let from = filled.entry(records).or_insert_with(|| {
            let path = self.folder().join(format!("filled-{records}"));
            child::Child::start("fill", &path, 0, records).wait_for("filled").end();
            path
        });
        let copy = tempfile::tempdir_in(self.folder()).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
        copy
    }
}

/// A file system in memory syncs nothing, and every figure would say so without telling.
pub(crate) fn on_a_disk(folder: &Path) -> Result<(), Missing> {
    const TMPFS: u64 = 0x0102_1994;
    let kind = rustix::fs::statfs(folder).map_err(|error| Missing(format!("{}: {error}", folder.display())))?.f_type;
    if kind as u64 == TMPFS {
        return Err(Missing(format!("{} is in memory; give --store a folder on a disk", folder.display())));
    }
    Ok(())
}

/// The commit of the checkout that this was built from.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ":/host", ":/tests/bench"]);
    if changed.is_some_and(|changes| !changes.is_empty()) { format!("{commit} with changes") } else { commit }
}

fn day() -> String {
    time::OffsetDateTime::now_utc().date().to_string()
}

fn machine() -> String {
    let read = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = read("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".into());
    let memory = read("/proc/meminfo", "MemTotal").and_then(|kibi| kibi.strip_suffix(" kB")?.parse::<u64>().ok());
    format!("{cores} cores ({model}), {} GiB", memory.unwrap_or(0) >> 20)
}
