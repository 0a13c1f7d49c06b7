//! The commands of `hapax`, one file each: read arguments, ask, print.

pub(crate) mod audit;
pub(crate) mod audit_args;
pub(crate) mod build;
pub(crate) mod check;
pub(crate) mod dlq;
pub(crate) mod doctor;
pub(crate) mod records;
pub(crate) mod run;
pub(crate) mod saga;
pub(crate) mod send;
pub(crate) mod state;
pub(crate) mod status;
pub(crate) mod streams;
pub(crate) mod target;
pub(crate) mod up;
