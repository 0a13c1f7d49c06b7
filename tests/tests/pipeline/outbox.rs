//! The outbox and a destination that refuses messages: each becomes a dead letter, the others go
//! on, and an operator decides. On both stores, with the relay alone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use hapax_core::{
    Actor, AfterRefusal, BATCH_BYTES_MAX, Commit, Committer, Effects, Message, Operator, OperatorAction, OperatorError,
    OutboxAction, OutboxRelay, Outgoing, Published, Publisher, RecordKey, Refusal, RefusedMessage, RefusedMessages,
    RelayError, RelayStatus, Scope, SendAnswer, Store, TransportError, Unavailable,
};
use hapax_store::MemoryStore;
use hapax_tests::backend::LossyDisk;
use hapax_tests::mutations;
use hapax_tests::stepped::{SteppedClock, eventually, let_others_run};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A destination that refuses some messages, by their data. Cloning shares it.
#[derive(Clone, Default)]
struct Destination {
    refused: Arc<Mutex<BTreeSet<String>>>,
    received: Arc<Mutex<Vec<Message>>>,
    /// Bytes of the largest batch.
    largest: Arc<AtomicU64>,
    /// Answers to come instead, the last one first.
    away: Arc<Mutex<Vec<Unavailable>>>,
}

impl Destination {
    fn refuse(&self, labels: &[&str]) {
        *self.refused.lock() = labels.iter().map(|label| (*label).to_owned()).collect();
    }

    fn labels(&self) -> Vec<String> {
        self.received.lock().iter().map(label).collect()
    }
}

fn label(message: &Message) -> String {
    String::from_utf8(message.data.iter().copied().take(9).collect()).unwrap()
}

impl Publisher for Destination {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<Published, TransportError>> {
        let bytes = batch.iter().map(|message| message.data.len() as u64).sum();
        self.largest.fetch_max(bytes, Ordering::SeqCst);
        if let Some(unavailable) = self.away.lock().pop() {
            return Box::pin(std::future::ready(Ok(Published::none(batch.len(), unavailable))));
        }
        let mut published = Published::all(batch.len());
        let mut stopped = BTreeSet::new();
        for (message, answer) in batch.iter().zip(&mut published.answers) {
            assert!(message.headers.is_empty(), "what the outbox keeps beside a message stays inside");
            let key = message.extensions.get("partitionkey");
            if key.is_some_and(|key| stopped.contains(key)) {
                *answer = SendAnswer::NotSent;
            } else if self.refused.lock().contains(&label(message)) {
                stopped.extend(key);
                let text = format!("no to {}", label(message)).into();
                *answer = SendAnswer::Refused(Refusal { destination: "there".into(), status: Some(422), text });
            } else {
                self.received.lock().push(message.clone());
            }
        }
        Box::pin(std::future::ready(Ok(published)))
    }
}

/// A store, its committer, its operator, and a relay to a destination.
struct House {
    store: Arc<dyn Store>,
    committer: Arc<Committer>,
    clock: SteppedClock,
    destination: Destination,
    status: Arc<RelayStatus>,
    written: AtomicU64,
}

struct Relay {
    stop: watch::Sender<bool>,
    running: JoinHandle<Result<u64, RelayError>>,
}

impl Relay {
    /// Stops the relay when nothing more can be sent; the number of messages delivered.
    async fn finish(self) -> u64 {
        self.stop.send_replace(true);
        self.running.await.unwrap().unwrap()
    }
}

impl House {
    async fn on(store: Arc<dyn Store>) -> Self {
        let committer = Committer::start(store.clone()).await.unwrap();
        let (destination, status) = Default::default();
        Self { store, committer, clock: SteppedClock::at(5), destination, status, written: AtomicU64::new(0) }
    }

    /// Commits one message after the other: `k1` has the ordering key `k`, `-1` has none.
    async fn send(&self, labels: &[&str]) {
        for label in labels {
            self.send_data(label, label.as_bytes().to_vec()).await;
        }
    }

