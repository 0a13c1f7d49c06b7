//! The context of one run of a message: a view of the state below, a buffer of effects above.
//! Nothing here is durable; the pipeline takes the effects when the run ends.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crate::message::key::RecordKey;
use crate::run::checkpoint::{Checkpoints, LazyCheckpoints};
use crate::run::failure::ContextError;
use crate::run::lock::Acquired;
use crate::run::outbound_call::OutboundCaller;
use crate::state::{EffectLimits, Effects, Outgoing, RESERVED, RangeRead, ReadSet, StateView};

/// The first reserved key: every key that is not the host's own comes before it.
const FIRST_RESERVED: &str = "\u{10ffff}";

/// Context through which a processor reads and writes: reads go to a view of the state and are
/// remembered, writes are buffered.
pub struct Context {
    view: Arc<dyn StateView>,
    limits: Arc<EffectLimits>,
    reads: ReadSet,
    effects: Effects,
    effect_bytes: usize,
    /// The message's own key, from which the ids of events are derived.
    message_key: Option<RecordKey>,
    /// Events appended so far.
    pub(crate) appended: usize,
    /// The run's checkpoints, once it has used them.
    checkpoints: OnceLock<Arc<Checkpoints>>,
    /// Makes `checkpoints` at their first use.
    lazy: Option<LazyCheckpoints>,
}

impl Context {
    /// Returns a context over `view`, with nothing read or written.
    pub fn new(view: Arc<dyn StateView>, limits: Arc<EffectLimits>) -> Self {
        Self {
            view,
            limits,
            reads: ReadSet::default(),
            effects: Effects::default(),
            effect_bytes: 0,
            message_key: None,
            appended: 0,
            checkpoints: OnceLock::new(),
            lazy: None,
        }
    }

    /// Makes this the context of the message whose own key is `message_key`.
    #[must_use]
    pub fn of(mut self, message_key: &RecordKey) -> Self {
        self.message_key = Some(message_key.clone());
        self
    }

    /// Gives the run its checkpoints.
    pub(crate) fn with_checkpoints(mut self, checkpoints: Arc<Checkpoints>) -> Self {
        self.checkpoints = checkpoints.into();
        self
    }

    /// Gives the run checkpoints that are made when it first uses them.
    pub(crate) fn with_lazy_checkpoints(mut self, lazy: LazyCheckpoints) -> Self {
        self.lazy = Some(lazy);
        self
    }

    /// Returns the run's checkpoints, or `None` where it was given none.
    pub(crate) fn checkpoints(&self) -> Option<&Arc<Checkpoints>> {
        match &self.lazy {
            Some(lazy) => Some(self.checkpoints.get_or_init(|| Arc::new(lazy.make()))),
            None => self.checkpoints.get(),
        }
    }

    /// Takes the run's checkpoints, or `None` if the run has not used them.
    pub(crate) fn take_checkpoints(&mut self) -> Option<Arc<Checkpoints>> {
        self.checkpoints.take()
    }

    /// Returns a context of the same message in which nothing was read or written.
    #[must_use]
    pub fn again(&self) -> Self {
        let again = Self { message_key: self.message_key.clone(), ..Self::new(self.view.clone(), self.limits.clone()) };
        match self.checkpoints() {
            Some(checkpoints) => again.with_checkpoints(checkpoints.clone()),
            None => again,
        }
    }

    /// Registers a step before its outbound effect. The step is durable when this returns. A re-run
    /// that registers the same step again registers nothing. An error ends the run.
    pub async fn step(&mut self, name: &str, payload: impl Into<Bytes>) -> Result<(), ContextError> {
        self.required_checkpoints()?.step(name, payload.into()).await
    }

    /// Passes the pivot: from here on nothing of the saga is compensated. Durable when this
    /// returns.
    pub async fn pivot(&mut self) -> Result<(), ContextError> {
        self.required_checkpoints()?.pivot().await
    }

    /// Makes the message a member of the saga `name`. Only allowed before its first step.
    pub async fn join_saga(&mut self, name: &str) -> Result<(), ContextError> {
        self.required_checkpoints()?.join(name).await
    }

    /// Completes the saga once the message has committed.
    pub async fn complete_saga(&mut self) -> Result<(), ContextError> {
        self.required_checkpoints()?.complete().await
    }

