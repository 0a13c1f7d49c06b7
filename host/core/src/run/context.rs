//! What one run of a message reads and writes: a view of the state below, a buffer of effects above. Nothing here is
//! durable; the pipeline takes the effects when the run ends.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::run::checkpoint::{Early, Unmade};
use crate::message::key::RecordKey;
use crate::run::processor::Failure;
use crate::store::StoreError;

/// Names one write of one state key; 0 means "the key is absent". Opaque beyond equality.
pub type Version = u64;

/// Begins the state keys that are the host's own. A processor neither sees nor writes one.
pub const RESERVED: char = '\u{10ffff}';
/// The first of them: every other key comes before.
const FIRST_RESERVED: &str = "\u{10ffff}";

/// One state entry as read: key, version, value.
pub type Entry = (String, Version, Bytes);

/// A read view of one processor's state.
pub trait StateView: Send + Sync {
    /// The value under `key` and its version; `(0, None)` where it is absent.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>>;

    /// Up to `limit` entries of `start <= key < end` in key order; no `end` means to the last.
    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>>;
}

/// A message to send, as the processor asked for it; id and source are the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// CloudEvents `type`.
    pub kind: String,
    /// CloudEvents `subject`.
    pub subject: Option<String>,
    /// Media type of `data`.
    pub content_type: Option<String>,
    /// The payload.
    pub data: Bytes,
    /// CloudEvents extension attributes.
    pub extensions: BTreeMap<String, String>,
}

/// What a run may do at most.
#[derive(Debug, Clone)]
pub struct EffectLimits {
    /// State keys written or read, together.
    pub state_keys: usize,
    /// Bytes of one state key.
    pub key_bytes: usize,
    /// Bytes of all writes and outgoing messages together.
    pub effect_bytes: usize,
    /// Outgoing messages.
    pub outgoing: usize,
    /// Entries one scan returns, and events one read does.
    pub scan_entries: usize,
    /// Bytes of an event stream's name.
    pub stream_name_bytes: usize,
    /// Events one append adds.
    pub append_events: usize,
}

impl Default for EffectLimits {
    fn default() -> Self {
        Self {
            state_keys: 10_000,
            key_bytes: 1024,
            effect_bytes: 16 << 20,
            outgoing: 1_000,
            scan_entries: 10_000,
            stream_name_bytes: 256,
            append_events: 1_000,
        }
    }
}

/// Why a read or write of the context failed. The run cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContextError {
    /// The store could not be read: run the message again.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key is one of the host's own, and would be again: reject the message.
    #[error("a state key must not begin with U+10FFFF: those are the host's own")]
    Reserved,
    /// What is to be appended is no event, and would be none again: reject the message.
    #[error("{0}")]
    NoEvent(&'static str),
    /// The run has lost its claim to the message: it ends here, and whoever has it now goes on.
    #[error("the run's claim is over, and another owner may have taken the message over")]
    Lost,
    /// The saga or the lock does not take that, and would not again: reject the message.
    #[error("{0}")]
    Saga(String),
    /// The run is over one of its limits, and would be again: reject the message.
    #[error("{what} is over its limit of {limit}")]
    Limit {
        /// What was counted, with its unit.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// A range that a run read, and what it saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRead {
    /// First key of the range.
    pub start: String,
    /// First key past the range; `None`: unbounded.
    pub end: Option<String>,
    /// How many entries were asked for.
    pub limit: usize,
    /// Keys and versions that were seen.
    pub seen: Vec<(String, Version)>,
}

/// What a run read of the state, to be checked again when it commits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadSet {
    /// Versions by key.
    pub keys: BTreeMap<String, Version>,
    /// Ranges, in the order read.
    pub ranges: Vec<RangeRead>,
}

/// What a run wants to become true: state writes (`None` deletes) and messages to send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Effects {
    /// State writes by key; `None` deletes.
    pub writes: BTreeMap<String, Option<Bytes>>,
    /// Messages to send, in order.
    pub outgoing: Vec<Outgoing>,
}

/// The processor's hands: reads through to a view of the state, buffers writes, remembers what was read.
pub struct Context {
    view: Arc<dyn StateView>,
    limits: Arc<EffectLimits>,
    reads: ReadSet,
    effects: Effects,
    effect_bytes: usize,
    /// The message's own key, which ids of events are derived from.
    own: Option<RecordKey>,
    /// Events appended so far.
    pub(crate) appended: usize,
    /// What the run makes durable before it ends, once it has asked for it ...
    early: OnceLock<Arc<Early>>,
    /// ... and what makes it.
    unmade: Option<Unmade>,
}

impl Context {
    /// A context over `view`, with nothing read or written.
    pub fn new(view: Arc<dyn StateView>, limits: Arc<EffectLimits>) -> Self {
        let (reads, effects) = (ReadSet::default(), Effects::default());
        let early = OnceLock::new();
        Self { view, limits, reads, effects, effect_bytes: 0, own: None, appended: 0, early, unmade: None }
    }

