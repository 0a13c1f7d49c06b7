//! Bindings to the contract in `wit/`, made by wasmtime's macro at compile time. Holds nothing written by hand.
#![allow(missing_docs, unreachable_pub, clippy::all)] // The macro's output is not ours to polish.

wasmtime::component::bindgen!({
    path: "../../wit",
    world: "hapax:processor/processor",
    imports: { default: trappable },
    exports: { default: async },
    with: { "hapax:processor/types.message": crate::host::message::MessageRef },
});
