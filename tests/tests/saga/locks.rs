//! Locks: one holder at a time, fences that only grow, also over restarts, and a fence that is
//! checked where it counts: at the commit.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapax_core::{
    Acquired, Committer, DistributedLock as _, Group, Handling, IdempotencyStorage, IdempotentConsumer, Lock,
    LockRequest, Message, Options, Outcome, Record, RecordKey, Scope, StateView, StoreError, StoreLocks, Verdict,
    Version,
};
use hapax_store::{MemoryStore, RedbStore};
use hapax_tests::owners::{BEGINS_MS, Owners};
use hapax_tests::plans::{Op, Reply, call, plan};
use hapax_tests::stepped::SteppedClock;
use tokio::sync::Semaphore;

struct Locks {
    clock: SteppedClock,
    locks: StoreLocks,
}

async fn locks_of(storage: Arc<dyn IdempotencyStorage>, clock: SteppedClock) -> Locks {
    let committer = Committer::start(storage.clone()).await.unwrap();
    let locks = StoreLocks::new(&*storage, committer, Arc::new(clock.clone()), &Scope::of("any"));
    Locks { clock, locks }
}

impl Locks {
    async fn acquire(&self, owner: &str) -> Acquired {
        self.locks.acquire(LockRequest { name: "till", owner, ttl_ms: 100 }).await.unwrap()
    }

    async fn held(&self, owner: &str) -> Lock {
        match self.acquire(owner).await {
            Acquired::Held(lock) => lock,
            Acquired::Busy { retry_after_ms } => panic!("{owner} is put off for {retry_after_ms} ms"),
        }
    }
}

fn start() -> SteppedClock {
    SteppedClock::at(BEGINS_MS)
}

#[tokio::test]
async fn one_holds_a_lock_until_it_gives_it_back_or_its_time_is_over() {
    let locks = locks_of(Arc::new(MemoryStore::default()), start()).await;
    let one = locks.held("one").await;
    locks.clock.advance(40);
    assert_eq!(locks.acquire("two").await, Acquired::Busy { retry_after_ms: 60 });
    let again = locks.held("one").await;
    assert!(again.fence > one.fence, "who holds it gets it anew, under a new fence");
    locks.locks.release(&again).await.unwrap();
    let two = locks.held("two").await;
    assert!(two.fence > again.fence);
    // The first holder is late: what it gives back is no longer its own.
    locks.locks.release(&again).await.unwrap();
    assert!(matches!(locks.acquire("one").await, Acquired::Busy { .. }));
    locks.clock.advance(100);
    let one = locks.held("one").await;
    assert!(one.fence > two.fence, "its time is over");
    assert_eq!(locks.locks.extend(&two, 100).await.unwrap(), None, "what is lost is not extended");
}

#[tokio::test]
async fn a_lock_that_is_extended_is_held_for_longer() {
    let locks = locks_of(Arc::new(MemoryStore::default()), start()).await;
    let one = locks.held("one").await;
    locks.clock.advance(90);
    let extended = locks.locks.extend(&one, 100).await.unwrap().expect("it is held");
    assert_eq!(extended.fence, one.fence);
    locks.clock.advance(90);
    assert_eq!(locks.acquire("two").await, Acquired::Busy { retry_after_ms: 10 });
}

#[tokio::test]
async fn fences_grow_over_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let mut fences = Vec::new();
    for _ in 0..3 {
        let store = Arc::new(RedbStore::open(&folder.path().join("store")).unwrap());
        let locks = locks_of(store, start()).await;
        let lock = locks.held("one").await;
        fences.push(lock.fence);
        locks.locks.release(&lock).await.unwrap();
    }
    assert_eq!(fences, [1, 2, 3]);
}

/// A store whose commits wait until the test lets them through.
struct Gated {
    store: MemoryStore,
    gate: Semaphore,
}

impl IdempotencyStorage for Gated {
    fn record<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.record(key)
    }

    fn commit<'a>(&'a self, group: &'a Group) -> BoxFuture<'a, Result<Vec<Verdict>, StoreError>> {
        Box::pin(async move {
            drop(self.gate.acquire().await);
            self.store.commit(group).await
        })
    }

    fn view(&self, scope: &Scope) -> Arc<dyn StateView> {
        self.store.view(scope)
    }

    fn last_version(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        self.store.last_version()
    }

    fn cleanup(&self, older_than_ms: u64, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.store.cleanup(older_than_ms, limit)
    }

    fn sweep(&self, now_ms: u64) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.store.sweep(now_ms)
    }
}

