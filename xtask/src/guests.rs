//! `cargo xtask guests` and `setup`: every guest of the workspace from source, and the compiler for
//! it. None is committed.
//!
//! A program of `hapax-guest-build` does the work: linked into xtask, that crate and all that is
//! below it would be compiled twice, as cargo builds the dependencies of xtask alone with fewer
//! features than those of the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::demo::{build_programs, target_dir};

/// Builds all and prints the folder.
pub(crate) fn run(root: &Path) -> Result<()> {
    println!("{}", build(root, &[])?.display());
    Ok(())
}

/// Finds or makes the toolchain; it says itself which way it took.
pub(crate) fn setup(root: &Path) -> Result<()> {
    guests(root, |command| command.arg("toolchain"))
}

/// Builds `packages`; if none is named, the examples and the fixtures: every package of the
/// workspace that makes a cdylib. The folder of the components, each `<package>.wasm`.
pub(crate) fn build(root: &Path, packages: &[&str]) -> Result<PathBuf> {
    let folder = target_dir(root).join("guests/components");
    guests(root, |command| command.arg("build").arg(&folder).args(packages))?;
    Ok(folder)
}

fn guests(root: &Path, arguments: impl FnOnce(&mut Command) -> &mut Command) -> Result<()> {
    build_programs(root, &["guests"])?;
    let mut command = Command::new(target_dir(root).join("debug/guests"));
    if !arguments(command.current_dir(root)).status()?.success() {
        bail!("no guests: see above");
    }
    Ok(())
}
