//! The suites that every source and every publisher must pass, over a way to make one. A third
//! party's transport can run them, too.

use std::collections::BTreeSet;

use futures_util::FutureExt as _;
use hapax_core::{Message, Publisher, Received, Source, TransportError};

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
/// - After `Ok` every message of the batch is at the other side, in order.
/// - A batch that comes again is accepted, under the same ids, also by a publisher that is made
///   anew.
/// - An empty batch is accepted and sends nothing.
pub async fn publisher<P: Publisher>(open: impl Fn() -> P, ids: impl Fn() -> Vec<String>) {
    let batch = |ids: &[&str]| ids.iter().map(|id| Message::new(*id, "/source", "kind")).collect::<Vec<_>>();
    let mut publisher = open();
    publisher.publish(&[]).await.unwrap();
    assert_eq!(ids(), [""; 0], "an empty batch");
    publisher.publish(&batch(&["a", "b"])).await.unwrap();
    assert_eq!(ids(), ["a", "b"]);
    publisher.publish(&batch(&["a", "b"])).await.unwrap();
    publisher.publish(&batch(&["c"])).await.unwrap();
    drop(publisher);
    open().publish(&batch(&["c", "d"])).await.unwrap();
    let all = ids();
    assert_eq!(all.iter().map(String::as_str).collect::<BTreeSet<_>>(), BTreeSet::from(["a", "b", "c", "d"]));
    let first = |id: &str| all.iter().position(|one| one == id);
    assert!(first("a") < first("b") && first("b") < first("c") && first("c") < first("d"), "{all:?}");
}

/// Checks that a publisher whose other side is away says so, and not that it needs a person: the
/// relay tries again then.
pub async fn publisher_that_is_away(publisher: &mut impl Publisher) {
    let error = publisher.publish(&[Message::new("a", "/source", "kind")]).await.unwrap_err();
    assert!(matches!(error, TransportError::Unavailable(_)), "{error:?}");
}

/// Checks that a publisher whose other side refuses a message says that it needs a person: trying
/// again would not help.
pub async fn publisher_that_is_refused(publisher: &mut impl Publisher) {
    let error = publisher.publish(&[Message::new("a", "/source", "kind")]).await.unwrap_err();
    assert!(matches!(error, TransportError::Broken(_)), "{error:?}");
}
