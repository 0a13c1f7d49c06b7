//! `hapax state`: prints a processor's state.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::{IdempotencyStorage as _, RESERVED, Scope};
use hapax_store::RedbStore;
use serde_json::{Value, json};

use crate::exit::Failed;
use crate::host;
use crate::output::run_printer::line;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List a processor's keys and values in the order of the keys.
    List(Args),
    /// Print the value of a key; without a key, list all keys and values.
    Get(Args),
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    processor: String,
    /// Key of the value; for `list`, the prefix of the keys.
    key: Option<String>,
    /// Folder of the store.
    #[arg(long, value_name = "PATH", default_value = "hapax-store")]
    store: PathBuf,
    /// List at most this many entries.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    limit: usize,
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    let (args, get) = match command {
        Command::List(args) => (args, false),
        Command::Get(args) => (args, true),
    };
    let store = RedbStore::open_existing(&args.store)?;
    match &args.key {
        Some(key) if get => print_one(&store, &args, key, json)?,
        prefix => {
            let rows = store.state_of(&Scope::of(&args.processor), prefix.as_deref().unwrap_or(""), args.limit)?;
            // Keys of the host itself, such as those of event streams, are not the processor's state.
            for row in rows.into_iter().filter(|row| !row.key.starts_with(RESERVED)) {
                if json {
                    line(&json!({ "key": row.key, "value": text(&row.value) }).to_string());
                } else {
                    line(&format!("{}\t{}", row.key, String::from_utf8_lossy(&row.value)));
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_one(store: &RedbStore, args: &Args, key: &str, json: bool) -> anyhow::Result<()> {
    let view = store.view(&Scope::of(&args.processor));
    let (_, value) = host::block_on(async { Ok(view.get(key).await?) })?;
    let value = value.ok_or_else(|| {
        Failed::not_found(format!("{} has no state {key}; `hapax state list {0}` shows what it has", args.processor))
    })?;
    if json {
        line(&json!({ "key": key, "value": text(&value) }).to_string());
    } else {
        line(&String::from_utf8_lossy(&value));
    }
    Ok(())
}

/// Returns text, or the bytes as numbers if the value is not UTF-8.
fn text(value: &[u8]) -> Value {
    std::str::from_utf8(value).map_or_else(|_| json!(value), |text| json!(text))
}
