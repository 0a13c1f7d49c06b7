//! Parts that the engine's tests share: state in memory, a message, a run. Asserts nothing.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test file uses its own part.

pub mod guest;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::{
    Context, EffectLimits, Effects, Entry, Failure, Invocation, Message, MessageProcessor, Output, ReadSet, StateView,
    StoreError, Version,
};
use hapax_engine::{Engine, EngineConfig, LoadError, LoadOptions, ProcessorLimits, WasmProcessor};

/// State in memory; one version for all, as nothing here conflicts.
#[derive(Default)]
pub struct MemoryState(pub BTreeMap<String, Bytes>);

impl StateView for MemoryState {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        async move { Ok(self.0.get(key).map_or((0, None), |value| (1, Some(value.clone())))) }.boxed()
    }

    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        let inside = move |key: &str| key >= start && end.is_none_or(|end| key < end);
        async move {
            let entries = self.0.iter().filter(|(key, _)| inside(key)).take(limit);
            Ok(entries.map(|(key, value)| (key.clone(), 1, value.clone())).collect())
        }
        .boxed()
    }
}

/// A store that cannot be read.
pub struct BrokenState;

impl StateView for BrokenState {
    fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        async { Err(StoreError::Io("disk on fire".into())) }.boxed()
    }

    fn scan<'a>(&'a self, _: &'a str, _: Option<&'a str>, _: usize) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        async { Err(StoreError::Io("disk on fire".into())) }.boxed()
    }
}

pub fn engine() -> Engine {
    Engine::new(EngineConfig { max_instances: 4, ..EngineConfig::default() }).expect("engine")
}

/// Limits that a test does not have to wait for.
pub fn limits() -> ProcessorLimits {
    ProcessorLimits { deadline: Duration::from_millis(300), memory_bytes: 16 << 20, ..ProcessorLimits::default() }
}

pub fn options() -> LoadOptions {
    let config = BTreeMap::from([("greeting".to_owned(), "hello".to_owned())]);
    LoadOptions { name: "test".to_owned(), config, limits: limits(), ..LoadOptions::default() }
}

pub fn load(bytes: &[u8]) -> Result<WasmProcessor, LoadError> {
    engine().load(bytes, options())
}

/// The error of a component that must not load.
pub fn load_error(bytes: &[u8]) -> LoadError {
    load(bytes).expect_err("this component must not load")
}

pub fn invocation(kind: &str, data: &str) -> Invocation {
    let mut message = Message::new("m-1", "tests", kind).with_data("text/plain", data.to_owned());
    message.time = Some("2026-01-02T03:04:05Z".to_owned());
    Invocation { message: Arc::new(message), idempotency_key: "m-1".into(), attempt: 1, seed: 42, step_key: None }
}

/// Results of a run.
pub struct Ran {
    pub result: Result<Output, Failure>,
    pub reads: ReadSet,
    pub effects: Effects,
}

impl Ran {
    pub fn output(&self) -> &[u8] {
        &self.result.as_ref().expect("the run must succeed").data
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.output().to_vec()).expect("text")
    }

    /// The reason of a failure that may pass.
    pub fn retry(&self) -> &str {
        match &self.result {
            Err(Failure::Retry { reason, .. }) => reason,
            other => panic!("expected a retry, got {other:?}"),
        }
    }

    /// The reason of a failure for good.
    pub fn reject(&self) -> &str {
        match &self.result {
            Err(Failure::Reject(reason)) => reason,
            other => panic!("expected a rejection, got {other:?}"),
        }
    }
}

pub async fn run(processor: &WasmProcessor, invocation: &Invocation) -> Ran {
    run_on(processor, invocation, Arc::new(MemoryState::default()), EffectLimits::default()).await
}

pub async fn run_on(
    processor: &WasmProcessor,
    invocation: &Invocation,
    view: Arc<dyn StateView>,
    limits: EffectLimits,
) -> Ran {
    let mut context = Context::new(view, Arc::new(limits));
    let result = processor.process(invocation, &mut context).await;
    let (reads, effects) = context.finish();
    Ran { result, reads, effects }
}

/// A component that `cargo xtask test` has built.
pub fn built(name: &str) -> Vec<u8> {
    let folder = std::env::var("HAPAX_GUESTS").expect("HAPAX_GUESTS: run the tests with `cargo xtask test`");
    let path = std::path::Path::new(&folder).join(format!("{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Collects what is logged while it is installed.
#[derive(Clone, Default)]
pub struct LogSink(Arc<Mutex<Vec<u8>>>);

impl LogSink {
    pub fn install(&self) -> tracing::subscriber::DefaultGuard {
        let sink = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || sink.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no panic while logging")).into_owned()
    }

    /// Lines that come from the guest.
    pub fn guest_lines(&self) -> Vec<String> {
        self.text().lines().filter(|line| line.contains("hapax::guest")).map(str::to_owned).collect()
    }
}

impl std::io::Write for LogSink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while logging").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
