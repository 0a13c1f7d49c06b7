//! `hapax.toml`: every setting, with its unit in its name. Unknown settings are refused by name.

pub(crate) mod breaker;
pub(crate) mod outbound;
pub(crate) mod strategy;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hapax_core::{ATTEMPTS_MAX, AfterRefusal, BreakerPolicy, MismatchPolicy, Options, Ordering};
use hapax_engine::{Batching, InstanceMode, ProcessorLimits, ReuseLimits};
use hapax_store::StoreOptions;
use hapax_transport::HttpLimits;
use serde::Deserialize;

use crate::config::breaker::BreakerSetting;
use crate::config::outbound::{GrantSetting, OutboundSettings, SecretSetting};
use crate::config::strategy::StrategySetting;
use crate::exit::Failed;

/// A configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Folder of the store.
    pub(crate) store: PathBuf,
    /// Address of the HTTP server.
    #[serde(default = "default_listen")]
    pub(crate) listen: SocketAddr,
    /// Maximum size of one message.
    #[serde(default = "default_max_message_bytes")]
    pub(crate) max_message_bytes: usize,
    /// Maximum size of one batch.
    #[serde(default = "default_max_batch_bytes")]
    pub(crate) max_batch_bytes: usize,
    /// Maximum number of messages in one batch.
    #[serde(default = "default_max_batch_items")]
    pub(crate) max_batch_items: usize,
    /// Destination of the outbox. Without one, messages stay in the outbox.
    pub(crate) outbox: Option<Outbox>,
    /// Circuit breaker of the destination of the outbox.
    #[serde(default)]
    outbox_breaker: BreakerSetting,
    outbox_after_refusal: Option<AfterRefusalName>,
    /// Limits of the store.
    #[serde(default)]
    pub(crate) limits: StoreLimits,
    /// Sources from which `hapax up` pulls messages, beside HTTP.
    #[serde(default)]
    pub(crate) sources: Vec<SourceSetting>,
    /// Processors by name.
    pub(crate) processors: BTreeMap<String, Processor>,
}

/// Limits of the store on memory and disk.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoreLimits {
    page_cache_bytes: Option<usize>,
    unapplied_bytes: Option<usize>,
    journal_bytes: Option<u64>,
}

impl StoreLimits {
    pub(crate) fn store_options(&self) -> StoreOptions {
        let default = StoreOptions::default();
        StoreOptions {
            page_cache_bytes: self.page_cache_bytes.unwrap_or(default.page_cache_bytes),
            unapplied_bytes_max: self.unapplied_bytes.unwrap_or(default.unapplied_bytes_max),
            journal_bytes: self.journal_bytes.unwrap_or(default.journal_bytes),
            ..default
        }
    }
}

/// A source of messages for one processor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceSetting {
    /// Name of the processor that gets the messages.
    pub(crate) processor: String,
    /// File of CloudEvents, one a line. It is read to its end at each start of the host.
    pub(crate) file: PathBuf,
}

/// Destination of outbox messages.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outbox {
    /// File to which messages are appended, one CloudEvent on each line; `-` is standard output.
    File(PathBuf),
    /// URL to which messages are posted, one request for each message.
    Url(String),
}

