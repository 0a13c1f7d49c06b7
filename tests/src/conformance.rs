//! Rules that every store must follow. One function per rule; `all` runs each of them on a store of
//! its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use hapax_core::{
    Commit, Cursor, Effects, Expected, FeedEntry, FeedEvent, FeedEventKind, Fingerprint, Group, HeldChange, HeldKey,
    HeldMessage, HistoryEntry, HoldReason, Message, Outgoing, Output, RangeRead, ReadSet, Record, RecordChange,
    RecordEvent, RecordKey, RecordState, Scope, SharedChange, Store, Verdict, Version,
};

fn key(name: &str) -> RecordKey {
    RecordKey::by_message_id(&Scope::of("p"), &Message::new(name, "/s", "t"))
}

fn record(epoch: u64, state: RecordState) -> Record {
    Record {
        state,
        epoch,
        attempts: 1,
        fingerprint: Fingerprint { version: 1, digest: [7; 16] },
        position: None,
        component: "c".into(),
        saga: None,
        received_ms: 1,
        changed_ms: 2,
        expires_ms: Some(3),
        history: Vec::new(),
    }
}

fn completed(text: &str) -> RecordState {
    RecordState::Completed { output: Output { content_type: None, data: text.to_owned().into() } }
}

fn commit(name: &str, version: u64, writes: &[(&str, Option<&str>)]) -> Commit {
    let writes = writes.iter().map(|(k, v)| ((*k).to_owned(), v.map(|v| v.to_owned().into()))).collect();
    Commit {
        expected: Expected::Absent,
        record: RecordChange::Put(record(1, completed(name)).into()),
        version,
        effects: Effects { writes, outgoing: Vec::new() },
        ..Commit::of(&key(name))
    }
}

async fn write(store: &impl Store, commits: Vec<Commit>) -> Vec<Verdict> {
    store.commit(&Group { commits, ..Group::default() }).await.unwrap()
}

/// Runs every rule, each on a fresh store from `make`.
pub async fn all<S: Store>(make: impl Fn() -> Arc<S>) {
    what_was_committed_is_found(&*make()).await;
    a_taken_key_writes_nothing(&*make()).await;
    only_the_expected_epoch_may_write(&*make()).await;
    a_read_that_changed_is_a_conflict(&*make()).await;
    a_range_that_changed_is_a_conflict(&*make()).await;
    a_conflict_spares_its_neighbours(&*make()).await;
    what_is_shared_commits_with_the_rest_or_not_at_all(&*make()).await;
    scans_are_ordered_bounded_and_scoped(&*make()).await;
    the_outbox_keeps_order_until_sent(&*make()).await;
    dead_letters_keep_every_body(&*make()).await;
    kept_messages_are_paged_and_go(&*make()).await;
    cleanup_spares_what_is_open(&*make()).await;
    a_sweep_takes_what_has_expired_and_nothing_else(&*make()).await;
    a_sweep_spares_the_younger_record_of_a_key(&*make()).await;
    records_are_paged(&*make()).await;
    the_feed_tells_of_each_commit_once_and_in_order(&*make()).await;
    the_feed_is_read_on_from_every_place(&*make()).await;
    the_feed_names_the_records_that_are_there(&*make()).await;
    notes_are_told_and_leave_the_record_as_it_is(&*make()).await;
    a_sweep_is_told_with_its_number_of_records(&*make()).await;
}

async fn what_was_committed_is_found(store: &impl Store) {
    assert_eq!(store.last_version().await.unwrap(), 0);
    assert_eq!(store.record(&key("a")).await.unwrap(), None);
    assert!(!store.is_processed(&key("a")).await.unwrap());
    assert_eq!(write(store, vec![commit("a", 5, &[("k", Some("v"))])]).await, [Verdict::Committed]);
    assert_eq!(store.record(&key("a")).await.unwrap(), Some(record(1, completed("a"))));
    assert!(store.is_processed(&key("a")).await.unwrap());
    assert_eq!(store.processed_result(&key("a")).await.unwrap().unwrap().data, "a");
    assert_eq!(store.view(&Scope::of("p")).get("k").await.unwrap(), (5, Some("v".into())));
    assert!(store.last_version().await.unwrap() >= 5);
    write(store, vec![commit("b", 6, &[("k", None)])]).await;
    assert_eq!(store.view(&Scope::of("p")).get("k").await.unwrap(), (0, None));
}

