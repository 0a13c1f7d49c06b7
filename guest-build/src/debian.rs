//! Debian's way to the wasm target: packages, a standard library built once, a sysroot in the
//! user's cache. Leaves the rustup toolchain and the system's own folders as they are.

use std::fmt;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{ask, cargo, run};
use crate::{Progress, TARGET, toolchain};

const RUSTC: &str = "/usr/bin/rustc";
const HOST_FOLDER: &str = "/usr/lib/rustlib";
/// The compiler and, from the same source package, the source of its standard library: they must
/// match to the letter.
const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
/// The oldest compiler that guests build with: the workspace's `rust-version`, which the SDK has as
/// well.
const MINIMUM: &str = env!("CARGO_PKG_RUST_VERSION");
/// The libraries that are built, and the flags for the compiler. Guests are linked with LTO, which
/// reads bitcode and nothing else: with this flag no machine code is made. No features: a backtrace
/// cannot be taken on the target.
const STANDARD_LIBRARY: [&str; 3] = ["-Zbuild-std=std,panic_abort", "-Zbuild-std-features=", "-Clinker-plugin-lto"];

/// A compiler from Debian's packages, with everything that takes done; its path.
pub(crate) fn toolchain(progress: Progress<'_>) -> Result<PathBuf, String> {
    install(progress)?;
    let plan = Plan::new()?;
    let rustc = plan.folder.join("bin/rustc");
    if !rustc.is_file() {
        plan.build(progress)?;
    }
    Ok(rustc)
}

/// Installs what is missing, and upgrades what is too old for guests.
fn install(progress: Progress<'_>) -> Result<(), String> {
    let lack = Present::look().lack(MINIMUM);
    let Some(lack) = lack else { return Ok(()) };
    progress(&format!("guest toolchain: installing Debian's {} ({lack})", PACKAGES.join(" and ")));
    // Old package lists know only old packages, and a fresh container has none. Without a network,
    // what is at hand may do all the same.
    let updated = apt(&["update", "-o", "APT::Update::Error-Mode=any"]);
    let installed = apt(&[&["install", "-y", "--no-install-recommends"], PACKAGES.as_slice()].concat());
    match Present::look().lack(MINIMUM) {
        None => Ok(()),
        Some(lack) => {
            let failed = [updated.err(), installed.err()].into_iter().flatten();
            Err(failed.fold(lack.advice(), |told, why| format!("{told}\n    {why}")))
        }
    }
}

/// Debian's packages found on this machine.
struct Present {
    /// The version of each of [`PACKAGES`], where it is installed.
    packages: [Option<String>; 2],
    /// Version text of the compiler, if there is a compiler.
    rustc: Option<String>,
}

/// Why what there is will not do.
#[derive(Debug, PartialEq, Eq)]
enum Lack {
    /// This package is not installed.
    Missing(&'static str),
    /// The compiler and the source are of different versions.
    Apart([String; 2]),
    /// The compiler, of this version, is older than guests need.
    Old { found: String, minimum: String },
}

impl Present {
    fn look() -> Self {
        let rustc = ask(Command::new(RUSTC).arg("-V")).ok();
        Self { packages: PACKAGES.map(version_of), rustc }
    }

    /// Returns the reason why this compiler cannot build guests that need at least `minimum`, if
    /// there is one.
    fn lack(&self, minimum: &str) -> Option<Lack> {
        let (compiler, source) = match &self.packages {
            [Some(compiler), Some(source)] => (compiler, source),
            [None, _] => return Some(Lack::Missing(PACKAGES[0])),
            [_, None] => return Some(Lack::Missing(PACKAGES[1])),
        };
        if compiler != source {
            return Some(Lack::Apart([compiler.clone(), source.clone()]));
        }
        let found = self.rustc.as_deref().and_then(|text| text.strip_prefix("rustc ")?.split(' ').next());
        match found {
            None => Some(Lack::Missing(PACKAGES[0])),
            Some(found) if numbers(found) < numbers(minimum) => {
                Some(Lack::Old { found: found.to_owned(), minimum: minimum.to_owned() })
            }
            Some(_) => None,
        }
    }
}

impl Lack {
    /// It, and what to do about it where apt could not help.
    fn advice(&self) -> String {
        let what = match self {
            Self::Missing(_) | Self::Apart(_) => {
                "run `apt-get update` and `apt-get install rustc-web rust-web-src` as root where the network allows it"
            }
            Self::Old { .. } => {
                "add your Debian release's security updates, which carry newer ones, to the package sources, run \
                 `apt-get update` and try again"
            }
        };
        format!("{self}: {what}; or install Rust's own wasm target with rustup")
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(package) => write!(f, "{package} is not installed"),
            Self::Apart([compiler, source]) => {
                write!(f, "{} is {compiler} and {} is {source}: they must be of one version", PACKAGES[0], PACKAGES[1])
            }
            Self::Old { found, minimum } => {
                write!(f, "Debian's rustc is {found}, and guests need {minimum} or later")
            }
        }
    }
}

