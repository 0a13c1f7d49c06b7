//! The composition root: joins store, committer, engine and consumers. It knows every part and
//! decides nothing.

pub(crate) mod component_archive;
pub(crate) mod ingress;
pub(crate) mod operations;
pub(crate) mod status;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use hapax_core::{
    AbandonedParts, AfterRefusal, BreakerPolicy, CircuitBreaker, CircuitBreakerParts, Committer, CompensatorParts,
    Counters, IdempotentConsumer, MessageProcessor as _, Observer, Operator, Options, Outbound, OutboxRelay, Parts,
    Publisher, RelayError, RelayStatus, SWEEP_EVERY_MS, Scope, Store, StoreError, SystemClock, run_abandoned,
    run_compensator, run_deferred, run_sweeper, settle_compensations,
};
use hapax_engine::{Engine, EngineConfig, LoadOptions};
use hapax_store::{OpenError, RedbStore, StoreOptions};
use hapax_transport::Reopen;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use crate::config::{Outbox, Processor};
use crate::exit::Failed;
use crate::host::component_archive::ComponentArchive;
use crate::host::operations::Ops;

/// Opens a store that is there already. This and [`Host::open`] are the only places that name a
/// kind of store.
pub(crate) fn open_existing(folder: &Path) -> Result<Arc<dyn Store>, OpenError> {
    Ok(Arc::new(RedbStore::open_existing(folder)?))
}

/// The joined parts of a host, before it gets messages.
pub(crate) struct Host {
    pub(crate) store: Arc<dyn Store>,
    /// Counters of each processor's consumer, by the processor's name.
    pub(crate) counters: Mutex<BTreeMap<String, Arc<Counters>>>,
    /// Status of the outbox relay, if one works.
    pub(crate) relay_status: Arc<RelayStatus>,
    committer: Arc<Committer>,
    engine: Engine,
    components: ComponentArchive,
    /// Maximum number of runs of one processor at the same time.
    concurrency: usize,
}

impl Host {
    pub(crate) async fn open(store: &Path, options: StoreOptions, concurrency: usize) -> anyhow::Result<Self> {
        let (folder, engine) = (store, engine(concurrency)?);
        let store: Arc<dyn Store> = Arc::new(RedbStore::open_with(folder, options)?);
        let committer = Committer::start(store.clone()).await?;
        let components = ComponentArchive::of(folder, engine.clone());
        let (counters, relay_status) = (Mutex::default(), Arc::default());
        Ok(Self { store, committer, counters, relay_status, engine, components, concurrency })
    }

    /// Loads a processor's component, and makes its consumer.
    pub(crate) fn consumer(&self, name: &str, processor: &Processor) -> anyhow::Result<IdempotentConsumer> {
        let bytes = read(processor)?;
        let component = load(&self.engine, name, processor, &bytes)?;
        let (outbound, options) = settings(name, processor, &component)?;
        self.components.run_as(load_options(name, processor));
        if component.compensation().is_some() {
            self.components.keep(component.digest(), &bytes)?;
        }
        let effects = (**component.effect_limits()).clone();
        let options = Options { effects, runs_max: self.concurrency, ..options };
        let counters = Arc::new(Counters::default());
        self.counters.lock().insert(name.to_owned(), counters.clone());
        Ok(IdempotentConsumer::new(Parts {
            scope: Scope::of(name),
            processor: Arc::new(component),
            storage: self.store.clone(),
            committer: self.committer.clone(),
            outbound,
            clock: Arc::new(SystemClock),
            metrics: counters,
            options,
        }))
    }

    /// Makes the operations that answer operators while these consumers work. Requests stop waiting
    /// once `stop` turns true.
    pub(crate) fn operations(
        &self,
        consumers: impl IntoIterator<Item = IdempotentConsumer>,
        stop: watch::Receiver<bool>,
    ) -> Arc<Ops> {
        let operator = Operator::new(self.store.clone(), self.committer.clone(), Arc::new(SystemClock), consumers);
        Arc::new(Ops::new(self.store.clone(), operator, stop))
    }

