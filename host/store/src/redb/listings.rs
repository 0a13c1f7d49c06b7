//! The thread on which listings run, one at a time: they read every record for a page, and nobody's
//! message may wait for that. While messages are committed a listing takes a fifth of one core.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt as _};
use hapax_core::StoreError;
use tokio::sync::oneshot;

use crate::redb::core::Core;

type Job = Box<dyn FnOnce() + Send>;

/// Dropping it waits for the listing that is under way.
pub(crate) struct Listings {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Listings {
    pub(crate) fn start() -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let work = move || inbox.into_iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name("hapax-listings".into()).spawn(work)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `list` on the thread. If the future is dropped before its turn, `list` does not run.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        list: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let (reply, result) = oneshot::channel();
        let job = Box::new(move || {
            if !reply.is_closed() {
                // The caller may have gone away meanwhile.
                let _ = reply.send(list());
            }
        });
        if let Some(jobs) = &self.jobs {
            // The thread ends only when this is dropped.
            let _ = jobs.send(job);
        }
        let closed = || StoreError::Closed("it is being closed".into());
        result.map(move |result| result.unwrap_or_else(|_| Err(closed()))).boxed()
    }
}

impl Drop for Listings {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Jobs catch redb's panics; any other was printed.
            let _ = thread.join();
        }
    }
}

/// Rows that a listing reads between two looks at what else is going on.
const STEP_ROWS: u32 = 1_024;
/// Rest of a listing for each unit of work, while messages are committed.
const REST: u32 = 4;
/// Longest rest at a time.
const REST_MAX: Duration = Duration::from_millis(100);

/// Slows a listing down while there are commits.
pub(crate) struct Pace<'a> {
    core: &'a Core,
    rows: u32,
    began: Instant,
    sequence: u64,
}

impl<'a> Pace<'a> {
    pub(crate) fn new(core: &'a Core) -> Self {
        Self { core, rows: 0, began: Instant::now(), sequence: core.view.read().last_sequence() }
    }

    /// Counts a row; rests after some, if something was committed since the last rest.
    pub(crate) fn row(&mut self) {
        self.rows += 1;
        if self.rows < STEP_ROWS {
            return;
        }
        let sequence = self.core.view.read().last_sequence();
        if sequence != self.sequence {
            std::thread::sleep((self.began.elapsed() * REST).min(REST_MAX));
        }
        *self = Self { core: self.core, rows: 0, began: Instant::now(), sequence };
    }
}
