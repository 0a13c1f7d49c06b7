//! What a processor's owner may set, with units and defaults. Reading it from a file is the binary's.

use std::sync::Arc;

use crate::circuit_breaker::state_machine::BreakerPolicy;
use crate::message::Message;
use crate::message::key::RecordKey;
use crate::message::strategy::Strategy;
use crate::state::EffectLimits;

/// Attempts that may be asked for, at most: each stands in the record's history.
pub const ATTEMPTS_MAX: u32 = 1_000;

/// Settings of one consumer.
#[derive(Debug, Clone)]
pub struct Options {
    /// How messages are recognised.
    pub strategy: Strategy,
    /// Attempts before a message fails for good; at least 1, at most [`ATTEMPTS_MAX`].
    pub attempts_max: u32,
    /// Backoff before the second attempt, in milliseconds; doubles with each further one.
    pub backoff_base_ms: u64,
    /// Longest backoff, in milliseconds.
    pub backoff_max_ms: u64,
    /// Longest delay that a processor may ask for with its failure, in milliseconds: a message that waits holds up those
    /// behind it.
    pub retry_after_max_ms: u64,
    /// When runs fail so often that nothing more is run for a while; `None`: never.
    pub breaker: Option<BreakerPolicy>,
    /// How long a terminal record is kept, in milliseconds.
    pub retention_ms: u64,
    /// How late a source may deliver a message again, in milliseconds. Where messages have positions, the last one seen is
    /// remembered that much longer than its record's retention.
    pub redelivery_horizon_ms: u64,
    /// Messages in flight, at most: those that run, and those whose commit is on its way. What waits for its turn or its time
    /// is not among them.
    pub runs_max: usize,
    /// Messages that are parked or redriven at one time, at most; what comes then is put off.
    pub held_max: usize,
    /// What happens to a message whose key was used with another body.
    pub mismatch: MismatchPolicy,
    /// Which messages must run one after the other.
    pub ordering: Ordering,
    /// What one run may do.
    pub effects: EffectLimits,
    /// Bytes of terminal records kept in memory.
    pub cache_bytes: u64,
    /// Whose claims these are, where effects can leave the transaction. Only one process at a time may use a name: who comes back
    /// under it takes up at once what it had claimed before.
    pub owner: Arc<str>,
    /// How long a claim holds, in milliseconds; renewed while the run is under way.
    pub lease_ms: u64,
    /// Attempts to undo one step before an operator is asked; at least 1, at most [`ATTEMPTS_MAX`].
    pub compensation_attempts_max: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            attempts_max: 5,
            backoff_base_ms: 100,
            backoff_max_ms: 60_000,
            retry_after_max_ms: 24 * 60 * 60 * 1_000,
            breaker: None,
            strategy: Strategy::default(),
            retention_ms: 7 * 24 * 60 * 60 * 1_000,
            redelivery_horizon_ms: 24 * 60 * 60 * 1_000,
            runs_max: 1_024,
            held_max: 10_000,
            mismatch: MismatchPolicy::DeadLetter,
            ordering: Ordering::PartitionKey,
            effects: EffectLimits::default(),
            cache_bytes: 32 << 20,
            owner: "host".into(),
            lease_ms: 30_000,
            compensation_attempts_max: 20,
        }
    }
}

/// What happens to a message whose idempotency key was used with another body. It never runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MismatchPolicy {
    /// Kept as a dead letter beside the record, and an error in the log.
    DeadLetter,
    /// Refused; not kept.
    Reject,
}

/// Where a message's ordering key comes from. Messages without one run in parallel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordering {
    /// The CloudEvents extension `partitionkey`.
    PartitionKey,
    /// The attribute `subject`.
    Subject,
    /// The attribute `source`: every source in its own order.
    Source,
    /// No order.
    None,
}

impl Ordering {
    /// The message's ordering key.
    pub fn key<'m>(&self, message: &'m Message) -> Option<&'m str> {
        match self {
            Self::PartitionKey => message.extensions.get("partitionkey").map(String::as_str),
            Self::Subject => message.subject.as_deref(),
            Self::Source => Some(&message.source),
            Self::None => None,
        }
    }
}

impl Options {
    /// How long a terminal record stands, in milliseconds.
    pub fn record_life_ms(&self) -> u64 {
        let horizon_ms = if self.strategy.has_positions() { self.redelivery_horizon_ms } else { 0 };
        self.retention_ms.saturating_add(horizon_ms)
    }

    /// Returns the delay before the attempt after `attempt`, in milliseconds: what the processor asked for, within
    /// `retry_after_max_ms`, or the backoff.
    pub(crate) fn retry_delay_ms(&self, key: &RecordKey, attempt: u32, asked_ms: Option<u64>) -> u64 {
        let asked_ms = asked_ms.map(|asked_ms| asked_ms.min(self.retry_after_max_ms));
        asked_ms.unwrap_or_else(|| self.backoff_ms(key, attempt))
    }

    /// Returns the backoff before the attempt after `attempt`, in milliseconds: exponential with full jitter. The jitter comes
    /// from the key, not from a generator: re-runs are repeatable, and different keys still spread.
    pub fn backoff_ms(&self, key: &RecordKey, attempt: u32) -> u64 {
        let doubled =
            self.backoff_base_ms.saturating_mul(1u64.checked_shl(attempt.saturating_sub(1)).unwrap_or(u64::MAX));
        let longest = doubled.min(self.backoff_max_ms);
        key.seed().rotate_left(attempt) % longest.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::key::Scope;

    fn key(number: u64) -> RecordKey {
        RecordKey::new(Scope::of("p"), "/source".into(), number.to_string().into())
    }

    #[test]
    fn the_backoff_doubles_up_to_its_longest_and_is_spread_over_all_of_it() {
        let options = Options { backoff_base_ms: 100, backoff_max_ms: 1_000, ..Options::default() };
        for (attempt, longest_ms) in
            [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1_000), (64, 1_000), (u32::MAX, 1_000)]
        {
            let mut delays: Vec<u64> = (0..1_000).map(|number| options.backoff_ms(&key(number), attempt)).collect();
            delays.sort_unstable();
            let (least, most) = (delays[0], delays[999]);
            assert!(least <= longest_ms / 10 && most <= longest_ms && most >= longest_ms * 9 / 10, "{least} to {most}");
            let middle = delays[500];
            assert!((longest_ms * 4 / 10..=longest_ms * 6 / 10).contains(&middle), "attempt {attempt}: {middle}");
        }
    }

    #[test]
    fn no_setting_of_the_backoff_overflows() {
        let options = Options { backoff_base_ms: u64::MAX, backoff_max_ms: u64::MAX, ..Options::default() };
        let delays: Vec<u64> = (1..100).map(|attempt| options.backoff_ms(&key(7), attempt)).collect();
        assert!(delays.iter().max() > Some(&(u64::MAX / 2)), "{delays:?}");
        let none = Options { backoff_base_ms: 0, backoff_max_ms: 0, ..Options::default() };
        assert_eq!(none.backoff_ms(&key(7), 1), 0);
    }
}
