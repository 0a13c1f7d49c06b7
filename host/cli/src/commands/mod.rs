//! The commands of `hapax`, one file each. A command parses its arguments, asks, and prints the
//! answer.

pub(crate) mod audit;
pub(crate) mod audit_args;
pub(crate) mod build;
pub(crate) mod check;
pub(crate) mod dlq;
pub(crate) mod doctor;
pub(crate) mod outbox;
pub(crate) mod records;
pub(crate) mod run;
pub(crate) mod saga;
pub(crate) mod send;
pub(crate) mod state;
pub(crate) mod status;
pub(crate) mod streams;
pub(crate) mod target;
pub(crate) mod up;

use clap::builder::{PossibleValuesParser, TypedValueParser};

/// Parses the name of one of `all`, which a wrong value is told. Core's enums have their names
/// themselves, for HTTP as well.
fn one_of<T: Copy + Send + Sync + 'static, const N: usize>(
    all: [T; N],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.map(name))
        .map(move |given| all.into_iter().find(|one| name(*one) == given).expect("the parser admits only their names"))
}
