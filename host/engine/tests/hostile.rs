//! A guest that misbehaves costs its message an error and the host nothing: the next message runs.

#![allow(clippy::unwrap_used)] // A test may.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hapax_core::{Context, EffectLimits, Failure, MessageProcessor};
use support::guest::processor;
use support::{BrokenState, MemoryState, invocation, load, run, run_on};

const GET: &str = r#"(import "hapax:processor/state@0.1.0" "get" (func $get (param i32 i32 i32)))"#;
const SET: &str = r#"(import "hapax:processor/state@0.1.0" "set" (func $set (param i32 i32 i32 i32)))"#;
const DATA: &str = r#"(import "hapax:processor/types@0.1.0" "[method]message.data" (func $data (param i32 i32)))"#;
/// Answers the message's data.
const ECHO: &str = "(call $data (local.get $message) (i32.const 4096))
    (call $ok (i32.load (i32.const 4096)) (i32.load (i32.const 4100)))";

/// Runs `body`; whatever came of it, the next message on the same engine must be answered.
async fn survive(imports: &str, body: &str) -> support::Ran {
    let engine = support::engine();
    let hostile = engine.load(&processor(imports, body), support::options()).expect("it loads");
    let honest = engine.load(&processor(DATA, ECHO), support::options()).expect("it loads");
    let ran = run(&hostile, &invocation("x", "")).await;
    assert_eq!(run(&honest, &invocation("x", "still here")).await.text(), "still here");
    ran
}

#[tokio::test]
async fn a_trap() {
    let ran = survive(SET, "(call $set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1)) unreachable").await;
    assert_eq!(ran.retry(), "trapped: wasm `unreachable` instruction executed (in handle)");
}

#[tokio::test]
async fn a_loop_ends_at_the_deadline_and_lets_others_run_meanwhile() {
    let engine = support::engine();
    let endless = engine.load(&processor("", "(loop $l (br $l)) unreachable"), support::options()).unwrap();
    let honest = engine.load(&processor(DATA, ECHO), support::options()).unwrap();
    let start = Instant::now();
    // One thread for both: the honest one runs only if the loop lets go of it.
    let (looping, hello) = (invocation("x", ""), invocation("x", "hello"));
    let (ran, (echo, waited)) = tokio::join!(run(&endless, &looping), async {
        tokio::task::yield_now().await;
        (run(&honest, &hello).await, start.elapsed())
    });
    assert_eq!(ran.retry(), "ran past its deadline of 300ms");
    assert!(start.elapsed() >= Duration::from_millis(300), "stopped early: {:?}", start.elapsed());
    assert_eq!(echo.text(), "hello");
    assert!(waited < Duration::from_millis(250), "the loop kept the thread: {waited:?}");
}

#[tokio::test]
async fn eating_memory() {
    let body = "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable";
    assert_eq!(survive("", body).await.retry(), "ran into its memory limit of 16 MiB");
}

#[tokio::test]
async fn a_guest_that_copes_with_a_refusal_is_not_failed() {
    let body = "(drop (memory.grow (i32.const 4000))) (call $ok (i32.const 0) (i32.const 0))";
    assert_eq!(survive("", body).await.output(), b"");
}

#[tokio::test]
async fn deep_recursion() {
    let ran = survive("", "(call $recurse (i32.const 0))").await;
    assert_eq!(ran.retry(), "trapped: call stack exhausted (in recurse)");
}

#[tokio::test]
async fn garbage_pointers() {
    let ran = survive("", "(call $ok (i32.const -16) (i32.const 64))").await;
    assert_eq!(ran.retry(), "the component failed: list pointer/length out of bounds of memory");
    let ran = survive("", "(i32.store8 (i32.const 1024) (i32.const 9)) (i32.const 1024)").await;
    assert!(ran.retry().contains("discriminant"), "{}", ran.retry());
    // Not UTF-8 where text is due.
    let ran =
        survive("", "(i32.store8 (i32.const 4096) (i32.const 255)) (call $reject (i32.const 4096) (i32.const 1))")
            .await;
    assert!(ran.retry().contains("utf-8"), "{}", ran.retry());
}

#[tokio::test]
async fn a_result_over_its_limit() {
    let grow = "(drop (memory.grow (i32.const 64)))";
    let ran = survive("", &format!("{grow} (call $ok (i32.const 4096) (i32.const 1048577))")).await;
    assert_eq!(ran.reject(), "bytes of the result (1048577) are over their limit of 1048576");
    let ran = survive("", &format!("{grow} (call $ok (i32.const 4096) (i32.const 1048576))")).await;
    assert_eq!(ran.output().len(), 1 << 20);
}

