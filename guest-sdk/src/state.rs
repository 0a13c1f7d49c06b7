//! The processor's state: typed values as JSON, or text, or bytes. Caches nothing: the host does.

use std::collections::VecDeque;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;
use crate::host::{Backend, Entry, Host as _};

/// Number of entries that one call of the host returns.
const PAGE_ENTRIES: u32 = 128;

/// The processor's own key-value state, part of the message's transaction.
///
/// Typed values are stored as JSON, so a number is stored as its decimal text.
#[derive(Clone, Copy)]
pub struct State<'a> {
    pub(crate) backend: &'a Backend,
}

impl<'a> State<'a> {
    /// The value under `key`. One that is no `T` fails the message for good.
    pub fn get<T: DeserializeOwned>(self, key: &str) -> Result<Option<T>, Failure> {
        let Some(bytes) = self.get_bytes(key) else { return Ok(None) };
        let value = serde_json::from_slice(&bytes);
        value.map(Some).map_err(|error| Failure::reject(format!("state `{key}` holds something else: {error}")))
    }

    /// Writes `value` under `key`.
    pub fn set<T: Serialize + ?Sized>(self, key: &str, value: &T) -> Result<(), Failure> {
        self.set_bytes(key, &serde_json::to_vec(value)?);
        Ok(())
    }

    /// Removes what is under `key`, if anything.
    pub fn delete(self, key: &str) {
        self.backend.delete(key);
    }

    /// The text under `key`. What is not UTF-8 fails the message for good.
    pub fn get_text(self, key: &str) -> Result<Option<String>, Failure> {
        let text = self.get_bytes(key).map(String::from_utf8).transpose();
        text.map_err(|error| Failure::reject(format!("state `{key}` holds no text: {error}")))
    }

    /// Writes text under `key`, as it is.
    pub fn set_text(self, key: &str, text: impl AsRef<str>) {
        self.set_bytes(key, text.as_ref().as_bytes());
    }

    /// The bytes under `key`.
    pub fn get_bytes(self, key: &str) -> Option<Vec<u8>> {
        self.backend.get(key)
    }

    /// Writes bytes under `key`.
    pub fn set_bytes(self, key: &str, bytes: &[u8]) {
        self.backend.set(key, bytes);
    }

    /// Writes `value` (`None`: deletes) if `key` now holds `expected` (`None`: nothing). Whether it
    /// did.
    pub fn compare_and_set(self, key: &str, expected: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        self.backend.compare_and_set(key, expected, value)
    }

    /// All entries whose key begins with `prefix`, in key order, fetched page by page.
    pub fn scan(self, prefix: &str) -> Scan<'a> {
        self.scan_range(prefix, after_prefix(prefix).as_deref())
    }

    /// All entries from `start` on and, if given, before `end`, in key order, fetched page by page.
    pub fn scan_range(self, start: &str, end: Option<&str>) -> Scan<'a> {
        let end = end.map(str::to_owned);
        Scan { state: self, next: Some(start.to_owned()), end, page: VecDeque::new() }
    }
}

/// Entries of the state, in key order.
pub struct Scan<'a> {
    state: State<'a>,
    /// Where the next page starts; `None` after the last.
    next: Option<String>,
    end: Option<String>,
    page: VecDeque<Entry>,
}

impl Iterator for Scan<'_> {
    type Item = (String, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.is_empty() {
            let start = self.next.take()?;
            let page = self.state.backend.scan(&start, self.end.as_deref(), PAGE_ENTRIES);
            if page.len() == PAGE_ENTRIES as usize {
                // The least key after the last one of this page.
                self.next = page.last().map(|(key, _)| format!("{key}\0"));
            }
            self.page = page.into();
        }
        self.page.pop_front()
    }
}

/// The least string after all that begin with `prefix`; `None` if there is none.
fn after_prefix(prefix: &str) -> Option<String> {
    let mut characters: Vec<char> = prefix.chars().collect();
    while let Some(last) = characters.pop() {
        // A range over characters steps over the surrogates by itself.
        if let Some(next) = (last..=char::MAX).nth(1) {
            characters.push(next);
            return Some(characters.into_iter().collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, message};
    use crate::{Context, Message, Outcome};

    fn run(harness: &mut Harness, check: fn(State<'_>) -> Result<(), Failure>) {
        let mut inner = harness.with_handler(move |_: Message, ctx: &mut Context| {
            check(ctx.state())?;
            Ok(Outcome::empty())
        });
        inner.deliver(message("t")).expect("the check passes");
        harness.take_world(inner);
    }

    #[test]
    fn typed_values_are_json_and_numbers_decimal_text() {
        let mut harness = Harness::new(|_: Message, _: &mut Context| Ok(Outcome::empty())).state("n", "5");
        run(&mut harness, |state| {
            assert_eq!(state.get::<i64>("n")?, Some(5));
            assert_eq!(state.get::<i64>("absent")?, None);
            state.set("n", &-6)?;
            state.set("s", "word")?;
            assert_eq!(state.get::<i64>("n")?, Some(-6), "a read sees the message's own write");
            Ok(())
        });
        assert_eq!(harness.state_text("n").as_deref(), Some("-6"));
        assert_eq!(harness.state_text("s").as_deref(), Some("\"word\""));
    }

    #[test]
    fn a_value_of_another_type_names_its_key() {
        let mut harness = Harness::new(|_: Message, ctx: &mut Context| {
            ctx.state().get::<i64>("n")?;
            Ok(Outcome::empty())
        })
        .state("n", "five");
        let failure = harness.deliver(message("t")).expect_err("it is no number");
        assert!(failure.to_string().contains("state `n` holds something else"), "{failure}");
    }

    #[test]
    fn compare_and_set_looks_before_it_writes() {
        let mut harness = Harness::new(|_: Message, _: &mut Context| Ok(Outcome::empty())).state("k", "a");
        run(&mut harness, |state| {
            assert!(!state.compare_and_set("k", None, Some(b"b")));
            assert!(!state.compare_and_set("k", Some(b"x"), Some(b"b")));
            assert!(state.compare_and_set("k", Some(b"a"), Some(b"b")));
            assert!(state.compare_and_set("new", None, Some(b"1")));
            assert!(state.compare_and_set("k", Some(b"b"), None));
            Ok(())
        });
        assert_eq!((harness.state_text("k"), harness.state_text("new").as_deref()), (None, Some("1")));
    }

    #[test]
    fn a_scan_brings_all_pages_and_only_its_prefix() {
        let mut harness = Harness::new(|_: Message, _: &mut Context| Ok(Outcome::empty()));
        run(&mut harness, |state| {
            for n in 0..300 {
                state.set(&format!("a/{n:03}"), &n)?;
            }
            state.set_text("a", "before");
            state.set_text("a0", "after: `0` follows `/`");
            let keys: Vec<String> = state.scan("a/").map(|(key, _)| key).collect();
            assert_eq!(keys.len(), 300);
            assert_eq!((keys[0].as_str(), keys[299].as_str()), ("a/000", "a/299"));
            assert!(keys.is_sorted());
            assert_eq!(state.scan("").count(), 302);
            assert_eq!(state.scan_range("a/010", Some("a/012")).count(), 2);
            Ok(())
        });
    }

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(after_prefix("a/").as_deref(), Some("a0"));
        assert_eq!(after_prefix("a\u{10FFFF}").as_deref(), Some("b"));
        assert_eq!(after_prefix("\u{D7FF}").as_deref(), Some("\u{E000}"));
        assert_eq!(after_prefix(""), None);
        assert_eq!(after_prefix("\u{10FFFF}"), None);
    }
}
