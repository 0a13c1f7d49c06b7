//! Tests of lanes, table in flight, overlay and committer under shuttle: the same code, one
//! interleaving of its threads after the other. A deadlock is a failure too: no task waits for
//! ever. A failing test prints its schedule.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use shuttle::future::{block_on, spawn};

use crate::commit::committer::Committer;
use crate::commit::overlay::Overlay;
use crate::message::key::{RecordKey, Scope};
use crate::pipeline::in_flight::InFlight;
use crate::pipeline::lanes::Lanes;
use crate::record::Record;
use crate::run::context::Context;
use crate::state::{EffectLimits, Effects, Entry, ReadSet, StateView, Version};
use crate::store::IdempotencyStorage;
use crate::store::commit::{Commit, Group, Verdict};
use crate::support::error::StoreError;
use crate::support::sync::Mutex;

#[path = "../../../tests/src/mutation.rs"]
#[expect(unreachable_pub, reason = "it is the library of tests that has it")]
mod mutation;

/// Runs the test under many interleavings: few by default, `HAPAX_CASES` for the long form.
fn explore(test: impl Fn() + Send + Sync + 'static) {
    let cases = std::env::var("HAPAX_CASES").map_or(2_000, |cases| cases.parse().unwrap());
    shuttle::check_pct(test, cases, 3);
}

/// Counts the tasks inside; more than one at a time is a failure.
#[derive(Default)]
struct Alone(AtomicUsize);

impl Alone {
    fn inside(&self) {
        assert_eq!(self.0.fetch_add(1, SeqCst), 0, "two at a time");
        shuttle::thread::yield_now();
        self.0.fetch_sub(1, SeqCst);
    }
}

fn turns_come_in_order() {
    let (lanes, alone) = (Lanes::default(), Arc::new(Alone::default()));
    let entered = Arc::new(Mutex::new(0));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let walkers: Vec<_> = (0..4)
        .map(|walker| {
            let (lanes, alone, entered, seen) = (lanes.clone(), alone.clone(), entered.clone(), seen.clone());
            spawn(async move {
                let (number, place) = {
                    let mut entered = entered.lock();
                    *entered += 1;
                    (*entered, lanes.enter("a"))
                };
                let turn = place.turn();
                if walker == 0 {
                    // This task gives its place up, with or without having had the turn.
                    drop(turn);
                    return;
                }
                let turn = turn.await;
                alone.inside();
                seen.lock().push(number);
                drop(turn);
            })
        })
        .collect();
    walkers.into_iter().for_each(|walker| block_on(walker).unwrap());
    let seen = seen.lock();
    assert!(seen.len() == 3 && seen.is_sorted(), "turns came as {seen:?}");
    assert!(lanes.is_empty(), "a lane is left");
}

/// Two threads enter a lane that is empty: no other lock orders them.
fn one_turn_at_a_time() {
    let (lanes, alone) = (Lanes::default(), Arc::new(Alone::default()));
    let walkers: Vec<_> = (0..3)
        .map(|_| {
            let (lanes, alone) = (lanes.clone(), alone.clone());
            spawn(async move {
                let turn = lanes.enter("a").turn().await;
                alone.inside();
                drop(turn);
            })
        })
        .collect();
    walkers.into_iter().for_each(|walker| block_on(walker).unwrap());
}

fn one_leads_at_a_time() {
    let (table, alone) = (InFlight::default(), Arc::new(Alone::default()));
    let runners: Vec<_> = (0..3)
        .map(|_| {
            let (table, alone) = (table.clone(), alone.clone());
            spawn(async move {
                let key = RecordKey::new(Scope::of("p"), "/s".into(), "k".into());
                let leading = loop {
                    match table.enter(&key) {
                        Ok(leading) => break leading,
                        Err(following) => following.ended().await,
                    }
                };
                alone.inside();
                drop(leading);
            })
        })
        .collect();
    runners.into_iter().for_each(|runner| block_on(runner).unwrap());
}

/// A store that trusts the overlay: it checks nothing, so that errors which the overlay lets pass
/// are seen.
#[derive(Default)]
struct Trusting {
    state: Mutex<BTreeMap<String, (Version, Bytes)>>,
    written: Mutex<Vec<Version>>,
}

/// Shuttle's threads need the store behind an `Arc` of its own.
#[derive(Clone, Default)]
struct Shared(Arc<Trusting>);

impl IdempotencyStorage for Shared {
    fn record<'a>(&'a self, _: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(ready(Ok(None)))
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        for commit in &group.commits {
            self.0.written.lock().push(commit.version);
            for (key, value) in &commit.effects.writes {
                let value = value.clone().unwrap();
                self.0.state.lock().insert(key.clone(), (commit.version, value));
            }
        }
        Box::pin(ready(Ok(vec![Verdict::Committed; group.commits.len()])))
    }

    fn view(&self, _: &Scope) -> Arc<dyn StateView> {
        Arc::new(self.clone())
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        Box::pin(ready(Ok(0)))
    }

    fn cleanup(&self, _: u64, _: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(ready(Ok(0)))
    }

    fn sweep(&self, _: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(ready(Ok(0)))
    }
}

impl StateView for Shared {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Version, Option<Bytes>), StoreError>> {
        let entry = self.0.state.lock().get(key).cloned();
        Box::pin(ready(Ok(entry.map_or((0, None), |(version, value)| (version, Some(value))))))
    }

    fn scan<'a>(&'a self, _: &'a str, _: Option<&'a str>, _: usize) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(ready(Ok(Vec::new())))
    }
}

fn key(number: usize) -> RecordKey {
    RecordKey::new(Scope::of("p"), "/s".into(), number.to_string().into())
}

