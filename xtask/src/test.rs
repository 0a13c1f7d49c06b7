//! `cargo xtask test`: everything the tests need, then all tests.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::demo::{build_host, cargo, target_dir};

/// Builds guests and host, then runs every test. `filter` goes to the test runner.
pub(crate) fn run(root: &Path, filter: &[String]) -> Result<()> {
    let guests = crate::guests::build(root, &[])?;
    build_host(root)?;
    let environment = |command: &mut Command| {
        command.env("HAPAX_GUESTS", &guests).env("HAPAX_BIN", target_dir(root).join("debug/hapax"));
    };
    let mut doc = cargo(root);
    environment(doc.args(["test", "--quiet", "--workspace", "--doc", "--features", "hapax/faults"]));
    succeed(&mut doc)?;
    if filter.is_empty() {
        interleavings(root)?;
    }
    let nextest = cargo(root).args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    let mut tests = cargo(root);
    if nextest {
        tests.args(["nextest", "run", "--workspace", "--features", "hapax/faults"]).args(filter);
    } else {
        println!("cargo-nextest is not installed: running the tests with cargo test");
        tests.args(["test", "--workspace", "--features", "hapax/faults", "--lib", "--bins", "--tests"]);
        tests.arg("--").args(filter);
    }
    environment(&mut tests);
    succeed(&mut tests)
}

/// The tests under shuttle: over a core that is built for them alone. Without the host and the
/// bench, which have no library and so nothing that is tested here, the core's dependencies would
/// have fewer features, and be compiled again.
fn interleavings(root: &Path) -> Result<()> {
    let mut tests = cargo(root);
    tests.args(["test", "--quiet", "--package", "hapax-core", "--package", "hapax", "--package", "hapax-bench"]);
    tests.args(["--features", "hapax-core/shuttle", "--lib", "shuttle_tests::"]);
    succeed(&mut tests)
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}
