//! The stored bytes: tables, keys, values, frames.

pub(crate) mod frame;
pub(crate) mod layout;
#[cfg(test)]
mod golden_tests;
