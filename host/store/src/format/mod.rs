//! The stored bytes: tables, keys, values, frames.

pub(crate) mod frame;
#[cfg(test)]
mod golden_tests;
pub(crate) mod layout;
pub(crate) mod seal;
