//! `cargo xtask guests`: every guest of the workspace from source. None is committed.

use std::path::PathBuf;

use anyhow::Result;

/// Builds all and prints the folder.
pub(crate) fn run() -> Result<()> {
    println!("{}", build_all()?.display());
    Ok(())
}

/// Builds the examples and the fixtures: every package of the workspace that makes a cdylib. The
/// folder of the components, each `<package>.wasm`.
pub(crate) fn build_all() -> Result<PathBuf> {
    let root = crate::root();
    let toolchain = crate::setup::toolchain()?;
    let folder = crate::demo::target_dir(&root).join("guests/components");
    let guests = hapax_guest_build::guests_of(&root)?;
    let components = hapax_guest_build::build_many(&guests, &toolchain, &folder, &mut |text| eprintln!("{text}"))?;
    for component in &components {
        eprintln!("guest: {} ({} kB)", component.package, component.bytes.div_ceil(1000));
    }
    Ok(folder)
}
