//! The seam to a note, outside the store, of which messages are being run: it outlives the death of the process and costs no
//! sync. So a message that kills the host is counted, and ends in the dead letters.

use std::sync::Arc;

use crate::message::key::RecordKey;

/// Notes of messages that are being run.
///
/// Contract: a note must survive the death of the process, by whatever signal; it need not survive the machine's. Called on
/// every run; must not block.
pub trait CrashTracker: Send + Sync + 'static {
    /// The message is about to be run. Answers where that is noted; `None` where it is not.
    fn begin(&self, key: &RecordKey) -> Option<usize>;
    /// The run that is noted at `place` has ended, in whatever way but the death of the process.
    fn end(&self, place: usize);
    /// How often the process died while it ran the message, since that was last forgotten.
    fn deaths(&self, key: &RecordKey) -> u32;
    /// The deaths are counted in the message's record now.
    fn forget(&self, key: &RecordKey);
}

/// Notes nothing: for stores that do not outlive the process, and for tests.
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

/// One run under way; dropping it ends the note, also when the run is abandoned.
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
