//! `hapax.toml`: what may be set, with units in the names. Unknown settings are refused by name.

pub(crate) mod breaker;
pub(crate) mod outbound;
pub(crate) mod strategy;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hapax_core::{ATTEMPTS_MAX, BreakerPolicy, MismatchPolicy, Options, Ordering};
use hapax_engine::{Batching, InstanceMode, ProcessorLimits, ReuseLimits};
use hapax_store::StoreOptions;
use hapax_transport::HttpLimits;
use serde::Deserialize;

use crate::config::breaker::BreakerSetting;
use crate::config::outbound::{GrantSetting, OutsideSettings, SecretSetting};
use crate::config::strategy::StrategySetting;
use crate::exit::Failed;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Folder of the store.
    pub(crate) store: PathBuf,
    /// Where HTTP is served.
    #[serde(default = "default_listen")]
    pub(crate) listen: SocketAddr,
    /// Bytes of one message at most.
    #[serde(default = "default_max_message_bytes")]
    pub(crate) max_message_bytes: usize,
    /// Bytes of one batch at most.
    #[serde(default = "default_max_batch_bytes")]
    pub(crate) max_batch_bytes: usize,
    /// Messages of one batch at most.
    #[serde(default = "default_max_batch_items")]
    pub(crate) max_batch_items: usize,
    /// Where the outbox is sent; without it, messages stay in the outbox.
    pub(crate) outbox: Option<Outbox>,
    /// When the destination of the outbox is left alone for a while.
    #[serde(default)]
    outbox_breaker: BreakerSetting,
    /// What the store may use.
    #[serde(default)]
    pub(crate) limits: StoreLimits,
    /// Processors by name.
    pub(crate) processors: BTreeMap<String, Processor>,
}

/// What the store may use of memory and disk.
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

/// Where outbox messages go.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outbox {
    /// Appended to a file, one CloudEvent a line; `-` is standard output.
    File(PathBuf),
    /// Posted to a URL, one request a message.
    Url(String),
}

/// One processor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Processor {
    /// The component's file.
    pub(crate) component: PathBuf,
    /// What the component reads through `config`.
    #[serde(default)]
    pub(crate) config: BTreeMap<String, String>,
    /// Over HTTP: whether a duplicate of a message in flight waits for its outcome; if not, it is answered with 409.
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
    /// Lets the host start though records are forgotten while the source may still deliver their messages again.
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
    /// Origins that it may call; none without.
    #[serde(default)]
    pub(crate) http: Vec<GrantSetting>,
    #[serde(default)]
    secrets: BTreeMap<String, SecretSetting>,
    http_timeout_ms: Option<u64>,
    http_response_bytes: Option<usize>,
    http_calls: Option<usize>,
    http_ca_file: Option<PathBuf>,
    lease_ms: Option<u64>,
    /// How long its source waits for an acknowledgement before it delivers again, where that is known.
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
    /// Reads a file; paths in it are relative to its folder.
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

    /// When the destination of the outbox is left alone; the error is for the file's author.
    pub(crate) fn outbox_breaker(&self) -> anyhow::Result<Option<BreakerPolicy>> {
        let policy = self.outbox_breaker.policy(BreakerPolicy::of_destination());
        policy.map_err(|error| Failed::usage(format!("outbox_breaker: {error}")))
    }
}

impl Processor {
    /// A processor with nothing set but its component, and without a circuit breaker: who runs a file to its end wants to
    /// see how each of its messages ends.
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

    /// What it may call, and how.
    pub(crate) fn outbound(&self) -> OutsideSettings<'_> {
        OutsideSettings {
            grants: &self.http,
            secrets: Some(&self.secrets),
            timeout_ms: self.http_timeout_ms,
            response_bytes: self.http_response_bytes,
            calls: self.http_calls,
            ca_file: self.http_ca_file.as_deref(),
        }
    }

    /// Whether a claim holds for as long as it must, where there are claims: longer than a run may take, and not so long that the source has
    /// delivered again before it is over.
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
                 again what nobody may take over yet; lower lease_ms or raise the source's redelivery time"
            )),
            _ => Ok(()),
        }
    }

    /// The pipeline's settings; the error is a sentence for the file's author.
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

    /// A record that is forgotten while its message may still be delivered again lets it run twice.
    fn check_retention(&self, options: &Options) -> Result<(), String> {
        let (retention_ms, horizon_ms) = (options.retention_ms, options.redelivery_horizon_ms);
        if retention_ms >= horizon_ms || self.allow_short_retention {
            return Ok(());
        }
        Err(format!(
            "retention_ms is {retention_ms}, but its source may deliver a message again for {horizon_ms} ms \
             (redelivery_horizon_ms), and a record that is gone lets it run twice: raise retention_ms, lower \
             redelivery_horizon_ms to what the source does, or set allow_short_retention = true"
        ))
    }

    /// How long an instance lives.
    pub(crate) fn instance(&self) -> InstanceMode {
        match self.instance {
            None | Some(InstanceName::Fresh) => InstanceMode::Fresh,
            Some(InstanceName::Reuse) => InstanceMode::Reuse(ReuseLimits::default()),
        }
    }

    /// How many messages go in one call of a component that takes batches.
    pub(crate) fn batching(&self) -> Batching {
        let default = Batching::default();
        Batching {
            messages_max: self.batch_max.unwrap_or(default.messages_max),
            wait: self.batch_wait_ms.map_or(default.wait, Duration::from_millis),
        }
    }

    /// Whether what is set about batches fits the component; the error is a sentence for the file's author.
    pub(crate) fn check_batching(&self, takes_batches: bool) -> Result<(), String> {
        let set = [("batch_max", self.batch_max.is_some()), ("batch_wait_ms", self.batch_wait_ms.is_some())];
        match set.into_iter().find(|(_, set)| *set) {
            Some((name, _)) if !takes_batches => Err(format!(
                "{name} is set, but its component handles one message a call: it exports `handler` and not \
                 `batch-handler`. Leave {name} out"
            )),
            _ if self.batch_max == Some(0) => Err("batch_max is 0: a call has one message at least".to_owned()),
            _ => Ok(()),
        }
    }

    /// The engine's limits.
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
