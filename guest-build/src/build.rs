//! Runs cargo for guests, one call a workspace, and places the components. Finds no compiler.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{CrateType, Message, Metadata, MetadataCommand, Package};

use crate::command::{cargo, run};
use crate::{BuildError, Progress, TARGET, Toolchain, component};

/// A component that was built.
#[derive(Debug, Clone)]
pub struct Component {
    /// The cargo package it was built from.
    pub package: String,
    /// The file: `<package>.wasm`.
    pub path: PathBuf,
    /// The file's size.
    pub bytes: u64,
}

/// Builds the package in `dir` into `out_dir`.
pub fn build(
    dir: &Path,
    toolchain: &Toolchain,
    out_dir: &Path,
    progress: Progress<'_>,
) -> Result<Vec<Component>, BuildError> {
    build_many(&[dir.to_owned()], toolchain, out_dir, progress)
}

/// Builds the packages in `dirs` into `out_dir`, those of one workspace in one call of cargo.
pub fn build_many(
    dirs: &[PathBuf],
    toolchain: &Toolchain,
    out_dir: &Path,
    progress: Progress<'_>,
) -> Result<Vec<Component>, BuildError> {
    let mut batches: BTreeMap<PathBuf, Batch> = BTreeMap::new();
    for dir in dirs {
        let (root, target, package) = package_in(dir)?;
        let batch = batches.entry(root).or_insert_with(|| Batch { target, packages: Vec::new() });
        batch.packages.push(package);
    }
    fs::create_dir_all(out_dir).map_err(BuildError::file(out_dir))?;
    let mut components = Vec::new();
    for (root, batch) in &batches {
        for (package, module) in batch.compile(root, toolchain, progress)? {
            components.push(place(package, &module, out_dir)?);
        }
    }
    Ok(components)
}

/// The folders of all guests in the workspace that holds `dir`: its packages that build a cdylib.
pub fn guests_of(dir: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let metadata = metadata(dir)?;
    let guests = metadata.workspace_packages().into_iter().filter(|package| is_guest(package));
    Ok(guests.filter_map(|package| package.manifest_path.parent().map(|dir| dir.into())).collect())
}

/// Packages of one workspace.
struct Batch {
    target: PathBuf,
    packages: Vec<Package>,
}

impl Batch {
    /// Compiles; each package with its module.
    fn compile<'a>(
        &'a self,
        root: &Path,
        toolchain: &Toolchain,
        progress: Progress<'_>,
    ) -> Result<Vec<(&'a Package, PathBuf)>, BuildError> {
        let mut command = cargo();
        command.current_dir(root).env("RUSTC", toolchain.rustc()).args(["build", "--release", "--lib"]);
        command.args(["--target", TARGET, "--message-format", "json-render-diagnostics"]);
        // A folder of its own: the host's build neither waits for this one nor is thrown away by
        // it. One a compiler: cargo knows a compiler by its version, not by the standard library
        // beside it, and would link what was built over another one.
        command.arg("--target-dir").arg(self.target.join("guests").join(toolchain.name()));
        for package in &self.packages {
            command.args(["--package", package.name.as_str()]);
        }
        // What makes a guest small and fast, whatever the workspace's profile says for the host.
        for (setting, value) in
            [("OPT_LEVEL", "3"), ("LTO", "true"), ("CODEGEN_UNITS", "1"), ("STRIP", "true"), ("PANIC", "abort")]
        {
            command.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
        }
        command.env("CARGO_PROFILE_RELEASE_DEBUG", "false");
        let ran = run(&mut command, progress)?;
        if !ran.success {
            return Err(BuildError::Cargo { packages: self.names(), stderr: ran.stderr });
        }
        let modules = modules(&ran.stdout);
        let missing = |package: &Package| BuildError::NoCdylib {
            package: package.name.to_string(),
            manifest: package.manifest_path.clone().into(),
        };
        let of = |package: &'a Package| modules.get(&package.id.repr).cloned().ok_or_else(|| missing(package));
        self.packages.iter().map(|package| Ok((package, of(package)?))).collect()
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.packages.iter().map(|package| package.name.as_str()).collect();
        names.join(", ")
    }
}

/// The wasm file of each package, by the package's id, from what cargo tells of its artifacts.
fn modules(stdout: &[u8]) -> BTreeMap<String, PathBuf> {
    let artifacts = Message::parse_stream(stdout).flatten().filter_map(|message| match message {
        Message::CompilerArtifact(artifact) => Some(artifact),
        _ => None,
    });
    artifacts
        .filter_map(|artifact| {
            let file = artifact.filenames.into_iter().find(|file| file.extension() == Some("wasm"))?;
            Some((artifact.package_id.repr, file.into()))
        })
        .collect()
}

fn place(package: &Package, module: &Path, out_dir: &Path) -> Result<Component, BuildError> {
    let bytes = fs::read(module).map_err(BuildError::file(module))?;
    let bytes = component::encode(&package.name, bytes)?;
    let path = out_dir.join(format!("{}.wasm", package.name));
    component::write(&path, &bytes)?;
    Ok(Component { package: package.name.to_string(), path, bytes: bytes.len() as u64 })
}

/// The package whose Cargo.toml lies in `dir`, with its workspace's root and target folder.
fn package_in(dir: &Path) -> Result<(PathBuf, PathBuf, Package), BuildError> {
    let metadata = metadata(dir)?;
    let manifest = fs::canonicalize(dir.join("Cargo.toml")).map_err(BuildError::file(dir))?;
    let is_it = |package: &Package| fs::canonicalize(&package.manifest_path).is_ok_and(|path| path == manifest);
    let package = metadata.packages.into_iter().find(is_it).ok_or_else(|| BuildError::NoPackage(dir.to_owned()))?;
    if !is_guest(&package) {
        return Err(BuildError::NoCdylib { package: package.name.to_string(), manifest });
    }
    Ok((metadata.workspace_root.into(), metadata.target_directory.into(), package))
}

fn metadata(dir: &Path) -> Result<Metadata, BuildError> {
    let manifest = dir.join("Cargo.toml");
    if !manifest.is_file() {
        return Err(BuildError::NoManifest(dir.to_owned()));
    }
    let command = MetadataCommand::new().manifest_path(manifest).no_deps().exec();
    command.map_err(|error| BuildError::Metadata { folder: dir.to_owned(), reason: error.to_string() })
}

fn is_guest(package: &Package) -> bool {
    package.targets.iter().any(|target| target.crate_types.contains(&CrateType::CDyLib))
}
