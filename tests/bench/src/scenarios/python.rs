//! The idempotency decorator of AWS Lambda Powertools for Python over Redis, which syncs nothing,
//! beside the host with every commit synced. Needs Debian's `redis-server` and PyPI's
//! `aws-lambda-powertools[redis]` with `boto3`, which it imports unasked.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use crate::measure::{Spread, settle, short};
use crate::pipeline::Host;
use crate::report::Section;
use crate::server;
use crate::work::Ids;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "python",
    about: "a Python idempotency decorator over Redis; needs redis-server and aws-lambda-powertools[redis]",
    by_default: false,
    run,
};

/// Names the interpreter that has the packages.
const PYTHON: &str = "HAPAX_BENCH_PYTHON";
const IN_FLIGHT: usize = 1_024;
/// Reads a first number on a line, handles as many messages as its arguments say, answers with a
/// line.
const SCRIPT: &str = include_str!("python.py");

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let redis = server::redis()?;
    let each = bench.pick(200, 5_000, 5_000);
    let processes = std::thread::available_parallelism().map_or(1, usize::from);
    let mut workers = (0..processes).map(|_| Worker::start(redis.port, each)).collect::<Result<Vec<_>, _>>()?;
    let mut host = Host::filled(bench.folder(), Ids::Random, bench.pick(1_000, 1_000_000, 1_000_000));
    let messages = bench.pick(2_048, 100_000, 100_000);
    settle();
    let (mut ours, mut theirs, mut sync_ms) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds(5) as u64 {
        sync_ms.push(bench.sync_ms());
        ours.push(host.run_fresh(IN_FLIGHT, messages).rate());
        settle();
        let since = Instant::now();
        for (number, worker) in (0..).zip(&mut workers) {
            worker.begin((round * processes as u64 + number) * each);
        }
        workers.iter_mut().for_each(Worker::end);
        theirs.push((each * processes as u64) as f64 / since.elapsed().as_secs_f64());
    }
    section.text(format!(
        "{processes} Python processes beside one Redis, one message at a time each; the host at {IN_FLIGHT} in flight, native, \
         synced. Sync time {} ms.",
        short(Spread::of(sync_ms).median)
    ));
    section.table(&["way", "messages a second"]);
    section.row(vec!["hapax, native".into(), Spread::of(ours.iter().copied()).to_string()]);
    section.row(vec!["Python decorator + Redis".into(), Spread::of(theirs.iter().copied()).to_string()]);
    let ratio = Spread::ratio(&ours, &theirs);
    section.judge("python", format!("{ratio} x, native"), ratio.median >= 20.0);
    Ok(())
}

/// An interpreter that waits for work.
struct Worker {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Worker {
    fn start(port: u16, messages: u64) -> Result<Self, Missing> {
        let python = std::env::var_os(PYTHON).unwrap_or_else(|| "python3".into());
        let mut process = Command::new(python)
            .args(["-c", SCRIPT, &port.to_string(), &messages.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| Missing(format!("no Python: {error}; {PYTHON} can name one")))?;
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut worker = Self { process, output };
        if worker.line() != "ready" {
            let packages = "pip install 'aws-lambda-powertools[redis]' boto3";
            return Err(Missing(format!("Python lacks a package: {packages}, and name that Python in {PYTHON}")));
        }
        Ok(worker)
    }

    fn begin(&mut self, first: u64) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{first}").unwrap();
    }

    fn end(&mut self) {
        assert_eq!(self.line(), "done");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It ends with its input, unless it has ended before.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}
