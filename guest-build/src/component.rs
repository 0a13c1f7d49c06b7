//! Makes a component of what the compiler left, and puts it in place whole. Does not look into it.

use std::fs;
use std::path::Path;

use wit_component::{ComponentEncoder, DecodedWasm, decode};

use crate::BuildError;

/// The first eight bytes of a component; a core module has 1 and 0 where this has 13 and 1.
const COMPONENT: [u8; 8] = [0, b'a', b's', b'm', 13, 0, 1, 0];

/// `module` as a component; what is one already stays as it is.
pub(crate) fn encode(package: &str, module: Vec<u8>) -> Result<Vec<u8>, BuildError> {
    if module.starts_with(&COMPONENT) {
        return Ok(module);
    }
    let refused = |reason| BuildError::NotAComponent { package: package.to_owned(), reason };
    let encoder = ComponentEncoder::default().validate(true).module(&module);
    let component = encoder.and_then(|mut encoder| encoder.encode()).map_err(|error| refused(format!("{error:#}")))?;
    // Any module without a world makes a component: an empty one.
    match decode(&component) {
        Ok(DecodedWasm::Component(resolve, world)) if !resolve.worlds[world].exports.is_empty() => Ok(component),
        Ok(_) => Err(refused("it exports nothing".to_owned())),
        Err(error) => Err(refused(format!("{error:#}"))),
    }
}

/// Writes under another name first: who reads `path` sees the old component or the new one, never
/// half of one.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let mut name = path.file_name().expect("a component has a name").to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    fs::write(&temporary, bytes).map_err(BuildError::file(&temporary))?;
    fs::rename(&temporary, path).map_err(BuildError::file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_stays_as_it_is() {
        let bytes = [&COMPONENT[..], b"anything"].concat();
        assert_eq!(encode("p", bytes.clone()).expect("it is one"), bytes);
    }

    #[test]
    fn what_is_no_module_is_told_with_the_package() {
        let error = encode("shop", b"not wasm".to_vec()).expect_err("it is no module").to_string();
        assert!(error.starts_with("package `shop` was compiled but is no component: "), "{error}");
    }

    #[test]
    fn a_module_without_a_world_is_refused() {
        let empty = b"\0asm\x01\0\0\0".to_vec();
        let error = encode("shop", empty).expect_err("it exports nothing").to_string();
        assert!(error.contains("`shop` was compiled but is no component: it exports nothing. Mark one"), "{error}");
    }

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.wasm");
        write(&path, b"first, and longer").expect("written");
        write(&path, b"second").expect("written");
        assert_eq!(fs::read(&path).expect("it is there"), b"second");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}
