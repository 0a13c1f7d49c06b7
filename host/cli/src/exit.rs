//! Exit codes, one for each kind of failure, so that scripts can tell them apart.
//! `docs/operating/exit-codes.md` explains each of them.

use std::fmt::Display;

use hapax_core::{RelayError, SourceError, StoreError, TransportError};
use hapax_engine::{EngineError, LoadError};
use hapax_guest_build::BuildError;
use hapax_store::OpenError;

/// Everything was done. Rejected messages are in the summary.
pub(crate) const SUCCESS: u8 = 0;
/// An error that has no code of its own.
pub(crate) const UNKNOWN: u8 = 1;
/// The command line or the configuration is wrong. `clap` exits with the same code.
pub(crate) const USAGE: u8 = 2;
/// Some input was not a message; everything else was processed.
pub(crate) const INVALID_INPUT: u8 = 3;
/// The component cannot be read, built or used.
pub(crate) const COMPONENT: u8 = 4;
/// The store is absent, damaged or of another format, or the folder holds no store.
pub(crate) const DAMAGED: u8 = 5;
/// Another process has the store open.
pub(crate) const LOCKED: u8 = 6;
/// The disk is full.
pub(crate) const DISK_FULL: u8 = 7;
/// The store failed while running.
pub(crate) const STORE_FAILED: u8 = 8;
/// Nothing exists under the key.
pub(crate) const NOT_FOUND: u8 = 9;
/// A signal stopped the command before the end of the input; messages in flight were finished.
pub(crate) const INTERRUPTED: u8 = 10;
/// The outbox could not be sent.
pub(crate) const NOT_SENT: u8 = 11;
/// The host does not answer.
pub(crate) const UNREACHABLE: u8 = 12;
/// An operator action was refused; of several, at least one.
pub(crate) const REFUSED: u8 = 13;

/// A failure of the command itself, with its exit code.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) code: u8,
    pub(crate) text: String,
}

impl Failed {
    /// Reports a wrong option or setting.
    pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
        Self { code: USAGE, text: text.into() }.into()
    }

    /// Reports a component that cannot be used.
    pub(crate) fn component(text: impl Into<String>) -> anyhow::Error {
        Self { code: COMPONENT, text: text.into() }.into()
    }

    /// Reports an answer that does not come from a host.
    pub(crate) fn unreachable(text: impl Into<String>) -> anyhow::Error {
        Self { code: UNREACHABLE, text: text.into() }.into()
    }

    /// Reports a host that does not answer.
    pub(crate) fn no_answer(cause: impl Display) -> anyhow::Error {
        Self::unreachable(format!("is the host running? `hapax up` starts it: {cause}"))
    }
}

impl Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failed {}

/// Returns the code of the outermost cause that has one: context that was added later does not hide
/// it.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of_cause).unwrap_or(UNKNOWN)
}

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(failed) = cause.downcast_ref::<Failed>() {
        return Some(failed.code);
    }
    if cause.is::<LoadError>() || cause.is::<EngineError>() || cause.is::<BuildError>() {
        return Some(COMPONENT);
    }
    if cause.is::<TransportError>() {
        return Some(NOT_SENT);
    }
    let open = cause.downcast_ref::<OpenError>().map(of_open);
    let source = || cause.downcast_ref::<SourceError>().map(of_source);
    let relay = || cause.downcast_ref::<RelayError>().map(of_relay);
    open.or_else(source).or_else(relay).or_else(|| cause.downcast_ref::<StoreError>().map(of_store))
}

fn of_open(error: &OpenError) -> u8 {
    match error {
        OpenError::Locked(_) => LOCKED,
        OpenError::Full { .. } => DISK_FULL,
        _ => DAMAGED,
    }
}

fn of_source(error: &SourceError) -> u8 {
    match error {
        SourceError::Store(error) => of_store(error),
        SourceError::Source(_) => INVALID_INPUT,
    }
}

fn of_relay(error: &RelayError) -> u8 {
    match error {
        RelayError::Store(error) => of_store(error),
        RelayError::Publisher(_) => NOT_SENT,
    }
}

fn of_store(error: &StoreError) -> u8 {
    if matches!(error, StoreError::Full(_)) { DISK_FULL } else { STORE_FAILED }
}
