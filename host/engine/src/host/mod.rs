//! The host's side of a running instance: what it holds, and the imports over it. All reads and writes of the guest go
//! through the message's `Context`.

pub(crate) mod log;
pub(crate) mod message;
pub(crate) mod outbox;
mod state;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::context::{EffectLimits, Entry, StateView, Version};
use hapax_core::storage::StoreError;
use hapax_core::{Context, Invocation};

use crate::bindings::hapax::processor::config;
use crate::limits::{MemoryGuard, ProcessorLimits};
use crate::wasi::Wasi;
use log::GuestLog;

/// What all messages of a processor share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) config: BTreeMap<String, String>,
    pub(crate) limits: ProcessorLimits,
}

/// What one instance's imports work on: one message's worth.
pub(crate) struct HostState {
    pub(crate) shared: Arc<Shared>,
    pub(crate) invocation: Invocation,
    pub(crate) context: Context,
    pub(crate) memory: MemoryGuard,
    pub(crate) log: GuestLog,
    /// Only for components that import WASI.
    pub(crate) wasi: Option<Box<Wasi>>,
}

impl config::Host for HostState {
    fn get(&mut self, key: String) -> wasmtime::Result<Option<String>> {
        Ok(self.shared.config.get(&key).cloned())
    }
}

/// Holds the place of a context that has been lent to an instance.
pub(crate) fn empty_context() -> Context {
    static PARTS: LazyLock<(Arc<dyn StateView>, Arc<EffectLimits>)> =
        LazyLock::new(|| (Arc::new(NoState), Arc::new(EffectLimits::default())));
    Context::new(Arc::clone(&PARTS.0), Arc::clone(&PARTS.1))
}

struct NoState;

impl StateView for NoState {
    fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        async { Ok((0, None)) }.boxed()
    }

    fn scan<'a>(&'a self, _: &'a str, _: Option<&'a str>, _: usize) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        async { Ok(Vec::new()) }.boxed()
    }
}
