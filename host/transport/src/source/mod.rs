//! Sources: where messages come from.

pub(crate) mod jsonl;
