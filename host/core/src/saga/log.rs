//! Logs of sagas, stored in the state that no processor owns: an event commits with the rest of its
//! commit, on every store. Appends are checked: a writer that read an outdated log appends nothing.
//!
//! Keys: `saga/member/<digest of a message's own key>` is the id of the named saga that the message
//! has joined. `saga/head/<id>` says that the saga exists and guards its appends.
//! `saga/event/<length><id>/<number>` are its events. `saga/undo/<id>` exists while the saga is
//! being compensated or is stuck. `saga/ended/<when>/<id>` exists once the saga may be removed at
//! that time.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::message::key::{RecordKey, Scope};
use crate::saga::{IllegalSagaEvent, Saga, SagaEvent, SagaId, SagaLogEntry, SagaState};
use crate::state::{StateView, Version};
use crate::store::IdempotencyStorage;
use crate::store::commit::SharedChange;
use crate::support::error::StoreError;
use crate::support::fault;

const HEADS: &str = "saga/head/";
const UNDOS: &str = "saga/undo/";
const ENDED: &str = "saga/ended/";
/// Events read at one time.
const PAGE: usize = 1_024;

/// The logs of a tenant's sagas.
#[derive(Clone)]
pub struct SagaLog {
    view: Arc<dyn StateView>,
}

/// Saga as it was read: the state its log adds up to, and the version of that log.
#[derive(Debug, Clone)]
pub struct ReadSaga {
    /// Name of the saga.
    pub id: SagaId,
    /// State that the log adds up to; empty where there is no log.
    pub saga: Saga,
    /// Version that guards the append.
    version: Version,
    /// Number of events of an earlier saga of the same id, which has ended: the next append
    /// replaces them.
    past_events: u32,
}

/// Saga in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SagaListing {
    /// Name of the saga.
    pub id: SagaId,
    /// State of the saga.
    pub state: SagaState,
    /// Time of the saga's last event, in milliseconds since the Unix epoch.
    pub changed_ms: u64,
}

impl SagaLog {
    /// Returns the logs of the tenant of `scope`.
    pub fn new(storage: &dyn IdempotencyStorage, scope: &Scope) -> Self {
        Self { view: storage.view(&scope.shared()) }
    }

    /// Reads a saga. Events that are not durable yet are not included.
    pub async fn read(&self, id: &SagaId) -> Result<ReadSaga, StoreError> {
        // Read the head first: if another writer appends meanwhile, the head is older than the
        // events, and the append fails.
        let (version, _) = self.view.get(&head(id)).await?;
        let entries = if version == 0 { Vec::new() } else { self.events(id).await? };
        let saga = Saga::replay(&entries).map_err(|error| damaged(id, &error))?;
        Ok(ReadSaga { id: id.clone(), saga, version, past_events: 0 })
    }

    /// Reads the saga of one message alone. A saga that has ended counts as absent: it was of a
    /// message that the host has forgotten since, by its retention or by an operator.
    pub(crate) async fn read_own(&self, id: &SagaId) -> Result<ReadSaga, StoreError> {
        let read = self.read(id).await?;
        if !read.saga.state.has_ended() || fault::mutated("ended-saga-stays") {
            return Ok(read);
        }
        Ok(ReadSaga { past_events: read.saga.events, saga: Saga::default(), ..read })
    }

    /// Returns the state of a saga, or `None` if there is no such saga.
    pub(crate) async fn state(&self, id: &SagaId) -> Result<Option<SagaState>, StoreError> {
        let (_, head) = self.view.get(&head(id)).await?;
        head.map(|head| SagaListing::of(id.clone(), &head).map(|listing| listing.state)).transpose()
    }

    /// Returns the named saga of which a message is a member.
    pub(crate) async fn saga_of(&self, message_key: &RecordKey) -> Result<Option<SagaId>, StoreError> {
        let (_, id) = self.view.get(&member(message_key)).await?;
        let parsed = |id: Bytes| std::str::from_utf8(&id).ok().and_then(|id| id.parse().ok());
        id.map(|id| parsed(id).ok_or_else(|| damaged(&SagaId::of_message(message_key), &"no saga"))).transpose()
    }

