//! The packages of the workspace, as `cargo metadata` tells of them: what the chores ask about, no
//! more. Read as plain JSON: typed metadata takes procedural macros, which would be compiled for
//! xtask alone.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// A package of the workspace.
pub(crate) struct Package {
    pub(crate) name: String,
    /// Its Cargo.toml, from the root.
    pub(crate) manifest_path: String,
    /// The names of the packages that it uses outside of its tests and build scripts.
    pub(crate) uses: Vec<String>,
    /// True if the package makes a cdylib.
    pub(crate) is_guest: bool,
}

/// The packages of the workspace in `root`.
pub(crate) fn packages(root: &Path) -> Result<Vec<Package>> {
    let mut metadata = crate::demo::cargo(root);
    let output =
        metadata.args(["metadata", "--format-version", "1", "--no-deps"]).output().context("cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    Ok(list(&metadata["packages"]).map(|package| Package::read(package, root)).collect())
}

impl Package {
    fn read(package: &Value, root: &Path) -> Self {
        let manifest = Path::new(text(&package["manifest_path"]));
        // The kind of a normal dependency is null.
        let normal = list(&package["dependencies"]).filter(|dependency| dependency["kind"].is_null());
        let mut crate_types = list(&package["targets"]).flat_map(|target| list(&target["crate_types"]));
        Self {
            name: text(&package["name"]).to_owned(),
            manifest_path: manifest.strip_prefix(root).unwrap_or(manifest).to_string_lossy().into_owned(),
            uses: normal.map(|dependency| text(&dependency["name"]).to_owned()).collect(),
            is_guest: crate_types.any(|kind| kind == "cdylib"),
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