/// Both have seen that nobody holds it when they write.
/// Proves G124.
#[tokio::test]
async fn of_two_that_ask_at_once_one_gets_it() {
    let store = Arc::new(Gated { store: MemoryStore::default(), gate: Semaphore::new(0) });
    let locks = locks_of(store.clone(), start()).await;
    let (mut one, mut two) = (Box::pin(locks.acquire("one")), Box::pin(locks.acquire("two")));
    assert!(futures_util::poll!(&mut one).is_pending() && futures_util::poll!(&mut two).is_pending());
    store.gate.add_permits(1);
    let mut both = [one.await, two.await];
    both.sort_by_key(|acquired| matches!(acquired, Acquired::Held(_)));
    assert!(matches!(both, [Acquired::Busy { .. }, Acquired::Held(_)]), "{both:?}");
}

fn processor(world: &Owners, name: &str) -> IdempotentConsumer {
    world.consumer(name, Options { backoff_base_ms: 1, ..Options::default() })
}

fn locks(name: &str) -> Op {
    Op::Lock(name.into(), 100)
}

async fn output(processor: &IdempotentConsumer, message: Message) -> String {
    match processor.handle(message, Handling::default()).await.unwrap() {
        Outcome::Completed { output } => String::from_utf8(output.data.to_vec()).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Its lock runs out while it runs, and somebody else has it meanwhile: nothing that it made of
/// what it saw is committed.
/// Proves G89, G124.
#[tokio::test]
async fn who_has_lost_its_lock_does_not_commit_on_it() {
    let world = Owners::new().await;
    let (p, q) = (processor(&world, "p"), processor(&world, "q"));
    world.books.reply("/slow", &[Reply::Held]);
    let slow = tokio::spawn({
        let p = p.clone();
        async move { output(&p, plan("m-1", &[locks("till"), call("/slow"), Op::Set("by".into(), "m-1".into())])).await }
    });
    world.books.arrival("/slow").await;
    world.clock.leap(BEGINS_MS + 101);
    assert_eq!(output(&q, plan("m-2", &[locks("till")])).await, "2");
    world.books.let_go();
    assert_eq!(slow.await.unwrap(), "3 200", "it ran again, under a lock that it held to the end");
    assert_eq!(world.books.arrived().len(), 1, "and was answered from its journal");
}

#[tokio::test]
async fn a_message_gives_its_locks_back_however_it_ends() {
    let world = Owners::new().await;
    let (p, q) = (processor(&world, "p"), processor(&world, "q"));
    assert_eq!(output(&p, plan("m-1", &[locks("till")])).await, "1");
    assert_eq!(output(&q, plan("m-2", &[locks("till")])).await, "2");
    let rejected = p.handle(plan("m-3", &[locks("till"), Op::Reject]), Handling::default()).await.unwrap();
    assert!(matches!(rejected, Outcome::DeadLettered { .. }), "{rejected:?}");
    assert_eq!(output(&q, plan("m-4", &[locks("till")])).await, "4");
    let nameless = p.handle(plan("m-5", &[locks("")]), Handling::default()).await.unwrap();
    assert!(matches!(&nameless, Outcome::DeadLettered { error } if error.contains("1 to 256")), "{nameless:?}");
}

/// Somebody else's lock is a failure that passes: the message is tried again.
/// Proves G88.
#[tokio::test]
async fn who_finds_a_lock_taken_is_told_when_to_come_again() {
    let world = Owners::new().await;
    let (p, q) = (processor(&world, "p"), processor(&world, "q"));
    world.books.reply("/slow", &[Reply::Held]);
    let slow = tokio::spawn({
        let p = p.clone();
        async move { output(&p, plan("m-1", &[locks("till"), call("/slow")])).await }
    });
    world.books.arrival("/slow").await;
    world.clock.leap(BEGINS_MS + 30);
    let handling = Handling { wait_in_flight: true, retry_here: false };
    let put_off = q.handle(plan("m-2", &[locks("till")]), handling).await.unwrap();
    assert!(matches!(&put_off, Outcome::Retry { error, after_ms: 70 } if error == "busy"), "{put_off:?}");
    world.books.let_go();
    assert_eq!(slow.await.unwrap(), "1 200");
}

hapax_tests::mutations! {
    mutation_a_lock_that_is_written_blindly_is_found: of_two_that_ask_at_once_one_gets_it is red with "lock-written-blindly";
    mutation_a_fence_that_is_not_checked_is_found: who_has_lost_its_lock_does_not_commit_on_it is red with "fence-unchecked";
}