    async fn send_data(&self, label: &str, data: Vec<u8>) {
        let number = self.written.fetch_add(1, Ordering::SeqCst);
        let key = RecordKey::new(Scope::of("p"), "/s".into(), number.to_string().into());
        let mut outgoing = Outgoing { kind: "t".into(), data: data.into(), ..Outgoing::default() };
        if let Some(ordering_key) = label.strip_suffix(|c: char| c.is_ascii_digit()).filter(|key| *key != "-") {
            outgoing.extensions.insert("partitionkey".into(), ordering_key.into());
        }
        let effects = Effects { outgoing: vec![outgoing], ..Effects::default() };
        self.committer.submit(Commit { effects, ..Commit::of(&key) }).durable().await.unwrap();
    }

    fn relay(&self, policy: AfterRefusal) -> Relay {
        let (store, committer, clock) = (self.store.clone(), self.committer.clone(), Arc::new(self.clock.clone()));
        let relay = OutboxRelay::new(store, committer, Box::new(self.destination.clone()), clock);
        let (stop, stopped) = watch::channel(false);
        let relay = relay.after_refusal(policy).reporting_to(self.status.clone());
        Relay { stop, running: tokio::spawn(relay.run(stopped)) }
    }

    /// Sends all that can be sent; the labels that arrived since the last call, in order.
    async fn sent(&self, policy: AfterRefusal) -> Vec<String> {
        self.relay(policy).finish().await;
        let labels = self.destination.labels();
        self.destination.received.lock().clear();
        labels
    }

    async fn refused(&self) -> Vec<RefusedMessage> {
        let mut refused = RefusedMessages::new(&*self.store).list(None, 10_000).await.unwrap();
        refused.sort_by_key(|letter| letter.position);
        refused
    }

    /// Does this to the refused message with these words in its refusal.
    async fn act(&self, action: OutboxAction, error: &str) -> Result<(), OperatorError> {
        let letter = self.refused().await.into_iter().find(|letter| letter.error == error).unwrap();
        self.act_on(action, &letter.id).await
    }

    async fn act_on(&self, action: OutboxAction, id: &str) -> Result<(), OperatorError> {
        let operator = Operator::new(self.store.clone(), self.committer.clone(), Arc::new(self.clock.clone()), []);
        let by = Actor { actor: "ada".into(), reason: "a test".into() };
        operator.perform(&OperatorAction::Outbox(action, id.to_owned()), &by).await
    }

    async fn pending(&self) -> Vec<String> {
        self.store.pending(None, 1_000).await.unwrap().iter().map(|row| label(&row.message)).collect()
    }

    async fn trail(&self) -> Vec<String> {
        let operator = Operator::new(self.store.clone(), self.committer.clone(), Arc::new(self.clock.clone()), []);
        let lines = operator.trail("p", 100).await.unwrap().into_iter();
        lines.map(|line| format!("{} {}", line.actor, line.action)).collect()
    }
}

async fn houses() -> [House; 2] {
    let redb = LossyDisk::new().open().unwrap();
    [House::on(Arc::new(MemoryStore::default())).await, House::on(Arc::new(redb)).await]
}

const PASS: AfterRefusal = AfterRefusal::Pass;
const WAIT: AfterRefusal = AfterRefusal::Wait;

/// Proves G164.
#[tokio::test]
async fn what_is_refused_leaves_the_outbox_as_a_dead_letter_and_the_others_go_on() {
    for house in houses().await {
        house.destination.refuse(&["b1", "-2"]);
        house.send(&["a1", "b1", "-1", "-2", "-3", "b2", "c1"]).await;
        let ids: Vec<_> = house.store.pending(None, 100).await.unwrap().into_iter().map(|row| row.message.id).collect();
        assert_eq!(house.sent(PASS).await, ["a1", "-1", "-3", "c1", "b2"]);
        assert_eq!(house.pending().await, [""; 0]);
        let refused = house.refused().await;
        let facts: Vec<_> =
            refused.iter().map(|letter| (&*letter.id, &*letter.error, letter.ordering_key.as_deref())).collect();
        assert_eq!(facts, [(&*ids[1], "no to b1", Some("b")), (&*ids[3], "no to -2", None)]);
        let RefusedMessage { processor, kind, destination, status, at_ms, .. } = &refused[0];
        assert_eq!((&**processor, &**kind, &**destination, *status, *at_ms), ("p", "t", "there", Some(422), 5));
        let (letter, message) = RefusedMessages::new(&*house.store).find(&ids[1]).await.unwrap().unwrap();
        assert_eq!((letter, label(&message), &message.id), (refused[0].clone(), "b1".to_owned(), &ids[1]));
        assert_eq!(RefusedMessages::new(&*house.store).count(1).await.unwrap(), 1, "as far as it was asked to count");
    }
}

