//! The seam to run marks: they say, outside the store, which messages are being run. A mark
//! survives the death of the process and costs no sync. So a message that kills the host is
//! counted, and becomes a dead letter.

use std::sync::Arc;

use crate::message::key::RecordKey;

/// Run marks of messages that are being run.
///
/// Contract: a mark must survive the death of the process, by any signal; it need not survive a
/// crash of the machine. Called on every run; must not block.
pub trait CrashTracker: Send + Sync + 'static {
    /// Marks that the message is about to be run. Returns the slot of the mark; `None` if no mark
    /// was made.
    fn begin(&self, key: &RecordKey) -> Option<usize>;
    /// Clears the mark at `place`: its run has ended, in any way except the death of the process.
    fn end(&self, place: usize);
    /// Returns the number of times that the process died while it ran the message, since that count
    /// was last cleared.
    fn deaths(&self, key: &RecordKey) -> u32;
    /// Clears the count of deaths: the message's record holds it now.
    fn forget(&self, key: &RecordKey);
}

/// Makes no marks: for stores that do not outlive the process, and for tests.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCrashTracker;

impl CrashTracker for NoCrashTracker {
    fn begin(&self, _: &RecordKey) -> Option<usize> {
        None
    }

    fn end(&self, _: usize) {}

    fn deaths(&self, _: &RecordKey) -> u32 {
        0
    }

    fn forget(&self, _: &RecordKey) {}
}

/// Mark of one run under way; dropping it clears the mark, also when the run is abandoned.
pub(crate) struct RunMark {
    notes: Arc<dyn CrashTracker>,
    place: Option<usize>,
}

impl RunMark {
    pub(crate) fn begin(notes: &Arc<dyn CrashTracker>, key: &RecordKey) -> Self {
        Self { place: notes.begin(key), notes: notes.clone() }
    }
}

impl Drop for RunMark {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.notes.end(place);
        }
    }
}
