//! Settings of a processor's outbound calls: grants, secrets and limits. They are checked at the
//! start, so that no message fails because of them later.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hapax_core::Outbound;
use hapax_transport::outbound::{Grant, HttpOutside, OutsideLimits, Secret, Secrets};
use serde::Deserialize;

/// One origin that a processor may call.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum GrantSetting {
    /// `"https://api.example.com"`.
    Url(String),
    /// `{ url = "http://payments.internal:8080", private = true }`.
    Table(GrantTable),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GrantTable {
    url: String,
    /// Permits addresses of private networks and of this machine.
    #[serde(default)]
    private: bool,
}

/// Source of a secret, and the grants to which it may be sent.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SecretSetting {
    env: Option<String>,
    file: Option<PathBuf>,
    /// Grants to which the secret may be sent; all grants of the processor if empty.
    #[serde(default, rename = "for")]
    only_to: Vec<String>,
}

/// Settings of the outbound calls of one processor.
#[derive(Debug, Default)]
pub(crate) struct OutboundSettings<'a> {
    pub(crate) grants: &'a [GrantSetting],
    pub(crate) secrets: Option<&'a BTreeMap<String, SecretSetting>>,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) response_bytes: Option<usize>,
    pub(crate) calls: Option<usize>,
    pub(crate) ca_file: Option<&'a Path>,
}

impl GrantSetting {
    fn grant(&self) -> Result<Grant, String> {
        let (url, private) = match self {
            Self::Url(url) => (url, false),
            Self::Table(GrantTable { url, private }) => (url, *private),
        };
        Grant::new(url, private).map_err(|error| format!("http: {error}"))
    }

    fn url(&self) -> &str {
        match self {
            Self::Url(url) | Self::Table(GrantTable { url, .. }) => url,
        }
    }
}

impl OutboundSettings<'_> {
    /// Returns the client that makes the calls, or `None` if none is granted. The error is written
    /// for the author of the file.
    pub(crate) fn client(&self) -> Result<Option<Arc<dyn Outbound>>, String> {
        if self.grants.is_empty() {
            return self.unused().map_or(Ok(None), |name| {
                Err(format!("{name} is set, but no calls are granted: name the origins in `http`, or remove {name}"))
            });
        }
        let grants = self.grants.iter().map(GrantSetting::grant).collect::<Result<Vec<_>, _>>()?;
        let default = OutsideLimits::default();
        let limits = OutsideLimits {
            timeout: self.timeout_ms.map_or(default.timeout, Duration::from_millis),
            response_bytes: self.response_bytes.unwrap_or(default.response_bytes),
            calls: self.calls.unwrap_or(default.calls),
            ..default
        };
        if limits.timeout.is_zero() || limits.calls == 0 {
            return Err("http_timeout_ms and http_calls must be more than 0".to_owned());
        }
        let read =
            |path: &Path| std::fs::read(path).map_err(|error| format!("http_ca_file {}: {error}", path.display()));
        let roots = self.ca_file.map(read).transpose()?;
        let client = HttpOutside::new(grants, self.secrets()?, limits, roots.as_deref());
        Ok(Some(Arc::new(client.map_err(|error| format!("http_ca_file: {error}"))?)))
    }

    /// Returns the name of a setting that has no use without grants.
    fn unused(&self) -> Option<&'static str> {
        [
            ("secrets", self.secrets.is_some_and(|secrets| !secrets.is_empty())),
            ("http_timeout_ms", self.timeout_ms.is_some()),
            ("http_response_bytes", self.response_bytes.is_some()),
            ("http_calls", self.calls.is_some()),
            ("http_ca_file", self.ca_file.is_some()),
        ]
        .into_iter()
        .find_map(|(name, set)| set.then_some(name))
    }

    fn secrets(&self) -> Result<Secrets, String> {
        let one = |(name, setting): (&String, &SecretSetting)| {
            let told = |error: String| format!("secrets.{name}: {error}");
            Ok((name.clone(), Secret::new(setting.value().map_err(told)?, self.only_to(setting).map_err(told)?)))
        };
        self.secrets.into_iter().flatten().map(one).collect::<Result<_, String>>().map(Secrets)
    }

    fn only_to(&self, setting: &SecretSetting) -> Result<Vec<Grant>, String> {
        let granted = |url: &String| {
            let grant = self.grants.iter().find(|grant| grant.url() == url);
            grant.ok_or_else(|| format!("`for` names {url}, which is not in `http`"))?.grant()
        };
        setting.only_to.iter().map(granted).collect()
    }
}

impl SecretSetting {
    fn value(&self) -> Result<String, String> {
        let value = match (&self.env, &self.file) {
            (Some(variable), None) => std::env::var(variable)
                .map_err(|_| format!("the environment variable {variable} is not set, or is not UTF-8"))?,
            (None, Some(file)) => {
                let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            _ => return Err("name either `env`, a variable of the environment, or `file`".to_owned()),
        };
        if value.is_empty() { Err("it is empty".to_owned()) } else { Ok(value) }
    }

    /// Makes the path of the file relative to `folder`.
    pub(crate) fn settle(&mut self, folder: &Path) {
        if let Some(file) = &mut self.file {
            *file = folder.join(&file);
        }
    }
}
