//! Operators' routes over a real socket: what reaches whoever answers, what comes back, and the
//! feed's long poll. What is done is a fake's to say.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::HoldKind;
use hapax_transport::{
    AskError, AuditFilter, EntryFilter, FeedPage, HeldFilter, Operations, OperatorClient, OperatorRequest,
    RecordFilter, RequestError, Selection, operator_router,
};
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

/// Remembers what it was asked, and has a feed of numbers.
struct Fake {
    asked: Mutex<Vec<OperatorRequest>>,
    answer: Mutex<Result<Value, RequestError>>,
    /// Number of events; `None` once the host has ended.
    events: watch::Sender<Option<usize>>,
}

impl Fake {
    fn new() -> Arc<Self> {
        let answer = Mutex::new(Ok(json!({ "fine": true })));
        Arc::new(Self { asked: Mutex::default(), answer, events: watch::Sender::new(Some(0)) })
    }
}

impl Operations for Fake {
    fn perform(&self, ask: OperatorRequest) -> BoxFuture<'static, Result<Value, RequestError>> {
        self.asked.lock().push(ask);
        Box::pin(std::future::ready(self.answer.lock().clone()))
    }

    fn events(&self, after: Option<String>, limit: usize) -> BoxFuture<'static, Result<FeedPage, RequestError>> {
        let count = self.events.borrow().unwrap_or(0);
        let page = match after.as_deref().unwrap_or("0").parse::<usize>() {
            Ok(after) => {
                let events: Vec<_> = (after..count).take(limit).map(|number| json!({ "number": number })).collect();
                Ok(FeedPage { next: (after + events.len()).to_string(), events, truncated: after == 90 })
            }
            Err(_) => Err(RequestError::Invalid("after: that is no cursor".into())),
        };
        Box::pin(std::future::ready(page))
    }

    fn feed_changed(&self) -> BoxFuture<'static, bool> {
        let mut events = self.events.subscribe();
        Box::pin(async move { events.changed().await.is_ok() && events.borrow().is_some() })
    }
}

async fn serve(fake: Arc<Fake>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, operator_router(fake)).await });
    url
}

async fn get(url: &str, path: &str, accept: &str) -> (u16, String) {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request =
        Request::get(format!("{url}{path}")).header("accept", accept).body(Full::default()).expect("a request");
    let response = client.request(request).await.expect("an answer");
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, String::from_utf8(body.to_vec()).expect("text"))
}

#[tokio::test]
async fn what_is_asked_arrives_as_it_was() {
    let fake = Fake::new();
    let client = OperatorClient::new(&serve(fake.clone()).await).expect("a URL");
    let text = |text: &str| Some(text.to_owned());
    let filter = HeldFilter {
        processor: text("p&q=1"),
        kind: text("a b+c"),
        source: text("/s?x#y"),
        error: text("100 % ü\n"),
        since: text("2h"),
        until: text("2026-01-01T00:00:00+01:00"),
        hold_reason: Some(HoldKind::Parked),
        limit: Some(7),
        after: text("t/p/%2Fs/k#0"),
    };
    let chosen = Selection {
        keys: vec!["t/p/%2Fs/k#0".into(), "\"ü".into()],
        dry_run: true,
        actor: "me".into(),
        reason: "because".into(),
        ..Selection::default()
    };
    let by_filter = Selection { keys: vec![], filter: Some(filter.clone()), ..chosen.clone() };
    let key = "default/p/%2Fs%25/ü ?#&;=+.~#00".to_owned();
    let entries = EntryFilter { prefix: text("a&b"), after: text("a&b=1"), limit: Some(3) };
    let asked = [
        OperatorRequest::Letters(filter),
        OperatorRequest::Letters(HeldFilter::default()),
        OperatorRequest::Letter(key.clone()),
        OperatorRequest::Letter(".".into()),
        OperatorRequest::Redrive(chosen.clone()),
        OperatorRequest::Discard(by_filter),
        OperatorRequest::Records(RecordFilter {
            processor: text("p"),
            after: text("k"),
            overdue: true,
            limit: Some(1),
        }),
        OperatorRequest::Record(key.clone()),
        OperatorRequest::History(key),
        OperatorRequest::Evict(chosen),
        OperatorRequest::Audit(AuditFilter { processor: "p".into(), since: text("1d"), limit: None }),
        OperatorRequest::State("p/\u{e9}".into(), entries.clone()),
        OperatorRequest::StateValue("p".into(), "a/b%2F?#".into()),
        OperatorRequest::Streams("p".into(), EntryFilter { after: text("s/1"), ..EntryFilter::default() }),
        OperatorRequest::StreamEvents(
            "p".into(),
            "account/ann".into(),
            EntryFilter { after: text("7"), ..EntryFilter::default() },
        ),
    ];
    for ask in &asked {
        assert_eq!(client.ask(ask).await.expect("an answer"), json!({ "fine": true }), "{ask:?}");
    }
    assert_eq!(*fake.asked.lock(), asked);
}

