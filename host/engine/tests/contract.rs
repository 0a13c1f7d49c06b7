//! A component that does not fit is refused when it is loaded, in words that say what to do.

#![allow(clippy::unwrap_used)] // A test may.

mod support;

use hapax_engine::LoadError;
use support::guest::{contract_with, dummy, dummy_of, processor};
use support::{load, load_error};

fn refused(bytes: &[u8], code: &str, words: &[&str]) -> LoadError {
    let error = load_error(bytes);
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(!text.contains("wasmtime") && !text.contains("backtrace"), "the host shows through: {text}");
    error
}

#[test]
fn no_wasm_at_all() {
    refused(b"", "component-empty", &["empty"]);
    refused(b"{\"json\": true}", "component-not-wasm", &["not WASM"]);
    refused(b"\0as", "component-not-wasm", &[]);
    refused(b"\0asm\x0d", "component-malformed", &["truncated", "8 bytes"]);
}

#[test]
fn truncated_anywhere() {
    let whole = processor("", "unreachable");
    load(&whole).expect("the whole one loads");
    for length in (8..whole.len()).step_by(23) {
        let error = load_error(&whole[..length]);
        assert!(
            matches!(error.code(), "component-malformed" | "contract-no-handler"),
            "cut at {length} of {}: {error}",
            whole.len()
        );
    }
    refused(&whole[..whole.len() / 2], "component-malformed", &["truncated", "copy it again"]);
}

#[test]
fn a_core_module() {
    refused(&wat::parse_str("(module)").unwrap(), "component-core-module", &["hapax build", "not a component"]);
}

#[test]
fn every_import_that_works() {
    let world = "import hapax:processor/state@0.1.0; import hapax:processor/outbox@0.1.0;
        import hapax:processor/log@0.1.0; import hapax:processor/config@0.1.0;
        import hapax:processor/events@0.1.0; import hapax:processor/batch@0.1.0; export hapax:processor/handler@0.1.0;";
    load(&dummy(world)).expect("all of them are granted");
}

#[test]
fn another_world() {
    let bytes = dummy("export greet: func(name: string) -> string;");
    refused(
        &bytes,
        "contract-no-handler",
        &[
            "hapax:processor/handler@0.1.0",
            "handle: func(message: borrow<message>) -> result<outcome, failure>",
            "`greet`",
        ],
    );
    let bytes = dummy("export wasi:random/random@0.2.6;");
    refused(&bytes, "contract-no-handler", &["wasi:random/random@0.2.6", "get-random-u64: func() -> u64"]);
    refused(&dummy(""), "contract-no-handler", &["exports nothing"]);
}

#[test]
fn another_version() {
    let next = contract_with("0.1.0", "0.2.0");
    let bytes = dummy_of(&next, "export hapax:processor/handler@0.2.0;");
    refused(&bytes, "contract-version", &["hapax:processor/handler@0.2.0", "hapax:processor/handler@0.1.0"]);
    let patch = contract_with("0.1.0", "0.1.7");
    let bytes = dummy_of(&patch, "import hapax:processor/state@0.1.7; export hapax:processor/handler@0.1.7;");
    load(&bytes).expect("0.1.7 that uses nothing new runs on 0.1.0");
}

#[test]
fn other_types() {
    let other = contract_with("-> result<outcome, failure>;\n}", "-> string;\n}");
    refused(
        &dummy_of(&other, "export hapax:processor/handler@0.1.0;"),
        "contract-types",
        &[
            "function `handle`",
            "component: handle: func(message: borrow<message>) -> string",
            "host:      handle: func(message: borrow<message>) -> result<outcome, failure>",
        ],
    );
    // The same names, another record inside.
    let other = contract_with(
        "content-type: option<string>,\n        data: list<u8>,\n    }\n\n    /// A failure",
        "data: list<u8>,\n    }\n\n    /// A failure",
    );
    let error = refused(&dummy_of(&other, "export hapax:processor/handler@0.1.0;"), "contract-types", &["`handle`"]);
    assert!(error.to_string().contains("record { data: list<u8> }"), "{error}");
    assert!(error.to_string().contains("record { content-type: option<string>, data: list<u8> }"), "{error}");
    let other = contract_with("get: func(key: string) -> option<list<u8>>", "get: func(key: string) -> option<string>");
    let world = "import hapax:processor/state@0.1.0; export hapax:processor/handler@0.1.0;";
    refused(
        &dummy_of(&other, world),
        "contract-types",
        &["function `get`", "hapax:processor/state@0.1.0", "option<string>"],
    );
}

#[test]
fn unknown_imports() {
    let newer = contract_with(
        "get: func(key: string) -> option<string>;",
        "get: func(key: string) -> option<string>; all: func() -> list<string>;",
    );
    let world = "import hapax:processor/config@0.1.0; export hapax:processor/handler@0.1.0;";
    refused(&dummy_of(&newer, world), "contract-import", &["function `all`", "hapax:processor/config@0.1.0"]);
    let world = "import launch: func(code: u32); export hapax:processor/handler@0.1.0;";
    refused(&dummy(world), "contract-import", &["`launch`", "hapax:processor/state@0.1.0", "wasi:clocks@0.2"]);
}

/// Proves G70.
#[test]
fn steps_need_a_way_back_and_a_message_of_their_own() {
    let saga = "import hapax:processor/saga@0.1.0;";
    let handler = "export hapax:processor/handler@0.1.0;";
    let batch = "export hapax:processor/batch-handler@0.1.0;";
    let compensation = "export hapax:processor/compensation@0.1.0;";
    refused(&dummy(&format!("{saga} {handler}")), "contract-combination", &["exports no `compensation`", "export it"]);
    refused(&dummy(&format!("{saga} {batch}")), "contract-combination", &["takes batches"]);
    refused(&dummy(&format!("{batch} {compensation}")), "contract-combination", &["takes batches"]);
    // It has one, and traps when it is asked for its steps.
    refused(&dummy(&format!("{saga} {handler} {compensation}")), "component-steps", &["was asked which steps"]);
}

#[test]
fn the_exports_say_whether_it_takes_batches() {
    let exports = |names: &[&str]| {
        let world: String = names.iter().map(|name| format!("export hapax:processor/{name}@0.1.0;")).collect();
        load(&dummy(&world)).expect("it loads").takes_batches()
    };
    assert!(!exports(&["handler"]));
    assert!(exports(&["batch-handler"]));
    assert!(exports(&["handler", "batch-handler"]));
    let other = contract_with("-> list<result<outcome, failure>>", "-> list<outcome>");
    refused(
        &dummy_of(&other, "export hapax:processor/batch-handler@0.1.0;"),
        "contract-types",
        &["function `handle-batch`", "list<result<outcome, failure>>"],
    );
}

#[test]
fn more_memory_than_granted() {
    let mut options = support::options();
    options.limits.memory_bytes = 64 << 10;
    let error = support::engine().load(&processor("", "unreachable"), options).expect_err("it needs 128 KiB");
    assert_eq!(error.to_string(), "it needs 128 KiB of memory to start, and its limit is 64 KiB");
}
