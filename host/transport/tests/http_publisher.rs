//! The outbox over HTTP, against a real server: what counts as delivered, what is refused, what is
//! tried again, and which answers are about the address.

use std::sync::{Arc, Mutex};

use axum::extract::State;
use bytes::Bytes;
use hapax_core::{Message, Published, Publisher as _, SendAnswer, Unavailable};
use hapax_transport::HttpPublisher;
use hapax_transport::cloudevents::binary;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// Requests that arrived, in order; the answers to come, 204 when that list is at its end; and the
/// headers of each answer.
#[derive(Clone, Default)]
struct Receiver {
    seen: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    answers: Arc<Mutex<Vec<u16>>>,
    headers: Arc<Mutex<HeaderMap>>,
}

async fn receive(State(receiver): State<Receiver>, headers: HeaderMap, body: Bytes) -> (StatusCode, HeaderMap, String) {
    receiver.seen.lock().expect("whole").push((headers, body));
    let status = receiver.answers.lock().expect("whole").pop().unwrap_or(204);
    let text = if status == 204 { String::new() } else { "because ".repeat(100) };
    (StatusCode::from_u16(status).expect("a status"), receiver.headers.lock().expect("whole").clone(), text)
}

impl Receiver {
    async fn start() -> (Self, HttpPublisher) {
        let receiver = Self::default();
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let url = format!("http://{}/hook?a=b", listener.local_addr().expect("an address"));
        let app = axum::Router::new().route("/hook", axum::routing::post(receive)).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        (receiver, HttpPublisher::new(&url).expect("a URL"))
    }

    /// The last answer comes first.
    fn answer(&self, backwards: &[u16]) {
        *self.answers.lock().expect("whole") = backwards.to_vec();
    }

    fn with_header(&self, name: &'static str, value: &'static str) {
        *self.headers.lock().expect("whole") =
            [(HeaderName::from_static(name), HeaderValue::from_static(value))].into_iter().collect();
    }

    fn take(&self) -> Vec<(HeaderMap, Bytes)> {
        std::mem::take(&mut self.seen.lock().expect("whole"))
    }

    fn ids(&self) -> Vec<String> {
        self.take().into_iter().map(|(headers, _)| headers["ce-id"].to_str().expect("ASCII").to_owned()).collect()
    }
}

fn batch(ids: &[&str]) -> Vec<Message> {
    ids.iter().map(|id| Message::new(*id, "/processors/p", "t").with_data("application/json", "{}")).collect()
}

#[tokio::test]
async fn a_message_arrives_whole_and_in_order() {
    let (receiver, mut publisher) = Receiver::start().await;
    let mut first = Message::new("id ö", "/s", "t").with_data("text/plain; charset=utf-8", "a\nb");
    first.subject = Some("50% of \"it\"".into());
    first.extensions.insert("partitionkey".into(), "p".into());
    let messages = [vec![first], batch(&["2", "3"])].concat();
    publisher.publish(&messages).await.expect("sent");
    let seen = receiver.take();
    assert_eq!(seen[1].0["idempotency-key"], "2");
    let read: Vec<_> = seen.into_iter().map(|(h, body)| binary::parse_binary(&h, body).expect("a message")).collect();
    assert_eq!(read, messages);
}

/// One letter an answer: delivered, refused, not sent.
fn letters(published: &Published) -> String {
    let letter = |answer: &SendAnswer| match answer {
        SendAnswer::Delivered => 'd',
        SendAnswer::Refused(_) => 'r',
        SendAnswer::NotSent => '-',
    };
    published.answers.iter().map(letter).collect()
}

fn why(published: &Published) -> &Unavailable {
    published.unavailable.as_ref().expect("it is not available")
}

/// Messages of these ordering keys; a space is none. The id is the index.
fn keyed(keys: &str) -> Vec<Message> {
    let message = |(index, key): (usize, char)| {
        let mut message = Message::new(index.to_string(), "/s", "t");
        if key != ' ' {
            message.extensions.insert("partitionkey".into(), key.into());
        }
        message
    };
    keys.chars().enumerate().map(message).collect()
}

#[tokio::test]
async fn what_was_delivered_of_a_batch_is_told() {
    let (receiver, mut publisher) = Receiver::start().await;
    for status in [408, 425, 429, 500, 503] {
        receiver.answer(&[status, 200]);
        let published = publisher.publish(&batch(&["1", "2", "3"])).await.expect("answers");
        assert_eq!(letters(&published), "d--", "{status}");
        let Unavailable { reason, retry_after_ms, is_misconfigured } = why(&published);
        assert!(reason.contains(&format!("answered {status} to message 2")), "{reason}");
        assert_eq!((*retry_after_ms, *is_misconfigured), (None, false));
        assert_eq!(receiver.ids(), ["1", "2"]);
    }
}

