//! `hapax build`: builds a component from the folder of its source.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_guest_build::Toolchain;
use serde_json::json;

use crate::output::{line, note};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the source, with its Cargo.toml.
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Folder for the component [default: the folder of the source]
    #[arg(long, short, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let mut progress = |text: &str| text.lines().for_each(note);
    let toolchain = Toolchain::find(&mut progress)?;
    let out = args.out.as_ref().unwrap_or(&args.dir);
    for component in hapax_guest_build::build(&args.dir, &toolchain, out, &mut progress)? {
        if json {
            line(&json!({ "component": component.path }).to_string());
        } else {
            line(&component.path.display().to_string());
        }
    }
    Ok(ExitCode::SUCCESS)
}
