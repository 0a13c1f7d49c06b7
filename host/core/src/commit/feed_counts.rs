//! Counts of messages that were answered and left nothing behind: duplicates and stale messages.
//! The counts are in memory until the committer takes them along, about once a second. A crash
//! loses the counts that were not taken. Counting never touches a record, and nothing waits for it.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::store::feed::{FeedEntry, FeedEventKind};

/// Messages counted by record between two hand-overs, at most. The rest is counted together, under
/// no record.
const COUNTS_MAX: usize = 1 << 14;

/// Counts since the last hand-over.
#[derive(Debug, Default)]
pub(crate) struct FeedCounts(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Counts in the order in which they came, since appending is the fastest way to write them.
    /// They are added up when they are handed over.
    each: Vec<Count>,
    /// Number of times, and the last time in milliseconds since the Unix epoch, of the counts that
    /// are not by record.
    rest: BTreeMap<FeedEventKind, (u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    digest: u128,
    kind: FeedEventKind,
    times: u64,
    /// Time of the last one, in milliseconds since the Unix epoch.
    at_ms: u64,
}

impl FeedCounts {
    /// Counts one message. Returns whether it is the first since the last hand-over.
    pub(crate) fn count(&self, kind: FeedEventKind, digest: u128, now_ms: u64) -> bool {
        let mut counts = self.0.lock();
        if counts.each.len() == COUNTS_MAX {
            let (times, at_ms) = counts.rest.entry(kind).or_default();
            (*times, *at_ms) = (*times + 1, now_ms.max(*at_ms));
            return false;
        }
        counts.each.push(Count { digest, kind, times: 1, at_ms: now_ms });
        counts.each.len() == 1
    }

    /// Takes the counts.
    pub(crate) fn take(&self) -> Vec<FeedEntry> {
        let mut counts = std::mem::take(&mut *self.0.lock());
        counts.add_up();
        let entry = |(digest, kind, times, at_ms)| FeedEntry { digest, times, ..FeedEntry::of_many(kind, 1, at_ms) };
        let each = counts.each.into_iter().map(|count| (count.digest, count.kind, count.times, count.at_ms));
        let rest = counts.rest.into_iter().map(|(kind, (times, at_ms))| (0, kind, times, at_ms));
        each.chain(rest).map(entry).collect()
    }
}

impl Counts {
    /// Merges the counts into one for each record and kind.
    fn add_up(&mut self) {
        self.each.sort_unstable_by_key(|count| (count.digest, count.kind));
        self.each.dedup_by(|next, sum| {
            let same = (next.digest, next.kind) == (sum.digest, sum.kind);
            if same {
                (sum.times, sum.at_ms) = (sum.times + next.times, sum.at_ms.max(next.at_ms));
            }
            same
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_by_record_and_bounded_and_taken_once() {
        let replays = FeedCounts::default();
        assert!(replays.count(FeedEventKind::Replayed, 7, 10));
        assert!(!replays.count(FeedEventKind::Stale, 7, 11));
        assert!(!replays.count(FeedEventKind::Replayed, 7, 12));
        let mut taken = replays.take();
        taken.sort_by_key(|entry| entry.at_ms);
        let of = |kind, times, at_ms| FeedEntry { digest: 7, times, ..FeedEntry::of_many(kind, 1, at_ms) };
        assert_eq!(taken, [of(FeedEventKind::Stale, 1, 11), of(FeedEventKind::Replayed, 2, 12)]);
        assert_eq!(replays.take(), []);
        let many = COUNTS_MAX as u64 + 5;
        for digest in 1..=many {
            assert_eq!(replays.count(FeedEventKind::Replayed, digest.into(), 20), digest == 1);
        }
        let taken = replays.take();
        assert_eq!(taken.len(), COUNTS_MAX + 1);
        assert_eq!(taken.iter().map(|entry| entry.times).sum::<u64>(), many, "none is lost");
        assert!(taken.contains(&FeedEntry::of_many(FeedEventKind::Replayed, 5, 20)));
        for _ in 0..many {
            replays.count(FeedEventKind::Replayed, 7, 30);
        }
        let rest = FeedEntry::of_many(FeedEventKind::Replayed, 5, 30);
        assert_eq!(replays.take(), [of(FeedEventKind::Replayed, COUNTS_MAX as u64, 30), rest]);
    }
}