fn each_commit_has_one_verdict_in_order() {
    let store = Shared::default();
    let committer = block_on(Committer::start(Arc::new(store.clone()))).unwrap();
    let submitters: Vec<_> = (0..3)
        .map(|number| {
            let committer = committer.clone();
            spawn(async move { [0, 1].map(|second| committer.submit(Commit::of(&key(2 * number + second)))) })
        })
        .collect();
    let pending: Vec<_> = submitters.into_iter().flat_map(|submitter| block_on(submitter).unwrap()).collect();
    committer.close();
    // All commits were submitted before the committer was closed: none of them may be lost.
    for pending in pending {
        assert_eq!(block_on(pending.durable()).unwrap(), Verdict::Committed);
    }
    assert_eq!(*store.0.written.lock(), [1, 2, 3, 4, 5, 6], "written in the order of the versions");
    assert!(block_on(committer.submit(Commit::of(&key(9))).durable()).is_err(), "a closed committer says so");
}

/// Closes the committer while others submit: each commit is written or refused, and every written
/// commit was reported as committed.
fn closing_loses_no_verdict() {
    let store = Shared::default();
    let committer = block_on(Committer::start(Arc::new(store.clone()))).unwrap();
    let submitters: Vec<_> = (0..2)
        .map(|number| {
            let committer = committer.clone();
            spawn(async move { committer.submit(Commit::of(&key(number))).durable().await.is_ok() })
        })
        .collect();
    committer.close();
    let written = submitters.into_iter().map(|submitter| block_on(submitter).unwrap());
    let written = written.filter(|written| *written).count();
    assert_eq!(store.0.written.lock().len(), written);
}

/// Adds one to a counter as the pipeline does: read, check in a turn, hand over, wait; again after
/// a conflict.
async fn add_one(overlay: &Arc<Overlay>, view: &Arc<dyn StateView>, committer: &Committer, number: usize) {
    loop {
        let running = overlay.begin();
        let mut context = Context::new(view.clone(), Arc::new(EffectLimits::default()));
        let before = context.get("count").await.unwrap();
        shuttle::thread::yield_now();
        context.set("count", vec![before.map_or(0, |before| before[0]) + 1]).unwrap();
        let (reads, effects): (_, Effects) = context.finish();
        let commit = Commit { reads, effects, ..Commit::of(&key(number)) };
        let room = committer.room(&commit).await;
        let pending = match overlay.turn(&commit.reads, false, None) {
            Ok(mut turn) => committer.submit_in_turn(Box::new(commit), room, overlay, &mut turn),
            Err(_) => continue,
        };
        drop(running);
        assert_eq!(pending.durable().await.unwrap(), Verdict::Committed);
        return;
    }
}

fn no_write_is_lost() {
    let store = Shared::default();
    let committer = block_on(Committer::start(Arc::new(store.clone()))).unwrap();
    let overlay = Arc::new(Overlay::default());
    let view = overlay.over(store.view(&Scope::of("p")));
    let runs: Vec<_> = (0..3)
        .map(|number| {
            let (overlay, view, committer) = (overlay.clone(), view.clone(), committer.clone());
            spawn(async move { add_one(&overlay, &view, &committer, number).await })
        })
        .collect();
    runs.into_iter().for_each(|run| block_on(run).unwrap());
    committer.close();
    assert_eq!(store.0.state.lock()["count"].1[0], 3, "a write was lost");
    assert!(overlay.is_empty(), "the overlay keeps what is durable");
}

/// Commits of one group give their room back together.
fn room_is_given_back() {
    let committer = block_on(Committer::start(Arc::new(Shared::default()))).unwrap();
    let overlay = Arc::new(Overlay::default());
    let pending: Vec<_> = (0..3)
        .map(|number| {
            let commit = Box::new(Commit::of(&key(number)));
            let room = block_on(committer.room(&commit));
            let mut turn = overlay.turn(&ReadSet::default(), false, None).unwrap();
            committer.submit_in_turn(commit, room, &overlay, &mut turn)
        })
        .collect();
    committer.close();
    assert!(pending.into_iter().all(|pending| block_on(pending.durable()).is_ok()));
    assert!(committer.all_room_is_free(), "room is lost");
}

macro_rules! explored {
    ($($test:ident: $scenario:ident, $mutation:ident is $name:literal;)*) => {$(
        #[test]
        fn $test() {
            explore($scenario);
        }

        #[test]
        fn $mutation() {
            mutation::turns_red(module_path!(), stringify!($test), $name);
        }
    )*};
}

explored! {
    shuttle_turns_come_in_order_and_a_place_given_up_passes_on: turns_come_in_order,
        mutation_turn_lost_with_who_gave_up_is_found is "turn-lost-with-who-gave-up";
    shuttle_one_turn_of_a_lane_at_a_time: one_turn_at_a_time,
        mutation_lane_entered_in_two_steps_is_found is "lane-entered-in-two-steps";
    shuttle_one_leads_at_a_time_and_nobody_waits_for_ever: one_leads_at_a_time,
        mutation_in_flight_entered_in_two_steps_is_found is "in-flight-entered-in-two-steps";
    shuttle_each_commit_has_one_verdict_in_the_order_of_versions: each_commit_has_one_verdict_in_order,
        mutation_version_taken_before_the_turn_is_found is "version-taken-before-the-turn";
    shuttle_no_write_is_lost_between_runs: no_write_is_lost,
        mutation_overlay_pruned_early_is_found is "overlay-pruned-early";
    shuttle_closing_loses_no_verdict: closing_loses_no_verdict,
        mutation_close_loses_a_verdict_is_found is "close-loses-a-verdict";
    shuttle_the_room_of_a_group_is_given_back_whole: room_is_given_back,
        mutation_room_that_is_kept_is_found is "room-kept";
}
