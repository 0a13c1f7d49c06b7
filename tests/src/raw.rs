//! Writes into a store's folder what no version of this code would write.

use std::path::Path;

/// Makes `store` say that it has format `format`; answers what it said.
pub fn set_format(store: &Path, format: u32) -> u32 {
    let path = store.join("STORE");
    let text = std::fs::read_to_string(&path).unwrap();
    let before = text.lines().find_map(|line| line.strip_prefix("format = ")).unwrap().to_owned();
    std::fs::write(path, text.replace(&format!("format = {before}"), &format!("format = {format}"))).unwrap();
    before.parse().unwrap()
}
