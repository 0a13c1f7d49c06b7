//! A delivery on its way through the pipeline: how it wants to be treated, and the message once it is accepted.

use std::sync::Arc;
use std::time::Instant;

use crate::message::Message;
use crate::message::identity::{Identity, Unidentified};
use crate::pipeline::lanes::LaneTicket;

/// How a delivery wants to be treated.
#[derive(Debug, Clone, Copy)]
pub struct Handling {
    /// A duplicate of a message in flight waits for its outcome; otherwise it ends as [`Outcome::InFlight`] at once.
    pub wait_in_flight: bool,
    /// A retryable failure is run again here, after its backoff; otherwise it ends as [`Outcome::Retry`] and the
    /// source delivers again.
    pub retry_here: bool,
}

impl Default for Handling {
    fn default() -> Self {
        Self { wait_in_flight: true, retry_here: true }
    }
}

/// A message in its place: accepted, its order fixed, nothing run yet.
pub struct Accepted {
    pub(crate) message: Arc<Message>,
    pub(crate) identity: Identity,
    /// Why it can never run: the strategy finds nothing to know it by. Its identity is then that of its id.
    pub(super) refused: Option<Unidentified>,
    /// The store keeps it: whatever becomes of it, it is kept no longer, or kept as something else.
    pub(crate) kept: bool,
    /// It has waited long enough for the one before it.
    pub(crate) past_gap: bool,
    pub(super) place: Option<LaneTicket>,
    pub(crate) handling: Handling,
    pub(super) since: Instant,
}
