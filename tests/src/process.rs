//! The real binary, run and killed; and a checker of what it left behind that shares no code with it: it reads the
//! database with redb alone, by `docs/STORAGE.md`.

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

    /// Runs, and is killed with SIGKILL after `delay` if it has not ended by then; answers whether it was killed.
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

    /// What is wrong with what the runs left behind; `expected` state is exact, `sent` says how many messages each id
    /// sends. Empty if nothing is lost and nothing doubled.
    pub fn faults(&self, ids: &BTreeSet<String>, expected: &BTreeMap<String, i64>, sent: bool) -> Vec<String> {
        let mut faults = Vec::new();
        let left = Left::read(&self.store().join("records.redb"));
        let lost: Vec<_> = ids.difference(&left.completed).collect();
        if !lost.is_empty() {
            faults.push(format!("lost: {lost:?}"));
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

/// What stands in a database.
struct Left {
    completed: BTreeSet<String>,
    state: BTreeMap<String, i64>,
}

impl Left {
    fn read(path: &Path) -> Self {
        let database = redb::Database::open(path).unwrap();
        let txn = database.begin_read().unwrap();
        let part = |key: &[u8], number: usize| -> String {
            let text = String::from_utf8(key.to_vec()).unwrap();
            text.split("\0\u{1}").nth(number).unwrap().to_owned()
        };
        let completed = records(&txn).into_iter().map(|row| {
            let key = 8 + u32::from_le_bytes(row[4..8].try_into().unwrap()) as usize;
            (row[8..key].to_vec(), row[key])
        });
        // The first byte of a record is its state: 1 is completed.
        let completed = completed.filter(|(_, state)| *state == 1).map(|(key, _)| part(&key, 3));
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
        Self { completed: completed.collect(), state }
    }
}

/// The rows of all records: those in buckets, by their index, and those that are kept.
fn records(txn: &redb::ReadTransaction) -> Vec<Vec<u8>> {
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
            let location = row.unwrap().1.value();
            let block = blocks.get(location >> 20).unwrap().unwrap();
            let at = (location & 0xf_ffff) as usize;
            let length = u32::from_le_bytes(block.value()[at..at + 4].try_into().unwrap()) as usize;
            found.push(block.value()[at..at + 4 + length].to_vec());
        }
    }
    let kept = txn.open_table(TableDefinition::<u128, &[u8]>::new("kept")).unwrap();
    found.extend(kept.iter().unwrap().map(|row| row.unwrap().1.value().to_vec()));
    found
}