/// Settings of one processor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Processor {
    /// File of the component.
    pub(crate) component: PathBuf,
    /// Settings that the component reads through `config`.
    #[serde(default)]
    pub(crate) config: BTreeMap<String, String>,
    /// Makes a duplicate of a message in flight wait for its outcome. Otherwise HTTP answers the
    /// duplicate with 409.
    #[serde(default = "yes")]
    pub(crate) wait_in_flight: bool,
    strategy: Option<StrategySetting>,
    attempts_max: Option<u32>,
    backoff_base_ms: Option<u64>,
    backoff_max_ms: Option<u64>,
    retry_after_max_ms: Option<u64>,
    #[serde(default)]
    breaker: BreakerSetting,
    retention_ms: Option<u64>,
    redelivery_horizon_ms: Option<u64>,
    /// Lets the host start although records expire while the source may still deliver their
    /// messages again.
    #[serde(default)]
    allow_short_retention: bool,
    cache_bytes: Option<u64>,
    deadline_ms: Option<u64>,
    memory_bytes: Option<usize>,
    instance: Option<InstanceName>,
    batch_max: Option<usize>,
    batch_wait_ms: Option<u64>,
    ordering: Option<OrderingName>,
    mismatch: Option<MismatchName>,
    /// Origins that the processor may call.
    #[serde(default)]
    pub(crate) http: Vec<GrantSetting>,
    #[serde(default)]
    secrets: BTreeMap<String, SecretSetting>,
    http_timeout_ms: Option<u64>,
    http_response_bytes: Option<usize>,
    http_calls: Option<usize>,
    http_ca_file: Option<PathBuf>,
    lease_ms: Option<u64>,
    /// Time after which the source delivers an unacknowledged message again, if that is known.
    redelivery_after_ms: Option<u64>,
    compensation_attempts_max: Option<u32>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OrderingName {
    Partitionkey,
    Subject,
    Source,
    None,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum InstanceName {
    Fresh,
    Reuse,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum MismatchName {
    DeadLetter,
    Reject,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum AfterRefusalName {
    Pass,
    Wait,
}

fn yes() -> bool {
    true
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

pub(crate) fn default_max_message_bytes() -> usize {
    1 << 20
}

impl std::fmt::Display for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

fn default_max_batch_bytes() -> usize {
    HttpLimits::default().max_batch_bytes
}

fn default_max_batch_items() -> usize {
    HttpLimits::default().max_batch_items
}

impl Config {
    /// Reads a file. Paths in it are relative to its folder.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failed::usage(format!("cannot read the configuration {}: {error}; name one with --config", path.display()))
        })?;
        let mut config: Self =
            toml::from_str(&text).map_err(|error| Failed::usage(format!("{}: {error}", path.display())))?;
        if config.processors.is_empty() {
            return Err(Failed::usage(format!("{}: it names no processor; add [processors.NAME]", path.display())));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        config.outbox_breaker()?;
        config.store = folder.join(&config.store);
        for source in &mut config.sources {
            if !config.processors.contains_key(&source.processor) {
                let names: Vec<_> = config.processors.keys().map(String::as_str).collect();
                return Err(Failed::usage(format!(
                    "{}: a source is for the processor `{}`, which is not there; name one of {}",
                    path.display(),
                    source.processor,
                    names.join(", ")
                )));
            }
            source.file = folder.join(&source.file);
        }
        for processor in config.processors.values_mut() {
            processor.component = folder.join(&processor.component);
            processor.secrets.values_mut().for_each(|secret| secret.settle(folder));
            processor.http_ca_file = processor.http_ca_file.take().map(|file| folder.join(file));
        }
        if let Some(Outbox::File(file)) = &mut config.outbox
            && file.as_os_str() != "-"
        {
            *file = folder.join(&file);
        }
        Ok(config)
    }

    /// Returns the policy of the circuit breaker of the outbox destination, or `None` if it is off.
    pub(crate) fn outbox_breaker(&self) -> anyhow::Result<Option<BreakerPolicy>> {
        let policy = self.outbox_breaker.policy(BreakerPolicy::of_destination());
        policy.map_err(|error| Failed::usage(format!("outbox_breaker: {error}")))
    }

    /// Returns the policy for outgoing messages whose ordering key has a refused message.
    pub(crate) fn outbox_after_refusal(&self) -> AfterRefusal {
        match self.outbox_after_refusal {
            None | Some(AfterRefusalName::Pass) => AfterRefusal::Pass,
            Some(AfterRefusalName::Wait) => AfterRefusal::Wait,
        }
    }
}

impl Processor {
    /// Returns the defaults for a component, without a circuit breaker: `hapax run` must reach the
    /// outcome of each message of its file.
    pub(crate) fn plain(component: PathBuf) -> Self {
        Self {
            component,
            config: BTreeMap::new(),
            wait_in_flight: true,
            strategy: None,
            attempts_max: None,
            backoff_base_ms: None,
            backoff_max_ms: None,
            retry_after_max_ms: None,
            breaker: BreakerSetting::off(),
            retention_ms: None,
            redelivery_horizon_ms: None,
            allow_short_retention: false,
            cache_bytes: None,
            deadline_ms: None,
            memory_bytes: None,
            instance: None,
            batch_max: None,
            batch_wait_ms: None,
            ordering: None,
            mismatch: None,
            http: Vec::new(),
            secrets: BTreeMap::new(),
            http_timeout_ms: None,
            http_response_bytes: None,
            http_calls: None,
            http_ca_file: None,
            lease_ms: None,
            redelivery_after_ms: None,
            compensation_attempts_max: None,
        }
    }

    /// Switches the circuit breaker off. Returns whether it was on.
    pub(crate) fn switch_breaker_off(&mut self) -> bool {
        let policy = self.breaker.policy(BreakerPolicy::of_processor());
        self.breaker = BreakerSetting::off();
        policy.is_ok_and(|policy| policy.is_some())
    }

    /// Returns the settings of outbound calls.
    pub(crate) fn outbound(&self) -> OutboundSettings<'_> {
        OutboundSettings {
            grants: &self.http,
            secrets: Some(&self.secrets),
            timeout_ms: self.http_timeout_ms,
            response_bytes: self.http_response_bytes,
            calls: self.http_calls,
            ca_file: self.http_ca_file.as_deref(),
        }
    }

    /// Checks the lease of processors that claim messages: it must outlast a run, and end before
    /// the source delivers the message again. The error is written for the author of the file.
    pub(crate) fn check_lease(&self) -> Result<(), String> {
        let (lease_ms, deadline_ms) =
            (self.lease_ms.unwrap_or(Options::default().lease_ms), self.limits().deadline.as_millis());
        if u128::from(lease_ms) <= deadline_ms {
            return Err(format!(
                "lease_ms is {lease_ms}, and a run may take {deadline_ms} ms (deadline_ms): a claim must outlast its run; \
                 raise lease_ms or lower deadline_ms"
            ));
        }
        match self.redelivery_after_ms {
            Some(after_ms) if after_ms <= lease_ms => Err(format!(
                "redelivery_after_ms is {after_ms}, and a claim holds for {lease_ms} ms (lease_ms): its source would deliver \
                 again before another owner may take over; lower lease_ms or raise the source's redelivery time"
            )),
            _ => Ok(()),
        }
    }

    /// Returns the settings of the pipeline. The error is written for the author of the file.
    pub(crate) fn options(&self) -> Result<Options, String> {
        let default = Options::default();
        let strategy = self.strategy.as_ref().map_or(Ok(default.strategy), StrategySetting::strategy);
        let options = Options {
            strategy: strategy.map_err(|error| format!("strategy: {error}"))?,
            attempts_max: self.attempts_max.unwrap_or(default.attempts_max),
            backoff_base_ms: self.backoff_base_ms.unwrap_or(default.backoff_base_ms),
            backoff_max_ms: self.backoff_max_ms.unwrap_or(default.backoff_max_ms),
            retry_after_max_ms: self.retry_after_max_ms.unwrap_or(default.retry_after_max_ms),
            breaker: self.breaker.policy(BreakerPolicy::of_processor()).map_err(|error| format!("breaker: {error}"))?,
            retention_ms: self.retention_ms.unwrap_or(default.retention_ms),
            redelivery_horizon_ms: self.redelivery_horizon_ms.unwrap_or(default.redelivery_horizon_ms),
            cache_bytes: self.cache_bytes.unwrap_or(default.cache_bytes),
            ordering: match self.ordering {
                None | Some(OrderingName::Partitionkey) => Ordering::PartitionKey,
                Some(OrderingName::Subject) => Ordering::Subject,
                Some(OrderingName::Source) => Ordering::Source,
                Some(OrderingName::None) => Ordering::None,
            },
            mismatch: match self.mismatch {
                None | Some(MismatchName::DeadLetter) => MismatchPolicy::DeadLetter,
                Some(MismatchName::Reject) => MismatchPolicy::Reject,
            },
            runs_max: default.runs_max,
            held_max: default.held_max,
            effects: default.effects,
            owner: default.owner,
            lease_ms: self.lease_ms.unwrap_or(default.lease_ms),
            compensation_attempts_max: self.compensation_attempts_max.unwrap_or(default.compensation_attempts_max),
        };
        if !(1..=ATTEMPTS_MAX).contains(&options.attempts_max) {
            return Err(format!("attempts_max is {}; give it 1 to {ATTEMPTS_MAX}", options.attempts_max));
        }
        if !(1..=ATTEMPTS_MAX).contains(&options.compensation_attempts_max) {
            return Err(format!(
                "compensation_attempts_max is {}; give it 1 to {ATTEMPTS_MAX}",
                options.compensation_attempts_max
            ));
        }
        self.check_retention(&options)?;
        Ok(options)
    }

    /// Refuses a retention after which the source may still deliver a message: its record would be
    /// gone, and the message would run twice.
    fn check_retention(&self, options: &Options) -> Result<(), String> {
        let (retention_ms, horizon_ms) = (options.retention_ms, options.redelivery_horizon_ms);
        if retention_ms >= horizon_ms || self.allow_short_retention {
            return Ok(());
        }
        Err(format!(
            "retention_ms is {retention_ms}, but its source may deliver a message again for {horizon_ms} ms \
             (redelivery_horizon_ms), and a message whose record has expired runs twice: raise retention_ms, lower \
             redelivery_horizon_ms to what the source does, or set allow_short_retention = true"
        ))
    }

    /// Returns the lifetime of instances.
    pub(crate) fn instance(&self) -> InstanceMode {
        match self.instance {
            None | Some(InstanceName::Fresh) => InstanceMode::Fresh,
            Some(InstanceName::Reuse) => InstanceMode::Reuse(ReuseLimits::default()),
        }
    }

    /// Returns the limits of one call of a component that takes batches.
    pub(crate) fn batching(&self) -> Batching {
        let default = Batching::default();
        Batching {
            messages_max: self.batch_max.unwrap_or(default.messages_max),
            wait: self.batch_wait_ms.map_or(default.wait, Duration::from_millis),
        }
    }

    /// Checks that the settings of batches fit the component. The error is written for the author
    /// of the file.
    pub(crate) fn check_batching(&self, takes_batches: bool) -> Result<(), String> {
        let set = [("batch_max", self.batch_max.is_some()), ("batch_wait_ms", self.batch_wait_ms.is_some())];
        match set.into_iter().find(|(_, set)| *set) {
            Some((name, _)) if !takes_batches => Err(format!(
                "{name} is set, but its component handles one message a call: it exports `handler` and not \
                 `batch-handler`. Remove {name}"
            )),
            _ if self.batch_max == Some(0) => Err("batch_max is 0: a call has at least one message".to_owned()),
            _ => Ok(()),
        }
    }

    /// Returns the limits of the engine.
    pub(crate) fn limits(&self) -> ProcessorLimits {
        let mut limits = ProcessorLimits::default();
        if let Some(deadline_ms) = self.deadline_ms {
            limits.deadline = Duration::from_millis(deadline_ms);
        }
        if let Some(memory_bytes) = self.memory_bytes {
            limits.memory_bytes = memory_bytes;
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_fresh_unless_reuse_is_granted() {
        let read = |line: &str| toml::from_str::<Processor>(&format!("component = \"c.wasm\"\n{line}"));
        assert_eq!(read("").expect("nothing set").instance(), InstanceMode::Fresh);
        assert_eq!(read("instance = \"fresh\"").expect("fresh").instance(), InstanceMode::Fresh);
        assert!(matches!(read("instance = \"reuse\"").expect("reuse").instance(), InstanceMode::Reuse(_)));
        let error = read("instance = \"warm\"").expect_err("there is no such mode").to_string();
        assert!(error.contains("`fresh`") && error.contains("`reuse`"), "{error}");
    }
}
