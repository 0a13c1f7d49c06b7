//! The `log` import, and the budget of log text that a message has. Not transactional: a re-run
//! logs again.

use super::HostState;
use crate::bindings::hapax::processor::log::{Host, Level};

/// Longest last log line that is held for the failure's reason, in bytes.
const LAST_ERROR_BYTES: usize = 300;

/// Log budget that a message has left.
pub(crate) struct LogBudget {
    limit_bytes: usize,
    left_bytes: usize,
    over: bool,
}

/// Decision on a line of the log.
pub(crate) enum Granted {
    /// Log it.
    Yes,
    /// Do not, but say that the limit is reached; once a message.
    Notice,
    /// Do not.
    No,
}

impl LogBudget {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, left_bytes: limit_bytes, over: false }
    }

    /// Takes `bytes` off the budget.
    pub(crate) fn take(&mut self, bytes: usize) -> Granted {
        if self.over {
            return Granted::No;
        }
        match self.left_bytes.checked_sub(bytes) {
            Some(left) => {
                self.left_bytes = left;
                Granted::Yes
            }
            None => {
                self.over = true;
                Granted::Notice
            }
        }
    }

    /// Returns true if nothing was dropped.
    pub(crate) fn is_within(&self) -> bool {
        !self.over
    }

    pub(crate) fn notice(&self) -> String {
        format!("log limit of {} bytes reached: the rest of this message's lines is dropped", self.limit_bytes)
    }
}

/// A message's log: the budget, and the last error in it. A guest's panic text arrives as one.
pub(crate) struct GuestLog {
    budget: LogBudget,
    pub(crate) last_error: Option<String>,
}

impl GuestLog {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self { budget: LogBudget::new(limit_bytes), last_error: None }
    }

    pub(crate) fn is_within_budget(&self) -> bool {
        self.budget.is_within()
    }
}

impl Host for HostState {
    fn write(&mut self, level: Level, text: String) -> wasmtime::Result<()> {
        match self.log.budget.take(text.len()) {
            Granted::Yes => emit(level, &self.shared.name, self.message_id(), &text),
            Granted::Notice => emit(Level::Warn, &self.shared.name, self.message_id(), &self.log.budget.notice()),
            Granted::No => {}
        }
        if level == Level::Error {
            self.log.last_error = Some(cut(&text, LAST_ERROR_BYTES).to_owned());
        }
        Ok(())
    }
}

/// A line of the guest in the host's log.
pub(crate) fn emit(level: Level, processor: &str, message: &str, text: &str) {
    macro_rules! event {
        ($level:ident) => {
            tracing::event!(target: "hapax::guest", tracing::Level::$level, processor, message_id = message, "{text}")
        };
    }
    match level {
        Level::Trace => event!(TRACE),
        Level::Debug => event!(DEBUG),
        Level::Info => event!(INFO),
        Level::Warn => event!(WARN),
        Level::Error => event!(ERROR),
    }
}

/// At most `bytes` of `text`, cut between characters.
pub(crate) fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
