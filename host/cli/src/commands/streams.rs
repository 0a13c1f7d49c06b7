//! `hapax streams`: prints a processor's event streams.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_core::{IdempotencyStorage as _, Scope, StateView, StreamEvent, list_streams, read_stream};
use hapax_store::RedbStore;
use serde_json::{Value, json};

use crate::exit::Failed;
use crate::host;
use crate::output::run_printer::line;

/// Events read from the store at one time.
const PAGE: usize = 1_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the processor.
    #[arg(long, value_name = "NAME")]
    processor: String,
    /// Name of the stream; without it, list the processor's streams with their versions.
    stream: Option<String>,
    /// Folder of the store.
    #[arg(long, value_name = "PATH", default_value = "hapax-store")]
    store: PathBuf,
    /// Start after this version of the stream.
    #[arg(long, value_name = "VERSION", default_value_t = 0)]
    after: u64,
    /// List at most this many events or streams.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    limit: usize,
}

pub(crate) fn command(args: Args, json: bool) -> anyhow::Result<ExitCode> {
    let store = RedbStore::open_existing(&args.store)?;
    let view = store.view(&Scope::of(&args.processor));
    host::block_on(async move {
        match &args.stream {
            Some(stream) => print_events(&*view, &args, stream, json).await?,
            None => {
                for (stream, version) in list_streams(&*view, None, args.limit).await? {
                    if json {
                        line(&json!({ "stream": stream, "version": version }).to_string());
                    } else {
                        line(&format!("{stream}\t{version}"));
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn print_events(view: &dyn StateView, args: &Args, stream: &str, json: bool) -> anyhow::Result<()> {
    let (mut after, mut left) = (args.after, args.limit);
    loop {
        let page = read_stream(view, stream, after, left.min(PAGE)).await?;
        let Some(last) = page.last() else { break };
        after = last.version;
        left -= page.len();
        page.iter().for_each(|event| line(&shown(event, json)));
    }
    if after == 0 {
        let there = format!("`hapax streams --processor {}` lists its streams", args.processor);
        return Err(Failed::not_found(format!("{} has no event stream {stream}; {there}", args.processor)));
    }
    Ok(())
}

fn shown(event: &StreamEvent, json: bool) -> String {
    let StreamEvent { id, version, kind, data } = event;
    if json {
        let data = serde_json::from_slice(data).unwrap_or_else(|_| Value::from(String::from_utf8_lossy(data)));
        return json!({ "version": version, "id": id, "type": kind, "data": data }).to_string();
    }
    format!("{version}\t{id}\t{kind}\t{}", String::from_utf8_lossy(data))
}
