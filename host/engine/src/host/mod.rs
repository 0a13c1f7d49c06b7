//! The host's side of a running instance: what it holds, and the imports over it. All reads and
//! writes of the guest go through the message's `Context`.

pub(crate) mod events;
pub(crate) mod http;
pub(crate) mod items;
pub(crate) mod lock;
pub(crate) mod log;
pub(crate) mod message;
pub(crate) mod outbox;
pub(crate) mod saga;
pub(crate) mod state;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hapax_core::{Context, EffectLimits, Entry, Invocation, Message, StateView, StoreError, Version};

use crate::bindings::hapax::processor::config;
use crate::limits::{MemoryGuard, ProcessorLimits};
use crate::ticker::{Deadline, Ticks};
use crate::wasi::Wasi;
use items::{Item, Items};
use log::GuestLog;

/// Data that all messages of a processor share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) config: BTreeMap<String, String>,
    pub(crate) limits: ProcessorLimits,
    /// Counter of the deadlines' ticks.
    pub(crate) ticks: Ticks,
}

/// State that one instance's imports work on, for one call.
pub(crate) struct HostState {
    pub(crate) shared: Arc<Shared>,
    pub(crate) items: Items,
    /// Message handles that the guest was given and has not dropped.
    pub(crate) handles_given: u32,
    pub(crate) memory: MemoryGuard,
    pub(crate) log: GuestLog,
    deadline: Deadline,
    /// Only for components that import WASI.
    pub(crate) wasi: Option<Box<Wasi>>,
}

impl HostState {
    /// The host side of an instance, for its first call.
    pub(crate) fn new(shared: &Arc<Shared>, wasi: bool, items: Items) -> Self {
        let limits = &shared.limits;
        Self {
            memory: MemoryGuard::new(limits),
            log: GuestLog::new(limits.log_bytes.saturating_mul(items.count())),
            deadline: shared.ticks.deadline(limits.deadline),
            wasi: wasi.then(|| Box::new(Wasi::new(shared, seeding(&items), items.count()))),
            items,
            handles_given: 0,
            shared: Arc::clone(shared),
        }
    }

    /// Puts another call in place of the last: nothing of that is left here. What memory the
    /// instance has is still its own, and counted.
    pub(crate) fn begin(&mut self, items: Items) {
        let limits = &self.shared.limits;
        self.log = GuestLog::new(limits.log_bytes.saturating_mul(items.count()));
        self.deadline = self.shared.ticks.deadline(limits.deadline);
        if let Some(wasi) = &mut self.wasi {
            wasi.begin(&self.shared, seeding(&items), items.count());
        }
        self.items = items;
    }

    /// The messages of a call that is over.
    pub(crate) fn take_items(&mut self) -> Vec<Item> {
        match std::mem::replace(&mut self.items, Items::batch(Vec::new())) {
            Items::One(item) => vec![item],
            Items::Batch { items, .. } => items,
        }
    }

    /// The id of the message that the guest works on; empty before it has selected one of a batch.
    pub(crate) fn message_id(&self) -> &str {
        self.items.selected().map_or("", |item| &item.invocation.message.id)
    }

    /// Ends an answered message. Whether another may follow: not after a limit, nor with a handle
    /// left open.
    pub(crate) fn end(&mut self) -> bool {
        let in_order = self.memory.denied.is_none() && self.log.is_within_budget() && self.handles_given == 0;
        self.wasi.as_mut().is_none_or(|wasi| wasi.end()) && in_order
    }

    /// Returns true if the message's time is over.
    pub(crate) fn is_over(&self) -> bool {
        self.deadline.is_over(&self.shared.ticks)
    }
}

impl config::Host for HostState {
    fn get(&mut self, key: String) -> wasmtime::Result<Option<String>> {
        Ok(self.shared.config.get(&key).cloned())
    }
}

/// Message whose clock and randomness a call begins with. A batch begins with no message's: the
/// choice of messages in it is chance, and must make no difference.
fn seeding(items: &Items) -> &Invocation {
    static NOBODY: LazyLock<Invocation> = LazyLock::new(|| Invocation {
        message: Arc::new(Message::new("", "", "")),
        idempotency_key: "".into(),
        attempt: 1,
        seed: 0,
        step_key: None,
    });
    items.selected().map_or(&NOBODY, |item| &item.invocation)
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
