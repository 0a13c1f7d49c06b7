//! The engine itself: cache of compiled code, pool and its fallback, WASI seeded by the message,
//! the log's limits.

#![allow(clippy::unwrap_used)] // A test may.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use hapax_core::MessageProcessor;
use hapax_engine::{Engine, EngineConfig};
use support::guest::{processor, processor_with};
use support::{LogSink, invocation, run};

const HELLO: &str = r#"(i32.store (i32.const 4096) (i32.const 0x6c6c6568)) (call $ok (i32.const 4096) (i32.const 4))"#;
const LOG: &str = r#"(import "hapax:processor/log@0.1.0" "write" (func $log (param i32 i32 i32)))"#;

fn cached(dir: &std::path::Path) -> Engine {
    let config = EngineConfig { cache_dir: Some(dir.to_owned()), max_instances: 4, ..EngineConfig::default() };
    Engine::new(config).expect("engine")
}

fn entry(dir: &std::path::Path) -> std::path::PathBuf {
    let entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(entries.len(), 1, "one component, one entry: {entries:?}");
    entries.into_iter().next().unwrap()
}

#[tokio::test]
async fn compiled_code_is_kept_and_an_odd_entry_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache/code");
    let guest = processor("", HELLO);
    let first = cached(&dir).load(&guest, support::options()).unwrap();
    assert!(!first.from_cache());
    assert_eq!(first.digest(), format!("blake3:{}", blake3::hash(&guest).to_hex()));
    assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    let second = cached(&dir).load(&guest, support::options()).unwrap();
    assert!(second.from_cache());
    assert_eq!(run(&second, &invocation("x", "")).await.output(), b"hell");

    let whole = std::fs::read(entry(&dir)).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    for odd in [Vec::new(), whole[..30].to_vec(), whole[..whole.len() - 1].to_vec(), damaged, b"hello".repeat(50)] {
        std::fs::write(entry(&dir), &odd).unwrap();
        let again = cached(&dir).load(&guest, support::options()).unwrap();
        assert!(!again.from_cache(), "an odd entry of {} bytes was used", odd.len());
        assert_eq!(run(&again, &invocation("x", "")).await.output(), b"hell");
        assert!(cached(&dir).load(&guest, support::options()).unwrap().from_cache(), "it was not written again");
    }
}

#[test]
fn the_code_used_longest_ago_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    let guests = ["(i32.const 1) drop ", "(i32.const 2) drop ", "(i32.const 3) drop "]
        .map(|more| processor("", &format!("{more}{HELLO}")));
    let load = |cache_bytes, guest: &[u8]| {
        let cache_dir = Some(folder.path().to_owned());
        let engine = Engine::new(EngineConfig { cache_dir, cache_bytes, max_instances: 4, ..EngineConfig::default() });
        engine.unwrap().load(guest, support::options()).unwrap().from_cache()
    };
    assert!(!load(u64::MAX, &guests[0]));
    let size = std::fs::metadata(entry(folder.path())).unwrap().len();
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3_600);
    std::fs::File::options().append(true).open(entry(folder.path())).unwrap().set_modified(hour_ago).unwrap();
    assert!(!load(u64::MAX, &guests[1]));
    let second = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path());
    let second = second.max_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap()).unwrap();
    let minute_ago = hour_ago + Duration::from_secs(3_540);
    std::fs::File::options().append(true).open(second).unwrap().set_modified(minute_ago).unwrap();
    // Used now: the other one is the older.
    assert!(load(u64::MAX, &guests[0]));
    assert!(!load(size * 2 + size / 2, &guests[2]));
    assert!(load(u64::MAX, &guests[0]) && load(u64::MAX, &guests[2]), "both fit");
    assert!(!load(0, &guests[1]), "the one used longest ago is gone");
    assert!(load(0, &guests[1]), "what was just compiled stays, whatever the limit");
    assert!(!load(0, &guests[0]) && !load(0, &guests[2]));
}