async fn a_taken_key_writes_nothing(store: &impl Store) {
    write(store, vec![commit("a", 1, &[("k", Some("first"))])]).await;
    let verdicts = write(store, vec![commit("a", 2, &[("k", Some("second"))])]).await;
    assert_eq!(verdicts, [Verdict::EpochMismatch(Some(Box::new(record(1, completed("a")))))]);
    assert_eq!(store.view(&Scope::of("p")).get("k").await.unwrap(), (1, Some("first".into())));
    // Also inside one group: the second of two deliveries finds the first one's record.
    let verdicts = write(store, vec![commit("b", 3, &[]), commit("b", 4, &[("k", Some("twice"))])]).await;
    assert!(matches!(verdicts[..], [Verdict::Committed, Verdict::EpochMismatch(Some(_))]));
    assert_eq!(store.view(&Scope::of("p")).get("k").await.unwrap().0, 1);
}

async fn only_the_expected_epoch_may_write(store: &impl Store) {
    let due = |epoch| record(epoch, RecordState::RetryDue { error: "e".into(), at_ms: 9 });
    let put =
        |expected, record| Commit { expected, record: RecordChange::Put(Arc::new(record)), ..commit("a", 1, &[]) };
    let at = |epoch, record| put(Expected::Epoch(epoch), record);
    assert_eq!(write(store, vec![at(1, due(2))]).await, [Verdict::EpochMismatch(None)]);
    assert_eq!(write(store, vec![put(Expected::Absent, due(1))]).await, [Verdict::Committed]);
    assert_eq!(write(store, vec![at(1, due(2))]).await, [Verdict::Committed]);
    assert_eq!(write(store, vec![at(1, due(2))]).await, [Verdict::EpochMismatch(Some(Box::new(due(2))))]);
    // A stale owner may not forget it either.
    let gone = |expected| Commit { expected, record: RecordChange::Remove, ..commit("a", 1, &[]) };
    assert_eq!(write(store, vec![gone(Expected::Epoch(1))]).await, [Verdict::EpochMismatch(Some(Box::new(due(2))))]);
    // Without a record to write, what is there stays byte for byte.
    for expected in [Expected::Epoch(2), Expected::Anything] {
        let untouched = Commit { expected, record: RecordChange::Keep, ..commit("a", 4, &[]) };
        assert_eq!(write(store, vec![untouched]).await, [Verdict::Committed]);
        assert_eq!(store.record(&key("a")).await.unwrap(), Some(due(2)));
    }
    // Forgotten, the key is free again, also inside one group.
    let again = put(Expected::Absent, due(1));
    assert_eq!(write(store, vec![gone(Expected::Epoch(2)), again]).await, [Verdict::Committed, Verdict::Committed]);
    assert_eq!(store.record(&key("a")).await.unwrap(), Some(due(1)));
    assert_eq!(write(store, vec![gone(Expected::Anything)]).await, [Verdict::Committed]);
    assert_eq!(store.record(&key("a")).await.unwrap(), None);
}

async fn a_read_that_changed_is_a_conflict(store: &impl Store) {
    write(store, vec![commit("a", 1, &[("k", Some("1"))])]).await;
    let reading = |name, version, read: u64| Commit {
        reads: ReadSet { keys: BTreeMap::from([("k".to_owned(), read)]), ranges: Vec::new() },
        ..commit(name, version, &[("k", Some("2"))])
    };
    assert_eq!(write(store, vec![reading("b", 2, 0)]).await, [Verdict::Conflict]);
    assert_eq!(store.record(&key("b")).await.unwrap(), None);
    // Two of one group that read the same version: the second has read what is no longer so.
    let verdicts = write(store, vec![reading("b", 2, 1), reading("c", 3, 1), reading("d", 4, 2)]).await;
    assert_eq!(verdicts, [Verdict::Committed, Verdict::Conflict, Verdict::Committed]);
    assert_eq!(store.view(&Scope::of("p")).get("k").await.unwrap().0, 4);
}

async fn a_range_that_changed_is_a_conflict(store: &impl Store) {
    write(store, vec![commit("a", 1, &[("k/1", Some("x"))])]).await;
    let reading = |name: &str, version, seen: &[(&str, u64)]| Commit {
        reads: ReadSet {
            keys: BTreeMap::new(),
            ranges: vec![RangeRead {
                start: "k/".into(),
                end: Some("k0".into()),
                limit: 10,
                seen: seen.iter().map(|(key, version)| ((*key).to_owned(), *version)).collect(),
            }],
        },
        ..commit(name, version, &[("k/2", Some("y"))])
    };
    assert_eq!(write(store, vec![reading("b", 2, &[])]).await, [Verdict::Conflict]);
    assert_eq!(write(store, vec![reading("b", 2, &[("k/1", 1)])]).await, [Verdict::Committed]);
    assert_eq!(write(store, vec![reading("c", 3, &[("k/1", 1)])]).await, [Verdict::Conflict], "a phantom");
}

