//! Errors of building a guest, each with the action that helps. Retries nothing.

use std::path::PathBuf;

/// Why there is no component.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The folder holds no cargo package.
    #[error("{} has no Cargo.toml: name the folder of the processor's crate", .0.display())]
    NoManifest(PathBuf),
    /// The manifest is a workspace's, not a package's.
    #[error("{} is a workspace without a package of its own: name the folder of one processor in it", .0.display())]
    NoPackage(PathBuf),
    /// The package is not built as what a component is made of.
    #[error(
        "package `{package}` builds no cdylib: put `crate-type = [\"cdylib\", \"rlib\"]` under [lib] in {}",
        manifest.display()
    )]
    NoCdylib {
        /// The package's name.
        package: String,
        /// Its Cargo.toml.
        manifest: PathBuf,
    },
    /// `cargo metadata` could not read the package.
    #[error("cargo cannot read {}: {reason}", folder.display())]
    Metadata {
        /// The package's folder.
        folder: PathBuf,
        /// Output of cargo.
        reason: String,
    },
    /// The compiler refused the source.
    #[error("cargo could not build {packages}; correct what it says:\n{stderr}")]
    Cargo {
        /// The packages that were to be built.
        packages: String,
        /// The last lines of what cargo said.
        stderr: String,
    },
    /// The compiled module does not make a component.
    #[error(
        "package `{package}` was compiled but is no component: {reason}. \
         Mark one function with #[hapax_sdk::processor], or build with the tools of your language and give the \
         host the finished component"
    )]
    NotAComponent {
        /// The package's name.
        package: String,
        /// Error of the encoder.
        reason: String,
    },
    /// No compiler for the wasm target could be had.
    #[error(
        "no compiler for wasm32-unknown-unknown could be found or made:\n{}\n\
         Run `rustup target add wasm32-unknown-unknown` where the network allows it, or, as root on Debian, \
         `apt-get install rustc-web rust-web-src`; then try again",
        list(.0)
    )]
    NoToolchain(Vec<(&'static str, String)>),
    /// The environment asks for a way that does not exist.
    #[error("HAPAX_GUEST_TOOLCHAIN is `{0}`: it may be `rustup` or `debian`, or be left out")]
    UnknownWay(String),
    /// A program could not be started.
    #[error("cannot run {program}: {source}. Install it or put it on PATH")]
    Start {
        /// The program.
        program: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A file could not be read or written.
    #[error("{}: {source}. Check that the folder exists, may be written and has room", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
}

impl BuildError {
    /// For `map_err` on what touches `path`.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

fn list(attempts: &[(&'static str, String)]) -> String {
    let lines: Vec<String> = attempts.iter().map(|(way, why)| format!("  - {way}: {}", why.trim())).collect();
    lines.join("\n")
}
