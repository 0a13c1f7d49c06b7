//! The bare loops: what the disk and redb can do with the same bytes and the same durability, and
//! nothing else.

pub(crate) mod append;
pub(crate) mod redb;
