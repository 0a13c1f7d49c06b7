//! The fixture component, built from source by `cargo xtask test`: what it does is chosen by the
//! message's type. Each hostile one costs its message an error and the host nothing.
#![allow(clippy::unwrap_used)] // A test may.

mod support;

use std::sync::Arc;

use hapax_core::{EffectLimits, Failure, Message};
use hapax_engine::WasmProcessor;
use support::{LogSink, MemoryState, Ran, built, invocation, load, load_error, run, run_on};

fn fixtures() -> WasmProcessor {
    load(&built("hapax-fixtures")).expect("the fixtures load")
}

/// Runs one behaviour, then makes sure that the next message is answered.
async fn survive(processor: &WasmProcessor, kind: &str) -> Ran {
    let limits = EffectLimits { effect_bytes: 4 << 20, ..EffectLimits::default() };
    let ran = run_on(processor, &invocation(kind, "{}"), Arc::new(MemoryState::default()), limits).await;
    assert_eq!(run(processor, &invocation("echo", "{\"still\":1}")).await.text(), "{\"still\":1}", "after {kind}");
    ran
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let processor = fixtures();
    for kind in ["trap", "panic", "deep-recursion"] {
        let ran = survive(&processor, kind).await;
        assert!(ran.retry().starts_with("trapped: "), "{kind}: {}", ran.retry());
    }
    assert_eq!(survive(&processor, "loop").await.retry(), "ran past its deadline of 300ms");
    assert_eq!(survive(&processor, "eat-memory").await.retry(), "ran into its memory limit of 16 MiB");
    survive(&processor, "retry").await.retry();
}

#[tokio::test]
async fn a_panics_text_is_in_the_reason() {
    let ran = survive(&fixtures(), "panic").await;
    assert!(ran.retry().contains("panicked"), "{}", ran.retry());
}

#[tokio::test]
async fn retry_until_the_third_attempt() {
    let processor = fixtures();
    let mut message = invocation("retry-until-3", "{}");
    for attempt in 1..=3 {
        message.attempt = attempt;
        assert_eq!(run(&processor, &message).await.result.is_ok(), attempt == 3, "attempt {attempt}");
    }
}

#[tokio::test]
async fn what_will_not_pass_is_refused() {
    // Room enough in the guest, so that it is the host's limits that it meets.
    let mut roomy = support::options();
    roomy.limits.memory_bytes = 64 << 20;
    roomy.limits.deadline = std::time::Duration::from_secs(10);
    let processor = support::engine().load(&built("hapax-fixtures"), roomy).expect("the fixtures load");
    for kind in ["reject", "big-result", "too-many-effects", "too-much-state"] {
        survive(&processor, kind).await.reject();
    }
    let ran = survive(&processor, "invalid").await;
    assert!(matches!(ran.result, Err(Failure::Invalid(_))), "{:?}", ran.result);
}

#[tokio::test]
async fn a_failure_may_say_when_it_is_to_be_tried_again() {
    let ran = run(&fixtures(), &invocation("retry-after", "{}")).await;
    assert!(matches!(ran.result, Err(Failure::Retry { after_ms: Some(50), .. })), "{:?}", ran.result);
}

/// One behaviour on the state `a/1`, `a/2` and `b/1`, with this subject.
async fn on_state(kind: &str, subject: &str, data: &str) -> Ran {
    let state = [("a/1", "one"), ("a/2", "two"), ("b/1", "three")];
    let view = MemoryState(state.map(|(key, value)| (key.to_owned(), value.into())).into());
    let mut message = invocation(kind, "");
    message.message =
        Arc::new(Message { subject: Some(subject.into()), data: data.to_owned().into(), ..(*message.message).clone() });
    run_on(&fixtures(), &message, Arc::new(view), EffectLimits::default()).await
}

