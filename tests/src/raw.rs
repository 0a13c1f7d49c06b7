//! Writes into a store's database with redb alone, by `docs/internals/storage-format.md`: what no
//! version of this code would write.

use std::path::Path;

use redb::{ReadableTable as _, TableDefinition};

/// Bytes of a page.
const PAGE: usize = 4_096;

/// Makes the database in `store` a plain file of redb's, without checksums, as an earlier version
/// wrote it.
pub fn strip_checksums(store: &Path) {
    let path = store.join("records.redb");
    let file = std::fs::read(&path).unwrap();
    // The first page names the format; then come groups of a page of checksums and 511 pages.
    let plain: Vec<u8> = file[PAGE..].chunks(512 * PAGE).flat_map(|group| group[PAGE..].to_vec()).collect();
    std::fs::write(path, plain).unwrap();
}

/// Makes the database in `store` one of format `format`; answers what it was.
pub fn set_format(store: &Path, format: u32) -> u32 {
    strip_checksums(store);
    let database = redb::Database::open(store.join("records.redb")).unwrap();
    let txn = database.begin_write().unwrap();
    let meta = TableDefinition::<&str, &[u8]>::new("meta");
    let mut table = txn.open_table(meta).unwrap();
    let before = table.get("format").unwrap().map(|value| value.value().try_into().unwrap()).unwrap();
    table.insert("format", format.to_le_bytes().as_slice()).unwrap();
    drop(table);
    txn.commit().unwrap();
    u32::from_le_bytes(before)
}
