//! State as a run sees it: the view below it, the versions it read, and the writes it asks for.
//! Data and one trait.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::support::error::StoreError;

/// Version of one write of one state key; 0 means "the key is absent". Opaque beyond equality.
pub type Version = u64;

/// Prefix of the state keys that are the host's own. A processor neither sees nor writes such a
/// key.
pub const RESERVED: char = '\u{10ffff}';

/// One state entry as read: key, version, value.
pub type Entry = (String, Version, Bytes);

/// A read view of one processor's state.
pub trait StateView: Send + Sync {
    /// Returns the value under `key` and its version; `(0, None)` where it is absent.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>>;

    /// Returns up to `limit` entries of `start <= key < end` in key order; without `end`, up to the
    /// last key.
    fn scan<'a>(
        &'a self,
        start: &'a str,
        end: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>>;
}

/// Message to send, as the processor asked for it; the host adds id and source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// CloudEvents `type`.
    pub kind: String,
    /// CloudEvents `subject`.
    pub subject: Option<String>,
    /// Media type of `data`.
    pub content_type: Option<String>,
    /// Payload of the message.
    pub data: Bytes,
    /// CloudEvents extension attributes.
    pub extensions: BTreeMap<String, String>,
}

/// Limits of one run.
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
    /// Entries that one scan returns, and events that one read returns.
    pub scan_entries: usize,
    /// Bytes of an event stream's name.
    pub stream_name_bytes: usize,
    /// Events that one append adds.
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

/// Range that a run read, and the versions it saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRead {
    /// First key of the range.
    pub start: String,
    /// First key past the range; `None`: unbounded.
    pub end: Option<String>,
    /// Number of entries that the run asked for.
    pub limit: usize,
    /// Keys and versions that the run saw.
    pub seen: Vec<(String, Version)>,
}

/// Versions that a run read of the state, to be checked again when it commits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadSet {
    /// Versions by key.
    pub keys: BTreeMap<String, Version>,
    /// Ranges, in the order read.
    pub ranges: Vec<RangeRead>,
}

impl ReadSet {
    /// Returns true if every read still holds: the one check of optimistic concurrency control, for
    /// the overlay and for the stores. `version` returns the current version of a key, or `None` if
    /// the caller knows of no change to the key. `range` tells whether a range holds; see
    /// [`RangeRead::matches`] and [`RangeRead::unchanged_by`].
    ///
    /// # Errors
    ///
    /// Returns the first error of `version` or `range`.
    pub fn holds<E>(
        &self,
        version: impl Fn(&str) -> Result<Option<Version>, E>,
        range: impl Fn(&RangeRead) -> Result<bool, E>,
    ) -> Result<bool, E> {
        if !Self::keys_hold(&self.keys, version)? {
            return Ok(false);
        }
        for read in &self.ranges {
            if !range(read)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns true if every key of `keys` still has the version it was read at. `version` as for
    /// [`ReadSet::holds`].
    ///
    /// # Errors
    ///
    /// Returns the first error of `version`.
    pub fn keys_hold<E>(
        keys: &BTreeMap<String, Version>,
        version: impl Fn(&str) -> Result<Option<Version>, E>,
    ) -> Result<bool, E> {
        for (key, read) in keys {
            if version(key)?.is_some_and(|now| now != *read) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl RangeRead {
    /// Returns true if a scan of the range would see the same again. `current` holds the range's
    /// keys and versions in key order, at least `limit` present ones if there are as many; version
    /// 0 marks an absent key.
    pub fn matches<'a>(&'a self, current: impl Iterator<Item = (&'a str, Version)>) -> bool {
        let present = current.filter(|(_, version)| *version != 0).take(self.limit);
        present.eq(self.seen.iter().map(|(key, version)| (key.as_str(), *version)))
    }

    /// Returns true if none of `written` changes the result of the scan. `written` holds the
    /// range's keys that were written since, in key order, with their latest versions; version 0
    /// marks a deleted key.
    pub fn unchanged_by<'a>(&self, written: impl Iterator<Item = (&'a str, Version)>) -> bool {
        let seen: BTreeMap<&str, Version> = self.seen.iter().map(|(key, version)| (key.as_str(), *version)).collect();
        // A scan that reached its limit saw nothing after its last entry, so writes there do not
        // change its result.
        let last = if self.seen.len() >= self.limit { self.seen.last().map(|(key, _)| key.as_str()) } else { None };
        written
            .take_while(|(key, _)| last.is_none_or(|last| *key <= last))
            .all(|(key, version)| seen.get(key).copied().unwrap_or(0) == version)
    }
}

/// Effects that a run asks for: state writes (`None` deletes) and messages to send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Effects {
    /// State writes by key; `None` deletes.
    pub writes: BTreeMap<String, Option<Bytes>>,
    /// Messages to send, in order.
    pub outgoing: Vec<Outgoing>,
}

/// Returns up to `limit` entries of a processor's state whose keys begin with `prefix`, in key
/// order, after the key `after`. The host's own keys are not included.
pub async fn list_state(
    view: &dyn StateView,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<(String, Bytes)>, StoreError> {
    let host_keys = RESERVED.to_string();
    let start = match after {
        // Start at the first key after `after`.
        Some(after) if after >= prefix => format!("{after}\0"),
        _ => prefix.to_owned(),
    };
    let end = end_of_prefix(prefix).filter(|end| *end < host_keys).unwrap_or(host_keys);
    if start >= end {
        return Ok(Vec::new());
    }
    let entries = view.scan(&start, Some(&end), limit).await?;
    Ok(entries.into_iter().map(|(key, _, value)| (key, value)).collect())
}

/// Returns the first key after all that begin with `prefix`, or `None` if there is no such key.
fn end_of_prefix(prefix: &str) -> Option<String> {
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        // Keys are compared by bytes, which orders UTF-8 by code points. Surrogates are not code
        // points of UTF-8.
        let next = if last == '\u{d7ff}' { Some('\u{e000}') } else { char::from_u32(u32::from(last) + 1) };
        if let Some(next) = next {
            chars.push(next);
            return Some(chars.into_iter().collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_first_key_behind_all_that_begin_with_it() {
        let ends = ["a", "ab", "", "a\u{10ffff}", "\u{10ffff}", "\u{d7ff}"].map(end_of_prefix);
        let wanted = [Some("b"), Some("ac"), None, Some("b"), None, Some("\u{e000}")];
        assert_eq!(ends, wanted.map(|end| end.map(str::to_owned)));
    }
}
