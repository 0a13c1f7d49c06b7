//! The bench as a process of its own, for what only a process has: memory, and a death. Prints a
//! word when it got somewhere.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use hapax_core::{Handling, Options};

use crate::measure;
use crate::pipeline::Host;
use crate::work::{self, Ids, Item};

/// The first argument of a child.
pub(crate) const FLAG: &str = "--child";
/// Messages in flight of a child under load.
const IN_FLIGHT: usize = 1_024;

/// A child that was started; ends when its input does.
pub(crate) struct Child {
    process: std::process::Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Child {
    /// Starts a child in a role on the store in `path`; `first` and `count` are the role's to read.
    pub(crate) fn start(role: &str, path: &Path, first: u64, count: u64) -> Self {
        Self::start_of(&std::env::current_exe().unwrap(), role, path, first, count)
    }

    /// Starts a child of another build of the bench.
    pub(crate) fn start_of(program: &Path, role: &str, path: &Path, first: u64, count: u64) -> Self {
        let mut process = Command::new(program)
            .args([FLAG, role])
            .arg(path)
            .args([first.to_string(), count.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, input, output }
    }

    /// Waits until it got there.
    pub(crate) fn wait_for(mut self, word: &str) -> Self {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word, "the child said something else");
        self
    }

    /// Returns the child's answer to a line.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Lets it come to its end.
    pub(crate) fn end(mut self) {
        drop(self.input.take());
        assert!(self.process.wait().unwrap().success());
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Work of a child.
pub(crate) fn run(arguments: &[String]) {
    let [role, path, first, count] = arguments else { panic!("role, path, first, count") };
    let (path, first, count) = (Path::new(path), first.parse().unwrap(), count.parse().unwrap());
    match role.as_str() {
        "fill" => fill(path, count),
        "memory" => memory(path, count),
        "serve" => serve(path, first, count),
        "rounds" => rounds(path, if first == 0 { Ids::Random } else { Ids::Ordered }, count),
        _ => panic!("there is no role {role}"),
    }
}

/// Fills an empty store.
fn fill(path: &Path, count: u64) {
    let mut host = Host::open(path, Ids::Random, 0);
    host.fill(count);
    measure::settle();
    drop(host);
    say("filled");
}

/// Fills an empty store, then works as a host does; stays until its input ends.
fn memory(path: &Path, count: u64) {
    let mut host = Host::open(path, Ids::Random, 0);
    host.fill(count);
    let consumer = host.consumer(Options::default().cache_bytes);
    let live = count / 20;
    // Made one by one: messages that wait would be the load generator's memory, not the host's.
    let messages = (count..count + live).map(|number| Item::new(Ids::Random, number).message());
    host.run(&consumer, IN_FLIGHT, messages);
    host.runtime.block_on(async {
        for number in work::picked(live, count) {
            consumer.handle(Item::new(Ids::Random, number).message(), Handling::default()).await.unwrap();
        }
    });
    measure::settle();
    say("ready");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Serves one message, says so, then as many as there are, until killed.
fn serve(path: &Path, first: u64, count: u64) {
    let host = Host::open(path, Ids::Random, first);
    let consumer = host.consumer(Options::default().cache_bytes);
    let message = |number| Item::new(Ids::Random, number).message();
    host.runtime.block_on(consumer.handle(message(first), Handling::default())).unwrap();
    say("served");
    host.run(&consumer, IN_FLIGHT, (first + 1..first + count).map(message));
    say("done");
}

/// Fills an empty store, then does the rounds that are asked for, a line each: messages in flight,
/// messages. Answers with what the scenario `builds` reads.
fn rounds(path: &Path, ids: Ids, count: u64) {
    let mut host = Host::open(path, ids, 0);
    host.fill(count);
    measure::settle();
    say("ready");
    for line in std::io::stdin().lines().map(Result::unwrap) {
        let (in_flight, messages) = line.split_once(' ').unwrap();
        let messages = host.fresh(messages.parse().unwrap());
        let consumer = host.consumer(Options::default().cache_bytes);
        let before = measure::process_cpu();
        let run = host.run(&consumer, in_flight.parse().unwrap(), messages);
        measure::settle();
        let cpu_us = (measure::process_cpu() - before).as_secs_f64() * 1e6 / run.messages as f64;
        say(&format!("{} {} {} {cpu_us}", run.rate(), run.latency_ms(0.5), run.latency_ms(0.99)));
    }
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().unwrap();
}
