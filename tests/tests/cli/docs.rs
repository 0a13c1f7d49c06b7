//! Docs that run: every command in a `sh` block of README.md, docs/ and the plugins' READMEs, in
//! the order in which they stand, with the output they promise; and the configuration in
//! docs/operating/configuration.md, which has every setting there is.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hapax_tests::process::{guest, hapax};

/// What is not run here: these are the README's two commands, which CI calls. One of them runs this
/// test.
const RUN_BY_CI: [&str; 2] = ["cargo xtask demo", "cargo xtask test"];
/// How the documents stop a host. Here it is the document's own host that is stopped, not every
/// host of the machine.
const STOP: &str = "kill -TERM \"$(pidof hapax)\"";
/// Where the documents' host listens.
const ADDRESS: &str = "127.0.0.1:8080";
/// How they start the service of payments, where it listens there, and how they stop it.
const SERVICE: &str = "cargo run -p hapax-tests --bin payments -- ";
const SERVICE_ADDRESS: &str = "127.0.0.1:9100";
const STOP_SERVICE: &str = "kill %1";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A fenced block of a document.
#[derive(Default)]
struct Block {
    /// `sh`, `toml`, or nothing for what a command prints.
    language: String,
    text: String,
    /// The heading it stands under, by number.
    section: usize,
}

fn blocks(document: &Path) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    let mut section = 0;
    for line in std::fs::read_to_string(document).unwrap().lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => open = Some(Block { language: language.into(), section, ..Block::default() }),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text += &format!("{line}\n"),
            (None, None) => section += usize::from(line.starts_with('#')),
        }
    }
    assert!(open.is_none(), "{}: a block is not closed", document.display());
    blocks
}

/// The documents whose commands are run: the README, the architecture, all under docs/ and the
/// plugins' READMEs.
fn documents() -> Vec<PathBuf> {
    let mut documents = vec![root().join("README.md"), root().join("ARCHITECTURE.md")];
    for folder in ["docs", "plugins"] {
        markdown(&root().join(folder), &mut documents);
    }
    assert!(documents.len() > 20, "only {} documents were found", documents.len());
    documents
}

/// Adds the markdown files under `folder`, in the order of their names. The benchmark's report is
/// left out: the benchmark writes it, with the command that wrote it, and has a test of its own.
fn markdown(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() && !path.ends_with("docs/internals/report") {
            markdown(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "md") {
            found.push(path);
        }
    }
}

/// A copy of the sources in the target folder, where commands may leave what they like. It is the
/// same folder at each run, so that guests are not compiled again.
fn checkout(name: &str) -> PathBuf {
    let copy = target().join("docs-test").join(name);
    let mut sources = BTreeSet::new();
    for top in ["Cargo.toml", "Cargo.lock", "host", "guest-sdk", "guest-build", "plugins", "tests", "wit", "xtask"] {
        files(root(), Path::new(top), &mut sources);
    }
    let mut present = BTreeSet::new();
    files(&copy, Path::new(""), &mut present);
    for left_over in present.difference(&sources) {
        std::fs::remove_file(copy.join(left_over)).unwrap();
        // With its folders, as far as nothing else is in them.
        let folders = left_over.ancestors().skip(1).take_while(|folder| !folder.as_os_str().is_empty());
        let _ = folders.map(|folder| std::fs::remove_dir(copy.join(folder))).find(Result::is_err);
    }
    for source in &sources {
        let content = std::fs::read(root().join(source)).unwrap();
        // What has not changed keeps its time: cargo goes by it.
        if std::fs::read(copy.join(source)).ok().as_ref() != Some(&content) {
            std::fs::create_dir_all(copy.join(source).parent().unwrap()).unwrap();
            std::fs::write(copy.join(source), content).unwrap();
        }
    }
    std::fs::create_dir_all(copy.join("target")).unwrap();
    copy
}

/// The files in `path`, relative to `base`; no component among them, as none is committed.
fn files(base: &Path, path: &Path, found: &mut BTreeSet<PathBuf>) {
    let full = base.join(path);
    if full.is_dir() {
        for entry in std::fs::read_dir(full).unwrap() {
            files(base, &path.join(entry.unwrap().file_name()), found);
        }
    } else if full.is_file() && (base != root() || full.extension().is_none_or(|kind| kind != "wasm")) {
        found.insert(path.to_owned());
    }
}

fn target() -> PathBuf {
    guest("any").ancestors().nth(3).unwrap().to_owned()
}

/// Runs a document's commands.
struct Reader {
    folder: PathBuf,
    address: String,
    host: Option<Child>,
    service_address: String,
    service: Option<Child>,
    printed: String,
}

/// Free when it was looked for.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

impl Reader {
    fn new(folder: PathBuf) -> Self {
        let (address, service_address) = (free_address(), free_address());
        Self { folder, address, host: None, service_address, service: None, printed: String::new() }
    }

    fn read(&mut self, document: &Path) {
        let mut section = 0;
        let mut ran = false;
        for block in blocks(document) {
            if block.section != section {
                (section, ran) = (block.section, false);
            }
            match &*block.language {
                "toml" => {
                    std::fs::write(self.folder.join("hapax.toml"), block.text.replace(ADDRESS, &self.address)).unwrap();
                }
                "sh" => block.text.lines().for_each(|line| ran |= self.run(line)),
                "" if ran => self.compare(&block.text),
                _ => {}
            }
        }
        let running = self.host.is_some() || self.service.is_some();
        assert!(!running, "{}: something that it started is not stopped", document.display());
    }

