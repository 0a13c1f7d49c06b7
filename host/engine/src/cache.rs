//! Compiled code on disk, so that a component is compiled once a machine. Everything that is odd
//! with an entry is a miss; nothing here can make a load fail. Bounded in bytes: what was used
//! longest ago goes first.

use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use wasmtime::Engine;
use wasmtime::component::Component;

/// An entry is this mark, the blake3 of the code, the code.
const MARK: &[u8; 8] = b"hapaxcw1";
const HEADER: usize = MARK.len() + blake3::OUT_LEN;

/// A folder of compiled components, named by component digest and compiler.
pub(crate) struct CodeCache {
    dir: PathBuf,
    /// Digest of what the code depends on beside the component: wasmtime's version and settings,
    /// the CPU.
    compiler: String,
    /// Bytes of the folder's files, at most, once something was stored.
    limit_bytes: u64,
}

impl CodeCache {
    /// The cache in `dir`, made if it is missing; `None`, with a warning, if it cannot be used
    /// safely.
    pub(crate) fn open(dir: PathBuf, limit_bytes: u64, engine: &Engine) -> Option<Self> {
        match own_directory(&dir) {
            Ok(()) => Some(Self { dir, compiler: compiler_digest(engine), limit_bytes }),
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "the folder for compiled code cannot be used: compiling at each start");
                None
            }
        }
    }

    /// The component with this digest, if its compiled code is here and whole.
    pub(crate) fn load(&self, engine: &Engine, digest: &blake3::Hash) -> Option<Component> {
        let path = self.path(digest);
        let entry = fs::read(&path).inspect_err(|error| log_unless_missing(&path, error)).ok()?;
        let component = deserialize(engine, &entry);
        match component {
            // A file's time of change is its last use: times of access are not kept on every
            // filesystem.
            Some(_) => mark_used(&path),
            None => tracing::info!(file = %path.display(), "cached compiled code cannot be used: compiling again"),
        }
        component
    }

    /// Keeps the compiled code of `component`, and makes room for it. A failure costs a compilation
    /// at the next start, so it is only logged.
    pub(crate) fn store(&self, component: &Component, digest: &blake3::Hash) {
        let path = self.path(digest);
        let result = component.serialize().map_err(|error| error.to_string()).and_then(|code| {
            write_whole(&path, &[MARK, blake3::hash(&code).as_bytes(), &code]).map_err(|error| error.to_string())
        });
        if let Err(error) = result {
            tracing::warn!(file = %path.display(), error, "compiled code was not cached");
        }
        if let Err(error) = prune(&self.dir, self.limit_bytes, &path) {
            tracing::warn!(dir = %self.dir.display(), %error, "old compiled code was not removed");
        }
    }

    fn path(&self, digest: &blake3::Hash) -> PathBuf {
        self.dir.join(format!("{}-{}.cwasm", digest.to_hex(), self.compiler))
    }
}

fn mark_used(path: &Path) {
    // Where it fails, the entry goes earlier than it might.
    let _ = fs::File::options().append(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes files of `dir` until the rest is within `limit_bytes`: those used longest ago first,
/// `keep` never. Another process may do the same; who has a file open goes on reading it. Leftovers
/// of writers that were killed go as well.
fn prune(dir: &Path, limit_bytes: u64, keep: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        // Gone meanwhile is fine.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_file() && path.extension().is_some_and(|kind| kind == "cwasm" || kind == "tmp") {
            files.push((metadata.modified()?, metadata.len(), path));
        }
    }
    files.sort();
    let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, freed, path) in files.iter().filter(|(_, _, path)| path != keep) {
        if bytes <= limit_bytes {
            break;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => bytes -= freed,
        }
    }
    Ok(())
}

/// Turns a cache entry back into a component, if it is whole and wasmtime takes it.
#[allow(unsafe_code)]
fn deserialize(engine: &Engine, entry: &[u8]) -> Option<Component> {
    let (header, code) = entry.split_at_checked(HEADER)?;
    let (mark, checksum) = header.split_at(MARK.len());
    if mark != MARK || checksum != blake3::hash(code).as_bytes() {
        return None;
    }
    // SAFETY: `deserialize` asks that the bytes come from `Component::serialize`, unmodified.
    // Entries are written by `store` only, whole (temporary file, then rename), into a folder that
    // belongs to this user and that no one else can write to (`own_directory` checks both at the
    // start); the checksum above excludes damage since then. Who could still forge an entry with a
    // fitting checksum already runs code as this user. wasmtime itself checks that version,
    // settings and CPU features are the engine's.
    unsafe { Component::deserialize(engine, code) }.ok()
}

/// Makes `dir` with mode 0700, or checks that it is ours and takes everyone else's rights away.
fn own_directory(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let metadata = fs::metadata(dir)?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Writes `parts` so that a reader sees all of them or none.
fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        parts.iter().try_for_each(|part| file.write_all(part))?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // It may not be there at all.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn log_unless_missing(path: &Path, error: &io::Error) {
    if error.kind() != io::ErrorKind::NotFound {
        tracing::warn!(file = %path.display(), %error, "cached compiled code cannot be read");
    }
}

fn compiler_digest(engine: &Engine) -> String {
    struct Blake3(blake3::Hasher);
    impl Hasher for Blake3 {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
        fn finish(&self) -> u64 {
            let digest = self.0.finalize();
            u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes"))
        }
    }
    let mut hasher = Blake3(blake3::Hasher::new());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
