//! `cargo xtask bench`: builds guests and benches in release and runs them on the disk of the target folder.

use std::path::Path;

use anyhow::{Result, bail};

use crate::demo::{cargo, target_dir};

/// Measures; the report goes to standard output.
pub(crate) fn run(root: &Path) -> Result<()> {
    let folder = target_dir(root);
    std::fs::create_dir_all(&folder)?;
    let guests = crate::guests::build_all()?;
    let status = cargo(root)
        .args(["run", "--release", "--package", "hapax-bench", "--"])
        .arg(&folder)
        .env("HAPAX_GUESTS", guests)
        .status()?;
    if !status.success() {
        bail!("the bench ended with {status}");
    }
    Ok(())
}
