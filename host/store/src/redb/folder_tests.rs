//! The names of new folders are made durable where they stand.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use crate::redb::folder::create_with;

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

/// Proves G179.
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
