//! Tests of instances that are reused for the next message: state that survives, state that never
//! does, and the reasons for a replacement.

#![allow(clippy::unwrap_used)] // A test may.

mod support;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapax_core::{Context, EffectLimits, Entry, Invocation, MessageProcessor, StateView, StoreError, Version};
use hapax_engine::{Engine, EngineConfig, InstanceMode, LoadOptions, ReuseLimits, WasmProcessor};
use support::guest::{processor, processor_with};
use support::{LogSink, Ran, built, invocation, run, run_on};

const DATA: &str = r#"(import "hapax:processor/types@0.1.0" "[method]message.data" (func $data (param i32 i32)))"#;
/// Counts the instance's messages at 8192; does what the length of the data says; answers the count
/// as a letter.
const MOODY: &str = r#"
    (i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 1)))
    (call $data (local.get $message) (i32.const 4096))
    (local.set $i (i32.load (i32.const 4100)))
    (if (i32.eq (local.get $i) (i32.const 1)) (then unreachable))
    (if (i32.eq (local.get $i) (i32.const 2)) (then (loop $l (br $l))))
    (if (i32.eq (local.get $i) (i32.const 3)) (then (drop (memory.grow (i32.const 32)))))
    (if (i32.eq (local.get $i) (i32.const 4)) (then (drop (memory.grow (i32.const 4000)))))
    (if (i32.eq (local.get $i) (i32.const 5)) (then (drop (memory.grow (i32.const 1)))))
    (i32.store8 (i32.const 8200) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 64)))
    (if (result i32) (i32.eq (local.get $i) (i32.const 6))
        (then (call $reject (i32.const 8200) (i32.const 1)))
        (else (if (result i32) (i32.eq (local.get $i) (i32.const 7))
            (then (call $ok (i32.const 0) (i32.const 100000)))
            (else (call $ok (i32.const 8200) (i32.const 1))))))"#;

fn reusing(limits: ReuseLimits) -> LoadOptions {
    let mut options = LoadOptions { instance: InstanceMode::Reuse(limits), ..support::options() };
    options.limits.result_bytes = 1000;
    options
}

fn load(guest: &[u8]) -> WasmProcessor {
    let limits = ReuseLimits { growth_bytes: 1 << 20, ..ReuseLimits::default() };
    support::engine().load(guest, reusing(limits)).expect("it loads")
}

/// The message whose data is `length` bytes.
fn of(length: usize) -> Invocation {
    invocation("x", &"d".repeat(length))
}

/// Ordinal of the message in its instance, as a letter: `A` for the first.
async fn place(processor: &WasmProcessor) -> String {
    run(processor, &of(0)).await.text()
}

/// Proves G19.
#[tokio::test]
async fn one_instance_answers_many_messages_each_its_own() {
    let body = "(i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 1)))
        (call $data (local.get $message) (i32.const 4096))
        (i32.store8 (i32.load (i32.const 4096)) (i32.load8_u (i32.const 8192)))
        (call $ok (i32.load (i32.const 4096)) (i32.load (i32.const 4100)))";
    let guest = load(&processor(DATA, body));
    for number in 1_u8..=200 {
        let ran = run(&guest, &invocation("x", &format!("_ {number}"))).await;
        assert_eq!(ran.output()[0], number, "it is not the same instance");
        assert_eq!(ran.output()[1..], *format!(" {number}").as_bytes(), "it is another message's answer");
    }
}

/// Proves G21.
#[tokio::test]
async fn an_instance_does_not_outlive_what_went_wrong() {
    let guest = load(&processor(DATA, MOODY));
    let moods = [
        (1, "a trap", true),
        (2, "a deadline", true),
        (3, "memory left grown over the bound", true),
        (4, "memory that was refused", true),
        (5, "memory grown within the bound", false),
        (6, "a message that was rejected", false),
        (7, "a result over its limit", true),
    ];
    for (length, mood, new) in moods {
        let guest = if new { &guest } else { &load(&processor(DATA, MOODY)) };
        assert_eq!(place(guest).await, "A", "before {mood}");
        assert_eq!(place(guest).await, "B", "before {mood}");
        run(guest, &of(length)).await;
        assert_eq!(place(guest).await, if new { "A" } else { "D" }, "after {mood}");
        // The next mood begins with a new one.
        run(guest, &of(1)).await.retry();
    }
}

