//! The work that every loop does: the same keys, records and state writes, byte for byte in size.
//! Nobody's code path; no loop gets a message that another could not get.

use bytes::Bytes;
use hapax_core::Message;

/// A record's own bytes, as a loop without a record format of its own writes them.
pub(crate) const RECORD: [u8; 100] = [7; 100];
/// Value that each message writes into the state.
pub(crate) const VALUE: &[u8; 16] = b"0123456789abcdef";
/// Answer of each message.
pub(crate) const ANSWER: &[u8; 32] = b"0123456789abcdef0123456789abcdef";
/// Bytes of a message's payload; it begins with the state key that the message writes.
const PAYLOAD_BYTES: usize = 256;
/// Tenant, processor and source, as they stand in front of every id in a record key.
const SCOPE: &str = "defaultbench/bench";
/// Fills an id up, so that a record key has 64 bytes.
const ID_TAIL: &str = "-0123456789abc";

/// Where keys land.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ids {
    /// Anywhere: 16 bytes of randomness each.
    Random,
    /// Behind the one before: 8 bytes that count up, 8 of randomness.
    Ordered,
}

impl Ids {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Ordered => "time-ordered",
        }
    }
}

/// One message's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Item {
    id: u128,
    state: u128,
}

impl Item {
    /// The `number`-th message; the same for every loop.
    pub(crate) fn new(ids: Ids, number: u64) -> Self {
        let random = |salt: u64| u128::from(mix(number ^ salt)) << 64 | u128::from(mix(mix(number ^ salt) ^ salt));
        let item = Self { id: random(0x5bd1_e995), state: random(0x2545_f491_4f6c_dd1d) };
        match ids {
            Ids::Random => item,
            Ids::Ordered => {
                let ordered = |random: u128| u128::from(1_700_000_000_000_000 + number) << 64 | random >> 64;
                Self { id: ordered(item.id), state: ordered(item.state) }
            }
        }
    }

    /// The CloudEvents id: 46 bytes.
    pub(crate) fn id(&self) -> String {
        format!("{:032x}{ID_TAIL}", self.id)
    }

    /// The state key: 32 bytes.
    pub(crate) fn state(&self) -> String {
        format!("{:032x}", self.state)
    }

    /// The record key of a loop that has no key format of its own: 64 bytes.
    pub(crate) fn record_key(&self) -> Vec<u8> {
        format!("{SCOPE}{:032x}{ID_TAIL}", self.id).into_bytes()
    }

    /// The state key of such a loop: scope and key.
    pub(crate) fn state_key(&self) -> Vec<u8> {
        format!("{}{:032x}", &SCOPE[..12], self.state).into_bytes()
    }

    /// The whole message.
    pub(crate) fn message(&self) -> Message {
        Message::new(self.id(), &SCOPE[12..], "t").with_data("text/plain", self.payload())
    }

    /// The payload: the state key, filled up to 256 bytes.
    pub(crate) fn payload(&self) -> Bytes {
        let mut payload = self.state().into_bytes();
        payload.resize(PAYLOAD_BYTES, b'x');
        payload.into()
    }
}

/// The first `count` items in the order of their keys: a B-tree is filled with them fast, and they
/// still lie everywhere.
pub(crate) fn sorted(ids: Ids, count: u64) -> Vec<Item> {
    let mut items: Vec<_> = (0..count).map(|number| Item::new(ids, number)).collect();
    items.sort_unstable();
    items
}

/// Up to `count` numbers below `below`, in an order that repeats from run to run and is nowhere
/// near sorted.
pub(crate) fn picked(count: u64, below: u64) -> impl Iterator<Item = u64> + Clone {
    (0..count).map(move |number| mix(number ^ 0x9e37_79b9) % below)
}

/// Spreads a number over 64 bits; different numbers stay different.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hapax_core::{RecordKey, Scope};

    #[test]
    fn every_loop_writes_keys_of_the_same_size() {
        for ids in [Ids::Random, Ids::Ordered] {
            let item = Item::new(ids, 5);
            let key = RecordKey::by_message_id(&Scope::of("bench"), &item.message());
            let parts = [&key.scope.tenant, &key.scope.processor, &key.source, &key.key];
            let ours: String = parts.into_iter().map(|part| &**part).collect();
            assert_eq!(ours.as_bytes(), item.record_key());
            assert_eq!(item.record_key().len(), 64);
            assert_eq!(item.payload().len(), PAYLOAD_BYTES);
            assert!(item.payload().starts_with(item.state().as_bytes()));
            assert!(item.state_key().ends_with(item.state().as_bytes()));
        }
    }

    #[test]
    fn ordered_items_come_in_order_and_random_ones_do_not() {
        let items = |ids| (0..1_000).map(|number| Item::new(ids, number)).collect::<Vec<_>>();
        assert!(items(Ids::Ordered).is_sorted());
        assert!(!items(Ids::Random).is_sorted());
        let mut random = items(Ids::Random);
        random.sort_unstable();
        random.dedup();
        assert_eq!(random.len(), 1_000);
    }
}