/// Proves G167.
#[tokio::test]
async fn what_is_redriven_is_sent_again_under_its_id() {
    for house in houses().await {
        house.destination.refuse(&["-1", "b1"]);
        house.send(&["-1", "b1", "b2"]).await;
        assert_eq!(house.sent(PASS).await, ["b2"]);
        let [first, second] = <[RefusedMessage; 2]>::try_from(house.refused().await).unwrap();
        house.act_on(OutboxAction::Redrive, &first.id).await.unwrap();
        assert_eq!((house.pending().await, house.refused().await), (vec!["-1".to_owned()], vec![second.clone()]));
        let again = house.act_on(OutboxAction::Redrive, &first.id).await.unwrap_err();
        assert!(matches!(again, OperatorError::NotFound { what: "refused message", .. }), "{again:?}");
        // Refused again, it is dead again, in its old place.
        assert_eq!(house.sent(PASS).await, [""; 0]);
        assert_eq!(house.refused().await, [first.clone(), second]);
        house.destination.refuse(&[]);
        house.clock.advance(1);
        house.act_on(OutboxAction::Redrive, &first.id).await.unwrap();
        house.relay(PASS).finish().await;
        assert_eq!(house.destination.received.lock()[0].id, first.id);
        house.act(OutboxAction::Discard, "no to b1").await.unwrap();
        assert_eq!((house.pending().await, house.refused().await), (vec![], vec![]));
        assert_eq!(house.trail().await.len(), 3, "{:?}", house.trail().await);
        assert!(house.trail().await.iter().all(|line| line.starts_with("ada outbox-")));
    }
}

/// Proves G168.
#[tokio::test]
async fn others_of_its_key_wait_behind_a_refused_message_and_nobody_else_does() {
    for house in houses().await {
        house.destination.refuse(&["a2"]);
        house.send(&["a1", "a2", "b1", "a3", "-1", "a4", "b2"]).await;
        assert_eq!(house.sent(WAIT).await, ["a1", "b1", "-1", "b2"]);
        assert_eq!(house.pending().await, ["a3", "a4"]);
        // Another process, as it were; and more of the key.
        house.send(&["a5", "b3"]).await;
        assert_eq!(house.sent(WAIT).await, ["b3"]);
        house.act(OutboxAction::Redrive, "no to a2").await.unwrap();
        assert_eq!(house.sent(WAIT).await, [""; 0], "it is refused again");
        house.destination.refuse(&[]);
        house.act(OutboxAction::Redrive, "no to a2").await.unwrap();
        assert_eq!(house.sent(WAIT).await, ["a2", "a3", "a4", "a5"]);
        assert_eq!((house.pending().await, house.refused().await), (vec![], vec![]));
        // A key is free again once it is through.
        house.send(&["a6"]).await;
        assert_eq!(house.sent(WAIT).await, ["a6"]);
    }
}

/// Proves G168.
#[tokio::test]
async fn several_of_one_key_go_in_their_order_whatever_the_order_of_the_redrives() {
    for house in houses().await {
        house.destination.refuse(&["a1"]);
        house.send(&["a1", "a2", "a3"]).await;
        assert_eq!(house.sent(WAIT).await, [""; 0]);
        // Under the other policy more of the key are refused.
        house.destination.refuse(&["a2", "a3"]);
        assert_eq!(house.sent(PASS).await, [""; 0]);
        house.destination.refuse(&[]);
        house.send(&["a4"]).await;
        for (redriven, expected) in [("a3", [].as_slice()), ("a1", &["a1"]), ("a2", &["a2", "a3", "a4"])] {
            house.act(OutboxAction::Redrive, &format!("no to {redriven}")).await.unwrap();
            assert_eq!(house.sent(WAIT).await, expected, "after {redriven}");
        }
    }
}

