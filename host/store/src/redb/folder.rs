//! Folders that outlive a power failure: a name is durable once the folder that has it is synced.

use std::io;
use std::path::{Path, PathBuf};

use hapax_core::fault;

/// Creates a folder with all its parents. Every name that this makes is durable afterwards.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    create_with(path, &mut |folder| sync(folder))
}

pub(super) fn create_with(path: &Path, sync: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let missing: Vec<PathBuf> = path
        .ancestors()
        .take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        .map(Into::into)
        .collect();
    std::fs::create_dir_all(path)?;
    for folder in missing.iter().rev().filter(|_| !fault::mutated("parents-not-synced")) {
        sync(parent(folder))?;
    }
    Ok(())
}

/// Returns the folder that has the name of `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}
