//! The real binary, run and killed; and a checker of what it left behind that shares no code with
//! it: it reads the database with redb alone, by `docs/internals/storage-format.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition, TableHandle as _};
use serde_json::Value;

/// The host's binary, built by `cargo xtask test`.
pub fn hapax() -> Command {
    let path = std::env::var_os("HAPAX_BIN").expect("HAPAX_BIN is not set: run the tests with `cargo xtask test`");
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}

/// A guest's component, built by `cargo xtask test`.
pub fn guest(name: &str) -> PathBuf {
    let folder =
        std::env::var_os("HAPAX_GUESTS").expect("HAPAX_GUESTS is not set: run the tests with `cargo xtask test`");
    PathBuf::from(folder).join(format!("{name}.wasm"))
}

/// One processor over one input, in a folder of its own.
pub struct Job {
    folder: tempfile::TempDir,
    processor: &'static str,
    /// Further arguments of every run.
    pub arguments: Vec<String>,
    /// Environment of every run: a mutation, say.
    pub environment: Vec<(&'static str, String)>,
    /// Ids reported as completed, over all runs, with how often.
    pub completed: BTreeMap<String, u32>,
}

impl Job {
    /// A job for `processor` over `input`.
    pub fn new(processor: &'static str, input: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("input.jsonl"), input).unwrap();
        Self { folder, processor, arguments: Vec::new(), environment: Vec::new(), completed: BTreeMap::new() }
    }

    /// The store's folder.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The outbox file.
    pub fn outbox(&self) -> PathBuf {
        self.folder.path().join("outbox.jsonl")
    }

