//! `cargo xtask setup`: a compiler for guests. Builds no guest.

use hapax_guest_build::Toolchain;

/// Finds or makes the toolchain; it says itself which way it took.
pub(crate) fn run() -> anyhow::Result<()> {
    toolchain().map(drop)
}

/// The toolchain, progress told on standard error.
pub(crate) fn toolchain() -> anyhow::Result<Toolchain> {
    Ok(Toolchain::find(&mut |text| eprintln!("{text}"))?)
}