    /// Returns the failure that closed the store, if one did.
    pub(crate) fn failure(&self) -> Option<StoreError> {
        self.committer.failure().cloned()
    }

    /// Completes when a failure has closed the store.
    pub(crate) fn store_failed(&self) -> impl Future<Output = StoreError> + Send + 'static {
        let committer = self.committer.clone();
        async move { committer.failed().await }
    }

    /// Starts removing expired records; runs until `stop` turns true.
    pub(crate) fn sweeper(&self, stop: watch::Receiver<bool>) -> JoinHandle<Result<(), StoreError>> {
        tokio::spawn(run_sweeper(self.store.clone(), Arc::new(SystemClock), SWEEP_EVERY_MS, stop))
    }

    /// Runs the deferred messages of a consumer until `stop` turns true.
    pub(crate) fn deferred(
        &self,
        consumer: &IdempotentConsumer,
        observer: Arc<dyn Observer>,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + 'static {
        run_deferred(consumer.clone(), self.store.clone(), observer, stop)
    }

    /// Compensates until every saga is compensated or stuck, or until `stop` turns true.
    pub(crate) async fn settle(
        &self,
        consumers: Vec<IdempotentConsumer>,
        observer: Arc<dyn Observer>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), StoreError> {
        settle_compensations(self.compensator_parts(consumers, observer), stop).await
    }

    fn compensator_parts(&self, consumers: Vec<IdempotentConsumer>, observer: Arc<dyn Observer>) -> CompensatorParts {
        CompensatorParts {
            scope: Scope::of(""),
            storage: self.store.clone(),
            committer: self.committer.clone(),
            clock: Arc::new(SystemClock),
            consumers,
            versions: Arc::new(self.components.clone()),
            observer,
        }
    }

    /// Removes components that no saga needs any more, then compensates failed sagas until `stop`
    /// turns true.
    pub(crate) fn compensator(
        &self,
        consumers: Vec<IdempotentConsumer>,
        observer: Arc<dyn Observer>,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + 'static {
        let parts = self.compensator_parts(consumers, observer);
        let at_work = parts.consumers.iter().map(|consumer| consumer.component().to_owned()).collect();
        let (components, store) = (self.components.clone(), self.store.clone());
        async move {
            components.clean(&*store, &at_work).await?;
            run_compensator(parts, stop).await
        }
    }

    /// Gives up messages that were never delivered again, until `stop` turns true.
    pub(crate) fn abandoned(
        &self,
        consumers: Vec<IdempotentConsumer>,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + 'static {
        let (store, clock) = (self.store.clone(), Arc::new(SystemClock));
        run_abandoned(AbandonedParts { scope: Scope::of(""), store, clock, consumers }, stop)
    }

    /// Starts sending the outbox; runs until `stop` turns true and nothing more can be sent.
    pub(crate) fn relay(
        &self,
        to: Outbox,
        after_refusal: AfterRefusal,
        breaker: Option<Arc<CircuitBreaker>>,
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<JoinHandle<Result<u64, RelayError>>> {
        let relay = OutboxRelay::new(self.store.clone(), self.committer.clone(), publisher(to)?, Arc::new(SystemClock));
        let relay = relay.guarded_by(breaker).after_refusal(after_refusal).reporting_to(self.relay_status.clone());
        Ok(tokio::spawn(relay.run(stop)))
    }

    /// Returns the circuit breaker of a destination, in the state in which an earlier process left
    /// it.
    pub(crate) async fn breaker(&self, of: &Outbox, policy: BreakerPolicy) -> Result<Arc<CircuitBreaker>, StoreError> {
        let breaker = CircuitBreaker::new(CircuitBreakerParts {
            name: format!("outbox/{of}"),
            policy,
            committer: self.committer.clone(),
            clock: Arc::new(SystemClock),
            metrics: Arc::new(Counters::default()),
        });
        breaker.restore(&*self.store).await?;
        Ok(Arc::new(breaker))
    }
}

