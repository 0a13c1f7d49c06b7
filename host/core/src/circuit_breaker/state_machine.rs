//! The rules of a circuit breaker: closed, open, half-open, by rates over the last calls. A pure
//! state machine: it reads no clock, waits for nothing and writes nothing. `circuit_breaker/mod.rs`
//! does that.

use crate::observe::status::BreakerState;
use crate::support::fault;

/// Rules for opening and closing a breaker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Number of the last calls from which the rates are computed; at least 1.
    pub window_calls: u32,
    /// Calls before the rates count at all; at most `window_calls`.
    pub calls_min: u32,
    /// Opens when this share of the calls has failed, in percent; above 100: never because of
    /// failures.
    pub failure_rate_percent: u32,
    /// Opens when this share of the calls was slow, in percent; above 100: never because of slow
    /// ones.
    pub slow_rate_percent: u32,
    /// Duration beyond which a call is slow, in milliseconds.
    pub slow_call_ms: u64,
    /// Time for which no call is let through once the breaker has opened, in milliseconds.
    pub open_ms: u64,
    /// Calls that are let through after that time. All of them must go well for the breaker to
    /// close; at least 1.
    pub probes: u32,
}

impl BreakerPolicy {
    /// Returns the default for a processor: its runs are many, and messages that fail by themselves
    /// must not stop it.
    pub fn of_processor() -> Self {
        Self {
            window_calls: 100,
            calls_min: 20,
            failure_rate_percent: 50,
            slow_rate_percent: 100,
            slow_call_ms: 60_000,
            open_ms: 10_000,
            probes: 3,
        }
    }

    /// Returns the default for a destination: one batch goes after the other, and each failure is
    /// followed by a longer wait.
    pub fn of_destination() -> Self {
        Self { window_calls: 10, calls_min: 5, open_ms: 5_000, probes: 1, ..Self::of_processor() }
    }

    /// Checks the settings. Returns a sentence for the user about the first setting that makes no
    /// sense.
    pub fn check(&self) -> Result<(), String> {
        let least = [("window_calls", self.window_calls), ("calls_min", self.calls_min), ("probes", self.probes)];
        if let Some((name, _)) = least.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{name} must be at least 1"));
        }
        if self.window_calls > WINDOW_CALLS_MAX {
            return Err(format!("window_calls is {}; it is at most {WINDOW_CALLS_MAX}", self.window_calls));
        }
        if self.calls_min > self.window_calls {
            let (min, window) = (self.calls_min, self.window_calls);
            return Err(format!("calls_min is {min}, and the last {window} calls (window_calls) never are as many"));
        }
        if self.failure_rate_percent == 0 || self.slow_rate_percent == 0 {
            return Err("a rate of 0 percent would open it at once; give 1 to 100, or 101 for never".into());
        }
        Ok(())
    }
}

/// Largest window: a byte a call.
const WINDOW_CALLS_MAX: u32 = 1 << 20;

/// Result and duration of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallOutcome {
    pub(crate) went: CallResult,
    pub(crate) elapsed_ms: u64,
}

/// Result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallResult {
    Succeeded,
    Failed,
}

/// Refusal of a call, which must wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    /// Wait in milliseconds; `None`: until a probe has ended.
    pub(crate) after_ms: Option<u64>,
}

/// State of one breaker. Every change of it begins a generation: results of calls of an earlier
/// generation are ignored.
#[derive(Debug)]
pub(crate) struct StateMachine {
    policy: BreakerPolicy,
    phase: Phase,
    generation: u64,
}

#[derive(Debug)]
enum Phase {
    Closed(Window),
    Open { until_ms: u64 },
    HalfOpen { under_way: u32, succeeded: u32 },
}

impl StateMachine {
    /// Returns a closed machine that has seen no calls.
    pub(crate) fn new(policy: BreakerPolicy) -> Self {
        Self { phase: Phase::Closed(Window::new(policy.window_calls)), policy, generation: 1 }
    }

