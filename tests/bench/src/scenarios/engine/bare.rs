//! The bare wasmtime loop: the same components, pool, limits and typed call as the engine's, over
//! imports that do next to nothing. What it takes is what wasmtime itself costs.

use std::sync::Arc;
use std::time::Duration;

use hapax_core::Message;
use wasmtime::component::{Component, HasSelf, Linker, Resource};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store, StoreLimits,
    StoreLimitsBuilder,
};

use self::wit::hapax::processor as contract;

/// Bindings that wasmtime's macro makes of the contract.
mod wit {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "hapax:processor/processor",
        imports: {
            "hapax:processor/state.get": async | trappable,
            "hapax:processor/state.compare-and-set": async | trappable,
            "hapax:processor/state.scan": async | trappable,
            default: trappable,
        },
        exports: { default: async },
        with: { "hapax:processor/types.message": super::Borrowed },
    });
}

/// The message's handle.
#[allow(unreachable_pub, reason = "the generated bindings re-export it, in a private module")]
pub struct Borrowed;

/// State that the imports work on.
struct Host {
    message: Arc<Message>,
    limits: StoreLimits,
}

/// A component, linked and compiled.
pub(super) struct Bare {
    engine: Engine,
    pre: wit::ProcessorPre<Host>,
}

/// An instance that was called before.
pub(super) struct Warm {
    store: Store<Host>,
    processor: wit::Processor,
}

impl Bare {
    /// As the engine does it, setting by setting.
    pub(super) fn new(component: &[u8], instances: u32) -> Self {
        let engine = Engine::new(&config(instances)).unwrap();
        beat(engine.clone());
        let component = Component::new(&engine, component).unwrap();
        let mut linker = Linker::new(&engine);
        contract::types::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host).unwrap();
        contract::state::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host).unwrap();
        contract::outbox::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host).unwrap();
        contract::log::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host).unwrap();
        contract::config::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host).unwrap();
        let pre = wit::ProcessorPre::new(linker.instantiate_pre(&component).unwrap()).unwrap();
        component.initialize_copy_on_write_image().unwrap();
        Self { engine, pre }
    }

    /// A fresh instance, called once and dropped: the bytes of its answer.
    pub(super) async fn fresh(&self, message: &Arc<Message>) -> usize {
        self.warm(message).await.call().await
    }

    /// A fresh instance, to be called more than once.
    pub(super) async fn warm(&self, message: &Arc<Message>) -> Warm {
        let limits = StoreLimitsBuilder::new().memory_size(64 << 20).table_elements(20_000).build();
        let mut store = Store::new(&self.engine, Host { message: message.clone(), limits });
        store.limiter(|host| &mut host.limits);
        store.set_hostcall_fuel(32 << 20);
        store.set_epoch_deadline(100);
        let processor = self.pre.instantiate_async(&mut store).await.unwrap();
        Warm { store, processor }
    }
}

impl Warm {
    pub(super) async fn call(&mut self) -> usize {
        self.store.set_epoch_deadline(100);
        let handler = self.processor.hapax_processor_handler();
        handler.call_handle(&mut self.store, Resource::new_borrow(0)).await.unwrap().unwrap().data.len()
    }
}

fn config(instances: u32) -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(50))
        .max_core_instances_per_component(50)
        .total_memories(instances)
        .total_tables(instances * 8)
        .total_stacks(instances)
        .table_elements(100_000)
        .max_tables_per_module(8)
        .max_unused_warm_slots(instances)
        .linear_memory_keep_resident(1 << 20)
        .table_keep_resident(1 << 20)
        .pagemap_scan(Enabled::Auto);
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .epoch_interruption(true)
        .memory_init_cow(true)
        .cranelift_nan_canonicalization(true)
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .concurrency_support(false)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// Moves the epoch as long as the bench runs.
fn beat(engine: Engine) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(10));
            engine.increment_epoch();
        }
    });
}

impl contract::types::Host for Host {}

impl contract::types::HostMessage for Host {
    fn attributes(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.message.attributes())
    }

    fn data(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<Vec<u8>> {
        Ok(self.message.data.to_vec())
    }

    fn idempotency_key(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<String> {
        Ok(self.message.id.clone())
    }

    fn attempt(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<u32> {
        Ok(1)
    }

    fn now_ms(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<u64> {
        Ok(0)
    }

    fn seed(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<u64> {
        Ok(42)
    }

    fn drop(&mut self, _: Resource<Borrowed>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl contract::state::Host for Host {
    async fn get(&mut self, _: String) -> wasmtime::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn set(&mut self, _: String, _: Vec<u8>) -> wasmtime::Result<()> {
        Ok(())
    }

    fn delete(&mut self, _: String) -> wasmtime::Result<()> {
        Ok(())
    }

    async fn compare_and_set(&mut self, _: String, _: Option<Vec<u8>>, _: Option<Vec<u8>>) -> wasmtime::Result<bool> {
        Ok(false)
    }

    async fn scan(&mut self, _: String, _: Option<String>, _: u32) -> wasmtime::Result<Vec<(String, Vec<u8>)>> {
        Ok(Vec::new())
    }
}

impl contract::outbox::Host for Host {
    fn send(&mut self, _: contract::outbox::Outgoing) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl contract::log::Host for Host {
    fn write(&mut self, _: contract::log::Level, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl contract::config::Host for Host {
    fn get(&mut self, _: String) -> wasmtime::Result<Option<String>> {
        Ok(None)
    }
}