async fn a_conflict_spares_its_neighbours(store: &impl Store) {
    let stale = Commit {
        reads: ReadSet { keys: BTreeMap::from([("k".to_owned(), 77)]), ranges: Vec::new() },
        ..commit("b", 2, &[("from-b", Some("x"))])
    };
    let verdicts = write(store, vec![commit("a", 1, &[]), stale, commit("c", 3, &[])]).await;
    assert_eq!(verdicts, [Verdict::Committed, Verdict::Conflict, Verdict::Committed]);
    assert!(store.record(&key("a")).await.unwrap().is_some() && store.record(&key("c")).await.unwrap().is_some());
    assert_eq!(store.record(&key("b")).await.unwrap(), None);
    assert_eq!(store.view(&Scope::of("p")).get("from-b").await.unwrap(), (0, None));
}

/// A commit that also rests on, and writes, an entry of the state that no processor owns.
fn with_shared(commit: Commit, reads: Version, value: Option<&str>) -> Commit {
    let entry = |value: Option<&str>| value.map(|value| value.to_owned().into());
    let shared = SharedChange {
        reads: [("lock/x".to_owned(), reads)].into(),
        writes: [("lock/x".to_owned(), entry(value))].into(),
    };
    Commit { shared: Some(Box::new(shared)), ..commit }
}

async fn what_is_shared_commits_with_the_rest_or_not_at_all(store: &impl Store) {
    let (message_key, shared) = (store.view(&Scope::of("p")), store.view(&Scope::of("p").shared()));
    let first = with_shared(commit("m-1", 1, &[("a", Some("1"))]), 0, Some("one"));
    assert_eq!(write(store, vec![first]).await, [Verdict::Committed]);
    assert_eq!(shared.get("lock/x").await.unwrap(), (1, Some("one".into())));
    assert_eq!(message_key.get("lock/x").await.unwrap(), (0, None), "it is no processor's");
    assert_eq!(store.view(&Scope::of("q").shared()).get("lock/x").await.unwrap().0, 1, "and every processor's");
    // In one group: who rests on what is no longer so, who does not, and who rests on what the one
    // before has changed.
    let late = with_shared(commit("m-2", 2, &[("b", Some("2"))]), 0, Some("two"));
    let fits = with_shared(commit("m-3", 3, &[("c", Some("3"))]), 1, Some("three"));
    let too_late = with_shared(commit("m-4", 4, &[("d", Some("4"))]), 1, Some("four"));
    let verdicts = write(store, vec![late, fits, too_late]).await;
    assert_eq!(verdicts, [Verdict::Conflict, Verdict::Committed, Verdict::Conflict]);
    assert_eq!(shared.get("lock/x").await.unwrap(), (3, Some("three".into())));
    for (name, key) in [("m-2", "b"), ("m-4", "d")] {
        assert_eq!(message_key.get(key).await.unwrap(), (0, None), "{key}");
        assert_eq!(store.record(&self::key(name)).await.unwrap(), None, "{name}");
    }
    let gone = with_shared(commit("m-5", 5, &[]), 3, None);
    assert_eq!(write(store, vec![gone]).await, [Verdict::Committed]);
    assert_eq!(shared.get("lock/x").await.unwrap().1, None);
    assert_eq!(shared.scan("", None, 10).await.unwrap(), []);
}

async fn scans_are_ordered_bounded_and_scoped(store: &impl Store) {
    write(store, vec![commit("a", 1, &[("b", Some("2")), ("a", Some("1")), ("c", Some("3")), ("c/d", Some("4"))])])
        .await;
    let mut other = commit("x", 2, &[("b", Some("other"))]);
    other.key = RecordKey::by_message_id(&Scope::of("p2"), &Message::new("a", "/s", "t"));
    write(store, vec![other]).await;
    let view = store.view(&Scope::of("p"));
    let keys = async |start: &str, end: Option<&str>, limit| {
        let entries = view.scan(start, end, limit).await.unwrap();
        entries.into_iter().map(|(key, ..)| key).collect::<Vec<_>>()
    };
    assert_eq!(keys("", None, 10).await, ["a", "b", "c", "c/d"]);
    assert_eq!(keys("b", Some("c/"), 10).await, ["b", "c"]);
    assert_eq!(keys("", None, 2).await, ["a", "b"]);
    assert_eq!(keys("c", Some("a"), 10).await, [""; 0]);
    assert_eq!(store.view(&Scope::of("p2")).scan("", None, 9).await.unwrap(), [("b".into(), 2, "other".into())]);
}