#[tokio::test]
async fn a_scan_finds_what_begins_with_its_prefix() {
    assert_eq!(on_state("scan", "a/", "").await.text(), r#"[["a/1","one"],["a/2","two"]]"#);
    assert_eq!(on_state("scan", "c", "").await.text(), "[]");
}

#[tokio::test]
async fn compare_and_set_writes_only_over_what_it_expects() {
    let ran = on_state("cas", "a/1", r#"["one", "new"]"#).await;
    assert_eq!((ran.text().as_str(), ran.effects.writes["a/1"].as_deref()), ("true", Some(&b"new"[..])));
    for (key, expected) in [("a/1", r#"["two", "new"]"#), ("a/1", r#"[null, "new"]"#), ("c", r#"["one", "new"]"#)] {
        let ran = on_state("cas", key, expected).await;
        assert!(ran.text() == "false" && ran.effects.writes.is_empty(), "{key} {expected}: {:?}", ran.effects);
    }
}

/// The stream `s` as the events that `ran` has appended make it.
fn kept(ran: &Ran) -> MemoryState {
    MemoryState(ran.effects.writes.iter().map(|(key, value)| (key.clone(), value.clone().unwrap())).collect())
}

#[tokio::test]
async fn a_stream_takes_events_at_the_version_that_is_expected() {
    let on = async |state: MemoryState, kind: &str, data: &str| {
        let mut message = invocation(kind, data);
        message.message = Arc::new(Message { subject: Some("s".into()), ..(*message.message).clone() });
        run_on(&fixtures(), &message, Arc::new(state), EffectLimits::default()).await
    };
    let first = on(MemoryState::default(), "append", r#"[0, ["opened", "used"]]"#).await;
    assert_eq!(first.text(), "2");
    assert_eq!(on(kept(&first), "append", r#"[1, ["lost"]]"#).await.text(), "[2]", "the actual version");
    let read = on(kept(&first), "stream", "{}").await.text();
    assert!(read.starts_with("[2,[[1,\"") && read.ends_with("\"used\",\"used\"]]]"), "{read}");
    assert_eq!(on(kept(&first), "append", r#"[null, ["closed"]]"#).await.text(), "3");
    let refused = on(MemoryState::default(), "append", r#"[null, [""]]"#).await;
    assert_eq!(refused.reject(), "an event has no type");
}

#[tokio::test]
async fn the_clock_is_the_messages() {
    let processor = fixtures();
    let first = run(&processor, &invocation("clock", "{}")).await;
    assert!(!first.output().is_empty());
    assert_eq!(run(&processor, &invocation("clock", "{}")).await.output(), first.output());
}

#[tokio::test]
async fn a_flood_of_log_lines_is_cut() {
    let sink = LogSink::default();
    let _guard = sink.install();
    let processor = fixtures();
    run(&processor, &invocation("log-flood", "{}")).await.output();
    let bytes: usize = sink.guest_lines().iter().map(String::len).sum();
    assert!(bytes < 2 << 20, "{bytes} bytes in the log");
    assert!(sink.text().contains("log limit of 65536 bytes reached"), "no notice");
}

#[tokio::test]
async fn the_plugins_load_and_refuse_what_is_not_theirs() {
    for name in ["order-intake", "account-ledger", "event-counter"] {
        let processor = load(&built(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ran = run(&processor, &invocation("x", "not json")).await;
        assert!(matches!(ran.result, Err(Failure::Invalid(_) | Failure::Reject(_))), "{name}: {:?}", ran.result);
    }
}

#[test]
fn components_that_do_not_fit() {
    let error = load_error(&built("wrong-world"));
    assert!(error.code().starts_with("contract-"), "{}: {error}", error.code());
    assert!(error.to_string().contains("handle"), "the function is not named: {error}");
    let error = load_error(&built("one-way"));
    assert_eq!(error.code(), "contract-combination", "{error}");
    assert!(error.to_string().contains("`saga`"), "{error}");
}

#[tokio::test]
async fn every_call_that_is_measured_works() {
    let processor = fixtures();
    for call in [
        "get-hit",
        "get-miss",
        "set",
        "delete",
        "compare-and-set",
        "scan-10",
        "send",
        "append",
        "stream",
        "log",
        "config",
    ] {
        let ran = survive(&processor, &format!("repeat/{call}")).await;
        assert!(matches!(ran.result, Err(Failure::Invalid(_))), "`{{}}` is no number: {:?}", ran.result);
        assert_eq!(run(&processor, &invocation(&format!("repeat/{call}"), "3")).await.output(), b"");
    }
}
