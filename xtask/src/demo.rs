//! `cargo xtask demo`: the main job on a sample file, shown; and a saga that fails at its last
//! step. Leaves nothing behind.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Builds the examples and the host, runs the sample twice on one store, and shows state and
/// outbox; then the saga.
pub(crate) fn run(root: &Path) -> Result<()> {
    let guests = crate::guests::build(root, &["order-intake", "payment-saga"])?;
    build_host(root)?;
    twice(root, &guests)?;
    undone(root, &guests)
}

fn twice(root: &Path, guests: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let demo = Demo::of(root, guests, "order-intake", folder.path());
    heading("The sample through order-intake, on an empty store");
    demo.consume()?;
    heading("The same file again, on the same store: nothing may change");
    let before = (demo.state()?, demo.outbox_file()?);
    demo.consume()?;
    if (demo.state()?, demo.outbox_file()?) != before {
        bail!("the second run changed the state or the outbox");
    }
    heading("State of order-intake");
    print!("{}", before.0);
    heading("Outbox, as published");
    print!("{}", before.1);
    heading("Deduplication records");
    print!("{}", demo.hapax(&["records", "list"])?);
    Ok(())
}

/// An order that is sold, and one that cannot be shipped: its reservation and its charge are
/// compensated, the last step first.
fn undone(root: &Path, guests: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let service = Service::start(root, folder.path())?;
    let mut demo = Demo::of(root, guests, "payment-saga", folder.path());
    demo.more = ["--http", &service.url, "--set", &format!("service={}", service.url)].map(str::to_owned).to_vec();
    heading("A saga: reserve, charge, ship; the second order is refused at the last step");
    demo.consume()?;
    heading("What the service did, in order, by its own books");
    let done = service.done()?;
    done.iter().for_each(|(order, path)| println!("{order:<14} {path}"));
    let of_failed: Vec<&str> =
        done.iter().filter(|(order, _)| order == "unshippable-2").map(|(_, path)| path.as_str()).collect();
    let expected = ["/reservations", "/charges", "/shipments/cancel", "/charges/refund", "/reservations/release"];
    if of_failed != expected {
        bail!("the second order was not undone in reverse: {of_failed:?}");
    }
    heading("Its saga, with its log");
    print!("{}", demo.hapax(&["saga", "show", "default/payment-saga/%2Fshop/m-2"])?);
    Ok(())
}

/// The service that the saga calls, until it is dropped.
struct Service {
    child: Child,
    url: String,
    books: PathBuf,
}

impl Service {
    fn start(root: &Path, folder: &Path) -> Result<Self> {
        let program = target_dir(root).join("debug/payments");
        let mut child = Command::new(program).arg(folder).stdout(Stdio::piped()).spawn()?;
        let mut url = String::new();
        let out = child.stdout.take().context("its standard output")?;
        BufReader::new(out).read_line(&mut url)?;
        Ok(Self { child, url: url.trim().to_owned(), books: folder.join("books.jsonl") })
    }

    /// Requests that took effect: order and path.
    fn done(&self) -> Result<Vec<(String, String)>> {
        let text = std::fs::read_to_string(&self.books).context("the service's books")?;
        let entries = text.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>()?;
        let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let applied = entries.iter().filter(|entry| entry["applied"] == true);
        Ok(applied.map(|entry| (word(&entry["body"]["order_id"]), word(&entry["path"]))).collect())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Demo {
    hapax: PathBuf,
    component: PathBuf,
    sample: PathBuf,
    store: PathBuf,
    outbox: PathBuf,
    /// Further arguments of `hapax run`.
    more: Vec<String>,
}

impl Demo {
    fn of(root: &Path, guests: &Path, plugin: &str, folder: &Path) -> Self {
        Self {
            hapax: target_dir(root).join("debug/hapax"),
            component: guests.join(format!("{plugin}.wasm")),
            sample: root.join("plugins").join(plugin).join("sample.jsonl"),
            store: folder.join("store"),
            outbox: folder.join("outbox.jsonl"),
            more: Vec::new(),
        }
    }

    fn consume(&self) -> Result<()> {
        let status = Command::new(&self.hapax)
            .arg("run")
            .args(["--verbose", "--concurrency", "1"])
            .arg("--component")
            .arg(&self.component)
            .arg("--store")
            .arg(&self.store)
            .arg("--input")
            .arg(&self.sample)
            .arg("--outbox")
            .arg(&self.outbox)
            .args(&self.more)
            .status()?;
        if !status.success() {
            bail!("hapax run ended with {status}");
        }
        Ok(())
    }

    fn hapax(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.hapax).args(args).arg("--store").arg(&self.store).output()?;
        if !output.status.success() {
            bail!("hapax {} failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn state(&self) -> Result<String> {
        self.hapax(&["state", "list", "order-intake"])
    }

    fn outbox_file(&self) -> Result<String> {
        std::fs::read_to_string(&self.outbox).context("the outbox file")
    }
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Builds the host, and the service that its sagas call.
pub(crate) fn build_host(root: &Path) -> Result<()> {
    build_programs(root, &["hapax", "payments"])
}

/// Builds programs of the workspace, with the host's fault points: the features in which the tests
/// are built. Whoever asks, they and all that is below them are compiled once. (Of one package
/// alone, cargo builds dependencies with fewer features, and so again.)
pub(crate) fn build_programs(root: &Path, names: &[&str]) -> Result<()> {
    let mut command = cargo(root);
    command.args(["build", "--workspace", "--features", "hapax/faults"]);
    if !command.args(names.iter().flat_map(|name| ["--bin", name])).status()?.success() {
        bail!("{} could not be built", names.join(" and "));
    }
    Ok(())
}

/// Cargo, in the workspace.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}
