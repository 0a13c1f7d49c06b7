//! The setting `strategy` of a processor, and its translation for core.

use hapax_core::{Fields, GapPolicy, Gaps, Select, Strategy, VersionOrder};
use serde::Deserialize;

/// Name of a strategy, or a table with its settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum StrategySetting {
    /// `strategy = "message-id"`.
    Name(Name),
    /// `[processors.NAME.strategy]`.
    Table(Table),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Name {
    MessageId,
    Version,
    Timestamp,
    ContentHash,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Table {
    MessageId {
        key: Option<From>,
    },
    Version {
        entity: Option<From>,
        version: Option<From>,
        order: Option<Order>,
        first: Option<u64>,
        gap_timeout_ms: Option<u64>,
        gap_then: Option<Then>,
    },
    Timestamp {
        entity: Option<From>,
        time: Option<From>,
        max_future_skew_ms: Option<u64>,
    },
    ContentHash {
        only: Option<Vec<String>>,
        without: Option<Vec<String>>,
    },
}

/// Source of a value in a message.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum From {
    /// A CloudEvents attribute by name.
    Attribute(String),
    /// A header of the transport by name.
    Header(String),
    /// A JSON pointer into the payload.
    Pointer(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    Monotonic,
    Strict,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Then {
    Accept,
    DeadLetter,
}

/// Default time for which a message waits for the one before it.
const GAP_TIMEOUT_MS: u64 = 60_000;
/// Default limit on how far a timestamp may be ahead of the host's clock.
const MAX_FUTURE_SKEW_MS: u64 = 60_000;

impl StrategySetting {
    /// Returns the strategy. The error is written for the author of the file.
    pub(crate) fn strategy(&self) -> Result<Strategy, String> {
        match self {
            Self::Name(name) => name.table().strategy(),
            Self::Table(table) => table.strategy(),
        }
    }
}

impl Name {
    fn table(self) -> Table {
        match self {
            Self::MessageId => Table::MessageId { key: None },
            Self::Version => Table::Version {
                entity: None,
                version: None,
                order: None,
                first: None,
                gap_timeout_ms: None,
                gap_then: None,
            },
            Self::Timestamp => Table::Timestamp { entity: None, time: None, max_future_skew_ms: None },
            Self::ContentHash => Table::ContentHash { only: None, without: None },
        }
    }
}

impl Table {
    fn strategy(&self) -> Result<Strategy, String> {
        let select = |from: &Option<From>, attribute: &str| match from {
            Some(from) => from.select(),
            None => Ok(Select::Attribute(attribute.to_owned())),
        };
        Ok(match self {
            Self::MessageId { key } => Strategy::MessageId { key: key.as_ref().map_or(Ok(Select::Id), From::select)? },
            Self::Version { entity, version, order, first, gap_timeout_ms, gap_then } => {
                let strict = *order == Some(Order::Strict);
                if !strict && (first.is_some() || gap_timeout_ms.is_some() || gap_then.is_some()) {
                    return Err("`first`, `gap_timeout_ms` and `gap_then` need `order = \"strict\"`: otherwise there are no gaps".into());
                }
                let gaps = Gaps {
                    first: first.unwrap_or(1),
                    timeout_ms: gap_timeout_ms.unwrap_or(GAP_TIMEOUT_MS),
                    then: match gap_then {
                        Some(Then::Accept) => GapPolicy::Accept,
                        None | Some(Then::DeadLetter) => GapPolicy::DeadLetter,
                    },
                };
                Strategy::Version {
                    entity: select(entity, "subject")?,
                    version: select(version, "version")?,
                    order: if strict { VersionOrder::Strict(gaps) } else { VersionOrder::Monotonic },
                }
            }
            Self::Timestamp { entity, time, max_future_skew_ms } => Strategy::Timestamp {
                entity: select(entity, "subject")?,
                time: select(time, "time")?,
                max_future_skew_ms: max_future_skew_ms.unwrap_or(MAX_FUTURE_SKEW_MS),
            },
            Self::ContentHash { only, without } => Strategy::ContentHash {
                fields: match (only, without) {
                    (Some(_), Some(_)) => {
                        return Err("give `only` or `without`, not both".into());
                    }
                    (Some(only), None) => Fields::Only(pointers(only)?),
                    (None, Some(without)) => Fields::Without(pointers(without)?),
                    (None, None) => Fields::All,
                },
            },
        })
    }
}

impl From {
    fn select(&self) -> Result<Select, String> {
        Ok(match self {
            Self::Attribute(name) => Select::Attribute(name.clone()),
            Self::Header(name) => Select::Header(name.to_ascii_lowercase()),
            Self::Pointer(text) => Select::Pointer(pointer(text)?),
        })
    }
}

fn pointers(texts: &[String]) -> Result<Vec<String>, String> {
    if texts.is_empty() {
        return Err("`only` and `without` need at least one JSON pointer".into());
    }
    texts.iter().map(|text| pointer(text)).collect()
}

/// Checks that the text is a JSON pointer to a part of a payload.
fn pointer(text: &str) -> Result<String, String> {
    if text.starts_with('/') {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is not a JSON pointer: it begins with /, such as \"/order/id\""))
    }
}
