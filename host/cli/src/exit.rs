//! Exit codes: one a kind of failure, so that scripts can tell them apart. `docs/errors/README.md` lists them.

use std::process::ExitCode;

use hapax_core::{RelayError, SourceError, StoreError, TransportError};
use hapax_engine::{EngineError, LoadError};
use hapax_store::OpenError;

/// Something in the input was no message; everything else was processed.
pub(crate) const INVALID_INPUT: u8 = 3;
/// The store is absent, damaged, of another version, or no store.
pub(crate) const DAMAGED: u8 = 5;
/// Stopped by a signal before the end of the input; what was in flight ended.
pub(crate) const INTERRUPTED: u8 = 10;

/// What was asked for may not be done as things are; of many, some.
pub(crate) const REFUSED: u8 = 13;

/// A failure of the command line itself, with its exit code.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) code: u8,
    pub(crate) text: String,
}

impl Failed {
    /// The user gave something that cannot be right.
    pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
        Self { code: 2, text: text.into() }.into()
    }

    /// A component that cannot be used.
    pub(crate) fn component(text: impl Into<String>) -> anyhow::Error {
        Self { code: 4, text: text.into() }.into()
    }

    /// The host that was to be asked does not answer.
    pub(crate) fn unreachable(text: impl Into<String>) -> anyhow::Error {
        Self { code: 12, text: text.into() }.into()
    }

    /// What was asked for is not there.
    pub(crate) fn not_found(text: impl Into<String>) -> anyhow::Error {
        Self { code: 9, text: text.into() }.into()
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failed {}

fn code(error: &anyhow::Error) -> u8 {
    let store = |error: &StoreError| if matches!(error, StoreError::Full(_)) { 7 } else { 8 };
    for cause in error.chain() {
        if let Some(failed) = cause.downcast_ref::<Failed>() {
            return failed.code;
        }
        if cause.is::<LoadError>() || cause.is::<EngineError>() || cause.is::<hapax_guest_build::BuildError>() {
            return 4;
        }
        match cause.downcast_ref::<OpenError>() {
            Some(OpenError::Locked(_)) => return 6,
            Some(OpenError::Full { .. }) => return 7,
            Some(_) => return DAMAGED,
            None => {}
        }
        match cause.downcast_ref::<SourceError>() {
            Some(SourceError::Store(error)) => return store(error),
            Some(SourceError::Source(_)) => return INVALID_INPUT,
            None => {}
        }
        match cause.downcast_ref::<RelayError>() {
            Some(RelayError::Store(error)) => return store(error),
            Some(RelayError::Publisher(_)) => return 11,
            None => {}
        }
        if cause.is::<TransportError>() {
            return 11;
        }
        if let Some(error) = cause.downcast_ref::<StoreError>() {
            return store(error);
        }
    }
    1
}

/// Tells the user what went wrong, and answers the exit code.
pub(crate) fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let code = code(error);
    if json {
        println!("{}", serde_json::json!({ "error": { "code": code, "message": format!("{error:#}") } }));
    }
    eprintln!("error: {error:#}");
    ExitCode::from(code)
}