async fn the_outbox_keeps_order_until_sent(store: &impl Store) {
    let sending = |name: &str, version, count: usize| {
        let mut commit = commit(name, version, &[]);
        let outgoing = |n| Outgoing { kind: format!("{name}{n}"), ..Outgoing::default() };
        commit.effects.outgoing = (0..count).map(outgoing).collect();
        commit
    };
    write(store, vec![sending("b", 1, 2), sending("a", 2, 1)]).await;
    let rows = store.pending(None, 10).await.unwrap();
    let kinds = |rows: &[hapax_core::OutboxRow]| rows.iter().map(|r| r.message.kind.clone()).collect::<Vec<_>>();
    assert_eq!(kinds(&rows), ["b0", "b1", "a0"]);
    assert_eq!(rows[1].message.id, key("b").outgoing_id(1));
    assert_eq!(kinds(&store.pending(Some(rows[0].position), 1).await.unwrap()), ["b1"]);
    store.commit(&Group { sent: vec![rows[1].position], ..Group::default() }).await.unwrap();
    assert_eq!(kinds(&store.pending(None, 10).await.unwrap()), ["b0", "a0"]);
    assert_eq!(store.outbox_len().await.unwrap(), 2);
    assert_eq!(store.facts().await.unwrap().outbox_pending, 2);
    // One at least, however few bytes are asked for.
    assert_eq!(kinds(&store.pending_within(None, 10, 0).await.unwrap()), ["b0"]);
    assert_eq!(kinds(&store.pending_within(None, 10, 1 << 20).await.unwrap()), ["b0", "a0"]);
    // What is requeued comes last, and is the message that it was.
    let requeued = Some(Box::new(rows[1].message.clone()));
    write(store, vec![Commit { requeued, ..sending("c", 3, 1) }]).await;
    let again = store.pending(None, 10).await.unwrap();
    assert_eq!(kinds(&again), ["b0", "a0", "c0", "b1"]);
    assert_eq!(again[3].message, rows[1].message);
    assert!(store.last_version().await.unwrap() >= 2);
}

fn held_message(digest: u8) -> HeldMessage {
    HeldMessage {
        message: Message::new("a", "/s", "t").with_data("text/plain", vec![digest]),
        fingerprint: Fingerprint { version: 1, digest: [digest; 16] },
        position: None,
        hold_reason: HoldReason::Dead,
        error: "e".into(),
        attempts: 1,
        component: "c".into(),
        at_ms: 4,
    }
}

async fn dead_letters_keep_every_body(store: &impl Store) {
    let dead = record(1, RecordState::DeadLettered { error: "e".into() });
    let put = |digest| Some(HeldChange::Put(Box::new(held_message(digest))));
    let first = Commit { record: RecordChange::Put(dead.into()), held_message: put(1), ..commit("a", 1, &[]) };
    let other_body = Commit { held_message: put(2), version: 2, ..Commit::of(&key("a")) };
    assert_eq!(write(store, vec![first, other_body]).await, [Verdict::Committed, Verdict::Committed]);
    assert_eq!(store.held_under(&key("a")).await.unwrap(), [held_message(1), held_message(2)]);
    assert_eq!(store.held_under(&key("ab")).await.unwrap(), []);
}

