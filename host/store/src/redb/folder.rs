//! Folders that outlive a power failure: a name is durable once the folder that has it is synced.

use std::io;
use std::path::{Path, PathBuf};

use hapax_core::fault;

/// Creates a folder with all its parents. Every name that this makes is durable afterwards.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    create_with(path, &mut |folder| sync(folder))
}

fn create_with(path: &Path, sync: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn synced(path: &Path) -> Vec<PathBuf> {
        let mut synced = Vec::new();
        let note = &mut |folder: &Path| {
            synced.push(folder.to_owned());
            Ok(())
        };
        create_with(path, note).unwrap();
        assert!(path.is_dir());
        synced
    }

    #[test]
    fn each_folder_that_has_a_new_name_is_synced_from_the_top_down() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        assert_eq!(synced(&at("a/b/c")), [root.path().to_owned(), at("a"), at("a/b")]);
        assert!(synced(&at("a/b/c")).is_empty());
        assert_eq!(synced(&at("a/b/d")), [at("a/b")]);
    }

    crate::mutations! {
        mutation_parents_that_are_not_synced_are_found: each_folder_that_has_a_new_name_is_synced_from_the_top_down is red with "parents-not-synced";
    }
}