#[test]
fn code_of_an_engine_with_other_settings_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let guest = processor("", HELLO);
    cached(folder.path()).load(&guest, support::options()).unwrap();
    let config = EngineConfig { cache_dir: Some(folder.path().to_owned()), pooling: false, ..EngineConfig::default() };
    assert!(!Engine::new(config).unwrap().load(&guest, support::options()).unwrap().from_cache());
}

#[test]
fn a_cache_that_cannot_be_used_is_done_without() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let engine = cached(file.path());
    assert!(!engine.load(&processor("", HELLO), support::options()).unwrap().from_cache());
}

#[tokio::test]
async fn without_room_for_the_pool_it_allocates_on_demand() {
    assert!(support::engine().is_pooling());
    // 60,000 slots of 4 GiB are more than a process can address.
    let engine = Engine::new(EngineConfig { max_instances: 60_000, ..EngineConfig::default() }).expect("engine");
    assert!(!engine.is_pooling());
    let guest = engine.load(&processor("", HELLO), support::options()).unwrap();
    assert_eq!(run(&guest, &invocation("x", "")).await.output(), b"hell");
    let eater = "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable";
    // Memory that is not reserved is copied as it grows: let it take its time.
    let mut patient = support::options();
    patient.limits.deadline = Duration::from_secs(30);
    let eater = engine.load(&processor("", eater), patient).unwrap();
    assert_eq!(run(&eater, &invocation("x", "")).await.retry(), "ran into its memory limit of 16 MiB");
}

#[test]
fn a_setting_of_zero_is_refused() {
    assert!(Engine::new(EngineConfig { max_instances: 0, ..EngineConfig::default() }).is_err());
    assert!(Engine::new(EngineConfig { tick: Duration::ZERO, ..EngineConfig::default() }).is_err());
}

#[tokio::test]
async fn a_fresh_instance_for_each_message() {
    // Answers what the last message left in memory, then leaves something.
    let body = "(i32.store8 (i32.const 4096) (i32.add (i32.load8_u (i32.const 8192)) (i32.const 65)))
        (i32.store8 (i32.const 8192) (i32.const 1))
        (call $ok (i32.const 4096) (i32.const 1))";
    let guest = support::load(&processor("", body)).unwrap();
    for _ in 0..20 {
        assert_eq!(run(&guest, &invocation("x", "")).await.text(), "A");
    }
}

#[tokio::test]
async fn the_log_has_a_limit() {
    let body = "(loop $l
            (call $log (i32.const 2) (i32.const 4096) (i32.const 1000))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $l (i32.lt_u (local.get $i) (i32.const 500))))
        (call $ok (i32.const 0) (i32.const 0))";
    let sink = LogSink::default();
    let _guard = sink.install();
    let guest = support::load(&processor(LOG, body)).unwrap();
    run(&guest, &invocation("x", "")).await.output();
    let lines = sink.guest_lines();
    assert_eq!(lines.len(), 66, "65 lines of 1000 bytes fit in 64 KiB, and a notice");
    assert!(lines[65].contains("WARN") && lines[65].contains("log limit of 65536 bytes"), "{}", lines[65]);
    assert!(lines[0].contains("processor=\"test\"") && lines[0].contains("message_id=\"m-1\""), "{}", lines[0]);
}

const WASI_CLOCKS: &str = r#"
    (import "wasi:clocks/wall-clock@0.2.6" "now" (func $wall (param i32)))
    (import "wasi:clocks/monotonic-clock@0.2.6" "now" (func $monotonic (result i64)))
    (import "wasi:random/random@0.2.6" "get-random-u64" (func $random (result i64)))"#;

