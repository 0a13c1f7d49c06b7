//! The journal of outbound answers, under state keys of the host: a re-run is answered from it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::run::checkpoint::Checkpoints;
use crate::run::outbound::OutboundResponse;
use crate::run::outbound_call::CALLS_MAX;
use crate::state::RESERVED;
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

impl Checkpoints {
    pub(crate) fn journal_key(&self, index: u32) -> String {
        format!("{RESERVED}call/{:032x}/{index:06}", self.identity.message_key.digest())
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
