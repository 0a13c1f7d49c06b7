//! Batches: messages that are ready share a call, each has its own effects and its own answer, and
//! what one of them does to the call is not the others' trouble.
#![allow(clippy::unwrap_used)] // A test may.

mod support;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};
use hapax_core::{Failure, Invocation, Message};
use hapax_engine::{Batching, InstanceMode, LoadOptions, ReuseLimits, WasmProcessor};
use support::{LogSink, Ran, built, invocation, load_error, run};

/// Batches of up to `messages_max`; they are full, or wait for ever.
fn load(messages_max: usize) -> WasmProcessor {
    load_with(LoadOptions { batching: Batching { messages_max, wait: Duration::from_secs(60) }, ..support::options() })
}

fn load_with(options: LoadOptions) -> WasmProcessor {
    let processor = support::engine().load(&built("batch-fixtures"), options).expect("the fixture loads");
    assert!(processor.takes_batches());
    processor
}

/// A message of this type and subject, with an id of its own.
fn item(kind: &str, subject: &str) -> Invocation {
    let mut invocation = invocation(kind, "{}");
    let message =
        Message { id: format!("m-{subject}"), subject: Some(subject.into()), ..(*invocation.message).clone() };
    invocation.message = Arc::new(message);
    invocation
}

/// All of them in one call.
async fn together(processor: &WasmProcessor, items: &[Invocation]) -> Vec<Ran> {
    join_all(items.iter().map(|item| run(processor, item))).await
}

#[tokio::test]
async fn messages_that_are_ready_share_a_call() {
    let processor = load(3);
    let ran = together(&processor, &["a", "b", "c"].map(|subject| item("size", subject))).await;
    assert!(ran.iter().all(|ran| ran.text() == "3"), "{:?}", ran.iter().map(Ran::text).collect::<Vec<_>>());
    // More than go in one call go in two.
    let ran = together(&processor, &["a", "b", "c", "d", "e", "f"].map(|subject| item("size", subject))).await;
    assert!(ran.iter().all(|ran| ran.text() == "3"));
}

#[tokio::test]
async fn who_is_not_joined_goes_when_its_wait_is_over() {
    for wait in [Duration::ZERO, Duration::from_millis(1)] {
        let batching = Batching { messages_max: 64, wait };
        let processor = load_with(LoadOptions { batching, ..support::options() });
        assert_eq!(run(&processor, &item("size", "a")).await.text(), "1");
        let ran = together(&processor, &["a", "b"].map(|subject| item("size", subject))).await;
        assert!(ran.iter().all(|ran| ran.text() == "2"));
    }
}

