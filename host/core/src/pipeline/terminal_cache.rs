//! Terminal records in memory: duplicates are answered from here without a read of the store.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::message::key::RecordKey;
use crate::record::{Record, RecordState};

/// Terminal records in memory, bounded in bytes. Never holds "there is no record": only the store
/// may say so.
pub(crate) struct TerminalCache(Cache<RecordKey, Arc<Record>, Bytes>);

#[derive(Clone)]
struct Bytes;

impl Weighter<RecordKey, Arc<Record>> for Bytes {
    fn weight(&self, key: &RecordKey, record: &Arc<Record>) -> u64 {
        let body = match &record.state {
            RecordState::Completed { output } => output.data.len(),
            other => other.error().map_or(0, str::len),
        };
        (size_of::<(RecordKey, Record)>() + key.source.len() + key.key.len() + body) as u64
    }
}

impl TerminalCache {
    pub(crate) fn new(bytes: u64) -> Self {
        // A guess of how many entries fit; it only sizes the cache's own tables.
        let entries = (bytes / 512).max(16) as usize;
        Self(Cache::with_weighter(entries, bytes, Bytes))
    }

    pub(crate) fn get(&self, key: &RecordKey) -> Option<Arc<Record>> {
        self.0.get(key)
    }

    pub(crate) fn remove(&self, key: &RecordKey) {
        self.0.remove(key);
    }

    pub(crate) fn insert(&self, key: RecordKey, record: Arc<Record>) {
        if record.state.is_terminal() {
            self.0.insert(key, record);
        }
    }
}