/// Makes the engine, with its cache of compiled code in the user's cache folder.
pub(crate) fn engine(concurrency: usize) -> anyhow::Result<Engine> {
    let config = EngineConfig { cache_dir: cache_dir(), max_instances: concurrency as u32, ..EngineConfig::default() };
    Ok(Engine::new(config)?)
}

/// Reads the file of a processor's component.
pub(crate) fn read(processor: &Processor) -> anyhow::Result<Vec<u8>> {
    let path = &processor.component;
    std::fs::read(path)
        .map_err(|error| Failed::component(format!("cannot read the component {}: {error}", path.display())))
}

/// Checks a processor's settings against its component. Returns the client of its outbound calls
/// and the options of the pipeline.
pub(crate) fn settings(
    name: &str,
    processor: &Processor,
    component: &hapax_engine::WasmProcessor,
) -> anyhow::Result<(Option<Arc<dyn Outbound>>, Options)> {
    let wrong = |error: String| Failed::usage(format!("processors.{name}: {error}"));
    let options = processor.options().map_err(wrong)?;
    let outbound = processor.outbound().client().map_err(wrong)?;
    if outbound.is_some() || component.compensation().is_some() {
        processor.check_lease().map_err(wrong)?;
    }
    if component.imports_http() && outbound.is_none() {
        tracing::warn!(
            "processors.{name}: it imports wasi:http and is granted no calls (`http`): every call will be denied"
        );
    }
    Ok((outbound, options))
}

fn load_options(name: &str, processor: &Processor) -> LoadOptions {
    LoadOptions {
        name: name.to_owned(),
        config: processor.config.clone(),
        limits: processor.limits(),
        instance: processor.instance(),
        batching: processor.batching(),
    }
}

/// Loads a processor's component.
pub(crate) fn load(
    engine: &Engine,
    name: &str,
    processor: &Processor,
    bytes: &[u8],
) -> anyhow::Result<hapax_engine::WasmProcessor> {
    let path = &processor.component;
    let loaded = engine.load(bytes, load_options(name, processor));
    let loaded = loaded.with_context(|| format!("the component {} is refused", path.display()))?;
    let fits = processor.check_batching(loaded.takes_batches());
    fits.map_err(|error| Failed::usage(format!("processors.{name}: {error}")))?;
    Ok(loaded)
}

fn publisher(to: Outbox) -> anyhow::Result<Box<dyn Publisher>> {
    Ok(match to {
        Outbox::File(path) => {
            let publisher = hapax_transport::JsonlPublisher::open(&path)?;
            publisher.reopen().map(reopen_on_hangup).transpose()?;
            Box::new(publisher)
        }
        Outbox::Url(url) => Box::new(hapax_transport::HttpPublisher::new(&url)?),
    })
}

/// Returns `$XDG_CACHE_HOME/hapax/compiled`, or `$HOME/.cache/hapax/compiled`, or `None` if neither
/// variable is set.
fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("hapax").join("compiled"))
}

/// Has the outbox file opened again at each SIGHUP: whoever rotates it has renamed it.
fn reopen_on_hangup(reopen: Reopen) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reopen.ask();
        }
    });
    Ok(())
}

/// Returns a receiver that turns true at SIGTERM or SIGINT. The second signal ends the process at
/// once.
pub(crate) fn stop_on_signal() -> anyhow::Result<watch::Receiver<bool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stopping, stop) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            if stopping.send_replace(true) {
                std::process::exit(i32::from(crate::exit::INTERRUPTED));
            }
            tracing::info!("draining: messages in flight finish, new ones are not accepted");
        }
    });
    Ok(stop)
}

/// Returns the result of a task that has ended. A panic of the task is an error too.
pub(crate) fn joined<T, E>(ended: Result<Result<T, E>, JoinError>) -> anyhow::Result<T>
where
    anyhow::Error: From<E>,
{
    Ok(ended??)
}

/// Runs a future on a runtime of its own.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}
