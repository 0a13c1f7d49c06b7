//! Hapax as a library: an idempotent consumer of a native closure on redb. `cargo run --example
//! embed`, twice.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Committer, Context, Counters, Failure, Handling, IdempotentConsumer, Invocation, Message, NativeProcessor, Options,
    Output, Parts, Scope, SystemClock,
};
use hapax_store::RedbStore;

/// Counts messages in the state, and answers the count.
fn count<'a>(_: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
    Box::pin(async move {
        let failed = |error: hapax_core::ContextError| Failure::retry(error.to_string());
        let before = context.get("count").await.map_err(failed)?;
        let before: u64 = before.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()).unwrap_or(0);
        let now = (before + 1).to_string();
        context.set("count", now.clone()).map_err(failed)?;
        Ok(Output { content_type: Some("text/plain".into()), data: now.into() })
    })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = Arc::new(RedbStore::open(&std::env::temp_dir().join("hapax-embed"))?);
    let consumer = IdempotentConsumer::new(Parts {
        scope: Scope::of("counter"),
        processor: Arc::new(NativeProcessor::new(count)),
        committer: Committer::start(store.clone()).await?,
        storage: store,
        outbound: None,
        clock: Arc::new(SystemClock),
        metrics: Arc::new(Counters::default()),
        options: Options::default(),
    });
    for id in ["m-1", "m-2", "m-1"] {
        let outcome = consumer.handle(Message::new(id, "/embed", "demo"), Handling::default()).await?;
        println!("{id}: {outcome:?}");
    }
    Ok(())
}
