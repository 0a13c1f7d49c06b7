//! Settings of a processor, with units and defaults. The binary reads them from a file.

use std::sync::Arc;

use crate::circuit_breaker::state_machine::BreakerPolicy;
use crate::message::Message;
use crate::message::key::RecordKey;
use crate::message::strategy::Strategy;
use crate::state::EffectLimits;

/// Attempts that may be set, at most: each has an entry in the record's history.
pub const ATTEMPTS_MAX: u32 = 1_000;

/// Settings of one consumer.
#[derive(Debug, Clone)]
pub struct Options {
    /// Strategy by which messages are recognised.
    pub strategy: Strategy,
    /// Attempts before a message fails for good; at least 1, at most [`ATTEMPTS_MAX`].
    pub attempts_max: u32,
    /// Backoff before the second attempt, in milliseconds; doubles with each further one.
    pub backoff_base_ms: u64,
    /// Longest backoff, in milliseconds.
    pub backoff_max_ms: u64,
    /// Longest delay that a processor may ask for with its failure, in milliseconds: a message that
    /// waits holds up those behind it.
    pub retry_after_max_ms: u64,
    /// Policy of the circuit breaker, which stops all runs for a while when runs fail too often;
    /// `None`: no circuit breaker.
    pub breaker: Option<BreakerPolicy>,
    /// Time for which a terminal record is retained, in milliseconds.
    pub retention_ms: u64,
    /// Longest delay of a redelivery by a source, in milliseconds. Where messages have positions,
    /// the last one seen is remembered that much longer than its record's retention.
    pub redelivery_horizon_ms: u64,
    /// Messages in flight, at most: those that run, and those whose commit is on its way. A message
    /// that waits for its turn or its time is not among them.
    pub runs_max: usize,
    /// Messages that are parked or redriven at one time, at most; further ones are put off.
    pub held_max: usize,
    /// Policy for a message whose key was used with another body.
    pub mismatch: MismatchPolicy,
    /// Source of the ordering key. Messages with one ordering key run one after the other.
    pub ordering: Ordering,
    /// Limits of one run.
    pub effects: EffectLimits,
    /// Size of the cache of terminal records, in bytes.
    pub cache_bytes: u64,
    /// Owner name of the claims, where effects can leave the transaction. Only one process at a
    /// time may use a name: a process that returns under it takes up at once the messages that it
    /// had claimed before.
    pub owner: Arc<str>,
    /// Duration of a claim, in milliseconds; renewed while the run is under way.
    pub lease_ms: u64,
    /// Attempts to compensate one step before an operator is asked; at least 1, at most
    /// [`ATTEMPTS_MAX`].
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

/// Policy for a message whose idempotency key was used with another body. The message never runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MismatchPolicy {
    /// Holds the message as a dead letter beside the record, and logs an error.
    DeadLetter,
    /// Refuses the message, and does not hold it.
    Reject,
}

/// Source of a message's ordering key. Messages without an ordering key run in parallel.
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
    /// Returns the message's ordering key.
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
    /// Returns the time for which a terminal record is retained, in milliseconds.
    pub fn record_life_ms(&self) -> u64 {
        let horizon_ms = if self.strategy.has_positions() { self.redelivery_horizon_ms } else { 0 };
        self.retention_ms.saturating_add(horizon_ms)
    }

    /// Returns the longest delay before an attempt, in milliseconds.
    pub(crate) fn longest_delay_ms(&self) -> u64 {
        self.backoff_max_ms.max(self.retry_after_max_ms)
    }

    /// Returns the delay before the attempt after `attempt`, in milliseconds: what the processor
    /// asked for, within `retry_after_max_ms`, or the backoff.
    pub(crate) fn retry_delay_ms(&self, key: &RecordKey, attempt: u32, asked_ms: Option<u64>) -> u64 {
        let asked_ms = asked_ms.map(|asked_ms| asked_ms.min(self.retry_after_max_ms));
        asked_ms.unwrap_or_else(|| self.backoff_ms(key, attempt))
    }

    /// Returns the backoff before the attempt after `attempt`, in milliseconds: exponential with
    /// full jitter. The jitter comes from the key, not from a generator: re-runs are repeatable,
    /// and different keys still spread.
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
