//! Locks that all processors of the host share, each with a fence. Decides nothing: who holds a
//! lock is the host's to say.

use std::time::Duration;

use crate::Failure;
use crate::host::{Backend, Host as _};

/// A lock that is held until its time is over, it is given back, or the message has ended. The
/// message commits only if it is still held then; if not, the message runs again.
#[derive(Debug)]
pub struct Lock<'a> {
    pub(crate) backend: &'a Backend,
    pub(crate) name: String,
    pub(crate) fence: u64,
}

/// Somebody else holds the lock. As a failure, it has the message run again when the lock may be
/// free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Busy {
    /// The lock.
    pub name: String,
    /// It is free after this time, if it is not extended.
    pub retry_after: Duration,
}

/// The lock is no longer held by this owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The lock.
    pub name: String,
}

impl Lock<'_> {
    /// Greater than that of every earlier holder: to be given to whoever must not listen to one
    /// that has lost the lock.
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// Holds it for `ttl` from now.
    pub fn extend(&self, ttl: Duration) -> Result<(), Lost> {
        if self.backend.extend(&self.name, self.fence, millis(ttl)) {
            Ok(())
        } else {
            Err(Lost { name: self.name.clone() })
        }
    }

    /// Gives it back before the message has ended. (Dropping it does not: the message still rests
    /// on it.)
    pub fn release(self) {
        self.backend.release(&self.name, self.fence);
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Backend")
    }
}

impl From<Busy> for Failure {
    fn from(busy: Busy) -> Self {
        Self::retry(format!("the lock `{}` is held by somebody else", busy.name)).after(busy.retry_after)
    }
}

impl From<Lost> for Failure {
    fn from(lost: Lost) -> Self {
        Self::retry(format!("the lock `{}` was lost", lost.name))
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
