//! `hapax check`: everything that can be found wrong without running anything.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::MessageProcessor as _;
use serde_json::json;

use crate::config::{Config, Processor};
use crate::exit::Failed;
use crate::host;
use crate::report::line;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = "hapax.toml", conflicts_with = "component")]
    config: PathBuf,
    /// A component to check against the contract, instead of a configuration.
    #[arg(long, value_name = "X.wasm")]
    component: Option<PathBuf>,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let processors = match &args.component {
        Some(component) => [("component".to_owned(), Processor::plain(component.clone()))].into(),
        None => Config::read(&args.config)?.processors,
    };
    let engine = host::engine(1)?;
    for (name, processor) in &processors {
        processor.options().map_err(|error| Failed::usage(format!("processors.{name}: {error}")))?;
        let loaded = host::load(&engine, name, processor, &host::read(processor)?)?;
        let path = processor.component.display().to_string();
        if json {
            line(&json!({ "processor": name, "component": path, "digest": loaded.digest(), "ok": true }).to_string());
        } else {
            line(&format!("{path}: fits the contract, {}", loaded.digest()));
        }
    }
    Ok(ExitCode::SUCCESS)
}