/// The numbers of a version, for comparing; a suffix such as `-nightly` does not count.
fn numbers(version: &str) -> [u32; 3] {
    let mut parts = version.split(['.', '-']).map_while(|part| part.parse().ok());
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

/// The version of a package that is installed.
fn version_of(package: &str) -> Option<String> {
    let answer = ask(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${Version}", package])).ok()?;
    answer.strip_prefix("installed ").map(str::to_owned)
}

fn apt(args: &[&str]) -> Result<(), String> {
    let root = ask(Command::new("id").arg("-u")).is_ok_and(|id| id == "0");
    let mut command = if root {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]).args(args);
    ask(&mut command).map(drop).map_err(|why| format!("apt-get {}: {why}", args.join(" ")))
}

/// Sysroot to build, and the paths that the build needs.
struct Plan {
    /// The sysroot: complete, or not there.
    folder: PathBuf,
    host: String,
    /// A folder that has `rust-lld`, which Debian's packages have not.
    linkers: PathBuf,
}

impl Plan {
    fn new() -> Result<Self, String> {
        let version = ask(Command::new(RUSTC).arg("-vV"))?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("unknown");
        let host = field("host: ").to_owned();
        let linkers = linkers(&host)?;
        let mut hasher = DefaultHasher::new();
        (&version, &linkers, STANDARD_LIBRARY).hash(&mut hasher);
        let folder = cache()?.join(format!("{}-{:016x}", field("release: "), hasher.finish()));
        Ok(Self { folder, host, linkers })
    }

    /// Builds beside the final place, then renames: a build that was killed is never half used.
    fn build(&self, progress: Progress<'_>) -> Result<(), String> {
        let parent = self.folder.parent().expect("the folder lies in the cache");
        fs::create_dir_all(parent).map_err(told(parent))?;
        let lock_path = parent.join(".lock");
        let lock = File::create(&lock_path).map_err(told(&lock_path))?;
        lock.lock().map_err(told(&lock_path))?;
        // Another process may have done it while this one waited.
        if self.folder.join("bin/rustc").is_file() {
            return Ok(());
        }
        let building = parent.join(".building");
        if building.exists() {
            fs::remove_dir_all(&building).map_err(told(&building))?;
        }
        progress("guest toolchain: building the standard library for wasm from Debian's source, once (about 90 s)");
        let libraries = standard_library(&building.join("build"), progress)?;
        let sysroot = building.join("sysroot");
        self.assemble(&libraries, &sysroot)?;
        fs::rename(&sysroot, &self.folder).map_err(told(&self.folder))?;
        fs::remove_dir_all(&building).map_err(told(&building))
    }

    fn assemble(&self, libraries: &[PathBuf], sysroot: &Path) -> Result<(), String> {
        let rustlib = sysroot.join("lib/rustlib");
        let (target, host) = (rustlib.join(TARGET).join("lib"), rustlib.join(&self.host));
        let bin = sysroot.join("bin");
        for folder in [&target, &host, &bin] {
            fs::create_dir_all(folder).map_err(told(folder))?;
        }
        for library in libraries {
            let name = library.file_name().expect("a library has a name");
            fs::copy(library, target.join(name)).map_err(told(library))?;
        }
        // Build scripts and macros of a guest are compiled for the host, by the same compiler.
        symlink(Path::new(HOST_FOLDER).join(&self.host).join("lib"), host.join("lib")).map_err(told(&host))?;
        symlink(&self.linkers, host.join("bin")).map_err(told(&host))?;
        let rustc = bin.join("rustc");
        let folder = quoted(&self.folder.to_string_lossy());
        fs::write(&rustc, format!("#!/bin/sh\nexec {RUSTC} --sysroot {folder} \"$@\"\n")).map_err(told(&rustc))?;
        fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755)).map_err(told(&rustc))
    }
}

