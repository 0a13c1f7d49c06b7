//! From bytes to a processor that is ready to run: check, compile or take from the cache, link.
//! Everything that can be wrong with a component is found here.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{Component, HasSelf, Linker};

use crate::batch::Gathering;
use crate::bindings::batches::BatchProcessorPre;
use crate::bindings::compensating::CompensatingProcessorPre;
use crate::bindings::{ProcessorPre, hapax::processor as wit};
use crate::component::WasmProcessor;
use crate::contract::{self, Needs};
use crate::engine::{Engine, TABLES_PER_SLOT};
use crate::error::LoadError;
use crate::host::{HostState, Shared, events, items, lock, message, saga, state};
use crate::instance::Pre;
use crate::limits::{Batching, InstanceMode, ProcessorLimits, human_bytes};
use crate::wasi;

/// wasmtime counts a memory's first size in pages.
const WASM_PAGE_BYTES: u64 = 64 << 10;

/// Under which name, configuration and limits a component runs.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The processor's name, for the log.
    pub name: String,
    /// Answers of the `config` import.
    pub config: BTreeMap<String, String>,
    /// Limits of one message.
    pub limits: ProcessorLimits,
    /// Lifetime of an instance.
    pub instance: InstanceMode,
    /// Size of one call, in messages, where the component takes batches.
    pub batching: Batching,
}

impl Engine {
    /// Checks and compiles a component. Takes as long as compiling does: not for a thread that
    /// serves messages.
    pub fn load(&self, bytes: &[u8], options: LoadOptions) -> Result<WasmProcessor, LoadError> {
        let needs = contract::check(bytes)?;
        let hash = blake3::hash(bytes);
        let (component, from_cache) = self.compile(bytes, &hash)?;
        let permits = self.permits_for(&component, &options.limits)?;
        let pre = self.link(&component, needs)?;
        // Done at the first instance otherwise, which would be a message's.
        component.initialize_copy_on_write_image().map_err(|error| LoadError::Compile(format!("{error:#}")))?;
        let LoadOptions { name, config, limits, instance, batching } = options;
        let processor = WasmProcessor {
            engine: Arc::clone(&self.inner),
            pre,
            digest: format!("blake3:{}", hash.to_hex()),
            effect_limits: Arc::new(limits.effects.clone()),
            shared: Arc::new(Shared { name, config, limits, ticks: self.inner.ticker.ticks() }),
            wasi: needs.wasi,
            mode: instance,
            gathering: needs.batches.then(|| Gathering::new(batching)),
            id: self.inner.next_id(),
            permits,
            from_cache,
            waits: needs.wasi || needs.saga,
            imports_http: needs.http,
            steps: Vec::new(),
        };
        if needs.compensates { processor.with_steps_asked() } else { Ok(processor) }
    }

    fn compile(&self, bytes: &[u8], hash: &blake3::Hash) -> Result<(Component, bool), LoadError> {
        let (engine, cache) = (&self.inner.wasmtime, self.inner.cache.as_ref());
        if let Some(component) = cache.and_then(|cache| cache.load(engine, hash)) {
            return Ok((component, true));
        }
        let component = Component::new(engine, bytes).map_err(|error| LoadError::Compile(format!("{error:#}")))?;
        if let Some(cache) = cache {
            cache.store(&component, hash);
        }
        Ok((component, false))
    }

    /// Returns the number of pool slots that an instance takes; an error if it could never start.
    fn permits_for(&self, component: &Component, limits: &ProcessorLimits) -> Result<u32, LoadError> {
        // `None` only for components that import modules, which the contract does not let through.
        let Some(needs) = component.resources_required() else { return Ok(1) };
        let memory = needs.max_initial_memory_size.unwrap_or(0).saturating_mul(WASM_PAGE_BYTES);
        if memory > limits.memory_bytes as u64 {
            let needs = human_bytes(usize::try_from(memory).unwrap_or(usize::MAX));
            return Err(LoadError::Limit {
                needs: format!("{needs} of memory"),
                limit: human_bytes(limits.memory_bytes),
            });
        }
        if needs.max_initial_table_size.unwrap_or(0) > limits.table_elements as u64 {
            let needs = format!("a table of {} elements", needs.max_initial_table_size.unwrap_or(0));
            return Err(LoadError::Limit { needs, limit: format!("{} elements", limits.table_elements) });
        }
        let permits = needs.num_memories.max(needs.num_tables.div_ceil(TABLES_PER_SLOT)).max(1);
        if permits > self.inner.max_instances {
            let needs = format!("{permits} slots of the instance pool");
            return Err(LoadError::Limit { needs, limit: format!("{} (`max_instances`)", self.inner.max_instances) });
        }
        Ok(permits)
    }

    fn link(&self, component: &Component, needs: Needs) -> Result<Pre, LoadError> {
        let link = || -> wasmtime::Result<Pre> {
            let mut linker = Linker::new(&self.inner.wasmtime);
            add_imports(&mut linker)?;
            if needs.wasi {
                wasi::add_imports(&mut linker)?;
            }
            let pre = linker.instantiate_pre(component)?;
            Ok(match (needs.batches, needs.compensates) {
                (true, _) => Pre::Batch(BatchProcessorPre::new(pre)?),
                (false, true) => Pre::Compensating(CompensatingProcessorPre::new(pre)?),
                (false, false) => Pre::One(ProcessorPre::new(pre)?),
            })
        };
        link().map_err(|error| LoadError::Link(format!("{error:#}")))
    }
}

/// The imports that work; `contract` keeps components that ask for others out.
fn add_imports(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    message::add_to_linker(linker)?;
    state::add_to_linker(linker)?;
    events::add_to_linker(linker)?;
    items::add_to_linker(linker)?;
    saga::add_to_linker(linker)?;
    lock::add_to_linker(linker)?;
    wit::outbox::add_to_linker::<_, HasSelf<HostState>>(linker, |state| state)?;
    wit::log::add_to_linker::<_, HasSelf<HostState>>(linker, |state| state)?;
    wit::config::add_to_linker::<_, HasSelf<HostState>>(linker, |state| state)
}