#[tokio::test]
async fn wasi_time_and_randomness_are_the_messages() {
    let world = "import wasi:clocks/wall-clock@0.2.6; import wasi:clocks/monotonic-clock@0.2.6;
        import wasi:random/random@0.2.6;";
    let body = "(call $wall (i32.const 4096))
        (i64.store (i32.const 4112) (call $monotonic))
        (i64.store (i32.const 4120) (call $monotonic))
        (i64.store (i32.const 4128) (call $random))
        (i64.store (i32.const 4136) (call $random))
        (call $ok (i32.const 4096) (i32.const 48))";
    let guest = support::load(&processor_with(world, WASI_CLOCKS, body)).unwrap();
    let ran = run(&guest, &invocation("x", "")).await;
    let numbers: Vec<u64> = ran.output().chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!(numbers[0], 1_767_323_045, "2026-01-02T03:04:05Z");
    assert!(numbers[2] < numbers[3], "the monotonic clock moves");
    assert_ne!(numbers[4], numbers[5], "randomness does not repeat");
    assert_eq!(run(&guest, &invocation("x", "")).await.output(), ran.output(), "a re-run sees the same");
    let mut other = invocation("x", "");
    other.seed = 43;
    assert_ne!(run(&guest, &other).await.output()[32..], ran.output()[32..], "another message sees another");
}

#[tokio::test]
async fn wasi_output_goes_to_the_log() {
    let world = "import wasi:cli/stdout@0.2.6; import wasi:io/streams@0.2.6;";
    let imports = r#"
        (import "wasi:cli/stdout@0.2.6" "get-stdout" (func $stdout (result i32)))
        (import "wasi:io/streams@0.2.6" "[method]output-stream.blocking-write-and-flush"
            (func $write (param i32 i32 i32 i32)))"#;
    let body = r#"(i64.store (i32.const 4096) (i64.const 0x0a6f77740a656e6f)) ;; "one\ntwo\n"
        (local.set $i (call $stdout))
        (call $write (local.get $i) (i32.const 4096) (i32.const 6) (i32.const 8192))
        (call $write (local.get $i) (i32.const 4102) (i32.const 2) (i32.const 8192))
        (call $write (local.get $i) (i32.const 4096) (i32.const 3) (i32.const 8192))
        (call $ok (i32.const 0) (i32.const 0))"#;
    let sink = LogSink::default();
    let _guard = sink.install();
    let guest = support::load(&processor_with(world, imports, body)).unwrap();
    run(&guest, &invocation("x", "")).await.output();
    let ends: Vec<bool> = sink
        .guest_lines()
        .iter()
        .zip(["INFO hapax::guest: one ", "INFO hapax::guest: two ", "INFO hapax::guest: one "])
        .map(|(line, expected)| line.contains(expected))
        .collect();
    assert_eq!(ends, [true, true, true], "{}", sink.text());
}

#[tokio::test]
async fn a_guest_that_sleeps_is_stopped_too() {
    let world = "import wasi:clocks/monotonic-clock@0.2.6; import wasi:io/poll@0.2.6;";
    let imports = r#"
        (import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $sleep (param i64) (result i32)))
        (import "wasi:io/poll@0.2.6" "[method]pollable.block" (func $block (param i32)))"#;
    let body = "(call $block (call $sleep (i64.const 3600000000000))) (call $ok (i32.const 0) (i32.const 0))";
    let guest = support::load(&processor_with(world, imports, body)).unwrap();
    let start = Instant::now();
    assert_eq!(run(&guest, &invocation("x", "")).await.retry(), "ran past its deadline of 300ms");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn wasi_has_no_environment() {
    let imports = r#"(import "wasi:cli/environment@0.2.6" "get-environment" (func $environment (param i32)))"#;
    let body = "(call $environment (i32.const 4096))
        (i32.store8 (i32.const 8192) (i32.add (i32.load (i32.const 4100)) (i32.const 48)))
        (call $ok (i32.const 8192) (i32.const 1))";
    let guest = support::load(&processor_with("import wasi:cli/environment@0.2.6;", imports, body)).unwrap();
    assert_eq!(run(&guest, &invocation("x", "")).await.text(), "0");
}