    /// The same for the message whose own key is `own`.
    #[must_use]
    pub fn of(mut self, own: &RecordKey) -> Self {
        self.own = Some(own.clone());
        self
    }

    /// The same with a way to make something durable before the run ends.
    pub(crate) fn with_early(mut self, early: Arc<Early>) -> Self {
        self.early = early.into();
        self
    }

    /// The same, made when it is asked for.
    pub(crate) fn with_unmade_early(mut self, unmade: Unmade) -> Self {
        self.unmade = Some(unmade);
        self
    }

    /// What the run makes durable before it ends; `None` where there is no way to.
    pub(crate) fn made_early(&self) -> Option<&Arc<Early>> {
        match &self.unmade {
            Some(unmade) => Some(self.early.get_or_init(|| Arc::new(unmade.make()))),
            None => self.early.get(),
        }
    }

    /// The same, if the run has asked for it.
    pub(crate) fn take_early(&mut self) -> Option<Arc<Early>> {
        self.early.take()
    }

    /// A context of the same message in which nothing was read or written yet.
    #[must_use]
    pub fn again(&self) -> Self {
        let again = Self { own: self.own.clone(), ..Self::new(self.view.clone(), self.limits.clone()) };
        match self.made_early() {
            Some(early) => again.with_early(early.clone()),
            None => again,
        }
    }

    /// The value under `key`, as this run left it.
    pub async fn get(&mut self, key: &str) -> Result<Option<Bytes>, ContextError> {
        not_reserved(key)?;
        self.get_any(key).await
    }

    /// As [`Self::get`], the host's own keys too.
    pub(crate) async fn get_any(&mut self, key: &str) -> Result<Option<Bytes>, ContextError> {
        if let Some(written) = self.effects.writes.get(key) {
            return Ok(written.clone());
        }
        self.check_key(key)?;
        let (version, value) = self.view.get(key).await?;
        // The first version read is the one the run rests on: a later, different one is a conflict at the commit.
        self.reads.keys.entry(key.to_owned()).or_insert(version);
        Ok(value)
    }

    /// Writes `value` under `key`.
    pub fn set(&mut self, key: &str, value: impl Into<Bytes>) -> Result<(), ContextError> {
        not_reserved(key)?;
        self.write_any(key, Some(value.into()))
    }

    /// Removes `key`.
    pub fn delete(&mut self, key: &str) -> Result<(), ContextError> {
        not_reserved(key)?;
        self.write_any(key, None)
    }

    /// Writes `value` (`None` deletes) if the key holds `expected`; answers whether it did.
    pub async fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<&[u8]>,
        value: Option<Bytes>,
    ) -> Result<bool, ContextError> {
        let holds = self.get(key).await?.as_deref() == expected;
        if holds {
            self.write_any(key, value)?;
        }
        Ok(holds)
    }

    /// Up to `limit` entries of `start <= key < end` in key order, as this run left them.
    pub async fn scan(
        &mut self,
        start: &str,
        end: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Bytes)>, ContextError> {
        // The host's own keys come after all others.
        self.scan_any(start, end.map_or(FIRST_RESERVED, |end| end.min(FIRST_RESERVED)), limit).await
    }

    /// As [`Self::scan`], the host's own keys too.
    pub(crate) async fn scan_any(
        &mut self,
        start: &str,
        end: &str,
        limit: usize,
    ) -> Result<Vec<(String, Bytes)>, ContextError> {
        self.check("entries of a scan", limit, self.limits.scan_entries)?;
        // Own deletes may hide entries of the view: ask for that many more.
        let own = || {
            let range = (std::ops::Bound::Included(start), std::ops::Bound::Excluded(end));
            self.effects.writes.range::<str, _>(range)
        };
        if limit == 0 || end <= start {
            return Ok(Vec::new());
        }
        let asked = limit.saturating_add(own().filter(|(_, value)| value.is_none()).count());
        let below = self.view.scan(start, Some(end), asked).await?;
        let seen = below.iter().map(|(key, version, _)| (key.clone(), *version)).collect();
        let below = below.into_iter().map(|(key, _, value)| (key, value));
        // Mostly the run wrote nothing in the range: the view's order stands.
        let entries = if own().next().is_none() { below.collect() } else { merged(below, own(), limit) };
        self.reads.ranges.push(RangeRead { start: start.into(), end: Some(end.into()), limit: asked, seen });
        Ok(entries)
    }

    /// Sends a message once this one has committed.
    pub fn send(&mut self, message: Outgoing) -> Result<(), ContextError> {
        self.check("outgoing messages", self.effects.outgoing.len() + 1, self.limits.outgoing)?;
        self.count_bytes(message.data.len() + message.kind.len())?;
        self.effects.outgoing.push(message);
        Ok(())
    }

    /// What the run read, and what it wants to become true.
    pub fn finish(self) -> (ReadSet, Effects) {
        (self.reads, self.effects)
    }

    /// The message's own key.
    pub(crate) fn own(&self) -> Option<&RecordKey> {
        self.own.as_ref()
    }

    /// What the run may do at most.
    pub(crate) fn limits(&self) -> &EffectLimits {
        &self.limits
    }

    /// Writes under any key, the host's own too.
    pub(crate) fn write_any(&mut self, key: &str, value: Option<Bytes>) -> Result<(), ContextError> {
        self.check_key(key)?;
        self.count_bytes(key.len() + value.as_ref().map_or(0, Bytes::len))?;
        self.effects.writes.insert(key.to_owned(), value);
        Ok(())
    }

    fn check_key(&self, key: &str) -> Result<(), ContextError> {
        let keys = self.reads.keys.len() + self.effects.writes.len();
        self.check("state keys touched", keys + 1, self.limits.state_keys)?;
        self.check("bytes of a state key", key.len(), self.limits.key_bytes)
    }

    fn count_bytes(&mut self, bytes: usize) -> Result<(), ContextError> {
        self.effect_bytes += bytes;
        self.check("bytes of effects", self.effect_bytes, self.limits.effect_bytes)
    }

    pub(crate) fn check(&self, what: &'static str, count: usize, limit: usize) -> Result<(), ContextError> {
        if count > limit { Err(ContextError::Limit { what, limit }) } else { Ok(()) }
    }
}