    /// Returns a saga's whole log, oldest entry first.
    pub async fn events(&self, id: &SagaId) -> Result<Vec<SagaLogEntry>, StoreError> {
        let (mut entries, end) = (Vec::new(), event(id, u32::MAX));
        loop {
            let start = event(id, entries.len() as u32);
            let page = self.view.scan(&start, Some(&end), PAGE).await?;
            let full = page.len() == PAGE;
            for (_, _, value) in page {
                entries.push(postcard::from_bytes(&value).map_err(|error| damaged(id, &error))?);
            }
            if !full {
                return Ok(entries);
            }
        }
    }

    /// Returns up to `limit` sagas after `after`, in the order of their names.
    pub async fn list(&self, after: Option<&SagaId>, limit: usize) -> Result<Vec<SagaListing>, StoreError> {
        let start = after.map_or_else(|| HEADS.to_owned(), |after| format!("{}\0", head(after)));
        let page = self.view.scan(&start, Some(&past(HEADS)), limit).await?;
        page.iter().map(|(key, _, value)| SagaListing::of(id_in(key, HEADS)?, value)).collect()
    }

    /// Returns up to `limit` sagas that are being compensated or are stuck, in the order of their
    /// names, regardless of the number of other sagas.
    pub async fn unsettled(&self, after: Option<&SagaId>, limit: usize) -> Result<Vec<SagaListing>, StoreError> {
        let mut listed = Vec::new();
        for id in self.compensating(after, limit).await? {
            if let (_, Some(value)) = self.view.get(&head(&id)).await? {
                listed.push(SagaListing::of(id, &value)?);
            }
        }
        Ok(listed)
    }

    /// Returns up to `limit` sagas that are being compensated or are stuck, after `after`.
    pub(crate) async fn compensating(&self, after: Option<&SagaId>, limit: usize) -> Result<Vec<SagaId>, StoreError> {
        let start = after.map_or_else(|| UNDOS.to_owned(), |after| format!("{UNDOS}{after}\0"));
        let page = self.view.scan(&start, Some(&past(UNDOS)), limit).await?;
        page.iter().map(|(key, _, _)| id_in(key, UNDOS)).collect()
    }

    /// Returns up to `limit` sagas whose retention is over, each with the time at which that was.
    pub(crate) async fn expired(&self, now_ms: u64, limit: usize) -> Result<Vec<(SagaId, u64)>, StoreError> {
        let page = self.view.scan(ENDED, Some(&format!("{ENDED}{now_ms:013}")), limit).await?;
        let one = |(key, _, _): &(String, Version, Bytes)| {
            let (when, _) = key[ENDED.len()..].split_once('/').unwrap_or_default();
            let id = id_in(key, &format!("{ENDED}{when}/"))?;
            Ok((id, when.parse().unwrap_or_default()))
        };
        page.iter().map(one).collect()
    }
}

impl SagaListing {
    fn of(id: SagaId, head: &[u8]) -> Result<Self, StoreError> {
        let (state, changed_ms) = postcard::from_bytes(head).map_err(|error| damaged(&id, &error))?;
        Ok(Self { id, state, changed_ms })
    }
}

