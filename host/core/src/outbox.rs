//! Dead letters of the outbox: outgoing messages that their destination refused. They stand in the
//! state that no processor owns, so that a refusal commits together with the mark that its message
//! has left the outbox, on every store.
//!
//! Keys, each with the message's position in the outbox as its end: `outbox/dead/<id>/` has the
//! facts, `outbox/message/<id>/` the message. `outbox/key/<ordering key>/` is an entry of the
//! ordering key: it exists while the message is a dead letter, and after a redrive until the
//! message is sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::message::Message;
use crate::message::key::{RecordKey, Scope, escaped};
use crate::state::{Entry, StateView, Version};
use crate::store::IdempotencyStorage;
use crate::store::commit::{OutboxPosition, SharedChange};
use crate::support::error::StoreError;
use crate::support::fault;

const DEAD: &str = "outbox/dead/";
const DEAD_END: &str = "outbox/dead0";
const KEYS: &str = "outbox/key/";
const KEYS_END: &str = "outbox/key0";

/// Extension attribute that names a message's ordering key.
const ORDERING_KEY: &str = "partitionkey";
/// Header of a redriven message in the outbox, with the position that the message had before. The
/// relay removes the header: no destination sees it.
const REDRIVEN: &str = "hapax-outbox-position";

/// Writes to the state that no processor owns, by key; `None` deletes.
pub(crate) type Writes = BTreeMap<String, Option<Bytes>>;

/// Policy for messages whose ordering key has a refused message in front of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AfterRefusal {
    /// They are sent: a refusal is the message's own end, as a dead letter is in the pipeline.
    #[default]
    Pass,
    /// They wait in the outbox until the refused message was sent or discarded. Messages of other
    /// keys, and those without a key, are sent.
    Wait,
}

/// Outgoing message that its destination refused: a dead letter of the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedMessage {
    /// Id of the message, the one under which the destination got it.
    pub id: String,
    /// Processor that sent the message.
    pub processor: String,
    /// CloudEvents `type`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Ordering key, if the message has one.
    pub ordering_key: Option<String>,
    /// First position of the message in the outbox: its place in the order of its key.
    pub position: OutboxPosition,
    /// Destination that refused it.
    pub destination: String,
    /// Status code of the answer, if the destination has status codes.
    pub status: Option<u16>,
    /// Text of the refusal.
    pub error: String,
    /// Time of the refusal, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// Dead letters of a store's outbox.
pub struct RefusedMessages {
    view: Arc<dyn StateView>,
}

/// Refused message as it was read, with the version that guards an action on it.
pub(crate) struct ReadRefused {
    pub(crate) letter: RefusedMessage,
    version: Version,
}

/// Place of an outbox row, in the outbox and in the order of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutgoingRow {
    /// Position of the row: what is marked as sent.
    pub(crate) position: OutboxPosition,
    /// Place in the order of its key; of a redriven message, the one before the refusal.
    pub(crate) place: OutboxPosition,
}

impl OutgoingRow {
    /// Returns the places of the message in the row at `position`. Removes what the outbox keeps
    /// beside the message.
    pub(crate) fn of(position: OutboxPosition, message: &mut Message) -> Self {
        let before = if message.headers.is_empty() { None } else { message.headers.remove(REDRIVEN) };
        let place = before.and_then(|text| parse_position(&text)).unwrap_or(position);
        Self { position, place }
    }

    pub(crate) fn is_redriven(self) -> bool {
        self.place != self.position
    }

    /// Returns the writes that make a dead letter of the row's message.
    pub(crate) fn refused(self, message: &Message, answer: Refusal<'_>) -> Writes {
        let letter = RefusedMessage {
            id: message.id.clone(),
            processor: message.source.strip_prefix("/processors/").unwrap_or_default().to_owned(),
            kind: message.kind.clone(),
            ordering_key: ordering_key(message).map(str::to_owned),
            position: self.place,
            destination: answer.destination.to_owned(),
            status: answer.status,
            error: answer.error.to_owned(),
            at_ms: answer.at_ms,
        };
        let facts = serde_json::to_vec(&letter).expect("texts and numbers");
        let whole = postcard::to_stdvec(message).expect("a message can be encoded");
        let mut writes = Writes::from([
            (dead_key(&letter.id, letter.position), Some(facts.into())),
            (message_key(&letter.id, letter.position), Some(whole.into())),
        ]);
        writes.extend(key_of(message).map(|key| (ordering_entry(key, self.place), Some(Bytes::new()))));
        writes
    }

    /// Returns the writes that the delivery of a redriven message needs: the end of its entry of
    /// the ordering key.
    pub(crate) fn delivered(self, message: &Message) -> Writes {
        key_of(message).map(|key| (ordering_entry(key, self.place), None)).into_iter().collect()
    }
}

/// Answer of a destination that refuses a message.
pub(crate) struct Refusal<'a> {
    pub(crate) destination: &'a str,
    pub(crate) status: Option<u16>,
    pub(crate) error: &'a str,
    pub(crate) at_ms: u64,
}

