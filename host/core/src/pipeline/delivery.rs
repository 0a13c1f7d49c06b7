//! A delivery on its way through the pipeline: its handling, and the message once it is accepted.

use std::sync::Arc;
use std::time::Instant;

use crate::message::Message;
use crate::message::identity::{Identity, Unidentified};
use crate::pipeline::lanes::LaneTicket;

/// Handling that a delivery asks for.
#[derive(Debug, Clone, Copy)]
pub struct Handling {
    /// A duplicate of a message in flight waits for its outcome. If `false`, the duplicate ends as
    /// [`Outcome::InFlight`] at once.
    ///
    /// [`Outcome::InFlight`]: crate::Outcome::InFlight
    pub wait_in_flight: bool,
    /// A message that failed for now runs again here, after its backoff. If `false`, the delivery
    /// ends as [`Outcome::Retry`] and the source delivers the message again.
    ///
    /// [`Outcome::Retry`]: crate::Outcome::Retry
    pub retry_here: bool,
}

impl Default for Handling {
    fn default() -> Self {
        Self { wait_in_flight: true, retry_here: true }
    }
}

/// An accepted message: its identity and its place in its lane are fixed, and nothing has run yet.
pub struct Accepted {
    pub(crate) message: Arc<Message>,
    pub(crate) identity: Identity,
    /// Set if the strategy cannot identify the message, which then never runs. `identity` is that
    /// of its id.
    pub(super) unidentified: Option<Unidentified>,
    /// Set if the store holds the message. Once the message has an outcome, the store holds it no
    /// longer, or for another reason.
    pub(crate) is_held: bool,
    /// Set if the message has waited long enough for the one before it, and runs across the gap.
    pub(crate) past_gap: bool,
    pub(super) ticket: Option<LaneTicket>,
    pub(crate) handling: Handling,
    pub(super) since: Instant,
}
