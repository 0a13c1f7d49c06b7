//! The pipeline against simpler models of it, over random histories.
#![expect(clippy::unwrap_used, reason = "tests")]

mod differential;
mod properties;
mod reference;
mod saga_interleavings;
mod saga_reference;