impl RefusedMessages {
    /// Returns the dead letters of the outbox of `storage`.
    pub fn new(storage: &dyn IdempotencyStorage) -> Self {
        Self { view: storage.view(&outbox_scope()) }
    }

    /// Returns up to `limit` refused messages after the id `after`, in the order of their ids,
    /// without their bodies.
    pub async fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<RefusedMessage>, StoreError> {
        let start = after.map_or_else(|| DEAD.to_owned(), |after| format!("{DEAD}{}0", escaped(after)));
        let page = self.view.scan(&start, Some(DEAD_END), limit).await?;
        page.iter().map(letter).collect()
    }

    /// Returns the number of refused messages, counted up to `max`.
    pub async fn count(&self, max: usize) -> Result<usize, StoreError> {
        Ok(self.view.scan(DEAD, Some(DEAD_END), max).await?.len())
    }

    /// Returns the refused message with this id, and the message itself. Of several with one id,
    /// returns the first one sent.
    pub async fn find(&self, id: &str) -> Result<Option<(RefusedMessage, Message)>, StoreError> {
        let Some(ReadRefused { letter, .. }) = self.read(id).await? else { return Ok(None) };
        // The message may have left since the facts were read.
        Ok(self.message(&letter).await?.map(|message| (letter, message)))
    }

    pub(crate) async fn read(&self, id: &str) -> Result<Option<ReadRefused>, StoreError> {
        let prefix = format!("{DEAD}{}", escaped(id));
        let page = self.view.scan(&format!("{prefix}/"), Some(&format!("{prefix}0")), 1).await?;
        page.first().map(|entry| Ok(ReadRefused { letter: letter(entry)?, version: entry.1 })).transpose()
    }

    pub(crate) async fn message(&self, letter: &RefusedMessage) -> Result<Option<Message>, StoreError> {
        let (_, value) = self.view.get(&message_key(&letter.id, letter.position)).await?;
        let decode = |value: Bytes| postcard::from_bytes(&value).map_err(|error| damaged(&letter.id, &error));
        value.map(decode).transpose()
    }
}

impl ReadRefused {
    /// Returns the change that forgets the message, if nobody has changed it since it was read.
    pub(crate) fn discarded(&self) -> SharedChange {
        let RefusedMessage { ordering_key, position, .. } = &self.letter;
        let mut change = self.redriven();
        change.writes.extend(ordering_key.as_deref().map(|key| (ordering_entry(key_digest(key), *position), None)));
        change
    }

    /// Returns the change that goes with the message's return to the outbox. Its entry of the
    /// ordering key stays until the message is sent.
    pub(crate) fn redriven(&self) -> SharedChange {
        let RefusedMessage { id, position, .. } = &self.letter;
        let dead = dead_key(id, *position);
        let writes = [(dead.clone(), None), (message_key(id, *position), None)];
        SharedChange { reads: [(dead, self.version)].into(), writes: writes.into() }
    }

    /// Returns the message as it goes back into the outbox: unchanged, with its former place.
    pub(crate) fn requeued(&self, mut message: Message) -> Message {
        message.headers.insert(REDRIVEN.to_owned(), position_text(self.letter.position));
        if fault::mutated("redriven-under-another-id") {
            message.id.push('x');
        }
        message
    }
}

/// Ordering keys that have a refused message, as far as they fit into memory: the relay asks it for
/// every message that has a key.
pub(crate) struct OrderingKeys {
    view: Arc<dyn StateView>,
    /// First place of each key that has an entry.
    first: BTreeMap<u128, OutboxPosition>,
    /// Set if `first` has every key. Otherwise the store is asked.
    is_complete: bool,
    max: usize,
}

impl OrderingKeys {
    /// Reads the keys, `max` of them at most.
    pub(crate) async fn read(storage: &dyn IdempotencyStorage, max: usize) -> Result<Self, StoreError> {
        let view = storage.view(&outbox_scope());
        let page = view.scan(KEYS, Some(KEYS_END), max + 1).await?;
        let mut keys = Self { view, first: BTreeMap::new(), is_complete: true, max };
        if page.len() > max {
            keys.overflow();
            return Ok(keys);
        }
        for (entry, ..) in &page {
            let (key, place) = parse_ordering_entry(entry)?;
            keys.add(key, place);
        }
        Ok(keys)
    }

    /// Adds the entry of a message that was refused since the keys were read.
    pub(crate) fn add_refused(&mut self, row: OutgoingRow, message: &Message) {
        if let Some(key) = key_of(message).filter(|_| self.is_complete) {
            self.add(key, row.place);
        }
    }

    fn add(&mut self, key: u128, place: OutboxPosition) {
        let first = self.first.entry(key).or_insert(place);
        *first = place.min(*first);
        if self.first.len() > self.max {
            self.overflow();
        }
    }

    fn overflow(&mut self) {
        self.first = BTreeMap::new();
        self.is_complete = false;
    }