/// What it means for the message: what would be so again is for good.
impl From<ContextError> for Failure {
    fn from(error: ContextError) -> Self {
        match error {
            ContextError::Store(_) | ContextError::Lost => Self::retry(error.to_string()),
            ContextError::Reserved | ContextError::NoEvent(_) | ContextError::Saga(_) | ContextError::Limit { .. } => {
                Self::Reject(error.to_string())
            }
        }
    }
}

fn not_reserved(key: &str) -> Result<(), ContextError> {
    if key.starts_with(RESERVED) { Err(ContextError::Reserved) } else { Ok(()) }
}

/// The first `limit` entries in key order, where what was written stands in for what is below it.
fn merged<'a>(
    below: impl Iterator<Item = (String, Bytes)>,
    written: impl Iterator<Item = (&'a String, &'a Option<Bytes>)>,
    limit: usize,
) -> Vec<(String, Bytes)> {
    let mut entries: BTreeMap<String, Option<Bytes>> = below.map(|(key, value)| (key, Some(value))).collect();
    entries.extend(written.map(|(key, value)| (key.clone(), value.clone())));
    entries.into_iter().filter_map(|(key, value)| Some((key, value?))).take(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys `a` to `e`, each with its own name as the value.
    struct Letters;

    impl StateView for Letters {
        fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
            Box::pin(async { Ok((0, None)) })
        }

        fn scan<'a>(
            &'a self,
            start: &'a str,
            end: Option<&'a str>,
            limit: usize,
        ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
            let inside = move |key: &&str| *key >= start && end.is_none_or(|end| *key < end);
            let entries = ["a", "b", "c", "d", "e"].into_iter().filter(inside).take(limit);
            let entries = entries.map(|key| (key.to_owned(), 1, Bytes::from(key))).collect();
            Box::pin(async move { Ok(entries) })
        }
    }

    async fn scanned(context: &mut Context, end: Option<&str>, limit: usize) -> String {
        let entries = context.scan("a", end, limit).await.expect("a scan");
        entries.iter().map(|(key, value)| format!("{key}={} ", String::from_utf8_lossy(value))).collect()
    }

    #[tokio::test]
    async fn a_scan_sees_what_the_run_wrote_and_no_more_than_its_limit() {
        let mut context = Context::new(Arc::new(Letters), Arc::new(EffectLimits::default()));
        context.set("z", "outside the range").expect("a write");
        assert_eq!(scanned(&mut context, Some("d"), 2).await, "a=a b=b ");
        context.delete("a").expect("a write");
        context.set("b", "new").expect("a write");
        context.set("bb", "between").expect("a write");
        assert_eq!(scanned(&mut context, Some("d"), 3).await, "b=new bb=between c=c ");
        assert_eq!(scanned(&mut context, Some("d"), 2).await, "b=new bb=between ");
        assert_eq!(scanned(&mut context, None, 9).await, "b=new bb=between c=c d=d e=e z=outside the range ");
        let ranges = context.finish().0.ranges;
        assert_eq!(ranges.iter().map(|range| range.seen.len()).collect::<Vec<_>>(), [2, 3, 3, 5]);
    }
}
