//! Limits of one message's cost to the host, and the guard that counts an instance's memory.
//! Enforces; never decides what becomes of the message.

use std::time::Duration;

use hapax_core::EffectLimits;
use wasmtime::ResourceLimiter;

/// Limits of one message of one processor.
#[derive(Debug, Clone)]
pub struct ProcessorLimits {
    /// Linear memory of an instance, all its memories together.
    pub memory_bytes: usize,
    /// Wall-clock time of one run, from the moment it has an instance. A call with many messages
    /// has no more.
    pub deadline: Duration,
    /// Elements of one table.
    pub table_elements: usize,
    /// Most that one host call, or the answer, may carry out of the guest, counted as the host
    /// holds it.
    pub hostcall_bytes: usize,
    /// Log text of one message; what is over is dropped with a notice. Applies to `log` and to
    /// standard output and error, each by itself.
    pub log_bytes: usize,
    /// The answer: content type and data.
    pub result_bytes: usize,
    /// State and outgoing messages. The engine passes them to the code that makes the run's
    /// `Context`.
    pub effects: EffectLimits,
}

impl Default for ProcessorLimits {
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            deadline: Duration::from_secs(1),
            table_elements: 20_000,
            hostcall_bytes: 32 << 20,
            log_bytes: 64 << 10,
            result_bytes: 1 << 20,
            effects: EffectLimits::default(),
        }
    }
}

/// Size of the calls of a component that takes batches, in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Messages of one call, at most.
    pub messages_max: usize,
    /// Longest time that a message waits for others to join its call. A message also waits while
    /// there is no room for an instance.
    pub wait: Duration,
}

impl Default for Batching {
    fn default() -> Self {
        Self { messages_max: 64, wait: Duration::from_millis(2) }
    }
}

/// Lifetime of an instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InstanceMode {
    /// One message: each starts from the same memory, so a re-run comes to the same result.
    #[default]
    Fresh,
    /// Many messages, one after the other, for components that take long to start. Their author
    /// promises that what a message leaves in the component's memory makes no difference to the
    /// next one: the host cannot tell, and a re-run may meet other memory than the run before it.
    /// State, clock, randomness, log and limits are each message's own.
    Reuse(ReuseLimits),
}

/// Limits after which a reused instance is replaced, apart from its failures: it never outlives a
/// trap, its deadline, a limit, or an answer that asks to be run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReuseLimits {
    /// Messages it answers at most.
    pub messages: u32,
    /// Bytes its memory may have grown by since it was made.
    pub growth_bytes: usize,
}

impl Default for ReuseLimits {
    fn default() -> Self {
        Self { messages: 10_000, growth_bytes: 16 << 20 }
    }
}

/// Limit that an instance reached when it asked for more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    Memory,
    Table,
}

/// Counts an instance's memory. A refusal is remembered: a guest that cannot grow mostly ends in a
/// trap, which says less than the cause does.
pub(crate) struct MemoryGuard {
    memory_limit: usize,
    table_limit: usize,
    memory_used: usize,
    pub(crate) denied: Option<Denied>,
}

impl MemoryGuard {
    pub(crate) fn new(limits: &ProcessorLimits) -> Self {
        Self { memory_limit: limits.memory_bytes, table_limit: limits.table_elements, memory_used: 0, denied: None }
    }

    /// All memories together.
    pub(crate) fn used_bytes(&self) -> usize {
        self.memory_used
    }
}

impl ResourceLimiter for MemoryGuard {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let used = self.memory_used.saturating_add(desired.saturating_sub(current));
        if used > self.memory_limit {
            self.denied = Some(Denied::Memory);
            return Ok(false);
        }
        self.memory_used = used;
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        if desired > self.table_limit {
            self.denied = Some(Denied::Table);
            return Ok(false);
        }
        Ok(true)
    }
}

/// A size as people write it: `64 MiB`, `1 KiB`, `100 bytes`.
pub(crate) fn human_bytes(bytes: usize) -> String {
    match bytes {
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} bytes"),
    }
}