async fn kept_messages_are_paged_and_go(store: &impl Store) {
    let put = |name: &str, digest, version| Commit {
        held_message: Some(HeldChange::Put(Box::new(held_message(digest)))),
        version,
        ..Commit::of(&key(name))
    };
    write(store, vec![put("a", 1, 1), put("b", 3, 2), put("a", 2, 3)]).await;
    let at = |name, digest| HeldKey { record: key(name), fingerprint: [digest; 16] };
    let all = [(at("a", 1), held_message(1)), (at("a", 2), held_message(2)), (at("b", 3), held_message(3))];
    assert_eq!(store.held_messages(None, None, 9).await.unwrap(), all);
    assert_eq!(store.facts().await.unwrap().held_messages, 3);
    assert_eq!(store.held_messages(Some("p"), None, 2).await.unwrap(), all[..2]);
    assert_eq!(store.held_messages(Some("p"), Some(&at("a", 1)), 9).await.unwrap(), all[1..]);
    assert_eq!(store.held_messages(Some("other"), None, 9).await.unwrap(), []);
    let gone = Commit {
        held_message: Some(HeldChange::Remove(held_message(1).fingerprint)),
        version: 4,
        ..Commit::of(&key("a"))
    };
    // Twice: what is not there may go as well.
    assert_eq!(write(store, vec![gone.clone(), gone]).await, [Verdict::Committed, Verdict::Committed]);
    assert_eq!(store.held_messages(None, None, 1).await.unwrap(), all[1..2]);
    assert_eq!(store.held_messages(None, None, 9).await.unwrap(), all[1..]);
    assert_eq!(store.facts().await.unwrap().held_messages, 2);
}

async fn cleanup_spares_what_is_open(store: &impl Store) {
    let states = [
        ("done", completed("")),
        ("dead", RecordState::DeadLettered { error: "e".into() }),
        ("due", RecordState::RetryDue { error: "e".into(), at_ms: 1 }),
        ("running", RecordState::InProgress { owner: "o".into(), lease_end_ms: 1 }),
        ("undoing", RecordState::Compensating { error: "e".into() }),
        ("stuck", RecordState::CompensationFailed { error: "e".into() }),
    ];
    let commits = (1..).zip(states).map(|(version, (name, state))| Commit {
        record: RecordChange::Put(record(1, state).into()),
        ..commit(name, version, &[("state", Some("stays"))])
    });
    write(store, commits.collect()).await;
    assert_eq!(store.cleanup(2, 10).await.unwrap(), 0, "changed at 2 is not before 2");
    assert_eq!(store.cleanup(3, 1).await.unwrap(), 1);
    assert_eq!(store.cleanup(3, 10).await.unwrap(), 1);
    assert_eq!(store.cleanup(u64::MAX, 10).await.unwrap(), 0);
    let left = store.records(None, None, 10).await.unwrap();
    let mut left: Vec<_> = left.iter().map(|(key, _)| &*key.key).collect();
    left.sort_unstable();
    assert_eq!(left, ["due", "running", "stuck", "undoing"]);
    assert!(store.view(&Scope::of("p")).get("state").await.unwrap().1.is_some());
}

/// Names of all records; also brings a store that writes behind to where a sweep finds them.
async fn names(store: &impl Store) -> Vec<String> {
    let mut names: Vec<_> =
        store.records(None, None, 100).await.unwrap().into_iter().map(|(key, _)| key.key.to_string()).collect();
    names.sort_unstable();
    names
}

async fn a_sweep_takes_what_has_expired_and_nothing_else(store: &impl Store) {
    let dead = RecordState::DeadLettered { error: "e".into() };
    let cases = [
        ("dead", dead.clone(), Some(1_000)),
        ("done", completed(""), Some(1_000)),
        ("due", RecordState::RetryDue { error: "e".into(), at_ms: 1 }, Some(1_000)),
        ("for-ever", completed(""), None),
        ("later", completed(""), Some(500_000)),
        ("running", RecordState::InProgress { owner: "o".into(), lease_end_ms: 1 }, Some(1_000)),
        ("stuck", RecordState::CompensationFailed { error: "e".into() }, Some(1_000)),
        ("undoing", RecordState::Compensating { error: "e".into() }, Some(1_000)),
    ];
    for (version, (name, state, expires_ms)) in (1..).zip(cases) {
        let mut commit = commit(name, version, &[("state", Some("stays"))]);
        commit.effects.outgoing = vec![Outgoing { kind: name.into(), ..Outgoing::default() }];
        commit.held_message = (state == dead).then(|| HeldChange::Put(Box::new(held_message(7))));
        commit.record = RecordChange::Put(Record { expires_ms, ..record(1, state) }.into());
        assert_eq!(write(store, vec![commit]).await, [Verdict::Committed]);
    }
    let all = ["dead", "done", "due", "for-ever", "later", "running", "stuck", "undoing"];
    for (now_ms, went, left) in [
        (999, 0, &all[..]),
        // Long after the first retention's end, and just before the second's.
        (499_999, 2, &["due", "for-ever", "later", "running", "stuck", "undoing"]),
        (1_000_000, 1, &["due", "for-ever", "running", "stuck", "undoing"]),
        (u64::MAX, 0, &["due", "for-ever", "running", "stuck", "undoing"]),
    ] {
        assert_eq!(names(store).await.len() as u64, went + left.len() as u64);
        assert_eq!(store.sweep(now_ms).await.unwrap(), went, "swept at {now_ms}");
        assert_eq!(names(store).await, left, "left at {now_ms}");
        for name in all {
            let found = store.record(&key(name)).await.unwrap().is_some();
            assert_eq!(found, left.contains(&name), "{name} at {now_ms}");
        }
    }
    let unsent = store.pending(None, 100).await.unwrap();
    assert_eq!(unsent.len(), all.len(), "what is not sent stays, whatever becomes of its record");
    assert_eq!(
        store.held_under(&key("dead")).await.unwrap(),
        [held_message(7)],
        "a dead letter waits for its operator"
    );
    assert!(store.view(&Scope::of("p")).get("state").await.unwrap().1.is_some());
    assert_eq!(write(store, vec![commit("done", 20, &[])]).await, [Verdict::Committed], "a swept key is free again");
}

