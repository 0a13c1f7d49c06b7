//! Finds a compiler for the wasm target, and says which way it took. Compiles nothing itself.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::ask;
use crate::{BuildError, Progress, TARGET, debian};

/// Forces one way: `rustup` or `debian`.
const VARIABLE: &str = "HAPAX_GUEST_TOOLCHAIN";

/// A compiler with a standard library for the wasm target.
#[derive(Debug, Clone)]
pub struct Toolchain {
    rustc: PathBuf,
    way: Way,
}

/// Origin of the compiler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The compiler in use has the target already.
    Present,
    /// rustup has added the target.
    Rustup,
    /// Debian's compiler, with a standard library built here from Debian's source.
    Debian,
}

impl Toolchain {
    /// Returns a name for folders that is the same for the same compiler and standard library only:
    /// a compiler that was made here stands in a folder named by all that it was made of.
    pub(crate) fn name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.rustc.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Present => "the compiler in use has the wasm target",
            Self::Rustup => "rustup has added the wasm target",
            Self::Debian => "Debian's compiler, with a standard library built from Debian's source",
        })
    }
}

impl Toolchain {
    /// Takes the first way that works: the target is there; `rustup target add`; Debian's packages.
    /// `HAPAX_GUEST_TOOLCHAIN=rustup|debian` forces one. The way taken is told to `progress`.
    pub fn find(progress: Progress<'_>) -> Result<Self, BuildError> {
        let forced = std::env::var(VARIABLE).unwrap_or_default();
        Self::find_by(&forced, progress)
    }

    /// A compiler that is known to have the target, by its path.
    pub fn at(rustc: impl Into<PathBuf>) -> Self {
        Self { rustc: rustc.into(), way: Way::Present }
    }

    /// The compiler, as cargo wants it in `RUSTC`.
    pub fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// Origin of the compiler.
    pub fn way(&self) -> Way {
        self.way
    }

    fn find_by(forced: &str, progress: Progress<'_>) -> Result<Self, BuildError> {
        type Attempt = fn(Progress<'_>) -> Result<PathBuf, String>;
        let ways: &[(&'static str, Way, Attempt)] = &[
            ("the target in the compiler in use", Way::Present, |_| present()),
            ("rustup target add", Way::Rustup, add_by_rustup),
            ("Debian's packages", Way::Debian, debian::toolchain),
        ];
        let ways = match forced {
            "" => ways,
            "rustup" => &ways[..2],
            "debian" => &ways[2..],
            other => return Err(BuildError::UnknownWay(other.to_owned())),
        };
        let mut failed = Vec::new();
        for &(name, way, attempt) in ways {
            match attempt(progress) {
                Ok(rustc) => {
                    let by_force = if forced.is_empty() { "" } else { ", as HAPAX_GUEST_TOOLCHAIN says" };
                    progress(&format!("guest toolchain: {way}{by_force} ({})", rustc.display()));
                    return Ok(Self { rustc, way });
                }
                Err(why) => failed.push((name, why)),
            }
        }
        Err(BuildError::NoToolchain(failed))
    }
}

/// The compiler in use, if it has the target's standard library.
fn present() -> Result<PathBuf, String> {
    let libraries = ask(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    let has_core = std::fs::read_dir(&libraries).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    });
    if !has_core {
        return Err(format!("no standard library in {libraries}"));
    }
    // By its real path: a rustup proxy would ask again which toolchain the guest's folder wants.
    let real = sysroot()?.join("bin/rustc");
    Ok(if real.is_file() { real } else { PathBuf::from("rustc") })
}

fn add_by_rustup(progress: Progress<'_>) -> Result<PathBuf, String> {
    progress("guest toolchain: trying `rustup target add wasm32-unknown-unknown`");
    ask(Command::new("rustup").args(["target", "add", TARGET]))?;
    present()
}

/// The folder of the compiler in use.
pub(crate) fn sysroot() -> Result<PathBuf, String> {
    ask(rustc().args(["--print", "sysroot"])).map(PathBuf::from)
}

/// The compiler in use, not one that some outer build was told to take.
fn rustc() -> Command {
    let mut command = Command::new("rustc");
    command.env_remove("RUSTC_WRAPPER").env_remove("RUSTFLAGS");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_way_is_named_with_those_that_exist() {
        let error = Toolchain::find_by("nix", &mut |_| ()).expect_err("there is no such way");
        assert_eq!(error.to_string(), "HAPAX_GUEST_TOOLCHAIN is `nix`: it may be `rustup` or `debian`, or be left out");
    }

    #[test]
    fn each_way_that_failed_is_told_with_its_reason() {
        let error =
            BuildError::NoToolchain(vec![("rustup target add", "no network\n".into()), ("Debian's", "no".into())]);
        let text = error.to_string();
        assert!(text.contains("  - rustup target add: no network\n  - Debian's: no\n"), "{text}");
        assert!(text.contains("apt-get install rustc-web rust-web-src"), "{text}");
    }
}
