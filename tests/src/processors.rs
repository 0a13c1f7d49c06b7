//! Native processors for tests: a ledger whose sum must stay zero, a counter, and what a closure
//! says.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{Context, ContextError, Failure, Invocation, MessageProcessor, NativeProcessor, Outgoing, Output};

fn failed(error: ContextError) -> Failure {
    Failure::retry(error.to_string())
}

async fn number(context: &mut Context, key: &str) -> Result<i64, Failure> {
    let text = context.get(key).await.map_err(failed)?;
    Ok(text.map_or(0, |text| std::str::from_utf8(&text).unwrap().parse().unwrap()))
}

async fn add(context: &mut Context, key: &str, amount: i64) -> Result<i64, Failure> {
    let sum = number(context, key).await? + amount;
    context.set(key, sum.to_string()).map_err(failed)?;
    Ok(sum)
}

/// Moves `amount` from account `from` to account `to`, and sends one message about it. Data:
/// `{"from","to","amount"}`.
pub fn ledger() -> Arc<dyn MessageProcessor> {
    fn transfer<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            let data: serde_json::Value =
                serde_json::from_slice(&run.message.data).map_err(|error| Failure::Invalid(error.to_string()))?;
            let (from, to) = (data["from"].as_str().unwrap(), data["to"].as_str().unwrap());
            let amount = data["amount"].as_i64().unwrap();
            add(context, &format!("account/{from}"), -amount).await?;
            // Lets other runs come in between: their writes must not get lost.
            tokio::task::yield_now().await;
            add(context, &format!("account/{to}"), amount).await?;
            let outgoing = Outgoing { kind: "moved".into(), data: run.message.data.clone(), ..Outgoing::default() };
            context.send(outgoing).map_err(failed)?;
            Ok(Output { content_type: None, data: run.message.id.clone().into() })
        })
    }
    Arc::new(NativeProcessor::new(transfer))
}

/// Counts its runs outside the transaction, and in state `count`; answers the new count.
pub struct Counter {
    runs: AtomicU64,
}

impl Counter {
    /// A counter at zero.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { runs: AtomicU64::new(0) })
    }

    /// Returns the number of runs.
    pub fn runs(&self) -> u64 {
        self.runs.load(Ordering::SeqCst)
    }
}

impl MessageProcessor for Counter {
    fn process<'a>(&'a self, _: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            tokio::task::yield_now().await;
            let count = add(context, "count", 1).await?;
            Ok(Output { content_type: Some("text/plain".into()), data: count.to_string().into() })
        })
    }

    fn digest(&self) -> &str {
        "counter"
    }
}

/// Does what the message's type says: `ok`, `reject`, `invalid`, `retry`, or `retry-until-N`.
pub fn obedient() -> Arc<dyn MessageProcessor> {
    fn obey<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            // Written before the failure: must not be there afterwards.
            add(context, "runs", 1).await?;
            let until = run.message.kind.strip_prefix("retry-until-").map(|n| n.parse::<u32>().unwrap());
            match (run.message.kind.as_str(), until) {
                ("reject", _) => Err(Failure::Reject("no".into())),
                ("invalid", _) => Err(Failure::Invalid("what?".into())),
                ("retry", _) => Err(Failure::retry("not now")),
                (_, Some(until)) if run.attempt < until => Err(Failure::retry("not yet")),
                _ => Ok(Output { content_type: None, data: format!("attempt {}", run.attempt).into() }),
            }
        })
    }
    Arc::new(NativeProcessor::new(obey))
}

/// Appends the message's id to state `order`: shows in which order messages ran.
pub fn recorder() -> Arc<dyn MessageProcessor> {
    fn record<'a>(run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            let key = format!("order/{}", run.message.extensions.get("partitionkey").map_or("", String::as_str));
            let before = context.get(&key).await.map_err(failed)?.unwrap_or_default();
            if run.message.kind == "retry-until-3" && run.attempt < 3 {
                return Err(Failure::retry("not yet"));
            }
            let after = format!("{}{},", std::str::from_utf8(&before).unwrap(), run.message.id);
            context.set(&key, after).map_err(failed)?;
            Ok(Output::default())
        })
    }
    Arc::new(NativeProcessor::new(record))
}
