//! One serial lane per ordering key: turns come in the order in which they were requested. Knows
//! nothing of messages.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::support::fault;
use crate::support::sync::Mutex;

/// All lanes of one processor. A lane exists while a ticket or a turn is in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lanes {
    lanes: Arc<Mutex<HashMap<Arc<str>, Lane>>>,
}

/// Waiting tickets, in order. The ticket that has the turn is not in here.
type Lane = VecDeque<oneshot::Sender<Turn>>;

/// A ticket for a place in a lane: waiting, or with the turn.
#[derive(Debug)]
pub(crate) enum LaneTicket {
    /// The ticket is at the front.
    Turn(Turn),
    /// The ticket is behind another one.
    Waiting(oneshot::Receiver<Turn>),
}

/// The right to run. Dropping it lets the next of the lane go.
#[derive(Debug)]
pub(crate) struct Turn {
    /// The lane; `None` once the turn was passed on.
    held: Option<(Lanes, Arc<str>)>,
}

impl Lanes {
    /// Takes the next place in the lane of `key`.
    pub(crate) fn enter(&self, key: &str) -> LaneTicket {
        let mut lanes = self.lanes.lock();
        if let Some(lane) = lanes.get_mut(key) {
            let (sender, receiver) = oneshot::channel();
            lane.push_back(sender);
            return LaneTicket::Waiting(receiver);
        }
        if fault::mutated("lane-entered-in-two-steps") {
            drop(lanes);
            lanes = self.lanes.lock();
        }
        let key: Arc<str> = key.into();
        lanes.insert(key.clone(), Lane::new());
        LaneTicket::Turn(Turn { held: Some((self.clone(), key)) })
    }
}

impl Lanes {
    /// Returns whether all lanes are empty.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.lock().is_empty()
    }
}

impl LaneTicket {
    /// Waits for the turn. Dropping the future, or the place, gives the place up.
    pub(crate) async fn turn(self) -> Turn {
        match self {
            Self::Turn(turn) => turn,
            Self::Waiting(receiver) => receiver.await.expect("a lane lives as long as somebody waits in it"),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut held = self.held.take();
        while let Some((lanes, key)) = held {
            let next = {
                let mut lanes = lanes.lanes.lock();
                let next = lanes.get_mut(&key).and_then(VecDeque::pop_front);
                if next.is_none() {
                    lanes.remove(&key);
                }
                next
            };
            let Some(next) = next else { return };
            if fault::mutated("turn-lost-with-who-gave-up") {
                drop(next.send(Turn { held: None }));
                return;
            }
            // A ticket that gave up waiting sends the turn back: the turn goes to the one behind.
            held = next.send(Turn { held: Some((lanes, key)) }).err().and_then(|mut turn| turn.held.take());
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_in_order_and_lanes_vanish() {
        let lanes = Lanes::default();
        let first = lanes.enter("a").turn().await;
        let (second, third) = (lanes.enter("a"), lanes.enter("a"));
        let other = lanes.enter("b").turn().await;
        assert!(matches!(second, LaneTicket::Waiting(_)));
        drop(first);
        let second = second.turn().await;
        let mut third = Box::pin(third.turn());
        assert!(futures_util::poll!(&mut third).is_pending());
        drop(second);
        drop(third.await);
        drop(other);
        assert!(lanes.is_empty());
    }

    #[tokio::test]
    async fn a_place_given_up_lets_the_next_go() {
        let lanes = Lanes::default();
        let first = lanes.enter("a").turn().await;
        let (second, third) = (lanes.enter("a"), lanes.enter("a"));
        drop(second);
        drop(first);
        drop(third.turn().await);
        assert!(lanes.is_empty());
    }
}
