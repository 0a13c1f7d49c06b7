//! From executed to durable: the overlay of what is sequenced and not yet durable, and the
//! committer, the one writer.

pub(crate) mod committer;
pub(crate) mod feed_counts;
pub(crate) mod overlay;
