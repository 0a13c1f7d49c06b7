//! Target of an operator's command: a store that no host has open, or a running host. Both give the
//! same answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hapax_core::{Committer, Operator, SystemClock};
use hapax_store::OpenError;
use hapax_transport::{AskError, OperatorClient, OperatorRequest, RequestError};
use serde_json::Value;
use tokio::sync::watch;

use crate::exit::{Failed, NOT_FOUND, REFUSED, STORE_FAILED, USAGE};
use crate::host;
use crate::host::operations::Ops;

#[derive(clap::Args)]
pub(crate) struct Target {
    /// Folder of the store, if no host has it open.
    #[arg(long, value_name = "PATH", default_value = "hapax-store", conflicts_with = "host")]
    store: PathBuf,
    /// Address of a running host to ask instead, such as http://127.0.0.1:8080.
    #[arg(long, value_name = "URL")]
    host: Option<String>,
}

impl Target {
    /// Sends the request to the target, and returns the answer.
    pub(crate) fn ask(&self, request: OperatorRequest) -> anyhow::Result<Value> {
        host::block_on(async {
            match &self.host {
                Some(url) => ask_host(url, &request).await,
                None => Ok(open(&self.store).await?.ask(request).await.map_err(Failed::from)?),
            }
        })
    }
}

async fn open(path: &Path) -> anyhow::Result<Ops> {
    let store = host::open_existing(path).map_err(|error| {
        let locked = matches!(error, OpenError::Locked(_));
        let error = anyhow::Error::from(error);
        if locked { error.context("to ask the host that has the store open, give --host URL") } else { error }
    })?;
    let committer = Committer::start(store.clone()).await?;
    let operator = Operator::new(store.clone(), committer, Arc::new(SystemClock), []);
    Ok(Ops::new(store, operator, watch::channel(false).1))
}

async fn ask_host(url: &str, request: &OperatorRequest) -> anyhow::Result<Value> {
    let client = OperatorClient::new(url).map_err(|error| Failed::usage(error.to_string()))?;
    client.ask(request).await.map_err(|error| match error {
        AskError::Refused(refusal) => Failed::from(refusal).into(),
        AskError::NoAnswer(why) => Failed::no_answer(why),
    })
}

impl From<RequestError> for Failed {
    fn from(refusal: RequestError) -> Self {
        let code = match &refusal {
            RequestError::Invalid(_) => USAGE,
            RequestError::NotFound(_) => NOT_FOUND,
            RequestError::Refused(_) => REFUSED,
            RequestError::Unavailable(_) => STORE_FAILED,
        };
        Self { code, text: refusal.to_string() }
    }
}
