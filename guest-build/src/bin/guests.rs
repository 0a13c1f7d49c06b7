//! Builds the guests of the workspace that it is started in: `guests toolchain`, or
//! `guests build FOLDER [PACKAGE...]`. `cargo xtask` starts it; users build theirs with
//! `hapax build`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hapax_guest_build::{BuildError, Toolchain, build_many, guests_of};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match &*arguments {
        ["toolchain"] => toolchain().map(drop),
        ["build", folder, packages @ ..] => build(Path::new(folder), packages),
        _ => {
            eprintln!("usage: guests toolchain | guests build FOLDER [PACKAGE...]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Finds or makes the toolchain; it says itself which way it took.
fn toolchain() -> Result<Toolchain, BuildError> {
    Toolchain::find(&mut |text| eprintln!("{text}"))
}

/// Builds the guests that lie in folders with the names `packages`, or all if none is named.
fn build(folder: &Path, packages: &[&str]) -> Result<(), BuildError> {
    let toolchain = toolchain()?;
    let mut guests: Vec<PathBuf> = guests_of(Path::new("."))?;
    guests.retain(|guest| packages.is_empty() || packages.iter().any(|package| guest.ends_with(package)));
    for component in build_many(&guests, &toolchain, folder, &mut |text| eprintln!("{text}"))? {
        eprintln!("guest: {} ({} kB)", component.package, component.bytes.div_ceil(1000));
    }
    Ok(())
}