/// Compiles the standard library as a dependency of an empty crate; the libraries.
fn standard_library(folder: &Path, progress: Progress<'_>) -> Result<Vec<PathBuf>, String> {
    let source = folder.join("src");
    fs::create_dir_all(&source).map_err(told(&source))?;
    let manifest = "[package]\nname = \"dummy\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n";
    fs::write(folder.join("Cargo.toml"), manifest).map_err(told(folder))?;
    fs::write(source.join("lib.rs"), "").map_err(told(&source))?;
    let target = folder.join("target");
    let [libraries, features, flags] = STANDARD_LIBRARY;
    let mut command = cargo();
    command
        .current_dir(folder)
        .env("RUSTC", RUSTC)
        // Debian's is a stable compiler; only building the library itself needs its unstable doors.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", flags)
        .args(["build", "--release", "--target", TARGET, libraries, features, "--target-dir"])
        .arg(&target);
    let ran = run(&mut command, progress).map_err(|error| error.to_string())?;
    if !ran.success {
        return Err(format!("the standard library could not be built:\n{}", ran.stderr));
    }
    let dependencies = target.join(TARGET).join("release/deps");
    let entries = fs::read_dir(&dependencies).map_err(told(&dependencies))?;
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".rlib") && !name.starts_with("libdummy")
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_library).collect())
}

/// A folder that holds `rust-lld`: the rustup toolchain's, else one Debian has.
fn linkers(host: &str) -> Result<PathBuf, String> {
    let inside = |sysroot: &Path| sysroot.join("lib/rustlib").join(host).join("bin");
    let mut places: Vec<PathBuf> = toolchain::sysroot().iter().map(|sysroot| inside(sysroot)).collect();
    places.extend([inside(Path::new("/usr")), PathBuf::from("/usr/bin")]);
    places
        .into_iter()
        .find(|folder| folder.join("rust-lld").is_file())
        .ok_or_else(|| "no `rust-lld`, which links for wasm: install Rust with rustup, or Debian's `lld`".to_owned())
}

fn cache() -> Result<PathBuf, String> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("hapax/guest-toolchain"))
        .ok_or_else(|| "neither XDG_CACHE_HOME nor HOME names a folder for the cache".to_owned())
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn told(path: &Path) -> impl FnOnce(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lack(packages: [Option<&str>; 2], rustc: Option<&str>) -> Option<Lack> {
        let packages = packages.map(|version| version.map(str::to_owned));
        Present { packages, rustc: rustc.map(str::to_owned) }.lack("1.95")
    }

    fn old(found: &str) -> Option<Lack> {
        Some(Lack::Old { found: found.into(), minimum: "1.95".into() })
    }

    #[test]
    fn what_is_new_enough_is_taken_as_it_is() {
        for version in ["1.95.0", "1.96.0", "1.100.0", "2.0.0"] {
            let says = format!("rustc {version} (0123456 2026-01-01) (built from a source tarball)");
            assert_eq!(lack([Some("1-1"), Some("1-1")], Some(&says)), None, "{version}");
        }
    }

    #[test]
    fn what_is_older_than_guests_need_is_told_with_both_versions() {
        for version in ["1.85.0", "1.94.9", "0.99.0", "1.9.0"] {
            assert_eq!(lack([Some("1-1"), Some("1-1")], Some(&format!("rustc {version} (built)"))), old(version));
        }
        let advice = old("1.85.0").expect("it is old").advice();
        assert!(advice.starts_with("Debian's rustc is 1.85.0, and guests need 1.95 or later: add "), "{advice}");
    }

    #[test]
    fn what_is_missing_or_does_not_fit_is_installed() {
        let new = Some("rustc 1.96.0 (built)");
        assert_eq!(lack([None, None], None), Some(Lack::Missing("rustc-web")));
        assert_eq!(lack([None, Some("1-1")], new), Some(Lack::Missing("rustc-web")));
        assert_eq!(lack([Some("1-1"), None], new), Some(Lack::Missing("rust-web-src")));
        assert_eq!(lack([Some("1-1"), Some("1-1")], None), Some(Lack::Missing("rustc-web")));
        assert_eq!(lack([Some("1-1"), Some("1-2")], new), Some(Lack::Apart(["1-1".into(), "1-2".into()])));
    }

    #[test]
    fn the_minimum_is_a_version() {
        assert!(numbers(MINIMUM) > [1, 0, 0], "{MINIMUM}");
    }
}