async fn a_sweep_spares_the_younger_record_of_a_key(store: &impl Store) {
    let until = |epoch, expires_ms| Record { expires_ms: Some(expires_ms), ..record(epoch, completed("")) };
    let first = Commit { record: RecordChange::Put(until(1, 1_000).into()), ..commit("a", 1, &[]) };
    write(store, vec![first]).await;
    assert_eq!(names(store).await, ["a"]);
    let record = RecordChange::Put(until(2, 900_000).into());
    let again = Commit { expected: Expected::Epoch(1), record, ..commit("a", 2, &[]) };
    assert_eq!(write(store, vec![again]).await, [Verdict::Committed]);
    for _ in 0..2 {
        store.sweep(500_000).await.unwrap();
        assert_eq!(store.record(&key("a")).await.unwrap().map(|record| record.epoch), Some(2));
        assert_eq!(names(store).await, ["a"], "one record a key, wherever it stands");
    }
    store.sweep(2_000_000).await.unwrap();
    assert_eq!(store.record(&key("a")).await.unwrap(), None);
}

async fn records_are_paged(store: &impl Store) {
    write(store, vec![commit("b", 1, &[]), commit("a", 2, &[]), commit("c", 3, &[])]).await;
    let mut other = commit("a", 4, &[]);
    other.key = RecordKey::by_message_id(&Scope::of("p2"), &Message::new("a", "/s", "t"));
    write(store, vec![other]).await;
    let names = async |processor, after: Option<&RecordKey>, limit| {
        let page = store.records(processor, after, limit).await.unwrap();
        page.into_iter().map(|(key, _)| format!("{}{}", key.scope.processor, key.key)).collect::<Vec<_>>()
    };
    assert_eq!(names(None, None, 10).await, ["pa", "pb", "pc", "p2a"]);
    assert_eq!(names(Some("p"), Some(&key("a")), 10).await, ["pb", "pc"]);
    assert_eq!(names(Some("p2"), None, 10).await, ["p2a"]);
    assert_eq!(names(Some("p"), None, 1).await, ["pa"]);
}

async fn feed(store: &impl Store) -> Vec<FeedEvent> {
    let page = store.events(None, None, 1_000).await.unwrap();
    assert!(!page.truncated);
    page.events
}