    /// `hapax run` on this job.
    pub fn command(&self) -> Command {
        let mut command = hapax();
        command.args(["run", "--json", "--component"]).arg(guest(self.processor));
        command.arg("--store").arg(self.store()).arg("--outbox").arg(self.outbox());
        command.arg("--input").arg(self.folder.path().join("input.jsonl"));
        command.args(&self.arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs to the end, or to its death at a fault point; answers whether it came to the end.
    pub fn run(&mut self, fault: Option<&str>) -> bool {
        let mut command = self.command();
        if let Some(fault) = fault {
            command.env("HAPAX_FAULT", fault);
        }
        let output = command.output().unwrap();
        self.note(&output);
        let died = output.status.code().is_none();
        assert!(died || output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(fault.is_some() || !died, "died without being told: {}", String::from_utf8_lossy(&output.stderr));
        !died
    }

    /// Runs, and is killed with SIGKILL after `delay` if it has not ended by then; answers whether
    /// it was killed.
    pub fn run_and_kill(&mut self, delay: Duration) -> bool {
        let mut child = self.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(delay);
        // The kill may come too late; what was reported counts either way.
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        self.note(&output);
        output.status.code().is_none()
    }

    fn note(&mut self, output: &Output) {
        // A last line may be cut short by the kill.
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            if line["outcome"] == "completed" {
                *self.completed.entry(line["id"].as_str().unwrap().to_owned()).or_default() += 1;
            }
        }
    }

    /// Returns the errors in the results of the runs; `expected` state is exact, `sent` says how
    /// many messages each id sends. Empty if nothing is lost and nothing doubled.
    pub fn faults(&self, ids: &BTreeSet<String>, expected: &BTreeMap<String, i64>, sent: bool) -> Vec<String> {
        let mut faults = Vec::new();
        let left = Left::read(&self.store().join("records.redb"));
        let lost: Vec<_> = ids.difference(&left.completed).collect();
        if !lost.is_empty() {
            faults.push(format!("lost: {lost:?}"));
        }
        if left.told != left.hashes {
            let (told, there) = (left.told.len(), left.hashes.len());
            faults.push(format!(
                "the feed tells of {told} completions, and {there} records are completed; or not the same"
            ));
        }
        if left.state != *expected {
            faults.push(format!("the state is {:?}, and should be {expected:?}", left.state));
        }
        let twice: Vec<_> = self.completed.iter().filter(|(_, times)| **times > 1).map(|(id, _)| id).collect();
        if !twice.is_empty() {
            faults.push(format!("reported as completed more than once: {twice:?}"));
        }
        if sent {
            let text = std::fs::read_to_string(self.outbox()).unwrap_or_default();
            let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let unique: BTreeSet<_> = lines.iter().map(|line| line["id"].as_str().unwrap()).collect();
            if lines.len() != ids.len() || unique.len() != ids.len() {
                faults.push(format!("{} lines with {} ids sent, not {}", lines.len(), unique.len(), ids.len()));
            }
        }
        faults
    }
}

/// Contents of a database.
struct Left {
    completed: BTreeSet<String>,
    state: BTreeMap<String, i64>,
    /// Hashes of completed records, in order.
    hashes: Vec<u128>,
    /// Of which the feed says that they completed, in the order of the hashes, one a time.
    told: Vec<u128>,
}

impl Left {
    fn read(path: &Path) -> Self {
        let plain = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(plain.path(), crate::raw::pages_of_redb(path)).unwrap();
        let database = redb::Database::open(plain.path()).unwrap();
        let txn = database.begin_read().unwrap();
        let part = |key: &[u8], number: usize| -> String {
            let text = String::from_utf8(key.to_vec()).unwrap();
            text.split("\0\u{1}").nth(number).unwrap().to_owned()
        };
        let records = records(&txn).into_iter().map(|(hash, row)| {
            let key = 8 + u32::from_le_bytes(row[4..8].try_into().unwrap()) as usize;
            (hash, part(&row[8..key], 3), row[key])
        });
        // The first byte of a record is its state: 1 is completed.
        let (mut hashes, completed): (Vec<_>, _) =
            records.filter(|(.., state)| *state == 1).map(|(hash, key, _)| (hash, key)).unzip();
        hashes.sort_unstable();
        let mut told = completions(&txn);
        told.sort_unstable();
        let mut state = BTreeMap::new();
        let tables = txn.list_tables().unwrap().map(|table| table.name().to_owned());
        for name in tables.filter(|name| name.starts_with("state/")) {
            let table = txn.open_table(TableDefinition::<&[u8], &[u8]>::new(&name)).unwrap();
            for row in table.iter().unwrap() {
                let (key, value) = row.unwrap();
                let key = String::from_utf8(key.value().to_vec()).unwrap();
                // What the host keeps for itself.
                if key.starts_with('\u{10ffff}') {
                    continue;
                }
                state.insert(key, std::str::from_utf8(&value.value()[8..]).unwrap().parse().unwrap());
            }
        }
        Self { completed, state, hashes, told }
    }
}

/// Hashes of the records of which the feed says that they completed.
fn completions(txn: &redb::ReadTransaction) -> Vec<u128> {
    let mut found = Vec::new();
    for row in txn.open_table(TableDefinition::<(u64, u32), &[u8]>::new("feed")).unwrap().iter().unwrap() {
        let block = row.unwrap().1;
        let mut rest = block.value();
        while !rest.is_empty() {
            rest = after_varints(rest, 2);
            if rest[0] == 1 {
                found.push(u128::from_le_bytes(rest[1..17].try_into().unwrap()));
            }
            rest = after_varints(&rest[17..], 4);
        }
    }
    found
}

fn after_varints(mut bytes: &[u8], count: usize) -> &[u8] {
    for _ in 0..count {
        let length = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        bytes = &bytes[length..];
    }
    bytes
}

/// Hash and row of every record: those in buckets, by their index, and those without expiry.
fn records(txn: &redb::ReadTransaction) -> Vec<(u128, Vec<u8>)> {
    let mut found = Vec::new();
    for (bucket, _) in
        txn.open_table(TableDefinition::<u64, (u64, u64)>::new("buckets")).unwrap().iter().unwrap().map(|row| {
            let (bucket, facts) = row.unwrap();
            (bucket.value(), facts.value())
        })
    {
        let (index, blocks) = (format!("index/{bucket}"), format!("rows/{bucket}"));
        let index = txn.open_table(TableDefinition::<u128, u64>::new(&index)).unwrap();
        let blocks = txn.open_table(TableDefinition::<u64, &[u8]>::new(&blocks)).unwrap();
        for row in index.iter().unwrap() {
            let (hash, location) = row.unwrap();
            let (hash, location) = (hash.value(), location.value());
            let block = blocks.get(location >> 20).unwrap().unwrap();
            let at = (location & 0xf_ffff) as usize;
            let length = u32::from_le_bytes(block.value()[at..at + 4].try_into().unwrap()) as usize;
            found.push((hash, block.value()[at..at + 4 + length].to_vec()));
        }
    }
    let kept = txn.open_table(TableDefinition::<u128, &[u8]>::new("kept")).unwrap();
    found.extend(kept.iter().unwrap().map(|row| {
        let (hash, row) = row.unwrap();
        (hash.value(), row.value().to_vec())
    }));
    found
}
