//! `cargo xtask demo`: the main job on a sample file, shown. Leaves nothing behind.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Builds the examples and the host, runs the sample twice on one store, and shows state and outbox.
pub(crate) fn run(root: &Path) -> Result<()> {
    let guests = crate::guests::build_all()?;
    build_host(root)?;
    let folder = tempfile::tempdir()?;
    let demo = Demo {
        hapax: target_dir(root).join("debug/hapax"),
        component: guests.join("order-intake.wasm"),
        sample: root.join("plugins/order-intake/sample.jsonl"),
        store: folder.path().join("store"),
        outbox: folder.path().join("outbox.jsonl"),
    };
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

struct Demo {
    hapax: PathBuf,
    component: PathBuf,
    sample: PathBuf,
    store: PathBuf,
    outbox: PathBuf,
}

impl Demo {
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

/// Builds the host, with its fault points, in the features in which the tests are built: whoever asks, it and all that is
/// below it are compiled once. (Of one package alone, cargo builds dependencies with fewer features, and so again.)
pub(crate) fn build_host(root: &Path) -> Result<()> {
    let built = cargo(root).args(["build", "--workspace", "--bins", "--features", "hapax/faults"]).status()?;
    if !built.success() {
        bail!("the host could not be built");
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
