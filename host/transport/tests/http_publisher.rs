//! The outbox over HTTP, against a real server: what counts as sent, what is tried again, what
//! needs somebody's help.

use std::sync::{Arc, Mutex};

use axum::extract::State;
use bytes::Bytes;
use hapax_core::{Message, Publisher as _, TransportError};
use hapax_transport::HttpPublisher;
use hapax_transport::cloudevents::binary;
use http::{HeaderMap, StatusCode};

/// Requests that arrived, in order, and the answers to come; 204 when that list is at its end.
#[derive(Clone, Default)]
struct Receiver {
    seen: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    answers: Arc<Mutex<Vec<u16>>>,
}

async fn receive(State(receiver): State<Receiver>, headers: HeaderMap, body: Bytes) -> (StatusCode, String) {
    receiver.seen.lock().expect("whole").push((headers, body));
    let status = receiver.answers.lock().expect("whole").pop().unwrap_or(204);
    let text = if status == 204 { String::new() } else { "because ".repeat(100) };
    (StatusCode::from_u16(status).expect("a status"), text)
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

#[tokio::test]
async fn what_was_accepted_of_a_batch_is_not_posted_again() {
    let (receiver, mut publisher) = Receiver::start().await;
    let messages = batch(&["1", "2", "3"]);
    for status in [408, 409, 425, 429, 500, 503] {
        receiver.answer(&[status, 200]);
        let error = publisher.publish(&messages).await.expect_err("not yet");
        let TransportError::Unavailable(text) = error else { panic!("{status}: {error:?}") };
        assert!(text.contains(&format!("answered {status} to message 2")), "{text}");
        publisher.publish(&messages).await.expect("sent");
        assert_eq!(receiver.ids(), ["1", "2", "2", "3"]);
    }
    // A batch that was sent whole is forgotten.
    publisher.publish(&messages).await.expect("sent");
    assert_eq!(receiver.ids(), ["1", "2", "3"]);
}

#[tokio::test]
async fn a_refusal_needs_help_and_shows_the_answer() {
    let (receiver, mut publisher) = Receiver::start().await;
    for (status, words) in [(400, "Fix"), (401, "Fix"), (404, "Fix"), (422, "Fix"), (307, "Redirects")] {
        receiver.answer(&[status]);
        let error = publisher.publish(&batch(&["1"])).await.expect_err("refused");
        let TransportError::Broken(text) = error else { panic!("{status}: {error:?}") };
        assert!(
            text.contains(&format!("answered {status}")) && text.contains("because") && text.contains(words),
            "{text}"
        );
        assert_eq!(text.matches("because").count(), 25, "200 bytes of it");
    }
}

#[tokio::test]
async fn nobody_there_is_tried_again() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    drop(listener);
    let error = HttpPublisher::new(&url).expect("a URL").publish(&batch(&["1"])).await.expect_err("nobody");
    assert!(matches!(&error, TransportError::Unavailable(text) if text.contains("refused")), "{error:?}");
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
