//! `hapax records`: deduplication records, for people.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::record::{Record, State};
use hapax_core::storage::{IdempotencyStorage as _, Inspect as _};
use hapax_core::{RecordKey, Stored};
use hapax_store::RedbStore;
use serde_json::{Value, json};

use crate::exit::Failed;
use crate::host;
use crate::report::{line, result};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List records in the order of their keys.
    List {
        /// Folder of the store.
        #[arg(long, value_name = "PATH", default_value = "hapax-store")]
        store: PathBuf,
        /// Only this processor's.
        #[arg(long, value_name = "NAME")]
        processor: Option<String>,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<RecordKey>,
        /// Records to list, at most.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: usize,
    },
    /// Show one record, and its dead letters.
    Show {
        /// The key: tenant/processor/source/key, with `/` inside a part as %2F.
        key: RecordKey,
        /// Folder of the store.
        #[arg(long, value_name = "PATH", default_value = "hapax-store")]
        store: PathBuf,
    },
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    host::block_on(async move {
        match command {
            Command::List { store, processor, after, limit } => {
                let store = RedbStore::open_existing(&store)?;
                for (key, record) in store.records(processor.as_deref(), after.as_ref(), limit).await? {
                    if json {
                        line(&as_json(&key, &record).to_string());
                    } else {
                        line(&format!("{:<13} {key}", record.state.name()));
                    }
                }
            }
            Command::Show { key, store } => show(&RedbStore::open_existing(&store)?, &key, json).await?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn show(store: &RedbStore, key: &RecordKey, json: bool) -> anyhow::Result<()> {
    let record = store.admit(key).await?;
    let record = record.ok_or_else(|| Failed::not_found(format!("there is no record {key}; `hapax records list`")))?;
    let mut shown = as_json(key, &record);
    let letters = store.dead_letters(key).await?;
    shown["dead_letters"] = letters
        .iter()
        .map(|letter| {
            json!({
                "error": letter.error, "attempts": letter.attempts, "component": letter.component, "at_ms": letter.at_ms,
                "attributes": letter.message.attributes().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
                "data": String::from_utf8_lossy(&letter.message.data),
            })
        })
        .collect();
    line(&if json { shown.to_string() } else { serde_json::to_string_pretty(&shown)? });
    Ok(())
}

fn as_json(key: &RecordKey, record: &Record) -> Value {
    let stored = match &record.state {
        State::Completed { output } => Some(Stored::Completed(output.clone())),
        state => state.error().map(|error| Stored::Failed(error.to_owned())),
    };
    let (output, error) = match stored {
        Some(Stored::Completed(output)) => (result(&output), Value::Null),
        Some(Stored::Failed(error)) => (Value::Null, json!(error)),
        None => (Value::Null, Value::Null),
    };
    json!({
        "key": key.to_string(), "tenant": key.scope.tenant, "processor": key.scope.processor, "source": key.source,
        "id": key.key, "state": record.state.name(), "epoch": record.epoch, "attempts": record.attempts,
        "component": record.component, "received_ms": record.received_ms, "changed_ms": record.changed_ms,
        "expires_ms": record.expires_ms, "result": output, "error": error,
    })
}
