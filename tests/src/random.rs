//! Random numbers from a seed that a failure prints: the same seed makes the same test.

use std::time::SystemTime;

/// A generator of random numbers; good enough to pick cases.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The generator of `seed`.
    pub fn of(seed: u64) -> Self {
        // Spread, so that neighbouring seeds differ in every bit; never 0, where it would stay.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// The seed of a random test: `HAPAX_SEED`, or another every time. Prints it: a failure shows what
/// to repeat.
pub fn seed() -> u64 {
    let seed = std::env::var("HAPAX_SEED")
        .map_or_else(|_| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64, |seed| seed.parse().unwrap());
    println!("HAPAX_SEED={seed}");
    seed
}
