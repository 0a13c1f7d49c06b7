//! Counts of messages that were answered and left nothing behind: duplicates, and those that were stale. In memory, until the
//! committer takes them along, about once a second; a crash loses what was not taken. Never touches a record, and nobody
//! waits.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;

use parking_lot::Mutex;

use crate::feed::{EventKind, FeedEntry};
use crate::key::Hashed;

/// Records counted one by one between two hand-overs, at most; the rest is counted together, under no record.
const RECORDS_MAX: usize = 1 << 14;

/// What was counted since the last hand-over.
#[derive(Debug, Default)]
pub(crate) struct Replays(Mutex<Counts>);

/// How often, and when the last time, by record and kind.
type Counts = HashMap<(u128, EventKind), (u64, u64), BuildHasherDefault<Hashed>>;

impl Replays {
    /// Counts one; answers whether it is the first since the last hand-over.
    pub(crate) fn count(&self, kind: EventKind, digest: u128, now_ms: u64) -> bool {
        let mut counts = self.0.lock();
        let (first, full) = (counts.is_empty(), counts.len() >= RECORDS_MAX);
        match counts.entry((digest, kind)) {
            Entry::Occupied(mut entry) => entry.get_mut().add(now_ms),
            Entry::Vacant(entry) if !full => drop(entry.insert((1, now_ms))),
            Entry::Vacant(_) => counts.entry((0, kind)).or_default().add(now_ms),
        }
        first
    }

    /// Takes what was counted.
    pub(crate) fn take(&self) -> Vec<FeedEntry> {
        let counts = std::mem::take(&mut *self.0.lock());
        let entry =
            |((digest, kind), (times, at_ms))| FeedEntry { digest, times, ..FeedEntry::of_many(kind, 1, at_ms) };
        counts.into_iter().map(entry).collect()
    }
}

trait Add {
    fn add(&mut self, now_ms: u64);
}

impl Add for (u64, u64) {
    fn add(&mut self, now_ms: u64) {
        self.0 += 1;
        self.1 = self.1.max(now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_by_record_and_bounded_and_taken_once() {
        let replays = Replays::default();
        assert!(replays.count(EventKind::Replayed, 7, 10));
        assert!(!replays.count(EventKind::Stale, 7, 11));
        assert!(!replays.count(EventKind::Replayed, 7, 12));
        let mut taken = replays.take();
        taken.sort_by_key(|entry| entry.at_ms);
        let of = |kind, times, at_ms| FeedEntry { digest: 7, times, ..FeedEntry::of_many(kind, 1, at_ms) };
        assert_eq!(taken, [of(EventKind::Stale, 1, 11), of(EventKind::Replayed, 2, 12)]);
        assert_eq!(replays.take(), []);
        let many = RECORDS_MAX as u64 + 5;
        for digest in 1..=many {
            assert_eq!(replays.count(EventKind::Replayed, digest.into(), 20), digest == 1);
        }
        let taken = replays.take();
        assert_eq!(taken.len(), RECORDS_MAX + 1);
        assert_eq!(taken.iter().map(|entry| entry.times).sum::<u64>(), many, "none is lost");
        assert!(taken.contains(&FeedEntry::of_many(EventKind::Replayed, 5, 20)));
        // However often: few records never fill it.
        for _ in 0..3 * many {
            replays.count(EventKind::Replayed, 7, 30);
        }
        assert_eq!(replays.take(), [of(EventKind::Replayed, 3 * many, 30)]);
    }
}
