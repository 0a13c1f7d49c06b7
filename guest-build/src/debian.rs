//! Debian's way to the wasm target: packages, a standard library built once, a sysroot in the user's cache.
//! Leaves the rustup toolchain and the system's own folders as they are.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{ask, cargo, run};
use crate::{Progress, TARGET, toolchain};

const RUSTC: &str = "/usr/bin/rustc";
const HOST_FOLDER: &str = "/usr/lib/rustlib";
/// The compiler and, from the same source package, the source of its standard library: they must match to the letter.
const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

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

/// Installs what is missing.
fn install(progress: Progress<'_>) -> Result<(), String> {
    let missing: Vec<&str> = PACKAGES.into_iter().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress(&format!("guest toolchain: installing Debian's {}", missing.join(" and ")));
    let install = [&["install", "-y", "--no-install-recommends"], missing.as_slice()].concat();
    // A fresh container has no package lists: update only if the first try says so.
    if apt(&install).is_err() {
        apt(&["update"])?;
        apt(&install)?;
    }
    Ok(())
}

fn installed(package: &str) -> bool {
    ask(Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]))
        .is_ok_and(|status| status == "install ok installed")
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

/// What is to be built, and where it will stand.
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
        (&version, &linkers).hash(&mut hasher);
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
    let mut command = cargo();
    command
        .current_dir(folder)
        .env("RUSTC", RUSTC)
        // Debian's is a stable compiler; only building the library itself needs its unstable doors.
        .env("RUSTC_BOOTSTRAP", "1")
        // Guests are linked with LTO, which reads bitcode.
        .env("RUSTFLAGS", "-Cembed-bitcode=yes")
        .args(["build", "--release", "--target", TARGET, "-Zbuild-std=std,panic_abort", "--target-dir"])
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
