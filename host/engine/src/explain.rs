//! From what wasmtime says to what becomes of the message: run again, or reject; and in which
//! words. Pure.

use hapax_core::{ContextError, Failure};
use wasmtime::{Error, Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use crate::host::HostState;
use crate::host::outbox::NotSendable;
use crate::limits::{Denied, ProcessorLimits, human_bytes};

/// Text of wasmtime's error at the end of the host-call budget, whose type is private. A test
/// notices if it changes.
const HOSTCALL_FUEL: &str = "fuel allocated for hostcalls has been exhausted";
/// Names of functions that a panic or an allocation passes through: never the ones to blame.
const PLUMBING: [&str; 12] = [
    "core::", "std::", "alloc::", "<core::", "<std::", "<alloc::", "__rust", "rust_", "panic", "abort", "cabi_",
    "__rustc",
];

/// Why a run ended without an answer.
pub(crate) fn failure(error: &Error, state: &HostState) -> Failure {
    let limits = &state.shared.limits;
    if let Some(error) = error.downcast_ref::<ContextError>() {
        return error.clone().into();
    }
    if let Some(error) = error.downcast_ref::<NotSendable>() {
        return Failure::Reject(error.to_string());
    }
    if error.root_cause().to_string().contains(HOSTCALL_FUEL) {
        let limit = limits.hostcall_bytes;
        return Failure::Reject(format!("bytes passed to the host in one call are over their limit of {limit}"));
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => deadline(limits),
        // What a guest does that gets no more memory: it aborts, or never came to start.
        Some(Trap::UnreachableCodeReached) | None if state.memory.denied.is_some() => out_of_memory(state),
        Some(trap) => Failure::retry(trapped(*trap, error, state)),
        None => match error.downcast_ref::<I32Exit>() {
            Some(exit) => Failure::retry(format!("the component called exit({})", exit.0)),
            None => Failure::retry(format!("the component failed: {}", error.root_cause())),
        },
    }
}

/// The run took too long.
pub(crate) fn deadline(limits: &ProcessorLimits) -> Failure {
    Failure::retry(format!("ran past its deadline of {:?}", limits.deadline))
}

fn out_of_memory(state: &HostState) -> Failure {
    let limits = &state.shared.limits;
    Failure::retry(match state.memory.denied {
        Some(Denied::Table) => format!("ran into its table limit of {} elements", limits.table_elements),
        _ => format!("ran into its memory limit of {}", human_bytes(limits.memory_bytes)),
    })
}

/// `trapped: wasm `unreachable` instruction executed (in order_intake::handle): panicked at ...`.
fn trapped(trap: Trap, error: &Error, state: &HostState) -> String {
    let what = trap.to_string();
    let what = what.strip_prefix("wasm trap: ").unwrap_or(&what);
    let place = blamed_function(error).unwrap_or_else(|| "handle".to_owned());
    match &state.log.last_error {
        // A panic is a trap whose text went to the log.
        Some(said) if trap == Trap::UnreachableCodeReached => format!("trapped: {what} (in {place}): {said}"),
        _ => format!("trapped: {what} (in {place})"),
    }
}

/// Returns the innermost function of the guest that is the author's own, if the component has its
/// names.
fn blamed_function(error: &Error) -> Option<String> {
    let backtrace = error.downcast_ref::<WasmBacktrace>()?;
    backtrace
        .frames()
        .iter()
        .filter_map(|frame| frame.func_name())
        .map(|name| format!("{:#}", rustc_demangle::demangle(name)))
        .find(|name| !PLUMBING.iter().any(|plumbing| name.starts_with(plumbing)))
}
