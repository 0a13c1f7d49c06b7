//! Small components written as text, so that these tests need no guest toolchain. Nothing here runs
//! them.

use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
use wit_parser::{ManglingAndAbi, Resolve};

const CONTRACT: &str = include_str!("../../../../wit/processor.wit");

/// The parts of WASI that the tests' guests use.
const WASI: [(&str, &str); 4] = [
    (
        "io.wit",
        "package wasi:io@0.2.6;
        interface error { resource error; }
        interface poll { resource pollable { block: func(); } }
        interface streams {
            use error.{error};
            variant stream-error { last-operation-failed(error), closed }
            resource output-stream { blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>; }
        }",
    ),
    (
        "clocks.wit",
        "package wasi:clocks@0.2.6;
        interface wall-clock { record datetime { seconds: u64, nanoseconds: u32 } now: func() -> datetime; }
        interface monotonic-clock {
            use wasi:io/poll@0.2.6.{pollable};
            now: func() -> u64;
            subscribe-duration: func(when: u64) -> pollable;
        }",
    ),
    ("random.wit", "package wasi:random@0.2.6; interface random { get-random-u64: func() -> u64; }"),
    (
        "cli.wit",
        "package wasi:cli@0.2.6;
        interface stdout { use wasi:io/streams@0.2.6.{output-stream}; get-stdout: func() -> output-stream; }
        interface environment { get-environment: func() -> list<tuple<string, string>>; }",
    ),
];

/// A component of the world `text` describes, whose functions all trap. `contract` stands in for
/// the real one.
pub fn dummy_of(contract: &str, world: &str) -> Vec<u8> {
    let (resolve, world) = resolve(contract, world);
    encode(dummy_module(&resolve, world, ManglingAndAbi::Standard32), &resolve, world)
}

/// As `dummy_of`, on the real contract.
pub fn dummy(world: &str) -> Vec<u8> {
    dummy_of(CONTRACT, world)
}

/// The real contract with one piece of text replaced.
pub fn contract_with(from: &str, to: &str) -> String {
    assert!(CONTRACT.contains(from), "the contract has no `{from}`");
    CONTRACT.replace(from, to)
}

/// A processor whose `handle` is the WAT `body`, with `imports` before it.
///
/// The body has the message handle in `$message` and the helpers `$ok` and `$reject`, which answer
/// with the bytes at pointer, length; memory from 4096 to 65535 is its own.
pub fn processor(imports: &str, body: &str) -> Vec<u8> {
    processor_with("", imports, body)
}

/// As `processor`, with more imports in its world than the contract's.
pub fn processor_with(world_imports: &str, imports: &str, body: &str) -> Vec<u8> {
    let world = format!("include hapax:processor/processor@0.1.0; {world_imports}");
    let (resolve, world) = resolve(CONTRACT, &world);
    let text = format!(
        r#"(module
            (import "hapax:processor/types@0.1.0" "[resource-drop]message" (func $drop_message (param i32)))
            {imports}
            (memory (export "memory") 2)
            (global $heap (mut i32) (i32.const 65536))
            (func $alloc (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
                (local $at i32)
                (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
                (global.set $heap (i32.add (local.get $at) (local.get 3)))
                (local.get $at))
            (func $ok (param $at i32) (param $length i32) (result i32)
                (i32.store8 (i32.const 1024) (i32.const 0))
                (i32.store8 (i32.const 1032) (i32.const 0))
                (i32.store (i32.const 1044) (local.get $at))
                (i32.store (i32.const 1048) (local.get $length))
                (i32.const 1024))
            (func $reject (param $at i32) (param $length i32) (result i32)
                (i32.store8 (i32.const 1024) (i32.const 1))
                (i32.store8 (i32.const 1032) (i32.const 1))
                (i32.store (i32.const 1040) (local.get $at))
                (i32.store (i32.const 1044) (local.get $length))
                (i32.const 1024))
            (func $recurse (param i32) (result i32)
                (i32.add (call $recurse (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
            (func $handle (param $message i32) (result i32)
                (local $i i32)
                {body})
            (func (export "hapax:processor/handler@0.1.0#handle") (param i32) (result i32)
                (call $handle (local.get 0))
                (call $drop_message (local.get 0)))
        )"#
    );
    let module = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    encode(module, &resolve, world)
}

/// A batch processor that answers the one message of a call with how many calls its instance has
/// answered; `body` is run before that, with the message's handle in `$message`, and
/// `$drop_message` to give it back.
pub fn batch_processor(body: &str) -> Vec<u8> {
    let (resolve, world) = resolve(CONTRACT, "include hapax:processor/batch-processor@0.1.0;");
    let text = format!(
        r#"(module
            (import "hapax:processor/types@0.1.0" "[resource-drop]message" (func $drop_message (param i32)))
            (memory (export "memory") 2)
            (global $calls (mut i32) (i32.const 0))
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 8192))
            (func (export "hapax:processor/batch-handler@0.1.0#handle-batch") (param $list i32) (param i32) (result i32)
                (local $message i32)
                (local.set $message (i32.load (local.get $list)))
                {body}
                (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
                ;; The answer's text at 4096, the answer at 1024, the list of answers at 2048.
                (i32.store8 (i32.const 4096) (i32.add (i32.const 48) (global.get $calls)))
                (i32.store8 (i32.const 1024) (i32.const 0))
                (i32.store8 (i32.const 1032) (i32.const 0))
                (i32.store (i32.const 1044) (i32.const 4096))
                (i32.store (i32.const 1048) (i32.const 1))
                (i32.store (i32.const 2048) (i32.const 1024))
                (i32.store (i32.const 2052) (i32.const 1))
                (i32.const 2048))
        )"#
    );
    let module = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    encode(module, &resolve, world)
}

fn resolve(contract: &str, world: &str) -> (Resolve, wit_parser::WorldId) {
    let mut resolve = Resolve::new();
    for (name, text) in WASI {
        resolve.push_source(name, text).expect("the test's WASI");
    }
    resolve.push_source("processor.wit", contract).expect("the contract");
    let text = format!("package test:guest; world guest {{ {world} }}");
    let package = resolve.push_source("guest.wit", &text).unwrap_or_else(|error| panic!("{error:#}\n{text}"));
    let world = resolve.select_world(&[package], Some("guest")).expect("the test's world");
    (resolve, world)
}

fn encode(mut module: Vec<u8>, resolve: &Resolve, world: wit_parser::WorldId) -> Vec<u8> {
    embed_component_metadata(&mut module, resolve, world, StringEncoding::UTF8).expect("metadata");
    let encoder = ComponentEncoder::default().module(&module).expect("module");
    encoder.validate(true).encode().expect("component")
}
