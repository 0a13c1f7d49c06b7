//! The door, over a real socket: each request is answered with its status, code and headers. What
//! becomes of a message is a fake's to say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Message, Output};
use hapax_transport::{Answer, HttpLimits, Ingress, router};
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

const LIMIT: usize = 1_000;
const JSON: (&str, &str) = ("content-type", "application/json");
const STRUCTURED: (&str, &str) = ("content-type", "application/cloudevents+json; charset=utf-8");
const BINARY: [(&str, &str); 4] = [("ce-specversion", "1.0"), ("ce-id", "i"), ("ce-source", "/s"), ("ce-type", "t")];

/// Answers by the message's type, and passes each message on to the test.
struct Fake {
    delivered: mpsc::UnboundedSender<Message>,
    gate: Arc<Notify>,
}

impl Ingress for Fake {
    fn deliver(&self, processor: &str, message: Message) -> BoxFuture<'static, Answer> {
        if processor != "echo" {
            let known = vec!["echo".into(), "other".into()];
            return Box::pin(std::future::ready(Answer::UnknownProcessor { known }));
        }
        let (delivered, gate) = (self.delivered.clone(), self.gate.clone());
        Box::pin(async move {
            let output = Output { content_type: Some("text/plain".into()), data: message.data.clone() };
            let answer = match &*message.kind {
                "replayed" => Answer::Replayed { output },
                "empty" => Answer::Completed { output: Output::default() },
                "odd" => Answer::Completed { output: Output { content_type: Some("a\nb".into()), ..output } },
                "failed" => Answer::Failed { error: "no such order".into(), replayed: false },
                "failed-before" => Answer::Failed { error: "no such order".into(), replayed: true },
                "mismatch" => Answer::Mismatch { held: true },
                "mismatch-rejected" => Answer::Mismatch { held: false },
                "stale" => Answer::Stale,
                "in-flight" => Answer::InFlight,
                "retry" => Answer::RetryLater { error: "try later".into(), after_ms: 1_001 },
                "retry-now" => Answer::RetryLater { error: "try now".into(), after_ms: 0 },
                "closed" => Answer::Unavailable { reason: "the disk is full".into() },
                "panic" => panic!("wanted by the test"),
                "slow" => {
                    delivered.send(message.clone()).expect("the test listens");
                    gate.notified().await;
                    Answer::Completed { output }
                }
                _ => Answer::Completed { output },
            };
            delivered.send(message).expect("the test listens");
            answer
        })
    }

    fn ready(&self) -> Result<(), String> {
        Err("the store is closed".into())
    }
}

struct Server {
    address: SocketAddr,
    delivered: mpsc::UnboundedReceiver<Message>,
    gate: Arc<Notify>,
}

struct Reply {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("ASCII"))
    }

    /// The code of a problem, and its detail; checks the rest of it.
    fn problem(&self) -> (String, String) {
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let body: Value = serde_json::from_slice(&self.body).expect("JSON");
        assert_eq!((&body["type"], &body["status"]), (&"about:blank".into(), &self.status.into()));
        assert!(body["title"].as_str().is_some_and(|title| !title.is_empty()), "{body}");
        let text = |name: &str| body[name].as_str().expect(name).to_owned();
        (text("code"), text("detail"))
    }

    fn field(&self) -> Option<String> {
        serde_json::from_slice::<Value>(&self.body).expect("JSON")["field"].as_str().map(str::to_owned)
    }
}

impl Server {
    async fn start() -> Self {
        let (sender, delivered) = mpsc::unbounded_channel();
        let gate = Arc::new(Notify::new());
        let fake = Arc::new(Fake { delivered: sender, gate: gate.clone() });
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let app =
            router(fake, HttpLimits { max_message_bytes: LIMIT, max_batch_bytes: 4 * LIMIT, max_batch_items: 20 });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, delivered, gate }
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).expect("a request");
        let client = Client::builder(TokioExecutor::new()).build_http();
        let (parts, body) = client.request(request).await.expect("an answer").into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        Reply { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn post(&self, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        self.send(Method::POST, "/v1/processors/echo/messages", headers, body).await
    }

    /// Posts a message in binary mode whose type says what the fake answers.
    async fn kind(&self, kind: &str) -> Reply {
        self.post(&[("ce-id", "i"), ("ce-source", "/s"), ("ce-type", kind)], "result").await
    }

    fn taken(&mut self) -> Message {
        self.delivered.try_recv().expect("a message was delivered")
    }
}

