//! `hapax check`: everything that can be found wrong without running anything.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::MessageProcessor as _;
use serde_json::json;

use crate::config::{Config, Processor};
use crate::host;
use crate::output::line;

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
        let loaded = host::load(&engine, name, processor, &host::read(processor)?)?;
        host::settings(name, processor, &loaded)?;
        let (path, digest) = (processor.component.display().to_string(), loaded.digest());
        let steps = loaded.compensation().map_or(&[][..], |compensation| compensation.steps());
        if json {
            let said = json!({ "processor": name, "component": path, "digest": digest, "steps": steps, "ok": true });
            line(&said.to_string());
        } else {
            let compensates =
                if steps.is_empty() { String::new() } else { format!(", compensates {}", steps.join(", ")) };
            line(&format!("{path}: fits the contract, {digest}{compensates}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
