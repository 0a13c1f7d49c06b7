//! Event streams through the whole pipeline: an append is there once its message has committed,
//! under the same id at every run, and no two messages append at one version.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use futures_util::future::{BoxFuture, join_all};
use hapax_core::{
    Context, ContextError, Failure, Handling, IdempotencyStorage as _, Invocation, MessageProcessor, NativeProcessor,
    NewEvent, Outcome, Output, Scope, StateView, StoredOutcome, StreamEvent, list_streams, read_stream,
};
use hapax_store::RedbStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::bench::{Bench, message, quick};
use hapax_tests::mutation::turns_red;
use hapax_tests::process::{guest, hapax};
use tokio::sync::Barrier;

fn failed(error: ContextError) -> Failure {
    Failure::retry(error.to_string())
}

/// Appends the message's id to stream `all` at the version that it has read, and answers the new
/// one. Messages of type `reject` fail after that.
fn appender() -> Arc<dyn MessageProcessor> {
    appender_after(0)
}

/// The same; the first `meeting` runs wait for one another after they have read: none of them has
/// seen another's append.
fn appender_after(meeting: usize) -> Arc<dyn MessageProcessor> {
    let (runs, meet) = (Arc::new(AtomicUsize::new(0)), Arc::new(Barrier::new(meeting.max(1))));
    Arc::new(NativeProcessor::new(move |run, context| {
        let meet = (runs.fetch_add(1, SeqCst) < meeting).then(|| meet.clone());
        append(run, context, meet)
    }))
}

fn append<'a>(
    run: &'a Invocation,
    context: &'a mut Context,
    meet: Option<Arc<Barrier>>,
) -> BoxFuture<'a, Result<Output, Failure>> {
    Box::pin(async move {
        let version = context.stream_version("all").await.map_err(failed)?;
        if let Some(meet) = meet {
            meet.wait().await;
        }
        let event = NewEvent { kind: "happened".into(), data: run.message.id.clone().into() };
        let appended = context.append("all", Some(version), vec![event]).await.map_err(failed)?;
        let version = appended.map_err(|conflict| Failure::Reject(format!("{conflict:?}")))?;
        match run.message.kind.as_str() {
            "reject" => Err(Failure::Reject("on purpose".into())),
            _ => Ok(Output { content_type: None, data: version.to_string().into() }),
        }
    })
}

fn view(store: &RedbStore) -> Arc<dyn StateView> {
    store.view(&Scope::of("p"))
}

async fn stream(store: &RedbStore) -> Vec<StreamEvent> {
    read_stream(&*view(store), "all", 0, 10_000).await.unwrap()
}

/// Proves G56.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_append_by_somebody_else_meanwhile_runs_the_message_again() {
    const MESSAGES: usize = 60;
    let store = Arc::new(LossyDisk::new().open().unwrap());
    let bench = Bench::new("p", store.clone(), appender_after(MESSAGES), quick()).await;
    let handled = (0..MESSAGES).map(|number| {
        let consumer = bench.consumer.clone();
        tokio::spawn(async move {
            consumer.handle(message(&format!("m-{number}"), "{}"), Handling::default()).await.unwrap()
        })
    });
    let outcomes = join_all(handled).await.into_iter().map(|outcome| match outcome.unwrap() {
        Outcome::Completed { output } => String::from_utf8(output.data.to_vec()).unwrap().parse::<usize>().unwrap(),
        other => panic!("{other:?}"),
    });
    let answered: BTreeSet<usize> = outcomes.collect();
    assert_eq!(answered, (1..=MESSAGES).collect(), "each message appended at a version of its own");
    let events = stream(&store).await;
    let versions: Vec<u64> = events.iter().map(|event| event.version).collect();
    assert_eq!(versions, (1..=MESSAGES as u64).collect::<Vec<_>>());
    let said: BTreeSet<_> = events.iter().map(|event| event.data.clone()).collect();
    let ids: BTreeSet<_> = events.iter().map(|event| event.id.clone()).collect();
    assert_eq!((said.len(), ids.len()), (MESSAGES, MESSAGES));
    assert_eq!(list_streams(&*view(&store), None, 9).await.unwrap(), [("all".to_owned(), MESSAGES as u64)]);
}

#[test]
fn mutation_a_stream_version_that_is_not_checked_is_found() {
    turns_red(
        module_path!(),
        "an_append_by_somebody_else_meanwhile_runs_the_message_again",
        "stream-version-unchecked",
    );
}

#[tokio::test]
async fn an_event_is_there_once_under_the_same_id_whoever_runs_its_message() {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let disk = LossyDisk::new();
        let store = Arc::new(disk.open().unwrap());
        let bench = Bench::new("p", store.clone(), appender(), quick()).await;
        assert!(matches!(bench.handle(message("m-1", "{}")).await, Outcome::Completed { .. }));
        assert!(matches!(bench.handle(message("m-1", "{}")).await, Outcome::Duplicate(StoredOutcome::Completed(_))));
        let events = stream(&store).await;
        assert_eq!(events.len(), 1, "a duplicate appends nothing");
        ids.push(events[0].id.clone());
        drop((bench, store));
        assert_eq!(stream(&disk.open().unwrap()).await, events, "it outlives the host");
    }
    assert_eq!(ids[0], ids[1]);
}

#[tokio::test]
async fn a_message_that_fails_appends_nothing() {
    let store = Arc::new(LossyDisk::new().open().unwrap());
    let bench = Bench::new("p", store.clone(), appender(), quick()).await;
    let mut rejected = message("m-1", "{}");
    rejected.kind = "reject".into();
    assert!(matches!(bench.handle(rejected).await, Outcome::DeadLettered { .. }));
    assert_eq!(stream(&store).await, []);
    assert_eq!(bench.handle(message("m-2", "{}")).await.name(), "completed");
    assert_eq!(stream(&store).await.len(), 1);
}

#[test]
fn the_command_line_lists_streams_and_their_events() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../plugins/event-counter/sample.jsonl");
    let run = hapax()
        .args(["run", "--processor", "accounts", "--concurrency", "1", "--input", sample, "--component"])
        .arg(guest("event-counter"))
        .arg("--store")
        .arg(&store)
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    let ask = |arguments: &[&str]| hapax().args(arguments).arg("--store").arg(&store).output().unwrap();
    let lines = |arguments: &[&str]| String::from_utf8(ask(arguments).stdout).unwrap();
    let listed = lines(&["streams", "--json", "--processor", "accounts"]);
    assert_eq!(listed, "{\"stream\":\"account/alice\",\"version\":2}\n{\"stream\":\"account/bob\",\"version\":2}\n");
    let events = lines(&["streams", "--processor", "accounts", "account/alice", "--after", "1"]);
    let fields: Vec<_> = events.trim_end().split('\t').collect();
    assert_eq!([fields[0], fields[2], fields[3]], ["2", "withdrawn", r#"{"amount_cents":-1200}"#]);
    assert_eq!(lines(&["streams", "--processor", "accounts", "account/alice", "--limit", "1"]).lines().count(), 1);
    assert_eq!(lines(&["state", "list", "accounts"]), "", "where events stand is the host's own");
    let nothing = ask(&["streams", "--processor", "accounts", "account/carol"]);
    let words = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert_eq!(nothing.status.code(), Some(9), "{words}");
    assert!(words.contains("has no event stream account/carol; `hapax streams --processor accounts`"), "{words}");
}
