//! The suites that every source and every publisher must pass, over a way to make one. A third
//! party's transport can run them, too.

use std::collections::BTreeSet;

use futures_util::FutureExt as _;
use hapax_core::{Message, Published, Publisher, Received, SendAnswer, Source};

/// The input of the source suite: two messages, a piece of input that is no message, one more
/// message.
pub const IDS: [&str; 3] = ["m-1", "m-2", "m-3"];

/// The way in which a delivery is settled.
#[derive(Debug, Clone, Copy)]
enum Settle {
    Ack,
    Nack,
    DeadLetter,
}

/// Checks a source whose input holds the messages [`IDS`], with one piece of input between the
/// second and the third that is no message.
///
/// - Messages come in the order of the input, once each, and the end is told.
/// - Input that is no message is reported in its place, with its position and a reason, and stops
///   nothing.
/// - A `recv` that is dropped loses nothing.
/// - Every way to settle a delivery succeeds.
pub async fn source<S: Source>(open: impl Fn() -> S) {
    for settle in [Settle::Ack, Settle::Nack, Settle::DeadLetter] {
        assert_eq!(received(&mut open(), settle, false).await, ["m-1", "m-2", "invalid", "m-3"], "{settle:?}");
    }
    assert_eq!(received(&mut open(), Settle::Ack, true).await, ["m-1", "m-2", "invalid", "m-3"], "dropped futures");
}

async fn received(source: &mut impl Source, settle: Settle, drops: bool) -> Vec<String> {
    let mut received = Vec::new();
    loop {
        // Polled once and dropped: it may have been ready, which is an answer as any other.
        let early = if drops { source.recv().now_or_never() } else { None };
        let next = match early {
            Some(answer) => answer,
            None => source.recv().await,
        };
        match next.unwrap() {
            None => return received,
            Some(Received::Invalid { position, reason }) => {
                assert!(!position.is_empty() && !reason.is_empty(), "{position}: {reason}");
                received.push("invalid".to_owned());
            }
            Some(Received::Delivery(delivery)) => {
                received.push(delivery.message().id.clone());
                match settle {
                    Settle::Ack => delivery.ack().await.unwrap(),
                    Settle::Nack => delivery.nack(1).await.unwrap(),
                    Settle::DeadLetter => delivery.dead_letter("a test").await.unwrap(),
                }
            }
        }
    }
}

/// Checks a publisher; `ids` reads what the other side has, in the order in which it came.
///
/// - What is answered as delivered is at the other side, in order.
/// - A batch that comes again is accepted, under the same ids, also by a publisher that is made
///   anew.
/// - An empty batch is accepted and sends nothing.
/// - Each message of a batch has an answer. What is not taken at once is taken later: the first one
///   always is.
pub async fn publisher<P: Publisher>(open: impl Fn() -> P, ids: impl Fn() -> Vec<String>) {
    let batch = |ids: &[&str]| ids.iter().map(|id| Message::new(*id, "/source", "kind")).collect::<Vec<_>>();
    let mut publisher = open();
    delivered(&mut publisher, &[]).await;
    assert_eq!(ids(), [""; 0], "an empty batch");
    delivered(&mut publisher, &batch(&["a", "b"])).await;
    assert_eq!(ids(), ["a", "b"]);
    delivered(&mut publisher, &batch(&["a", "b"])).await;
    delivered(&mut publisher, &batch(&["c"])).await;
    drop(publisher);
    delivered(&mut open(), &batch(&["c", "d"])).await;
    let all = ids();
    assert_eq!(all.iter().map(String::as_str).collect::<BTreeSet<_>>(), BTreeSet::from(["a", "b", "c", "d"]));
    let first = |id: &str| all.iter().position(|one| one == id);
    assert!(first("a") < first("b") && first("b") < first("c") && first("c") < first("d"), "{all:?}");
}

/// Sends until the whole batch is delivered.
async fn delivered(publisher: &mut impl Publisher, mut batch: &[Message]) {
    loop {
        let Published { answers, unavailable } = publisher.publish(batch).await.unwrap();
        assert_eq!((answers.len(), unavailable), (batch.len(), None));
        let taken = answers.iter().take_while(|answer| **answer == SendAnswer::Delivered).count();
        assert!(answers[taken..].iter().all(|answer| *answer == SendAnswer::NotSent), "{answers:?}");
        batch = &batch[taken..];
        if batch.is_empty() {
            return;
        }
        assert!(taken > 0, "nothing of it was taken");
    }
}

/// Checks that a publisher whose other side is away says so, and answers for no message: the relay
/// tries again then.
pub async fn publisher_that_is_away(publisher: &mut impl Publisher) {
    let published = publisher.publish(&[Message::new("a", "/source", "kind")]).await.unwrap();
    let unavailable = published.unavailable.expect("a reason");
    assert!(!unavailable.reason.is_empty() && !unavailable.is_misconfigured, "{unavailable:?}");
    assert_eq!(published.answers, [SendAnswer::NotSent]);
}

/// Ids of the messages that the other side must refuse in [`publisher_that_is_refused`].
pub const REFUSED: [&str; 2] = ["refused-1", "refused-2"];

/// Checks a publisher whose other side refuses the messages [`REFUSED`] and takes all others.
///
/// - A refusal is the answer to its message alone, with a text and the destination: others of the
///   batch are delivered.
/// - Behind a refused message, no other of its ordering key is sent in the same batch.
/// - A refused message that comes again is refused again.
pub async fn publisher_that_is_refused(publisher: &mut impl Publisher, ids: impl Fn() -> Vec<String>) {
    let message = |id: &str, key: Option<&str>| {
        let mut message = Message::new(id, "/source", "kind");
        message.extensions = key.map(|key| ("partitionkey".into(), key.into())).into_iter().collect();
        message
    };
    let batch = [
        message("a", Some("k")),
        message(REFUSED[0], Some("k")),
        message("waits", Some("k")),
        message("b", Some("other")),
        message(REFUSED[1], None),
        message("c", None),
    ];
    let published = publisher.publish(&batch).await.unwrap();
    assert_eq!(published.unavailable, None);
    let letter = |answer: &SendAnswer| match answer {
        SendAnswer::Delivered => 'd',
        SendAnswer::NotSent => '-',
        SendAnswer::Refused(refusal) => {
            assert!(!refusal.text.is_empty() && !refusal.destination.is_empty(), "{refusal:?}");
            'r'
        }
    };
    assert_eq!(published.answers.iter().map(letter).collect::<String>(), "dr-drd");
    assert!(!ids().contains(&"waits".to_owned()), "{:?}", ids());
    let again = publisher.publish(&batch[1..2]).await.unwrap();
    assert!(matches!(again.answers[..], [SendAnswer::Refused(_)]) && again.unavailable.is_none(), "{again:?}");
}
