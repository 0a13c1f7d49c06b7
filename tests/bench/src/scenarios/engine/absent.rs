//! Stands in for the engine scenario where the bench is built without its feature: the report still
//! prints what it found before.

use crate::report::Section;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "engine",
    about: "one invocation, many in flight and each host call, beside a bare wasmtime loop with the same limits",
    by_default: false,
    run,
};

fn run(_: &Workbench, _: &mut Section) -> Result<(), Missing> {
    Err(Missing(
        "this bench was built without the feature `engine`; `cargo xtask bench -- engine` builds it with it".into(),
    ))
}
