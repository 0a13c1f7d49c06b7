//! The table of messages in flight: one leader a record, and followers that wait for its end.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::message::key::{DigestHasher, RecordKey};
use crate::support::fault;
use crate::support::sync::Mutex;

type Followers = HashMap<RecordKey, Vec<oneshot::Sender<()>>, BuildHasherDefault<DigestHasher>>;

/// Messages that are being run here, by record key, each with the tasks that wait for its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct InFlight {
    table: Arc<Mutex<Followers>>,
}

/// The right to run a message. Dropping it wakes every task that waits for the message's end.
#[derive(Debug)]
pub(crate) struct Leader {
    table: InFlight,
    pub(crate) key: RecordKey,
}

/// Waits for the end of a message that another task runs.
pub(crate) struct Follower(oneshot::Receiver<()>);

impl InFlight {
    /// Returns a leader if there is none, else a follower.
    pub(crate) fn enter(&self, key: &RecordKey) -> Result<Leader, Follower> {
        if fault::mutated("in-flight-entered-in-two-steps") && !self.contains(key) {
            self.table.lock().insert(key.clone(), Vec::new());
            return Ok(Leader { table: self.clone(), key: key.clone() });
        }
        match self.table.lock().entry(key.clone()) {
            Entry::Occupied(mut followers) => {
                let (sender, ended) = oneshot::channel();
                followers.get_mut().push(sender);
                Err(Follower(ended))
            }
            Entry::Vacant(place) => {
                place.insert(Vec::new());
                Ok(Leader { table: self.clone(), key: key.clone() })
            }
        }
    }

    /// Returns whether a run of `key` is under way.
    pub(crate) fn contains(&self, key: &RecordKey) -> bool {
        self.table.lock().contains_key(key)
    }
}

impl Follower {
    /// Completes when the leader has ended, with any result: look again.
    pub(crate) async fn ended(self) {
        // No message is ever sent: an error, the sender's end, is the signal.
        let _ = self.0.await;
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        // Removed from the table first: a follower that wakes does not find it again.
        let followers = self.table.table.lock().remove(&self.key);
        drop(followers);
    }
}
