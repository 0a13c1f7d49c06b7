//! Secrets that the host puts into headers of calls, so that a processor never has them. Each goes
//! to the hosts it is for, and to no other; no text that leaves this file holds a value.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use hapax_core::fault;

use super::grant::{Grant, Target};

/// Begins the place of a secret in a header's value; `}}` ends it.
const OPEN: &str = "{{secret:";
const CLOSE: &str = "}}";

/// One secret.
#[derive(Clone)]
pub struct Secret {
    value: String,
    /// Where it may go; empty: wherever the processor may call.
    only_to: Vec<Grant>,
}

impl Secret {
    /// A secret for calls that `only_to` allows; for all calls of the processor if that is empty.
    pub fn new(value: String, only_to: Vec<Grant>) -> Self {
        Self { value, only_to }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("only_to", &self.only_to).finish_non_exhaustive()
    }
}

/// The secrets of a processor, by name.
#[derive(Debug, Clone, Default)]
pub struct Secrets(pub BTreeMap<String, Secret>);

impl Secrets {
    /// A header's value with its secrets in their places; an error that names the one that may not
    /// go there.
    pub(crate) fn put_into(&self, value: &Bytes, target: &Target) -> Result<Bytes, String> {
        let Ok(mut rest) = std::str::from_utf8(value) else { return Ok(value.clone()) };
        if !rest.contains(OPEN) {
            return Ok(value.clone());
        }
        let mut whole = String::with_capacity(rest.len());
        while let Some((before, after)) = rest.split_once(OPEN) {
            let (name, behind) = after.split_once(CLOSE).ok_or("a header has `{{secret:` without `}}`")?;
            whole.push_str(before);
            whole.push_str(self.value(name, target)?);
            rest = behind;
        }
        whole.push_str(rest);
        Ok(whole.into())
    }

    fn value(&self, name: &str, target: &Target) -> Result<&str, String> {
        let secret = self.0.get(name).ok_or_else(|| format!("the processor has no secret `{name}`"))?;
        let granted = secret.only_to.is_empty() || secret.only_to.iter().any(|grant| grant.allows(target));
        if granted || fault::mutated("secret-sent-anywhere") {
            Ok(&secret.value)
        } else {
            Err(format!("the secret `{name}` is not for {}://{}:{}", target.scheme, target.host, target.port))
        }
    }
}
