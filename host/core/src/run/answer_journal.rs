//! The journal of outbound answers, under state keys of the host: a re-run is answered from it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::message::key::RecordKey;
use crate::run::checkpoint::Checkpoints;
use crate::run::outbound::OutboundResponse;
use crate::run::outbound_call::CALLS_MAX;
use crate::state::RESERVED;
use crate::store::IdempotencyStorage;
use crate::support::error::StoreError;

/// Answers by the index of their call.
pub(crate) type Journal = BTreeMap<u32, Answered>;

/// A call with its answer, as it is stored until its message has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answered {
    pub(super) method: String,
    pub(super) url: String,
    pub(super) body: [u8; 16],
    pub(crate) response: OutboundResponse,
}

/// Returns the state keys of all journalled answers of a message.
pub(crate) async fn journalled_answers(
    storage: &dyn IdempotencyStorage,
    message_key: &RecordKey,
) -> Result<Vec<String>, StoreError> {
    let view = storage.view(&message_key.scope);
    let (start, end) = (journal_key(message_key, 0), journal_key(message_key, CALLS_MAX));
    let entries = view.scan(&start, Some(&end), CALLS_MAX as usize).await?;
    Ok(entries.into_iter().map(|(key, ..)| key).collect())
}

fn journal_key(message_key: &RecordKey, index: u32) -> String {
    format!("{RESERVED}call/{:032x}/{index:06}", message_key.digest())
}

impl Checkpoints {
    pub(crate) fn journal_key(&self, index: u32) -> String {
        journal_key(&self.identity.message_key, index)
    }

    pub(crate) async fn read_journal(&self) -> Result<Journal, StoreError> {
        let view = self.parts.storage.view(&self.parts.scope);
        let (start, end) = (self.journal_key(0), self.journal_key(CALLS_MAX));
        let entries = view.scan(&start, Some(&end), CALLS_MAX as usize).await?;
        let damaged = |key: &str| StoreError::Damaged(format!("a stored answer, `{key}`").into());
        let read = |(key, _, value): (String, u64, Bytes)| {
            let index = key.rsplit_once('/').and_then(|(_, index)| index.parse().ok());
            let answered = postcard::from_bytes(&value).ok();
            Ok((index.ok_or_else(|| damaged(&key))?, answered.ok_or_else(|| damaged(&key))?))
        };
        entries.into_iter().map(read).collect()
    }
}