/// Proves G21.
#[tokio::test]
async fn a_message_that_asks_to_be_run_again_has_a_new_instance() {
    let processor = load(&built("hapax-fixtures"));
    for expected in ["1", "2"] {
        assert_eq!(run(&processor, &invocation("remember", "{}")).await.text(), expected);
    }
    run(&processor, &invocation("retry", "{}")).await.retry();
    assert_eq!(run(&processor, &invocation("remember", "{}")).await.text(), "1");
    for hostile in ["panic", "eat-memory", "loop", "log-flood", "deep-recursion"] {
        run(&processor, &invocation(hostile, "{}")).await;
        assert_eq!(run(&processor, &invocation("remember", "{}")).await.text(), "1", "after {hostile}");
        assert_eq!(run(&processor, &invocation("remember", "{}")).await.text(), "2", "after {hostile}");
    }
}

/// Proves G21.
#[tokio::test]
async fn an_abandoned_run_takes_its_instance_with_it() {
    let guest = load(&processor(DATA, MOODY));
    assert_eq!(place(&guest).await, "A");
    let mut context = Context::new(Arc::new(support::MemoryState::default()), Arc::new(EffectLimits::default()));
    let looping = of(2);
    let run = guest.process(&looping, &mut context);
    assert!(tokio::time::timeout(Duration::from_millis(50), run).await.is_err(), "it cannot have ended");
    assert_eq!(place(&guest).await, "A");
}

#[tokio::test]
async fn an_instance_ends_after_its_number_of_messages() {
    let limits = ReuseLimits { messages: 3, ..ReuseLimits::default() };
    let guest = support::engine().load(&processor(DATA, MOODY), reusing(limits)).unwrap();
    for expected in ["A", "B", "C", "A", "B", "C", "A"] {
        assert_eq!(place(&guest).await, expected);
    }
}

#[tokio::test]
async fn the_longest_waiting_gives_way_and_a_processor_takes_only_its_own() {
    let engine = Engine::new(EngineConfig { max_instances: 1, kept_instances: 2, ..EngineConfig::default() }).unwrap();
    let load = || engine.load(&processor(DATA, MOODY), reusing(ReuseLimits::default())).unwrap();
    let (one, two, three) = (load(), load(), load());
    assert_eq!([place(&one).await, place(&two).await], ["A", "A"]);
    assert_eq!([place(&one).await, place(&two).await], ["B", "B"]);
    assert_eq!(place(&three).await, "A", "room is made for it");
    assert_eq!(place(&two).await, "C", "the one that ran last is still there");
    assert_eq!(place(&one).await, "A", "the one that waited longest has gone");
}

/// Answers once two are asking.
struct Meeting(tokio::sync::Barrier);

impl StateView for Meeting {
    fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(Version, Option<bytes::Bytes>), StoreError>> {
        Box::pin(async {
            self.0.wait().await;
            Ok((0, None))
        })
    }

    fn scan<'a>(&'a self, _: &'a str, _: Option<&'a str>, _: usize) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// Proves G20.
#[tokio::test]
async fn two_messages_at_once_never_share_an_instance() {
    let imports = format!(r#"{DATA} (import "hapax:processor/state@0.1.0" "get" (func $get (param i32 i32 i32)))"#);
    // Leaves its data in the memory, waits for the other, answers what is in the memory now, and
    // the count.
    let body = "(i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 1)))
        (call $data (local.get $message) (i32.const 4096))
        (i32.store8 (i32.const 8201) (i32.load8_u (i32.load (i32.const 4096))))
        (call $get (i32.const 0) (i32.const 1) (i32.const 4112))
        (i32.store8 (i32.const 8200) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 64)))
        (call $ok (i32.const 8200) (i32.const 2))";
    let guest = load(&processor(&imports, body));
    let view: Arc<dyn StateView> = Arc::new(Meeting(tokio::sync::Barrier::new(2)));
    for count in ["A", "B", "C", "D"] {
        let (left, right) = (invocation("x", "l"), invocation("x", "r"));
        let both = futures_util::future::join(
            run_on(&guest, &left, view.clone(), EffectLimits::default()),
            run_on(&guest, &right, view.clone(), EffectLimits::default()),
        );
        let (left, right): (Ran, Ran) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("both run");
        assert_eq!([left.text(), right.text()], [format!("{count}l"), format!("{count}r")]);
    }
}