async fn the_feed_tells_of_each_commit_once_and_in_order(store: &impl Store) {
    assert_eq!(feed(store).await, []);
    let put = |record| RecordChange::Put(Record { changed_ms: 50, ..record }.into());
    let redriven = {
        let event = RecordEvent::Redriven { at_ms: 40 };
        let entry = HistoryEntry { event, at_ms: 40, epoch: 4, attempts: 0, component: "c".into(), expires_ms: None };
        let due = record(4, RecordState::RetryDue { error: "e".into(), at_ms: 40 });
        Record { attempts: 0, history: vec![entry], ..due }
    };
    let kept = |hold_reason| Some(HeldChange::Put(Box::new(HeldMessage { hold_reason, ..held_message(1) })));
    let gone = || Some(HeldChange::Remove(held_message(1).fingerprint));
    let only = |held_message| Commit { record: RecordChange::Keep, held_message, at_ms: 60, ..Commit::of(&key("a")) };
    let change = |record, held_message| Commit { record, held_message, at_ms: 60, ..Commit::of(&key("a")) };
    let dead = record(3, RecordState::DeadLettered { error: "e".into() });
    let cases = [
        (only(kept(HoldReason::Parked { awaits: 1, until_ms: 9 })), FeedEventKind::Parked, 60, 1, 0),
        (only(kept(HoldReason::Dead)), FeedEventKind::DeadLettered, 60, 1, 0),
        (
            change(put(record(1, RecordState::RetryDue { error: "e".into(), at_ms: 9 })), None),
            FeedEventKind::Failed,
            50,
            1,
            1,
        ),
        (
            change(put(record(2, RecordState::InProgress { owner: "o".into(), lease_end_ms: 9 })), None),
            FeedEventKind::Claimed,
            50,
            1,
            2,
        ),
        (change(put(dead), kept(HoldReason::Dead)), FeedEventKind::DeadLettered, 50, 1, 3),
        (change(put(redriven), kept(HoldReason::Redriven)), FeedEventKind::Redriven, 50, 0, 4),
        (only(kept(HoldReason::Redriven)), FeedEventKind::Redriven, 60, 1, 0),
        (change(put(record(5, completed(""))), gone()), FeedEventKind::Completed, 50, 1, 5),
        (only(gone()), FeedEventKind::Discarded, 60, 0, 0),
        (
            Commit { expected: Expected::Epoch(5), ..change(RecordChange::Remove, None) },
            FeedEventKind::Evicted,
            60,
            0,
            5,
        ),
    ];
    let mut told = Vec::new();
    for (version, (commit, kind, at_ms, attempts, epoch)) in (1..).zip(cases) {
        told.push(FeedEntry { kind, digest: key("a").digest(), at_ms, attempts, epoch, times: 1 });
        // What is not committed is not told; nor is what touches neither a record nor a kept
        // message.
        let taken = Commit { expected: Expected::Epoch(99), version, ..commit.clone() };
        let state_only = Commit { record: RecordChange::Keep, ..self::commit("b", version, &[("k", Some("v"))]) };
        let verdicts = write(store, vec![taken, state_only, Commit { version, ..commit }]).await;
        assert!(
            matches!(verdicts[..], [Verdict::EpochMismatch(_), Verdict::Committed, Verdict::Committed]),
            "{verdicts:?}"
        );
        let now: Vec<_> = feed(store).await.into_iter().map(|event| event.entry).collect();
        assert_eq!(now, told);
    }
}

async fn the_feed_is_read_on_from_every_place(store: &impl Store) {
    let name = |number: u64| format!("m-{number}");
    for number in 0..40 {
        let one = |number: u64| commit(&name(number), number + 1, &[]);
        write(store, vec![one(2 * number), one(2 * number + 1)]).await;
    }
    let all = feed(store).await;
    let digests: Vec<_> = all.iter().map(|event| event.entry.digest).collect();
    assert_eq!(digests, (0..80).map(|number| key(&name(number)).digest()).collect::<Vec<_>>());
    assert!(all.is_sorted_by(|one, next| one.cursor < next.cursor), "places only grow");
    for (seen, event) in (1..).zip(&all) {
        let after: Cursor = event.cursor.to_string().parse().unwrap();
        let page = store.events(None, Some(after), 3).await.unwrap();
        assert_eq!((&page.events[..], page.truncated), (&all[seen..all.len().min(seen + 3)], false));
    }
    let end = all.last().map(|event| event.cursor);
    assert_eq!(store.events(None, end, 9).await.unwrap().next(end), end);
    // A place that the feed has not come to is another store's: nothing may be skipped without a
    // word.
    let ahead = Cursor { sequence: 1_000, index: 0 };
    let page = store.events(None, Some(ahead), 9).await.unwrap();
    assert_eq!((page.events.len(), page.truncated), (0, true));
    let of = store.events(Some(key(&name(7)).digest()), None, 9).await.unwrap();
    assert_eq!(of.events, all[7..8]);
    assert_eq!(store.events(Some(key(&name(7)).digest()), Some(all[7].cursor), 9).await.unwrap().events, []);
    assert_eq!(feed(store).await, all, "places never change");
}

async fn the_feed_names_the_records_that_are_there(store: &impl Store) {
    let parked = Some(HeldChange::Put(Box::new(held_message(1))));
    write(
        store,
        vec![commit("a", 1, &[]), commit("b", 2, &[]), Commit { held_message: parked, ..Commit::of(&key("c")) }],
    )
    .await;
    let keys = async || feed(store).await.into_iter().map(|event| event.key).collect::<Vec<_>>();
    assert_eq!(keys().await, [Some(key("a")), Some(key("b")), None]);
    write(store, vec![Commit { record: RecordChange::Remove, ..Commit::of(&key("a")) }]).await;
    assert_eq!(keys().await, [None, Some(key("b")), None, None]);
    write(store, vec![commit("a", 4, &[])]).await;
    assert_eq!(keys().await, [Some(key("a")), Some(key("b")), None, Some(key("a")), Some(key("a"))]);
}