#[tokio::test]
async fn a_long_reason_is_cut() {
    let ran = survive(
        "",
        "(memory.fill (i32.const 4096) (i32.const 65) (i32.const 60000))
        (call $reject (i32.const 4096) (i32.const 60000))",
    )
    .await;
    assert_eq!(ran.reject(), "A".repeat(4096));
}

#[tokio::test]
async fn one_call_that_carries_too_much() {
    let engine = support::engine();
    let mut options = support::options();
    options.limits.hostcall_bytes = 10_000;
    let body = "(call $set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 20000)) (call $ok (i32.const 0) (i32.const 0))";
    let greedy = engine.load(&processor(SET, body), options).unwrap();
    let ran = run(&greedy, &invocation("x", "")).await;
    assert_eq!(ran.reject(), "bytes passed to the host in one call are over their limit of 10000");
}

#[tokio::test]
async fn too_much_state() {
    let body = "(loop $l (call $set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1000)) (br $l)) unreachable";
    let greedy = load(&processor(SET, body)).unwrap();
    let limits = EffectLimits { effect_bytes: 50_000, ..EffectLimits::default() };
    let ran = run_on(&greedy, &invocation("x", ""), Arc::new(MemoryState::default()), limits).await;
    assert_eq!(ran.reject(), "bytes of effects is over its limit of 50000");
}

#[tokio::test]
async fn a_store_that_fails_is_tried_again() {
    let body = "(call $get (i32.const 0) (i32.const 1) (i32.const 4096)) (call $ok (i32.const 0) (i32.const 0))";
    let reader = load(&processor(GET, body)).unwrap();
    let ran = run_on(&reader, &invocation("x", ""), Arc::new(BrokenState), EffectLimits::default()).await;
    assert!(ran.retry().contains("disk on fire"), "{}", ran.retry());
}

#[tokio::test]
async fn a_full_pool_makes_messages_wait() {
    let slow = load(&processor("", "(loop $l (br $l)) unreachable")).unwrap();
    let message = invocation("x", "");
    // Twelve on four slots: three rounds of deadlines, and no other error.
    let start = Instant::now();
    let all = futures_util::future::join_all((0..12).map(|_| run(&slow, &message))).await;
    for ran in &all {
        assert_eq!(ran.retry(), "ran past its deadline of 300ms");
    }
    assert!(start.elapsed() >= Duration::from_millis(900), "they did not wait: {:?}", start.elapsed());
}

#[tokio::test]
async fn an_abandoned_run_gives_its_slot_and_its_context_back() {
    let body = "(call $set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1)) (loop $l (br $l)) unreachable";
    let slow = load(&processor(SET, body)).unwrap();
    let message = invocation("x", "");
    for _ in 0..10 {
        let mut context = Context::new(Arc::new(MemoryState::default()), Arc::new(EffectLimits::default()));
        let run = slow.process(&message, &mut context);
        assert!(tokio::time::timeout(Duration::from_millis(30), run).await.is_err(), "it cannot have ended");
        assert_eq!(context.finish().1.writes.len(), 1, "the caller's context was lost");
    }
}

#[tokio::test]
async fn a_panic_of_the_state_is_a_failure() {
    struct Panics;
    impl hapax_core::StateView for Panics {
        fn get<'a>(
            &'a self,
            _: &'a str,
        ) -> futures_util::future::BoxFuture<'a, Result<(u64, Option<bytes::Bytes>), hapax_core::StoreError>> {
            panic!("a bug of the host")
        }
        fn scan<'a>(
            &'a self,
            _: &'a str,
            _: Option<&'a str>,
            _: usize,
        ) -> futures_util::future::BoxFuture<'a, Result<Vec<hapax_core::Entry>, hapax_core::StoreError>> {
            panic!("a bug of the host")
        }
    }
    let body = "(call $get (i32.const 0) (i32.const 1) (i32.const 4096)) (call $ok (i32.const 0) (i32.const 0))";
    let reader = load(&processor(GET, body)).unwrap();
    let ran = run_on(&reader, &invocation("x", ""), Arc::new(Panics), EffectLimits::default()).await;
    assert!(ran.retry().contains("the host failed"), "{}", ran.retry());
    let ran = run(&reader, &invocation("x", "")).await;
    assert!(!matches!(ran.result, Err(Failure::Retry { .. })), "the next message runs");
}
