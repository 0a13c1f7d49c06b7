//! Tests that a build that cannot succeed is refused, with the action that helps, before any
//! compiler runs. Builds nothing.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::fs;
use std::path::Path;

use hapax_guest_build::{BuildError, Toolchain, build, guests_of};

const PACKAGE: &str = "[package]\nname = \"shop\"\nversion = \"0.0.0\"\nedition = \"2024\"\n";

/// The error of a folder with this Cargo.toml.
fn refused(manifest: Option<&str>) -> BuildError {
    let folder = tempfile::tempdir().unwrap();
    if let Some(manifest) = manifest {
        fs::create_dir(folder.path().join("src")).unwrap();
        fs::write(folder.path().join("src/lib.rs"), "").unwrap();
        fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
    }
    let toolchain = Toolchain::at(Path::new("rustc"));
    build(folder.path(), &toolchain, &folder.path().join("out"), &mut |_| ()).unwrap_err()
}

#[test]
fn a_folder_without_a_manifest() {
    let error = refused(None);
    assert!(matches!(error, BuildError::NoManifest(_)), "{error}");
    assert!(error.to_string().ends_with("has no Cargo.toml: name the folder of the processor's crate"), "{error}");
}

#[test]
fn a_workspace_without_a_package() {
    let error = refused(Some("[workspace]\n"));
    assert!(matches!(error, BuildError::NoPackage(_)), "{error}");
}

#[test]
fn a_package_that_is_no_cdylib() {
    let error = refused(Some(&format!("{PACKAGE}[workspace]\n")));
    assert!(error.to_string().starts_with("package `shop` builds no cdylib: put `crate-type = "), "{error}");
}

#[test]
fn a_manifest_that_cargo_cannot_read() {
    let error = refused(Some("[package\n"));
    assert!(matches!(error, BuildError::Metadata { .. }), "{error}");
}

#[test]
fn a_compiler_that_is_not_there_is_told_in_cargos_words() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("src")).unwrap();
    fs::write(folder.path().join("src/lib.rs"), "").unwrap();
    let manifest = format!("{PACKAGE}[lib]\ncrate-type = [\"cdylib\"]\n[workspace]\n");
    fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
    let toolchain = Toolchain::at(Path::new("/no/such/rustc"));
    let error = build(folder.path(), &toolchain, &folder.path().join("out"), &mut |_| ()).unwrap_err();
    assert!(matches!(&error, BuildError::Cargo { packages, .. } if packages == "shop"), "{error}");
    assert!(error.to_string().contains("/no/such/rustc"), "{error}");
}

#[test]
fn guests_are_the_packages_that_build_a_cdylib() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let guests = guests_of(root).unwrap();
    assert!(guests.contains(&root.join("plugins/order-intake")), "{guests:?}");
    assert!(!guests.contains(&root.join("guest-sdk")), "{guests:?}");
}
