//! `cargo xtask bench`: builds what the scenarios need in release and runs them on the disk of the
//! target folder. What is measured is the bench's own; see its --help.

use std::path::Path;

use anyhow::{Result, bail};

use crate::demo::{cargo, target_dir};

/// Scenarios that drive the host's own binary with an example guest.
const OVER_THE_HOST: &[&str] = &["engine", "wasm", "start", "http", "jetstream"];
/// Scenarios that do without, so that measuring only them builds no engine.
const OVER_THE_LIBRARY: &[&str] =
    &["throughput", "sustained", "duplicates", "growth", "memory", "retention", "restart", "postgres", "python"];

/// Scenarios that need clients which nothing else does.
const OVER_BROKERS: &[&str] = &["jetstream"];

/// Measures; the report goes to a folder, its path to standard output.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<()> {
    let mut bench = cargo(root);
    bench.args(["run", "--release", "--package", "hapax-bench"]);
    if needs_host(arguments) {
        bench.args(["--features", "hapax-bench/engine"]);
    }
    if named(arguments, OVER_BROKERS) {
        bench.args(["--features", "hapax-bench/brokers"]);
    }
    bench.arg("--").args(arguments);
    if !arguments.iter().any(|argument| argument == "--store") {
        let folder = target_dir(root);
        std::fs::create_dir_all(&folder)?;
        bench.arg("--store").arg(folder);
    }
    if needs_host(arguments) {
        let built = cargo(root).args(["build", "--release", "--package", "hapax"]).status()?;
        if !built.success() {
            bail!("the host could not be built");
        }
        bench
            .env("HAPAX_BIN", target_dir(root).join("release/hapax"))
            .env("HAPAX_GUESTS", crate::guests::build(root, &[])?);
    }
    let status = bench.status()?;
    if !status.success() {
        bail!("the bench ended with {status}");
    }
    Ok(())
}

/// Returns true if a named scenario drives the host's binary, or if no scenario is named and all
/// are run.
fn needs_host(arguments: &[String]) -> bool {
    let asks = ["--list", "--help", "-h"];
    named(arguments, OVER_THE_HOST) || !(named(arguments, OVER_THE_LIBRARY) || named(arguments, &asks))
}

fn named(arguments: &[String], names: &[&str]) -> bool {
    arguments.iter().any(|argument| names.contains(&argument.as_str()))
}