impl ReadSaga {
    /// Returns the change that appends `entries`, if no other writer has appended since. A saga
    /// that has ended with it is retained until `expires_ms` (since the Unix epoch).
    pub fn append(&self, entries: &[SagaLogEntry], expires_ms: u64) -> Result<(SharedChange, Saga), IllegalSagaEvent> {
        let mut saga = self.saga.clone();
        let mut writes = BTreeMap::new();
        for entry in entries {
            let value = postcard::to_stdvec(entry).expect("an event of a saga can be encoded");
            writes.insert(event(&self.id, saga.events), Some(value.into()));
            if let SagaEvent::Joined(joined) = &entry.event
                && self.id.is_named()
            {
                writes.insert(member(&joined.message_key), Some(Bytes::copy_from_slice(self.id.as_str().as_bytes())));
            }
            saga.apply(entry)?;
        }
        writes.extend((saga.events..self.past_events).map(|number| (event(&self.id, number), None)));
        let value = postcard::to_stdvec(&(saga.state, saga.changed_ms)).expect("two numbers can be encoded");
        writes.insert(head(&self.id), Some(value.into()));
        let (was, is) = (self.saga.state, saga.state);
        match (is_unsettled(was), is_unsettled(is)) {
            (false, true) => drop(writes.insert(format!("{UNDOS}{}", self.id), Some(Bytes::new()))),
            (true, false) => drop(writes.insert(format!("{UNDOS}{}", self.id), None)),
            _ => {}
        }
        if is.has_ended() {
            writes.insert(ended(expires_ms, &self.id), Some(Bytes::new()));
        }
        Ok((SharedChange { reads: self.guard(), writes }, saga))
    }

    /// Returns the change that removes the saga, and its entry under the time `expired_ms`, if
    /// given.
    pub fn forget(&self, expired_ms: Option<u64>) -> SharedChange {
        let events = (0..self.saga.events.max(self.past_events)).map(|number| event(&self.id, number));
        let ended = expired_ms.map(|expires_ms| ended(expires_ms, &self.id));
        let members = self.saga.members.iter().filter(|_| self.id.is_named());
        let members = members.map(|joined| member(&joined.message_key));
        let keys = events.chain([head(&self.id), format!("{UNDOS}{}", self.id)]).chain(members).chain(ended);
        SharedChange { reads: self.guard(), writes: keys.map(|key| (key, None)).collect() }
    }

    /// Returns the change that removes only the entry under the time `expired_ms`: the saga has
    /// been opened again since, or is another one.
    pub(crate) fn stays(&self, expired_ms: u64) -> SharedChange {
        SharedChange { reads: self.guard(), writes: BTreeMap::from([(ended(expired_ms, &self.id), None)]) }
    }

    /// Returns the change that only checks that no other writer has appended since.
    pub fn unchanged(&self) -> SharedChange {
        SharedChange { reads: self.guard(), writes: BTreeMap::new() }
    }

    fn guard(&self) -> BTreeMap<String, Version> {
        BTreeMap::from([(head(&self.id), self.version)])
    }
}

fn is_unsettled(state: SagaState) -> bool {
    matches!(state, SagaState::Compensating | SagaState::Stuck)
}

/// Latest time in the index of ended sagas, in milliseconds since the Unix epoch: the year 2286.
/// Its entries are ordered as texts of 13 digits.
const LATEST_MS: u64 = 9_999_999_999_999;

fn ended(expires_ms: u64, id: &SagaId) -> String {
    let latest_ms = if fault::mutated("times-of-any-length") { u64::MAX } else { LATEST_MS };
    format!("{ENDED}{:013}/{id}", expires_ms.min(latest_ms))
}

fn member(message_key: &RecordKey) -> String {
    format!("saga/member/{:032x}", message_key.digest())
}

fn head(id: &SagaId) -> String {
    format!("{HEADS}{id}")
}

/// The length prefix ensures that no name's events lie among those of another name.
fn event(id: &SagaId, number: u32) -> String {
    format!("saga/event/{:05}{id}/{number:010}", id.as_str().len())
}

/// Returns the first key after all that begin with `prefix`, which ends in `/`.
fn past(prefix: &str) -> String {
    format!("{}0", prefix.trim_end_matches('/'))
}

fn id_in(key: &str, prefix: &str) -> Result<SagaId, StoreError> {
    let id = key.strip_prefix(prefix).and_then(|id| id.parse().ok());
    id.ok_or_else(|| StoreError::Damaged(format!("`{key}` names no saga").into()))
}

fn damaged(id: &SagaId, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Damaged(format!("the log of the saga {id}: {error}").into())
}
