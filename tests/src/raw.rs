//! Reads and writes a store's folder by `docs/internals/storage-format.md`, without the host's code.

use std::path::Path;

/// Bytes of a page.
const PAGE: usize = 4_096;

/// Returns redb's own pages of the database in `path`: its file without the checksums.
pub fn pages_of_redb(path: &Path) -> Vec<u8> {
    let file = std::fs::read(path).unwrap();
    // The first page names the format; then come groups of a page of checksums and 511 pages.
    file[PAGE..].chunks(512 * PAGE).flat_map(|group| group[PAGE..].to_vec()).collect()
}

/// Makes `store` say that it has format `format`; answers what it said.
pub fn set_format(store: &Path, format: u32) -> u32 {
    let path = store.join("STORE");
    let text = std::fs::read_to_string(&path).unwrap();
    let before = text.lines().find_map(|line| line.strip_prefix("format = ")).unwrap().to_owned();
    std::fs::write(path, text.replace(&format!("format = {before}"), &format!("format = {format}"))).unwrap();
    before.parse().unwrap()
}