#[tokio::test]
async fn both_modes_and_a_plain_body_become_the_same_kind_of_message() {
    let mut server = Server::start().await;
    let event = r#"{"specversion":"1.0","id":"i","source":"/s","type":"t","partitionkey":"p","data":{ "n":1 }}"#;
    let reply = server.post(&[STRUCTURED, ("idempotency-key", "k")], event).await;
    assert_eq!((reply.status, &*reply.body), (200, &br#"{ "n":1 }"#[..]));
    let mut expected = Message::new("i", "/s", "t");
    expected.data = r#"{ "n":1 }"#.into();
    expected.extensions.insert("partitionkey".into(), "p".into());
    expected.idempotency_key = Some("k".into());
    assert_eq!(server.taken(), expected);

    let headers = [&BINARY[..], &[JSON, ("ce-partitionkey", "p"), ("idempotency-key", "k")]].concat();
    assert_eq!(server.post(&headers, r#"{ "n":1 }"#).await.status, 200);
    expected.content_type = Some("application/json".into());
    assert_eq!(server.taken(), expected);

    let reply = server.post(&[JSON, ("idempotency-key", "order-1")], "{}").await;
    assert_eq!(reply.status, 200);
    let plain = server.taken();
    assert_eq!((&*plain.id, &*plain.source, &*plain.kind), ("order-1", "/http", "message"));
}

#[tokio::test]
async fn endings_have_their_status() {
    let server = Server::start().await;
    let completed = server.kind("completed").await;
    assert_eq!((completed.status, &*completed.body), (200, &b"result"[..]));
    assert_eq!((completed.header("content-type"), completed.header("idempotent-replayed")), (Some("text/plain"), None));
    let replayed = server.kind("replayed").await;
    assert_eq!((replayed.status, &*replayed.body), (200, &b"result"[..]));
    assert_eq!(replayed.header("idempotent-replayed"), Some("true"));
    let empty = server.kind("empty").await;
    assert_eq!((empty.status, empty.body.len(), empty.header("content-type")), (200, 0, None));
    assert_eq!(server.kind("odd").await.header("content-type"), Some("application/octet-stream"));

    for (kind, status, code, words, retry_after, replayed) in [
        ("failed", 422, "failed", "no such order", None, None),
        ("failed-before", 422, "failed", "no such order", None, Some("true")),
        ("mismatch", 422, "mismatch", "another body", None, None),
        ("stale", 422, "stale", "newer version", None, None),
        ("in-flight", 409, "in-flight", "being processed", Some("1"), None),
        ("retry", 503, "retry", "try later", Some("2"), None),
        ("retry-now", 503, "retry", "try now", Some("1"), None),
        ("closed", 503, "unavailable", "disk is full", None, None),
        ("panic", 500, "internal", "Sending again is safe", None, None),
    ] {
        let reply = server.kind(kind).await;
        let (is_code, detail) = reply.problem();
        assert_eq!((reply.status, &*is_code), (status, code), "{kind}");
        assert!(detail.contains(words), "{kind}: {detail}");
        assert_eq!(reply.header("retry-after"), retry_after, "{kind}");
        assert_eq!(reply.header("idempotent-replayed"), replayed, "{kind}");
    }
}

#[tokio::test]
async fn bad_input_is_told_what_is_wrong() {
    let mut server = Server::start().await;
    let with = |name, value| [&BINARY[..], &[(name, value)]].concat();
    let batch = ("content-type", "application/cloudevents-batch+json");
    for (headers, body, status, field, words) in [
        (vec![STRUCTURED], "nonsense", 400, None, "not JSON"),
        (vec![STRUCTURED], r#"{"source":"/s","type":"t"}"#, 400, Some("id"), "id"),
        (
            vec![STRUCTURED, ("idempotency-key", "")],
            r#"{"id":"i","source":"/s","type":"t"}"#,
            400,
            Some("Idempotency-Key"),
            "empty",
        ),
        (vec![JSON], "{}", 400, Some("id"), "application/cloudevents+json"),
        (BINARY[..3].to_vec(), "{}", 400, Some("type"), "`ce-type`"),
        (with("ce-time", "noon"), "{}", 400, Some("time"), "RFC 3339"),
        (with("ce-specversion", "0.3"), "{}", 400, Some("specversion"), "twice"),
        (vec![batch], "[]", 415, None, "/v1/processors/NAME/batch"),
        (vec![("content-type", "application/cloudevents+xml")], "<e/>", 415, None, "application/cloudevents+json"),
    ] {
        let reply = server.post(&headers, body).await;
        let (code, detail) = reply.problem();
        assert_eq!((reply.status, reply.field().as_deref()), (status, field), "{headers:?}: {detail}");
        assert_eq!(code, if status == 415 { "media-type" } else { "invalid" });
        assert!(detail.contains(words), "{detail}");
    }
    let body = "{}";
    let unknown = server.send(Method::POST, "/v1/processors/ec%68/messages", &BINARY, body).await;
    assert_eq!((unknown.status, unknown.problem().0.as_str()), (404, "unknown-processor"));
    assert!(unknown.problem().1.contains("`ech`; there are: echo, other"), "{}", unknown.problem().1);
    let garbled = server.send(Method::POST, "/v1/processors/%ff/messages", &BINARY, body).await;
    assert_eq!((garbled.status, garbled.problem().0.as_str()), (400, "invalid"));
    let nowhere = server.send(Method::POST, "/v1/processors/echo", &BINARY, body).await;
    assert_eq!((nowhere.status, nowhere.problem().0.as_str()), (404, "not-found"));
    let method = server.send(Method::GET, "/v1/processors/echo/messages", &[], "").await;
    assert_eq!((method.status, method.header("allow"), method.problem().0.as_str()), (405, Some("POST"), "method"));
    assert!(server.delivered.try_recv().is_err(), "none of these is a message");
}

#[tokio::test]
async fn a_body_over_the_limit_is_told_so_and_never_cut() {
    let mut server = Server::start().await;
    assert_eq!(server.post(&BINARY, vec![b'x'; LIMIT]).await.body.len(), LIMIT);
    assert_eq!(server.taken().data.len(), LIMIT);
    // Larger than what the sockets' buffers hold: the answer arrives although the client first
    // writes all of it.
    for length in [LIMIT + 1, 10 << 20] {
        let reply = server.post(&BINARY, vec![b'x'; length]).await;
        let (code, detail) = reply.problem();
        assert_eq!((reply.status, &*code), (413, "too-large"));
        assert!(detail.contains(&format!("{length} bytes")) && detail.contains("limit of 1000"), "{detail}");
        assert!(detail.contains("max_message_bytes"), "{detail}");
    }
    // One that asks first is told before it sends.
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    let head =
        "POST /v1/processors/echo/messages HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 9999\r\n\r\n";
    client.write_all(head.as_bytes()).await.expect("written");
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.expect("answered");
    assert_eq!(&answer, b"HTTP/1.1 413");
    assert!(server.delivered.try_recv().is_err());
}

#[tokio::test]
async fn a_client_that_goes_away_abandons_nothing() {
    let mut server = Server::start().await;
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    let head = "POST /v1/processors/echo/messages HTTP/1.1\r\nhost: h\r\nce-id: i\r\nce-source: /s\r\nce-type: slow\r\n\
                content-length: 2\r\n\r\n{}";
    client.write_all(head.as_bytes()).await.expect("written");
    assert_eq!(server.delivered.recv().await.expect("it started").kind, "slow");
    drop(client);
    // Time for the server to see the end of the connection and to drop the handler.
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.gate.notify_one();
    let ended = tokio::time::timeout(Duration::from_secs(5), server.delivered.recv()).await.expect("it went on");
    assert_eq!(ended.expect("it ended").id, "i");
}

#[tokio::test]
async fn health_is_not_readiness() {
    let server = Server::start().await;
    let health = server.send(Method::GET, "/healthz", &[], "").await;
    assert_eq!((health.status, &*health.body), (200, &b"ok\n"[..]));
    let ready = server.send(Method::GET, "/readyz", &[], "").await;
    assert_eq!((ready.status, ready.problem()), (503, ("unavailable".into(), "the store is closed".into())));
}

const BATCH: (&str, &str) = ("content-type", "application/cloudevents-batch+json");
const BATCH_PATH: &str = "/v1/processors/echo/batch";

/// An event whose type says what the fake answers.
fn event(id: &str, kind: &str) -> Value {
    serde_json::json!({ "id": id, "source": "/s", "type": kind, "datacontenttype": "text/plain", "data": "said" })
}

#[tokio::test]
async fn a_batch_is_answered_item_by_item() {
    let server = Server::start().await;
    let kinds = [
        "completed",
        "replayed",
        "empty",
        "failed",
        "failed-before",
        "mismatch",
        "stale",
        "in-flight",
        "retry",
        "closed",
    ];
    let mut events: Vec<Value> = kinds.iter().map(|kind| event(kind, kind)).collect();
    events.push(serde_json::json!({ "id": "no-source", "type": "t" }));
    events.push(serde_json::json!({ "source": "/s" }));
    events.push(serde_json::json!({ "id": "big", "source": "/s", "type": "t", "data": "x".repeat(LIMIT) }));
    let reply = server.send(Method::POST, BATCH_PATH, &[BATCH], Value::from(events).to_string()).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    let body: Value = serde_json::from_slice(&reply.body).expect("JSON");
    let failures = body["batchItemFailures"].as_array().expect("failures");
    let failures: Vec<_> = failures.iter().map(|failure| failure["itemIdentifier"].as_str().expect("an id")).collect();
    assert_eq!(failures, ["in-flight", "retry", "closed", "no-source", "#11", "big"]);
    let results = body["results"].as_array().expect("results");
    let outcomes: Vec<_> = results.iter().map(|result| result["outcome"].as_str().expect("an outcome")).collect();
    let expected = [
        "completed",
        "duplicate",
        "completed",
        "dead-lettered",
        "duplicate",
        "mismatch",
        "stale",
        "in-flight",
        "retry",
        "unavailable",
        "invalid",
        "invalid",
        "invalid",
    ];
    assert_eq!(outcomes, expected);
    assert_eq!((&results[0]["result"], &results[3]["error"]), (&"said".into(), &"no such order".into()));
    assert_eq!((&results[4]["error"], &results[8]["retry_after_ms"]), (&"no such order".into(), &1_001.into()));
    assert!(results[12]["error"].as_str().expect("an error").contains("limit of 1000"), "{}", results[12]);
}

#[tokio::test]
async fn a_batch_that_cannot_be_taken_as_one_is_refused_as_one() {
    let server = Server::start().await;
    let one = |kind: &str| Value::from(vec![event("i", kind)]).to_string();
    for (path, headers, body, status, code, words) in [
        (BATCH_PATH, vec![STRUCTURED], one("t"), 415, "media-type", "application/cloudevents-batch+json"),
        (BATCH_PATH, vec![BATCH, ("idempotency-key", "k")], one("t"), 400, "invalid", "names one message"),
        (BATCH_PATH, vec![BATCH], "{}".into(), 400, "invalid", "no JSON array"),
        (BATCH_PATH, vec![BATCH], "[1,".into(), 400, "invalid", "no JSON array"),
        (BATCH_PATH, vec![BATCH], format!("[{}1]", "1,".repeat(20)), 413, "too-many", "21 messages"),
        (BATCH_PATH, vec![BATCH], " ".repeat(4 * LIMIT + 1), 413, "too-large", "max_batch_bytes"),
        (BATCH_PATH, vec![BATCH], one("closed"), 503, "unavailable", "the disk is full"),
        (BATCH_PATH, vec![BATCH], one("panic"), 500, "internal", "Sending again is safe"),
        ("/v1/processors/nobody/batch", vec![BATCH], one("t"), 404, "unknown-processor", "echo, other"),
    ] {
        let reply = server.send(Method::POST, path, &headers, body).await;
        let (is, detail) = reply.problem();
        assert_eq!((reply.status, &*is), (status, code), "{detail}");
        assert!(detail.contains(words), "{detail}");
    }
    let reply = server.send(Method::POST, BATCH_PATH, &[BATCH], "[]").await;
    assert_eq!(reply.body, r#"{"batchItemFailures":[],"results":[]}"#);
}
