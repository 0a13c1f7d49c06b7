//! Bindings to the contract in `wit/`, made by wasmtime's macro at compile time. Holds nothing
//! written by hand.
#![allow(missing_docs, unreachable_pub, clippy::all)] // The macro's output is not ours to polish.

wasmtime::component::bindgen!({
    path: "../../wit",
    world: "hapax:processor/processor",
    imports: { default: trappable },
    exports: { default: async },
    with: { "hapax:processor/types.message": crate::host::message::MessageRef },
});

/// The world with a way back; what it shares with the plain one is the same.
pub mod compensating {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "hapax:processor/compensating-processor",
        imports: { default: trappable },
        exports: { default: async },
        with: {
            "hapax:processor/types": super::hapax::processor::types,
            "hapax:processor/state": super::hapax::processor::state,
            "hapax:processor/events": super::hapax::processor::events,
            "hapax:processor/outbox": super::hapax::processor::outbox,
            "hapax:processor/saga": super::hapax::processor::saga,
            "hapax:processor/lock": super::hapax::processor::lock,
            "hapax:processor/log": super::hapax::processor::log,
            "hapax:processor/config": super::hapax::processor::config,
        },
    });
}

/// The world of batches; what both worlds import is the same.
pub mod batches {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "hapax:processor/batch-processor",
        imports: { default: trappable },
        exports: { default: async },
        with: {
            "hapax:processor/types": super::hapax::processor::types,
            "hapax:processor/state": super::hapax::processor::state,
            "hapax:processor/events": super::hapax::processor::events,
            "hapax:processor/outbox": super::hapax::processor::outbox,
            "hapax:processor/saga": super::hapax::processor::saga,
            "hapax:processor/lock": super::hapax::processor::lock,
            "hapax:processor/log": super::hapax::processor::log,
            "hapax:processor/config": super::hapax::processor::config,
        },
    });
}
