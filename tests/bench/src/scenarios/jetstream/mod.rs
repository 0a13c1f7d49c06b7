//! The hand-written way to do the job over JetStream and Redis, beside the host with a WASM
//! processor and every commit synced. Its clients are built by a feature, since nothing else here
//! needs them.

#[cfg(feature = "brokers")]
mod live;

use crate::Scenario;

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "jetstream",
    about: "JetStream consumer + Redis SET NX + double ack, nothing synced; needs nats-server and redis-server",
    by_default: false,
    run,
};

#[cfg(feature = "brokers")]
use live::run;

#[cfg(not(feature = "brokers"))]
fn run(_: &crate::workbench::Workbench, _: &mut crate::report::Section) -> Result<(), crate::Missing> {
    Err(crate::Missing("the bench was built without its clients; `cargo xtask bench -- jetstream` builds them".into()))
}