async fn notes_are_told_and_leave_the_record_as_it_is(store: &impl Store) {
    write(store, vec![commit("a", 1, &[])]).await;
    let before = store.record(&key("a")).await.unwrap();
    let note = |kind, times| FeedEntry { digest: key("a").digest(), ..FeedEntry::of_many(kind, times, 70) };
    let notes = vec![note(FeedEventKind::Replayed, 3), note(FeedEventKind::Stale, 1)];
    let alone = Group { feed_entries: notes.clone(), ..Group::default() };
    assert_eq!(store.commit(&alone).await.unwrap(), []);
    let beside = Group { commits: vec![commit("b", 2, &[])], feed_entries: notes[..1].to_vec(), ..Group::default() };
    assert_eq!(store.commit(&beside).await.unwrap(), [Verdict::Committed]);
    let told = store.events(Some(key("a").digest()), None, 9).await.unwrap().events;
    let entries: Vec<_> = told.iter().map(|event| event.entry).collect();
    assert_eq!(entries[1..], [notes[0], notes[1], notes[0]]);
    assert_eq!(feed(store).await.len(), 5);
    assert_eq!(store.record(&key("a")).await.unwrap(), before);
}

async fn a_sweep_is_told_with_its_number_of_records(store: &impl Store) {
    let until = |name, version, expires_ms| Commit {
        record: RecordChange::Put(Record { expires_ms: Some(expires_ms), ..record(1, completed("")) }.into()),
        ..commit(name, version, &[])
    };
    write(store, vec![until("a", 1, 1_000), until("b", 2, 1_000), until("c", 3, 1_000), until("d", 4, 900_000)]).await;
    names(store).await;
    let swept = async || {
        let events = feed(store).await;
        let swept: Vec<_> = events.into_iter().filter(|event| event.entry.kind == FeedEventKind::Swept).collect();
        assert!(swept.iter().all(|event| event.key.is_none() && event.entry.digest == 0));
        (swept.iter().map(|event| event.entry.times).sum::<u64>(), swept.last().map(|event| event.entry.at_ms))
    };
    store.sweep(999).await.unwrap();
    assert_eq!(swept().await, (0, None));
    for _ in 0..2 {
        store.sweep(500_000).await.unwrap();
        assert_eq!(swept().await, (3, Some(500_000)));
    }
    assert_eq!(names(store).await, ["d"]);
    // Where a record was in a bucket that is gone, and a new one of the same window comes, it
    // stands in a new bucket.
    write(store, vec![until("a", 5, 1_000)]).await;
    assert_eq!(names(store).await, ["a", "d"]);
    store.sweep(500_001).await.unwrap();
    assert_eq!(swept().await, (4, Some(500_001)));
}

/// A feed that keeps no more than eight events, as `store` does, says what it has dropped.
pub async fn a_feed_that_is_full_says_what_it_has_dropped(store: &impl Store) {
    let mut cursors = Vec::new();
    for number in 0..30_u64 {
        write(store, vec![commit(&format!("m-{number}"), number + 1, &[])]).await;
        // Also brings the event to where it counts.
        names(store).await;
        cursors.push(store.events(None, cursors.last().copied(), 9).await.unwrap().next(None).unwrap());
        let page = store.events(None, None, 99).await.unwrap();
        let dropped = cursors.len() - page.events.len();
        assert!(page.events.len() <= 8, "{} events are kept", page.events.len());
        assert_eq!(page.events.len().min(1), 1, "the last one is kept");
        assert_eq!(page.truncated, dropped > 0);
        for (place, cursor) in cursors.iter().enumerate() {
            let rest = store.events(None, Some(*cursor), 99).await.unwrap();
            let found: Vec<_> = rest.events.iter().map(|event| event.cursor).collect();
            assert_eq!(found, cursors[dropped.max(place + 1)..], "after {cursor}");
            // After the last one that was dropped, nothing is missing.
            assert_eq!(rest.truncated, place + 1 < dropped, "after {cursor}, {dropped} dropped");
        }
    }
}