    /// Returns true if a message of the row's key stands before it and was refused.
    pub(crate) async fn hold(&self, row: OutgoingRow, message: &Message) -> Result<bool, StoreError> {
        if self.is_complete && self.first.is_empty() {
            return Ok(false);
        }
        let Some(key) = key_of(message) else { return Ok(false) };
        let first = if self.is_complete { self.first.get(&key).copied() } else { self.first_stored(key).await? };
        Ok(first.is_some_and(|first| first < row.place) && !fault::mutated("key-passes-its-refusal"))
    }

    async fn first_stored(&self, key: u128) -> Result<Option<OutboxPosition>, StoreError> {
        let prefix = format!("{KEYS}{key:032x}");
        let page = self.view.scan(&format!("{prefix}/"), Some(&format!("{prefix}0")), 1).await?;
        page.first().map(|(entry, ..)| Ok(parse_ordering_entry(entry)?.1)).transpose()
    }
}

/// Returns the scope in which the dead letters stand.
pub(crate) fn outbox_scope() -> Scope {
    Scope::of("").shared()
}

fn ordering_key(message: &Message) -> Option<&str> {
    message.extensions.get(ORDERING_KEY).map(String::as_str)
}

/// Returns the digest of the message's ordering key, if it has one.
fn key_of(message: &Message) -> Option<u128> {
    ordering_key(message).map(key_digest)
}

fn key_digest(key: &str) -> u128 {
    RecordKey::new(outbox_scope(), "outbox/key".into(), key.into()).digest()
}

fn dead_key(id: &str, position: OutboxPosition) -> String {
    format!("{DEAD}{}/{}", escaped(id), position_text(position))
}

fn message_key(id: &str, position: OutboxPosition) -> String {
    format!("outbox/message/{}/{}", escaped(id), position_text(position))
}

fn ordering_entry(key: u128, place: OutboxPosition) -> String {
    format!("{KEYS}{key:032x}/{}", position_text(place))
}

fn parse_ordering_entry(entry: &str) -> Result<(u128, OutboxPosition), StoreError> {
    let parts = entry.strip_prefix(KEYS).and_then(|rest| rest.split_once('/'));
    let parsed = parts.and_then(|(key, place)| Some((u128::from_str_radix(key, 16).ok()?, parse_position(place)?)));
    parsed.ok_or_else(|| StoreError::Damaged(format!("`{entry}` is no entry of an ordering key").into()))
}

/// Returns a position as text that sorts as positions do.
fn position_text(position: OutboxPosition) -> String {
    format!("{:016x}{:08x}", position.version, position.index)
}

fn parse_position(text: &str) -> Option<OutboxPosition> {
    let (version, index) = text.split_at_checked(16)?;
    let (version, index) = (u64::from_str_radix(version, 16).ok()?, u32::from_str_radix(index, 16).ok()?);
    Some(OutboxPosition { version, index })
}

fn letter((key, _, facts): &Entry) -> Result<RefusedMessage, StoreError> {
    serde_json::from_slice(facts).map_err(|error| damaged(key, &error))
}

fn damaged(key: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Damaged(format!("the refused message {key}: {error}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_come_back_from_their_text_and_sort_as_it_does() {
        let at = |version, index| OutboxPosition { version, index };
        let positions = [at(0, 0), at(0, u32::MAX), at(9, 1), at(16, 0), at(u64::MAX, u32::MAX)];
        let texts = positions.map(position_text);
        assert!(texts.is_sorted());
        assert_eq!(texts.each_ref().map(|text| parse_position(text)), positions.map(Some));
        assert_eq!(["", "12", "xx"].map(parse_position), [None; 3]);
    }

    #[test]
    fn an_ordering_entry_names_its_key_whatever_is_in_it() {
        let place = OutboxPosition { version: 7, index: 2 };
        for key in ["", "a", "a/b", "a/b/", "%2F"] {
            let digest = key_digest(key);
            assert_eq!(parse_ordering_entry(&ordering_entry(digest, place)).expect(key), (digest, place));
        }
        assert!(parse_ordering_entry("outbox/key/1").is_err());
    }

    #[test]
    fn the_header_of_a_redriven_message_stays_inside() {
        let position = OutboxPosition { version: 3, index: 1 };
        let mut message = Message::new("id", "/processors/p", "t");
        assert!(!OutgoingRow::of(position, &mut message).is_redriven());
        let letter = RefusedMessage {
            id: "id".into(),
            processor: "p".into(),
            kind: "t".into(),
            ordering_key: None,
            position,
            destination: "d".into(),
            status: None,
            error: String::new(),
            at_ms: 1,
        };
        let mut again = ReadRefused { letter, version: 1 }.requeued(message.clone());
        let row = OutgoingRow::of(OutboxPosition { version: 9, index: 0 }, &mut again);
        assert_eq!((row.place, again), (position, message));
        assert!(row.is_redriven());
    }
}