#[tokio::test]
async fn a_running_relay_goes_on_when_an_operator_has_decided() {
    for house in houses().await {
        let relay = house.relay(WAIT);
        house.destination.refuse(&["a1", "b1"]);
        house.send(&["a1", "a2", "b1", "b2", "-1"]).await;
        eventually("what can be sent is sent", || house.destination.labels() == ["-1"]).await;
        house.act(OutboxAction::Discard, "no to a1").await.unwrap();
        eventually("a goes on", || house.destination.labels() == ["-1", "a2"]).await;
        house.destination.refuse(&[]);
        house.act(OutboxAction::Redrive, "no to b1").await.unwrap();
        eventually("b goes on", || house.destination.labels() == ["-1", "a2", "b1", "b2"]).await;
        assert_eq!(relay.finish().await, 4);
    }
}

/// Proves G168.
#[tokio::test]
async fn more_keys_are_refused_than_the_relay_remembers() {
    const KEYS: usize = 4_200;
    let house = House::on(Arc::new(MemoryStore::default())).await;
    let labels: Vec<_> = (0..2 * KEYS).map(|number| format!("key-{:04}{}", number % KEYS, number / KEYS)).collect();
    let labels: Vec<_> = labels.iter().map(String::as_str).collect();
    house.destination.refuse(&labels[..KEYS]);
    house.send(&labels).await;
    house.send(&["-1"]).await;
    assert_eq!(house.sent(WAIT).await, ["-1"]);
    house.act(OutboxAction::Discard, &format!("no to {}", labels[7])).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(house.sent(WAIT).await, [labels[KEYS + 7]]);
}

#[tokio::test]
async fn a_batch_is_bounded_in_bytes() {
    for house in houses().await {
        for number in 0..40 {
            house.send_data("-", (number.to_string() + &" ".repeat(1_000_000)).into_bytes()).await;
        }
        house.send_data("-", vec![b'x'; BATCH_BYTES_MAX + 1]).await;
        assert_eq!(house.sent(PASS).await.len(), 41);
        let largest = house.destination.largest.load(Ordering::SeqCst);
        assert_eq!(largest, BATCH_BYTES_MAX as u64 + 1, "the one message that is larger");
    }
}

/// Proves G170.
#[tokio::test]
async fn a_destination_that_says_when_is_left_alone_until_then() {
    let house = House::on(Arc::new(MemoryStore::default())).await;
    let asked = Unavailable { retry_after_ms: Some(7_000), ..Unavailable::for_now("overloaded") };
    let wrong = Unavailable { is_misconfigured: true, ..Unavailable::for_now("nothing is there") };
    *house.destination.away.lock() = vec![wrong, asked];
    house.send(&["-1", "-2"]).await;
    let relay = house.relay(PASS);
    let is_left_alone = |reason: &str| {
        let trouble = house.status.trouble();
        house.clock.asleep() == 1 && trouble.is_some_and(|trouble| *trouble.reason == *reason)
    };
    eventually("it is left alone", || is_left_alone("overloaded")).await;
    house.clock.advance(6_999);
    let_others_run().await;
    assert!(is_left_alone("overloaded") && house.destination.away.lock().len() == 1);
    house.clock.advance(1);
    eventually("it was asked again", || is_left_alone("nothing is there")).await;
    let trouble = house.status.trouble().unwrap();
    assert_eq!((trouble.is_misconfigured, trouble.since_ms, trouble.failures), (true, 5, 2));
    house.clock.advance(200);
    eventually("all is sent", || house.destination.labels() == ["-1", "-2"]).await;
    eventually("that is over", || house.status.trouble().is_none()).await;
    assert_eq!(relay.finish().await, 2);
}

mutations! {
    mutation_a_refused_message_is_forgotten_is_found:
        what_is_refused_leaves_the_outbox_as_a_dead_letter_and_the_others_go_on is red with "refused-is-forgotten";
    mutation_others_of_the_key_pass_is_found:
        others_of_its_key_wait_behind_a_refused_message_and_nobody_else_does is red with "key-passes-its-refusal";
    mutation_a_redriven_message_has_another_id_is_found:
        what_is_redriven_is_sent_again_under_its_id is red with "redriven-under-another-id";
}