#[tokio::test]
async fn a_refusal_comes_back_as_what_it_was() {
    let fake = Fake::new();
    let client = OperatorClient::new(&serve(fake.clone()).await).expect("a URL");
    for refusal in [RequestError::Invalid, RequestError::NotFound, RequestError::Refused, RequestError::Unavailable] {
        let refusal = refusal("why \"not\"".into());
        *fake.answer.lock() = Err(refusal.clone());
        let ask = OperatorRequest::Letters(HeldFilter::default());
        assert!(matches!(client.ask(&ask).await, Err(AskError::Refused(came)) if came == refusal));
    }
}

#[tokio::test]
async fn the_feed_is_read_on_from_its_cursor() {
    let fake = Fake::new();
    let url = serve(fake.clone()).await;
    fake.events.send_replace(Some(5));
    let page = |path: &'static str| {
        let url = url.clone();
        async move { serde_json::from_str::<Value>(&get(&url, path, "*/*").await.1).expect("JSON") }
    };
    let numbers = |page: &Value| {
        let events = page["events"].as_array().expect("events").iter();
        events.map(|event| event["number"].as_u64().expect("a number")).collect::<Vec<_>>()
    };
    let first = page("/v1/feed?limit=3").await;
    assert_eq!((numbers(&first), &first["next"], &first["truncated"]), (vec![0, 1, 2], &json!("3"), &json!(false)));
    let second = page("/v1/feed?limit=3&after=3").await;
    assert_eq!((numbers(&second), &second["next"]), (vec![3, 4], &json!("5")));
    let none = page("/v1/feed?after=5").await;
    assert_eq!((numbers(&none), &none["next"]), (vec![], &json!("5")), "the cursor stays");
    let lines = get(&url, "/v1/feed?after=3", "application/x-ndjson").await.1;
    assert_eq!(lines, "{\"number\":3}\n{\"number\":4}\n{\"next\":\"5\",\"truncated\":false}\n");
    for (path, word) in [("after=x", "no cursor"), ("limit=0", "limit"), ("wait_ms=30001", "30000"), ("from=1", "from")]
    {
        let (status, body) = get(&url, &format!("/v1/feed?{path}"), "*/*").await;
        assert!(status == 400 && body.contains(word), "{status} {body}");
    }
}

#[tokio::test]
async fn who_waits_for_events_gets_the_next_ones() {
    let fake = Fake::new();
    let url = serve(fake.clone()).await;
    let waiting = |after: usize| {
        let url = url.clone();
        tokio::spawn(async move {
            let path = format!("/v1/feed?after={after}&wait_ms=30000");
            serde_json::from_str::<Value>(&get(&url, &path, "*/*").await.1).expect("JSON")
        })
    };
    let (one, other) = (waiting(0), waiting(1));
    while fake.events.receiver_count() < 2 {
        tokio::task::yield_now().await;
    }
    fake.events.send_replace(Some(1));
    assert_eq!(one.await.expect("an answer")["events"], json!([{ "number": 0 }]));
    assert!(!other.is_finished(), "what has come is not after its cursor");
    fake.events.send_replace(Some(2));
    assert_eq!(other.await.expect("an answer")["events"], json!([{ "number": 1 }]));
    // A reader whose events are gone is told at once.
    assert_eq!(waiting(90).await.expect("an answer")["truncated"], true);
    // Who still waits when the host stops is let go.
    let last = waiting(2);
    while fake.events.receiver_count() < 1 {
        tokio::task::yield_now().await;
    }
    fake.events.send_replace(None);
    assert_eq!(last.await.expect("an answer"), json!({ "events": [], "next": "2", "truncated": false }));
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_vain_is_answered_in_time() {
    let fake = Fake::new();
    let url = serve(fake.clone()).await;
    let since = tokio::time::Instant::now();
    let (status, body) = get(&url, "/v1/feed?wait_ms=20000", "*/*").await;
    assert_eq!((status, &*body), (200, r#"{"events":[],"next":"0","truncated":false}"#));
    assert!(since.elapsed() >= Duration::from_secs(20));
}