    pub(crate) fn state(&self) -> BreakerState {
        match &self.phase {
            Phase::Closed(_) => BreakerState::Closed,
            Phase::Open { until_ms } => BreakerState::Open { until_ms: *until_ms },
            Phase::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Returns the generation, which is never 0.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the number of calls in the window, of failed ones and of slow ones. All are 0 unless
    /// the breaker is closed.
    pub(crate) fn counts(&self) -> (u32, u32, u32) {
        match &self.phase {
            Phase::Closed(window) => (window.calls(), window.failed, window.slow),
            Phase::Open { .. } | Phase::HalfOpen { .. } => (0, 0, 0),
        }
    }

    /// Restores the state that an earlier process has left: an open breaker stays open until its
    /// time is over.
    pub(crate) fn restore(&mut self, state: BreakerState) {
        match state {
            BreakerState::Closed => {}
            BreakerState::Open { until_ms } => self.change_to(Phase::Open { until_ms }),
            BreakerState::HalfOpen => self.change_to(Phase::HalfOpen { under_way: 0, succeeded: 0 }),
        }
    }

    /// Checks that a call would be let through now.
    pub(crate) fn peek(&self, now_ms: u64) -> Result<(), Refused> {
        match &self.phase {
            Phase::Closed(_) => Ok(()),
            Phase::Open { until_ms } => match until_ms.saturating_sub(now_ms).min(self.policy.open_ms) {
                0 => Ok(()),
                after_ms => Err(Refused { after_ms: Some(after_ms) }),
            },
            Phase::HalfOpen { under_way, succeeded } if under_way + succeeded < self.policy.probes => Ok(()),
            Phase::HalfOpen { .. } if fault::mutated("half-open-lets-all-through") => Ok(()),
            Phase::HalfOpen { .. } => Err(Refused { after_ms: None }),
        }
    }

    /// Begins a call, and returns its generation. The first call after the open time is over makes
    /// the breaker half-open.
    pub(crate) fn enter(&mut self, now_ms: u64) -> Result<u64, Refused> {
        if let Phase::Open { until_ms } = &mut self.phase {
            // A clock that was turned back must not keep the breaker open for longer.
            *until_ms = (*until_ms).min(now_ms.saturating_add(self.policy.open_ms));
        }
        self.peek(now_ms)?;
        if let Phase::Open { .. } = self.phase {
            self.change_to(Phase::HalfOpen { under_way: 0, succeeded: 0 });
        }
        if let Phase::HalfOpen { under_way, .. } = &mut self.phase {
            *under_way += 1;
        }
        Ok(self.generation)
    }

    /// Ends a call of `generation`. `outcome` is `None` if its result is not known.
    pub(crate) fn leave(&mut self, generation: u64, outcome: Option<CallOutcome>, now_ms: u64) {
        if generation != self.generation {
            return;
        }
        let slow = outcome.is_some_and(|outcome| outcome.elapsed_ms > self.policy.slow_call_ms);
        let failed = outcome.is_some_and(|outcome| outcome.went == CallResult::Failed);
        match &mut self.phase {
            Phase::Closed(window) if outcome.is_some() => {
                window.push(failed, slow);
                if window.is_over(&self.policy) {
                    self.open(now_ms);
                }
            }
            Phase::Closed(_) | Phase::Open { .. } => {}
            Phase::HalfOpen { under_way, succeeded } => {
                *under_way = under_way.saturating_sub(1);
                *succeeded += u32::from(outcome.is_some());
                if failed || (slow && self.policy.slow_rate_percent <= 100) {
                    self.open(now_ms);
                } else if *succeeded >= self.policy.probes {
                    self.change_to(Phase::Closed(Window::new(self.policy.window_calls)));
                }
            }
        }
    }

    fn open(&mut self, now_ms: u64) {
        self.change_to(Phase::Open { until_ms: now_ms.saturating_add(self.policy.open_ms) });
    }

    fn change_to(&mut self, phase: Phase) {
        self.phase = phase;
        self.generation += 1;
    }
}

/// The last calls, oldest overwritten first.
#[derive(Debug)]
struct Window {
    calls: Box<[Call]>,
    next: usize,
    filled: bool,
    failed: u32,
    slow: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Call {
    failed: bool,
    slow: bool,
}

impl Window {
    fn new(calls: u32) -> Self {
        let calls = vec![Call::default(); calls.clamp(1, WINDOW_CALLS_MAX) as usize].into();
        Self { calls, next: 0, filled: false, failed: 0, slow: 0 }
    }

    fn calls(&self) -> u32 {
        if self.filled { self.calls.len() as u32 } else { self.next as u32 }
    }

    fn push(&mut self, failed: bool, slow: bool) {
        // Where the window is not filled yet, the overwritten call is neither failed nor slow.
        let before = std::mem::replace(&mut self.calls[self.next], Call { failed, slow });
        self.failed = self.failed + u32::from(failed) - u32::from(before.failed);
        self.slow = self.slow + u32::from(slow) - u32::from(before.slow);
        self.next = (self.next + 1) % self.calls.len();
        self.filled |= self.next == 0;
    }

    fn is_over(&self, policy: &BreakerPolicy) -> bool {
        let calls = u64::from(self.calls());
        let reaches = |count: u32, percent: u32| u64::from(count) * 100 >= u64::from(percent) * calls;
        calls >= u64::from(policy.calls_min.clamp(1, self.calls.len() as u32))
            && (reaches(self.failed, policy.failure_rate_percent) || reaches(self.slow, policy.slow_rate_percent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> BreakerPolicy {
        BreakerPolicy {
            window_calls: 10,
            calls_min: 4,
            failure_rate_percent: 50,
            slow_rate_percent: 50,
            slow_call_ms: 100,
            open_ms: 1_000,
            probes: 2,
        }
    }

    const WELL: CallOutcome = CallOutcome { went: CallResult::Succeeded, elapsed_ms: 100 };
    const FAILED: CallOutcome = CallOutcome { went: CallResult::Failed, elapsed_ms: 1 };
    const SLOW: CallOutcome = CallOutcome { went: CallResult::Succeeded, elapsed_ms: 101 };

    fn call(machine: &mut StateMachine, outcome: CallOutcome, now_ms: u64) {
        let generation = machine.enter(now_ms).expect("it lets calls through");
        machine.leave(generation, Some(outcome), now_ms);
    }

    fn opened(now_ms: u64) -> StateMachine {
        let mut machine = StateMachine::new(policy());
        (0..4).for_each(|_| call(&mut machine, FAILED, now_ms));
        assert_eq!(machine.state(), BreakerState::Open { until_ms: now_ms + 1_000 });
        machine
    }

    #[test]
    fn it_opens_by_the_rate_and_not_below_the_least_number_of_calls() {
        let mut machine = StateMachine::new(policy());
        (0..3).for_each(|_| call(&mut machine, FAILED, 0));
        assert_eq!(machine.state(), BreakerState::Closed, "three calls say nothing");
        call(&mut machine, WELL, 0);
        assert_eq!(machine.state(), BreakerState::Open { until_ms: 1_000 }, "three of four");

        let mut machine = StateMachine::new(policy());
        for _ in 0..50 {
            call(&mut machine, WELL, 0);
            call(&mut machine, WELL, 0);
            call(&mut machine, FAILED, 0);
        }
        assert_eq!(machine.state(), BreakerState::Closed, "a third of the calls is less than a half");
    }

    #[test]
    fn only_the_last_calls_count() {
        let mut machine = StateMachine::new(policy());
        (0..1_000).for_each(|_| call(&mut machine, WELL, 0));
        (0..4).for_each(|_| call(&mut machine, FAILED, 0));
        assert_eq!((machine.counts(), machine.state()), ((10, 4, 0), BreakerState::Closed));
        (0..7).for_each(|_| call(&mut machine, WELL, 0));
        assert_eq!(machine.counts(), (10, 3, 0));
        (0..2).for_each(|_| call(&mut machine, FAILED, 0));
        assert_eq!(machine.counts(), (10, 3, 0), "two of those before are past the window");
        (0..3).for_each(|_| call(&mut machine, FAILED, 7));
        assert_eq!(machine.state(), BreakerState::Open { until_ms: 1_007 });
    }

    #[test]
    fn slow_calls_open_it_though_they_went_well() {
        let mut machine = StateMachine::new(policy());
        (0..2).for_each(|_| call(&mut machine, WELL, 0));
        (0..2).for_each(|_| call(&mut machine, SLOW, 0));
        assert_eq!(machine.state(), BreakerState::Open { until_ms: 1_000 });
        let mut never = StateMachine::new(BreakerPolicy { slow_rate_percent: 101, ..policy() });
        (0..100).for_each(|_| call(&mut never, SLOW, 0));
        assert_eq!(never.state(), BreakerState::Closed);
    }

    #[test]
    fn open_it_lets_nothing_through_and_then_a_few_that_close_it() {
        let mut machine = opened(5);
        assert_eq!(machine.enter(1_004), Err(Refused { after_ms: Some(1) }));
        let one = machine.enter(1_005).expect("the first probe");
        let two = machine.enter(1_005).expect("the second probe");
        assert_eq!((machine.state(), machine.enter(1_005)), (BreakerState::HalfOpen, Err(Refused { after_ms: None })));
        machine.leave(one, Some(WELL), 1_006);
        assert_eq!(machine.enter(1_006), Err(Refused { after_ms: None }), "what went well needs no further probe");
        machine.leave(two, Some(WELL), 1_007);
        assert_eq!((machine.state(), machine.counts()), (BreakerState::Closed, (0, 0, 0)), "the window begins anew");
    }

    #[test]
    fn one_probe_that_fails_opens_it_again() {
        for bad in [FAILED, SLOW] {
            let mut machine = opened(0);
            call(&mut machine, WELL, 1_000);
            call(&mut machine, bad, 1_500);
            assert_eq!(machine.state(), BreakerState::Open { until_ms: 2_500 });
        }
    }

    #[test]
    fn a_probe_that_is_given_up_gives_its_place_back() {
        let mut machine = opened(0);
        let one = machine.enter(1_000).expect("the first probe");
        machine.enter(1_000).expect("the second probe");
        machine.leave(one, None, 1_001);
        assert!(machine.peek(1_001).is_ok());
    }

    #[test]
    fn a_call_that_began_before_a_change_says_nothing_after_it() {
        let mut machine = StateMachine::new(policy());
        let early = machine.enter(0).expect("closed");
        (0..4).for_each(|_| call(&mut machine, FAILED, 0));
        let probe = machine.enter(1_000).expect("half-open");
        machine.leave(early, Some(FAILED), 1_000);
        assert_eq!(machine.state(), BreakerState::HalfOpen);
        machine.leave(probe, Some(FAILED), 1_000);
        machine.leave(probe, Some(WELL), 1_000);
        assert_eq!(machine.state(), BreakerState::Open { until_ms: 2_000 });
    }

    #[test]
    fn a_clock_that_is_turned_back_does_not_keep_it_open() {
        let mut machine = opened(1_000_000);
        assert_eq!(machine.enter(500), Err(Refused { after_ms: Some(1_000) }));
        assert!(machine.enter(1_500).is_ok());
        let mut restored = StateMachine::new(policy());
        restored.restore(BreakerState::Open { until_ms: u64::MAX });
        assert_eq!(restored.enter(0), Err(Refused { after_ms: Some(1_000) }));
        assert!(restored.enter(1_000).is_ok());
    }

    #[test]
    fn what_cannot_be_meant_is_told() {
        assert_eq!(BreakerPolicy::of_processor().check(), Ok(()));
        assert_eq!(BreakerPolicy::of_destination().check(), Ok(()));
        for (wrong, word) in [
            (BreakerPolicy { probes: 0, ..policy() }, "probes"),
            (BreakerPolicy { calls_min: 11, ..policy() }, "calls_min"),
            (BreakerPolicy { failure_rate_percent: 0, ..policy() }, "0 percent"),
            (BreakerPolicy { window_calls: u32::MAX, ..policy() }, "window_calls"),
        ] {
            assert!(wrong.check().is_err_and(|error| error.contains(word)), "{wrong:?}");
        }
    }
}