    /// Whether the line was run here.
    fn run(&mut self, line: &str) -> bool {
        let command = line.split(" #").next().unwrap().trim().replace(ADDRESS, &self.address);
        let command = command.replace(SERVICE_ADDRESS, &self.service_address);
        if RUN_BY_CI.contains(&&*command) {
            return false;
        }
        let command = command.replace("cargo run -- ", "hapax ");
        match &*command {
            STOP => self.stop(),
            STOP_SERVICE => self.stop_service(),
            _ if command.starts_with(SERVICE) => self.start_service(command[SERVICE.len()..].trim_end_matches(" &")),
            "hapax up" => self.start(),
            _ if command.starts_with("hapax ") => self.run_to_its_end(&command),
            _ => panic!("`{line}` is a command that this test does not know: teach it"),
        }
        true
    }

    fn run_to_its_end(&mut self, command: &str) {
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("hapax() {{ \"$HAPAX_BIN\" \"$@\"; }}; {command}")]);
        shell.env("CARGO_TARGET_DIR", target()).env("HAPAX_BIN", hapax().get_program());
        let output = shell.current_dir(&self.folder).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
        self.printed += &String::from_utf8(output.stdout).unwrap();
    }

    fn start(&mut self) {
        let mut host = hapax().arg("up").current_dir(&self.folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(host.stdout.as_mut().unwrap()).read_line(&mut first).unwrap();
        self.host = Some(host);
        assert_eq!(first.trim(), format!("http://{}/v1/processors/orders/messages", self.address));
    }

    fn start_service(&mut self, arguments: &str) {
        let mut service = Command::new(env!("CARGO_BIN_EXE_payments"));
        service.args(arguments.split(' ')).current_dir(&self.folder).stdout(Stdio::piped());
        let mut service = service.spawn().unwrap();
        BufReader::new(service.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
        self.service = Some(service);
    }

    fn stop_service(&mut self) {
        let mut service = self.service.take().expect("a document stops only what it has started");
        service.kill().unwrap();
        service.wait().unwrap();
    }

    fn stop(&mut self) {
        let mut host = self.host.take().expect("a document stops only what it has started");
        assert!(Command::new("kill").args(["-TERM", &host.id().to_string()]).status().unwrap().success());
        let mut rest = String::new();
        host.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(host.wait().unwrap().code(), Some(0), "{rest}");
    }

    /// Each line that a document shows was printed; `...` stands for others, and how long something
    /// took is not compared.
    fn compare(&self, shown: &str) {
        let timeless = |line: &str| match line.rsplit_once("; ") {
            Some((before, after)) if after.ends_with(" ms") => before.to_owned(),
            _ => line.to_owned(),
        };
        let printed: BTreeSet<String> = self.printed.lines().map(timeless).collect();
        for line in shown.lines().filter(|line| *line != "...") {
            assert!(printed.contains(&timeless(line)), "`{line}` was not printed:\n{}", self.printed);
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for mut started in self.host.take().into_iter().chain(self.service.take()) {
            let _ = started.kill();
            let _ = started.wait();
        }
    }
}

#[test]
fn every_command_in_the_documents_does_what_they_say() {
    let folder = checkout("commands");
    for document in documents() {
        Reader::new(folder.clone()).read(&document);
    }
}

#[test]
fn what_is_left_to_ci_is_run_by_ci() {
    let ci = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    for command in RUN_BY_CI {
        assert!(ci.lines().any(|line| line == format!("step {command}")), "{command}");
    }
}

/// The names that the binary itself gives when it is asked for one that it does not know.
fn settings(config: &str) -> BTreeSet<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hapax.toml");
    std::fs::write(&file, config).unwrap();
    let output = hapax().args(["check", "--config"]).arg(file).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    let (_, expected) = error.split_once(", expected ").unwrap_or_else(|| panic!("{error}"));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_configuration_in_the_documents_has_every_setting() {
    let document = root().join("docs/operating/configuration.md");
    let sample = blocks(&document).into_iter().find(|block| block.language == "toml").unwrap().text;
    let processor = "store = 's'\n[processors.p]\ncomponent = 'p.wasm'\nno_such_setting = 1\n";
    let limits = "store = 's'\n[limits]\nno_such_setting = 1\n";
    let breaker = "store = 's'\n[outbox_breaker]\nno_such_setting = 1\n";
    let of_processor =
        "store = 's'\n[processors.p]\ncomponent = 'p.wasm'\n[processors.p.breaker]\nno_such_setting = 1\n";
    let source = "store = 's'\n[[sources]]\nno_such_setting = 1\n";
    let all = ["no_such_setting = 1\n", processor, limits, breaker, of_processor, source];
    let names: BTreeSet<String> = all.into_iter().flat_map(settings).collect();
    assert!(names.contains("store") && names.contains("component") && names.len() > 10, "{names:?}");
    for name in names {
        let set = |line: &str| {
            line.trim_start_matches("# ").starts_with(&format!("{name} = ")) || line.ends_with(&format!(".{name}]"))
        };
        let section = |line: &str| {
            line.starts_with(&format!("[{name}."))
                || line == format!("[{name}]")
                || line.ends_with(&format!("[[{name}]]"))
        };
        assert!(sample.lines().any(|line| set(line) || section(line)), "{name} is not in {}", document.display());
    }
}