    /// Acquires a lock for `ttl_ms` milliseconds. The message commits only if the lock is still
    /// held then, and releases it.
    pub async fn acquire(&mut self, name: &str, ttl_ms: u64) -> Result<Acquired, ContextError> {
        self.required_checkpoints()?.acquire(name, ttl_ms).await
    }

    /// Extends a lock to `ttl_ms` milliseconds from now. Returns `false` if the lock is lost.
    pub async fn extend(&mut self, name: &str, fence: u64, ttl_ms: u64) -> Result<bool, ContextError> {
        self.required_checkpoints()?.extend(name, fence, ttl_ms).await
    }

    /// Releases a lock before the message ends.
    pub async fn release(&mut self, name: &str, fence: u64) -> Result<(), ContextError> {
        self.required_checkpoints()?.release(name, fence).await
    }

    /// Returns the caller for the run's outbound calls, or `None` where the context belongs to no
    /// message.
    pub fn caller(&self) -> Option<OutboundCaller> {
        self.checkpoints().cloned().map(OutboundCaller)
    }

    fn required_checkpoints(&self) -> Result<&Arc<Checkpoints>, ContextError> {
        self.checkpoints().ok_or_else(|| ContextError::Saga("this context belongs to no message".into()))
    }

    /// Returns the value under `key`, as this run left it.
    pub async fn get(&mut self, key: &str) -> Result<Option<Bytes>, ContextError> {
        not_reserved(key)?;
        self.get_any(key).await
    }

    /// Returns the value under `key`, which may be one of the host's own, as this run left it.
    pub(crate) async fn get_any(&mut self, key: &str) -> Result<Option<Bytes>, ContextError> {
        if let Some(written) = self.effects.writes.get(key) {
            return Ok(written.clone());
        }
        self.check_key(key)?;
        let (version, value) = self.view.get(key).await?;
        // The first version read is the one the run rests on: a later, different one is a conflict
        // at the commit.
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

    /// Writes `value` (`None` deletes) if the key holds `expected`. Returns whether it did.
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

    /// Returns up to `limit` entries of `start <= key < end` in key order, as this run left them.
    pub async fn scan(
        &mut self,
        start: &str,
        end: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Bytes)>, ContextError> {
        // The host's own keys come after all others.
        self.scan_any(start, end.map_or(FIRST_RESERVED, |end| end.min(FIRST_RESERVED)), limit).await
    }

    /// Returns up to `limit` entries of `start <= key < end` in key order, those of the host's own
    /// keys included.
    pub(crate) async fn scan_any(
        &mut self,
        start: &str,
        end: &str,
        limit: usize,
    ) -> Result<Vec<(String, Bytes)>, ContextError> {
        self.check("entries of a scan", limit, self.limits.scan_entries)?;
        // Own deletes may hide entries of the view: ask for that many more.
        let written = || {
            let range = (std::ops::Bound::Included(start), std::ops::Bound::Excluded(end));
            self.effects.writes.range::<str, _>(range)
        };
        if limit == 0 || end <= start {
            return Ok(Vec::new());
        }
        let asked = limit.saturating_add(written().filter(|(_, value)| value.is_none()).count());
        let below = self.view.scan(start, Some(end), asked).await?;
        let seen = below.iter().map(|(key, version, _)| (key.clone(), *version)).collect();
        let below = below.into_iter().map(|(key, _, value)| (key, value));
        // Mostly the run wrote nothing in the range: the view's order holds.
        let entries = if written().next().is_none() { below.collect() } else { merged(below, written(), limit) };
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

    /// Returns the reads of the run, and the effects that it wants to become true.
    pub fn finish(self) -> (ReadSet, Effects) {
        (self.reads, self.effects)
    }

    /// Returns the message's own key.
    pub(crate) fn message_key(&self) -> Option<&RecordKey> {
        self.message_key.as_ref()
    }

    /// Returns the limits of the run.
    pub(crate) fn limits(&self) -> &EffectLimits {
        &self.limits
    }

    /// Writes under any key, the host's own included.
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

fn not_reserved(key: &str) -> Result<(), ContextError> {
    if key.starts_with(RESERVED) { Err(ContextError::Reserved) } else { Ok(()) }
}

/// Returns the first `limit` entries in key order. Written entries replace those below them.
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
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::state::{Entry, Version};
    use crate::support::error::StoreError;

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