/// Proves G19.
#[tokio::test]
async fn each_message_has_its_own_effects_and_log_budget() {
    let imports = r#"(import "hapax:processor/log@0.1.0" "write" (func $log (param i32 i32 i32)))
        (import "hapax:processor/state@0.1.0" "set" (func $set (param i32 i32 i32 i32)))"#;
    // Most of the budget of one message, each time; and a key of its own.
    let body = "(i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 1)))
        (i32.store8 (i32.const 8200) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 64)))
        (memory.fill (i32.const 10000) (i32.const 97) (i32.const 50000))
        (call $log (i32.const 2) (i32.const 10000) (i32.const 50000))
        (call $set (i32.const 8200) (i32.const 1) (i32.const 0) (i32.const 1))
        (call $ok (i32.const 8200) (i32.const 1))";
    let sink = LogSink::default();
    let _guard = sink.install();
    let guest = load(&processor(imports, body));
    for expected in ["A", "B", "C"] {
        let ran = run(&guest, &invocation("x", "")).await;
        assert_eq!(ran.text(), expected);
        assert_eq!(ran.effects.writes.keys().collect::<Vec<_>>(), [expected]);
    }
    assert_eq!(sink.guest_lines().len(), 3, "no line was dropped, and no notice given");
}

/// Proves G22.
#[tokio::test]
async fn wasi_begins_anew_with_each_message() {
    let world = "import wasi:clocks/wall-clock@0.2.6; import wasi:clocks/monotonic-clock@0.2.6;
        import wasi:random/random@0.2.6;";
    let imports = r#"
        (import "wasi:clocks/monotonic-clock@0.2.6" "now" (func $monotonic (result i64)))
        (import "wasi:random/random@0.2.6" "get-random-u64" (func $random (result i64)))"#;
    let body = "(i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 1)))
        (i64.store (i32.const 4096) (call $monotonic))
        (i64.store (i32.const 4104) (call $random))
        (i64.store (i32.const 4112) (i64.load8_u (i32.const 8192)))
        (call $ok (i32.const 4096) (i32.const 24))";
    let guest = load(&processor_with(world, imports, body));
    let mut other = invocation("x", "");
    other.seed = 43;
    let first = run(&guest, &invocation("x", "")).await;
    let second = run(&guest, &other).await;
    let third = run(&guest, &invocation("x", "")).await;
    assert_eq!([first.output()[16], second.output()[16], third.output()[16]], [1, 2, 3], "one instance");
    assert_eq!(first.output()[..16], third.output()[..16], "the same message sees the same");
    assert_ne!(first.output()[8..16], second.output()[8..16], "another message sees another");
}

/// Proves G22.
#[tokio::test]
async fn standard_output_stays_open_and_belongs_to_the_message() {
    let world = "import wasi:cli/stdout@0.2.6; import wasi:io/streams@0.2.6;";
    let imports = r#"
        (import "wasi:cli/stdout@0.2.6" "get-stdout" (func $stdout (result i32)))
        (import "wasi:io/streams@0.2.6" "[method]output-stream.blocking-write-and-flush"
            (func $write (param i32 i32 i32 i32)))"#;
    // Opens it once, as a language runtime does, and leaves its line without an end.
    let body = r#"(if (i32.eqz (i32.load (i32.const 8192)))
            (then (i32.store (i32.const 8192) (i32.add (call $stdout) (i32.const 1)))))
        (i32.store8 (i32.const 8196) (i32.add (i32.load8_u (i32.const 8196)) (i32.const 1)))
        (i32.store8 (i32.const 8200) (i32.add (i32.load8_u (i32.const 8196)) (i32.const 64)))
        (call $write (i32.sub (i32.load (i32.const 8192)) (i32.const 1)) (i32.const 8200) (i32.const 1) (i32.const 9000))
        (call $ok (i32.const 8200) (i32.const 1))"#;
    let sink = LogSink::default();
    let _guard = sink.install();
    let guest = load(&processor_with(world, imports, body));
    for (id, expected) in [("m-1", "A"), ("m-2", "B"), ("m-3", "C")] {
        let mut message = invocation("x", "");
        Arc::make_mut(&mut message.message).id = id.to_owned();
        assert_eq!(run(&guest, &message).await.text(), expected);
        let lines = sink.guest_lines();
        let last = lines.last().unwrap();
        assert!(last.contains(&format!(": {expected} ")) && last.contains(&format!("message_id=\"{id}\"")), "{last}");
    }
}

/// Proves G22.
#[tokio::test]
async fn a_handle_left_open_ends_the_instance() {
    let world = "import wasi:clocks/monotonic-clock@0.2.6; import wasi:io/poll@0.2.6;";
    let imports = r#"
        (import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $sleep (param i64) (result i32)))"#;
    let body = "(i32.store8 (i32.const 8192) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 65)))
        (drop (call $sleep (i64.const 1)))
        (call $ok (i32.const 8192) (i32.const 1))";
    let guest = load(&processor_with(world, imports, body));
    for _ in 0..3 {
        assert_eq!(run(&guest, &invocation("x", "")).await.text(), "A");
    }
}
