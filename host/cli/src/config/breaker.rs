//! Settings of a circuit breaker, of a processor or of the outbox destination.

use hapax_core::BreakerPolicy;
use serde::Deserialize;

/// `[processors.NAME.breaker]` or `[outbox_breaker]`. Absent settings have their defaults.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BreakerSetting {
    enabled: Option<bool>,
    window_calls: Option<u32>,
    calls_min: Option<u32>,
    failure_rate_percent: Option<u32>,
    slow_rate_percent: Option<u32>,
    slow_call_ms: Option<u64>,
    open_ms: Option<u64>,
    probes: Option<u32>,
}

impl BreakerSetting {
    /// Returns settings that switch the circuit breaker off.
    pub(crate) fn off() -> Self {
        Self { enabled: Some(false), ..Self::default() }
    }

    /// Returns the policy, or `None` if the circuit breaker is off. The error is written for the
    /// author of the file.
    pub(crate) fn policy(&self, default: BreakerPolicy) -> Result<Option<BreakerPolicy>, String> {
        let policy = BreakerPolicy {
            window_calls: self.window_calls.unwrap_or(default.window_calls),
            calls_min: self.calls_min.unwrap_or(default.calls_min),
            failure_rate_percent: self.failure_rate_percent.unwrap_or(default.failure_rate_percent),
            slow_rate_percent: self.slow_rate_percent.unwrap_or(default.slow_rate_percent),
            slow_call_ms: self.slow_call_ms.unwrap_or(default.slow_call_ms),
            open_ms: self.open_ms.unwrap_or(default.open_ms),
            probes: self.probes.unwrap_or(default.probes),
        };
        policy.check()?;
        Ok(self.enabled.unwrap_or(true).then_some(policy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_on_unless_it_is_switched_off() {
        let read = |text: &str| toml::from_str::<BreakerSetting>(text).expect("settings");
        let policy = |text: &str| read(text).policy(BreakerPolicy::of_processor());
        assert_eq!(policy(""), Ok(Some(BreakerPolicy::of_processor())));
        assert_eq!(policy("enabled = false"), Ok(None));
        let open_ms = policy("open_ms = 5").map(|policy| policy.map(|policy| policy.open_ms));
        assert_eq!(open_ms, Ok(Some(5)));
        assert!(policy("probes = 0").is_err_and(|error| error.contains("probes")));
    }
}