#[tokio::test]
async fn a_destination_says_when_to_come_again() {
    let (receiver, mut publisher) = Receiver::start().await;
    receiver.with_header("retry-after", "7");
    for status in [409, 429, 503] {
        receiver.answer(&[status]);
        let published = publisher.publish(&batch(&["1"])).await.expect("answers");
        assert_eq!((letters(&published).as_str(), why(&published).retry_after_ms), ("-", Some(7_000)), "{status}");
    }
}

#[tokio::test]
async fn a_refusal_is_the_messages_own_and_shows_the_answer() {
    let (receiver, mut publisher) = Receiver::start().await;
    for status in [400, 409, 413, 415, 422] {
        receiver.answer(&[200, status, 200]);
        let published = publisher.publish(&batch(&["1", "2", "3"])).await.expect("answers");
        assert_eq!((letters(&published).as_str(), &published.unavailable), ("drd", &None), "{status}");
        let SendAnswer::Refused(refusal) = &published.answers[1] else { unreachable!() };
        assert_eq!(refusal.status, Some(status));
        assert!(refusal.destination.ends_with("/hook?a=b"), "{refusal:?}");
        assert!(refusal.text.contains(&format!("answered {status} to message 2")), "{refusal:?}");
        assert_eq!(refusal.text.matches("because").count(), 25, "200 bytes of it");
        assert_eq!(receiver.ids(), ["1", "2", "3"]);
    }
}

#[tokio::test]
async fn what_the_receiver_has_settled_is_delivered() {
    let (receiver, mut publisher) = Receiver::start().await;
    for outcome in ["dead-lettered", "duplicate", "stale", "mismatch"] {
        receiver.with_header("hapax-settled", outcome);
        receiver.answer(&[422]);
        let published = publisher.publish(&batch(&["1", "2"])).await.expect("answers");
        assert_eq!(letters(&published), "dd", "{outcome}");
    }
}

#[tokio::test]
async fn behind_a_refused_message_no_other_of_its_key_is_sent() {
    let (receiver, mut publisher) = Receiver::start().await;
    // To `a`, `a`, `b`, none, `b`, `c`, none: the second of `a` and that of `c` are refused.
    receiver.answer(&[200, 404, 200, 200, 200, 422, 200]);
    let published = publisher.publish(&keyed("aab abac c")).await.expect("answers");
    assert_eq!((letters(&published).as_str(), &published.unavailable), ("drdd-d-rd-", &None));
    assert_eq!(receiver.ids(), ["0", "1", "2", "3", "5", "7", "8"]);
}

/// Proves G169.
#[tokio::test]
async fn an_answer_that_may_be_about_the_address_waits_for_another_one() {
    let (receiver, mut publisher) = Receiver::start().await;
    for (status, words) in
        [(401, "rights"), (403, "rights"), (404, "correct the URL"), (410, "correct the URL"), (307, "Redirects")]
    {
        // Everybody gets it: it is the address.
        receiver.answer(&[status; 20]);
        let published = publisher.publish(&keyed(&" ".repeat(20))).await.expect("answers");
        let told = why(&published);
        assert!(told.is_misconfigured && told.reason.contains(words) && told.reason.contains("because"), "{told:?}");
        assert_eq!((letters(&published), receiver.ids().len()), ("-".repeat(20), 8), "{status}");
        // Another message is taken: it was about the first ones.
        receiver.answer(&[200, status, status]);
        let published = publisher.publish(&keyed("aba ")).await.expect("answers");
        assert_eq!((letters(&published).as_str(), &published.unavailable), ("rr-d", &None), "{status}");
        assert_eq!(receiver.ids(), ["0", "1", "3"]);
        // One alone says nothing.
        receiver.answer(&[status]);
        let published = publisher.publish(&batch(&["1"])).await.expect("answers");
        assert!(letters(&published) == "-" && why(&published).is_misconfigured, "{published:?}");
        receiver.take();
    }
}

#[tokio::test]
async fn nobody_there_is_tried_again() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    drop(listener);
    let published = HttpPublisher::new(&url).expect("a URL").publish(&batch(&["1"])).await.expect("answers");
    assert!(why(&published).reason.contains("refused") && !why(&published).is_misconfigured, "{published:?}");
    assert_eq!(letters(&published), "-");
}

#[test]
fn a_url_that_cannot_work_is_refused() {
    for (url, words) in [
        ("https://h/", "TLS"),
        ("ftp://h/", "http://"),
        ("h:80", "http://"),
        ("/hook", "http://"),
        ("http://u:p@h/", "password"),
        ("http://a b/", "cannot be read"),
    ] {
        let error = HttpPublisher::new(url).map(drop).expect_err(url).to_string();
        assert!(error.contains(words) && error.contains(url), "{error}");
    }
}