#[tokio::test]
async fn each_message_has_its_own_effects_and_its_own_answer() {
    let ran = together(&load(3), &[item("count", "a"), item("reject", "b"), item("count", "c")]).await;
    assert_eq!((ran[0].text(), ran[2].text()), ("1".to_owned(), "1".to_owned()));
    assert_eq!(ran[1].reject(), "refused on purpose");
    let keys = |ran: &Ran| ran.effects.writes.keys().cloned().collect::<Vec<_>>();
    assert_eq!([keys(&ran[0]), keys(&ran[1]), keys(&ran[2])], [["a"], ["b"], ["c"]]);
    assert_eq!(ran[0].reads.keys.keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test]
async fn what_breaks_the_call_is_not_the_others_trouble() {
    for kind in ["trap", "loop"] {
        let ran = together(&load(3), &[item("count", "a"), item(kind, "b"), item("count", "c")]).await;
        assert_eq!((ran[0].text(), ran[2].text()), ("1".to_owned(), "1".to_owned()), "{kind}");
        let reason = ran[1].retry();
        assert!(reason.contains("on purpose") || reason == "ran past its deadline of 300ms", "{kind}: {reason}");
        assert!(ran[1].effects.writes.is_empty() && ran[0].effects.writes.len() == 1, "{kind}");
    }
}

#[tokio::test]
async fn the_others_run_once_more_and_alone_and_the_host_says_so() {
    let sink = LogSink::default();
    let _guard = sink.install();
    together(&load(2), &[item("count", "a"), item("trap", "b")]).await;
    let lines = sink.guest_lines();
    let runs: Vec<_> = lines.iter().filter_map(|line| line.split("m-a in a call of ").nth(1)).collect();
    assert!(runs.len() == 2 && runs[0].starts_with('2') && runs[1].starts_with('1'), "{lines:?}");
    assert!(sink.text().contains("a call of test with 2 messages failed, each runs alone"), "{}", sink.text());
}

#[tokio::test]
async fn a_wrong_number_of_answers_is_said() {
    let ran = together(&load(2), &[item("too-few", "a"), item("count", "b")]).await;
    assert_eq!(ran[0].retry(), "the component answered 0 messages of a call that has 1");
    assert_eq!(ran[1].text(), "1");
    assert!(ran[0].effects.writes.is_empty());
}

#[tokio::test]
async fn an_effect_that_is_nobodys_ends_the_call() {
    let ran = run(&load(1), &item("no-select", "a")).await;
    assert!(ran.retry().contains("before it selected a message of the batch"), "{}", ran.retry());
    assert!(ran.effects.writes.is_empty());
    let ran = run(&load(1), &item("select-past", "a")).await;
    assert!(ran.retry().contains("it selected message 1000 of a call that has 1"), "{}", ran.retry());
}

#[tokio::test]
async fn clock_and_chance_are_the_messages_whoever_is_in_the_call() {
    let clock = |subject: &str, seed| Invocation { seed, ..item("clock", subject) };
    let alone = run(&load(1), &clock("a", 7)).await.text();
    let ran = together(&load(2), &[clock("b", 8), clock("a", 7)]).await;
    assert_eq!(ran[1].text(), alone);
    assert_ne!(ran[0].text(), alone);
}

#[tokio::test]
async fn who_gives_up_does_not_strand_those_who_joined_it() {
    let processor = load(3);
    let (first, second, third) = (item("size", "a"), item("size", "b"), item("size", "c"));
    let mut leader = Box::pin(run(&processor, &first));
    assert!(futures_util::poll!(&mut leader).is_pending());
    let mut joined = Box::pin(run(&processor, &second));
    assert!(futures_util::poll!(&mut joined).is_pending());
    drop(leader);
    assert_eq!(joined.await.text(), "1", "it ran alone");
    // The next ones meet in a batch of their own.
    let batching = Batching { messages_max: 2, wait: Duration::from_secs(60) };
    let processor = load_with(LoadOptions { batching, ..support::options() });
    let (second, third) = join(run(&processor, &second), run(&processor, &third)).await;
    assert_eq!((second.text(), third.text()), ("2".to_owned(), "2".to_owned()));
}

#[tokio::test]
async fn an_instance_that_is_reused_has_nothing_of_the_call_before() {
    let batching = Batching { messages_max: 2, wait: Duration::from_secs(60) };
    let instance = InstanceMode::Reuse(ReuseLimits::default());
    let processor = load_with(LoadOptions { batching, instance, ..support::options() });
    for _ in 0..3 {
        let ran = together(&processor, &[item("count", "a"), item("count", "b")]).await;
        let keys = |ran: &Ran| ran.effects.writes.keys().cloned().collect::<Vec<_>>();
        assert_eq!([keys(&ran[0]), keys(&ran[1])], [["a"], ["b"]]);
    }
}

#[tokio::test]
async fn an_instance_that_keeps_a_message_is_not_used_again() {
    for (body, answers) in [("(call $drop_message (local.get $message))", ["1", "2"]), ("", ["1", "1"])] {
        let batching = Batching { messages_max: 1, ..Batching::default() };
        let instance = InstanceMode::Reuse(ReuseLimits::default());
        let options = LoadOptions { batching, instance, ..support::options() };
        let processor = support::engine().load(&support::guest::batch_processor(body), options).unwrap();
        for answer in answers {
            assert_eq!(run(&processor, &item("x", "a")).await.text(), answer, "with `{body}`");
        }
    }
}

#[tokio::test]
async fn the_example_keeps_the_good_readings() {
    let processor = support::engine().load(&built("sensor-readings"), support::options()).unwrap();
    let ran = run(&processor, &invocation("x", "not json")).await;
    assert!(matches!(ran.result, Err(Failure::Invalid(_))), "{:?}", ran.result);
}

#[test]
fn who_handles_one_message_takes_no_batches() {
    assert!(!support::load(&built("hapax-fixtures")).unwrap().takes_batches());
    assert_eq!(load_error(&built("one-way")).code(), "contract-combination");
}
