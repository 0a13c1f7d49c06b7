//! Tests of the built guests' imports and exports: nothing that a guest does not use, no WASI. Runs
//! no guest.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::path::Path;

use wit_component::{DecodedWasm, decode};

/// Names of what a built component imports, and exports.
fn world(guest: &str) -> (Vec<String>, Vec<String>) {
    let folder = std::env::var("HAPAX_GUESTS").expect("HAPAX_GUESTS: run the tests with `cargo xtask test`");
    let bytes = std::fs::read(Path::new(&folder).join(format!("{guest}.wasm"))).unwrap();
    let DecodedWasm::Component(resolve, world) = decode(&bytes).unwrap() else { panic!("{guest} is no component") };
    let names = |items: Vec<_>| items.into_iter().map(|key| resolve.name_world_key(key)).collect();
    let world = &resolve.worlds[world];
    (names(world.imports.keys().collect()), names(world.exports.keys().collect()))
}

fn contract(interfaces: &[&str]) -> Vec<String> {
    let mut names: Vec<_> = interfaces.iter().map(|name| format!("hapax:processor/{name}@0.1.0")).collect();
    names.sort();
    names
}

fn assert_processor(guest: &str, interfaces: &[&str]) {
    let (mut imports, exports) = world(guest);
    imports.sort();
    // Every processor reads its message, and logs if it panics.
    assert_eq!(imports, contract(&[&["types", "log"], interfaces].concat()), "imports of {guest}");
    assert_eq!(exports, contract(&["handler"]), "exports of {guest}");
}

#[test]
fn a_processor_imports_only_what_it_uses() {
    assert_processor("order-intake", &["state", "outbox"]);
    assert_processor("account-ledger", &["state"]);
    assert_processor("hapax-fixtures", &["state", "events", "outbox", "config"]);
    assert_processor("event-counter", &["events"]);
    assert_processor("one-way", &["saga"]);
}

#[test]
fn the_guest_of_another_world_is_of_another_world() {
    assert_eq!(world("wrong-world"), (vec![], vec!["run".to_owned()]));
}
