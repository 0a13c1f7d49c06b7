//! The engine: one wasmtime configuration, its pool, its heartbeat and its permits, shared by all
//! processors. Refuses to fail where it can do with less: without a pool it allocates on demand.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use wasmtime::{Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::cache::CodeCache;
use crate::error::EngineError;
use crate::idle_instances::IdleInstances;
use crate::ticker::Ticker;

/// Tables one slot of the pool offers; a component with more takes several slots.
pub(crate) const TABLES_PER_SLOT: u32 = 8;
/// Core instances one component may have: a language runtime with its adapters has under ten.
const CORE_INSTANCES_PER_COMPONENT: u32 = 50;
/// Bytes of a slot that are wiped where the kernel cannot tell which pages were used: the whole
/// slot is wiped, so it is small.
const KEEP_RESIDENT_BLINDLY_BYTES: usize = 64 << 10;
/// Elements a table of the pool can hold; a processor's own limit may be lower.
const POOL_TABLE_ELEMENTS: usize = 100_000;

/// Settings of the engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Folder that holds compiled code between starts; `None`: no cache. Made with mode 0700, used
    /// by this user only.
    pub cache_dir: Option<PathBuf>,
    /// Most bytes of compiled code in the cache; the least recently used code is removed first.
    pub cache_bytes: u64,
    /// Instances that run at once, of all processors; more wait.
    pub max_instances: u32,
    /// Instances that wait for the next message of processors which reuse theirs
    /// (`InstanceMode::Reuse`), of all processors; beyond that, those that have waited longest are
    /// dropped. Each holds the memory it has grown to.
    pub kept_instances: u32,
    /// Time between two looks at the deadlines.
    pub tick: Duration,
    /// True to reserve the instances' address space at the start (4 GiB each, for idle instances
    /// too).
    pub pooling: bool,
    /// Memory an ended instance has used that is wiped in place for the next one, and not given
    /// back to the kernel: three to four times as fast. At most this much stays for each of
    /// `max_instances` and `kept_instances`. Linux 6.7 or later; before, less is kept.
    pub keep_resident_bytes: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            cache_dir: None,
            cache_bytes: 1 << 30,
            max_instances: 256,
            kept_instances: 64,
            tick: Duration::from_millis(10),
            pooling: true,
            keep_resident_bytes: 1 << 20,
        }
    }
}

/// Compiles and runs components. Cheap to clone; its thread ends with the last clone and the last
/// processor.
#[derive(Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) wasmtime: wasmtime::Engine,
    pub(crate) ticker: Ticker,
    /// One permit a slot of the pool, beside the slots of `kept`: who holds one finds room, who
    /// does not waits.
    pub(crate) permits: Semaphore,
    pub(crate) max_instances: u32,
    pub(crate) kept: IdleInstances,
    pub(crate) cache: Option<CodeCache>,
    /// Processors loaded so far.
    loaded: AtomicU64,
    pooling: bool,
}

impl Engine {
    /// Sets the engine up: address space, heartbeat thread, folder of the cache.
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        if config.max_instances == 0 || config.tick.is_zero() {
            return Err(EngineError::Zero);
        }
        let (wasmtime, pooling) = make_wasmtime(&config)?;
        let ticker = Ticker::start(wasmtime.clone(), config.tick).map_err(EngineError::Thread)?;
        let cache = config.cache_dir.and_then(|dir| CodeCache::open(dir, config.cache_bytes, &wasmtime));
        let permits = Semaphore::new(config.max_instances as usize);
        let max_instances = config.max_instances;
        let (kept, loaded) = (IdleInstances::new(config.kept_instances), AtomicU64::new(0));
        Ok(Self { inner: Arc::new(Inner { wasmtime, ticker, permits, max_instances, kept, cache, loaded, pooling }) })
    }

    /// Returns true if instances come from the pool; otherwise they are allocated on demand, which
    /// is slower.
    pub fn is_pooling(&self) -> bool {
        self.inner.pooling
    }
}

impl Inner {
    /// A number that no other processor of this engine has.
    pub(crate) fn next_id(&self) -> u64 {
        self.loaded.fetch_add(1, Ordering::Relaxed)
    }
}

fn make_wasmtime(config: &EngineConfig) -> Result<(wasmtime::Engine, bool), EngineError> {
    if config.pooling {
        match wasmtime::Engine::new(&pooling_config(config)) {
            Ok(engine) => return Ok((engine, true)),
            Err(error) => tracing::warn!(
                max_instances = config.max_instances,
                reason = %format!("{error:#}"),
                "no room for the instance pool, allocating on demand: slower; lower `max_instances` or raise the \
                 limit of address space (ulimit -v)"
            ),
        }
    }
    let engine =
        wasmtime::Engine::new(&on_demand_config()).map_err(|error| EngineError::Setup(format!("{error:#}")))?;
    Ok((engine, false))
}

fn base_config() -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .epoch_interruption(true)
        .parallel_compilation(true)
        .memory_init_cow(true)
        // What runs again must come to the same result, on any machine.
        .cranelift_nan_canonicalization(true)
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        // The contract's functions are plain: no machinery for guests with tasks of their own.
        .concurrency_support(false);
    config
}

fn pooling_config(config: &EngineConfig) -> Config {
    let slots = config.max_instances.saturating_add(config.kept_instances);
    let scan = PoolingAllocationConfig::is_pagemap_scan_available();
    let keep_resident = config.keep_resident_bytes.min(if scan { usize::MAX } else { KEEP_RESIDENT_BLINDLY_BYTES });
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(slots)
        .total_core_instances(slots.saturating_mul(CORE_INSTANCES_PER_COMPONENT))
        .max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT)
        .total_memories(slots)
        .total_tables(slots.saturating_mul(TABLES_PER_SLOT))
        .total_stacks(slots)
        .table_elements(POOL_TABLE_ELEMENTS)
        .max_tables_per_module(TABLES_PER_SLOT)
        .max_unused_warm_slots(slots)
        .linear_memory_keep_resident(keep_resident)
        .table_keep_resident(keep_resident)
        .pagemap_scan(Enabled::Auto);
    let mut config = base_config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// Without the pool the address space is taken to be scarce: nothing reserved, bounds checked in
/// code.
fn on_demand_config() -> Config {
    let mut config = base_config();
    config
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
        .memory_reservation(0)
        .memory_guard_size(64 << 10)
        .memory_reservation_for_growth(1 << 20);
    config
}
