//! HTTP for operators: dead letters, records, audit trail, feed of events. Reads requests and
//! writes answers; what is done is not its own. Asks nobody who they are: it is for a trusted
//! network.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, get, post};
use hapax_core::SagaAction;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::cloudevents::binary;
use crate::http::ingress::read_body;
use crate::http::response::problem;
use crate::operator::request::{
    EntryFilter, FeedPage, LISTED, Operations, OperatorRequest, RequestError, Selection, limit, number,
};

/// Bytes of an order, at most.
const ORDER_BYTES_MAX: usize = 4 << 20;
/// Longest wait for an event.
const WAIT_MS_MAX: usize = 30_000;
/// Media type of one JSON value a line.
const LINES: &str = "application/x-ndjson";

type Answering = State<Arc<dyn Operations>>;
type Key = Result<Path<String>, PathRejection>;
/// Processor, and the key or stream of it.
type KeyOf = Result<Path<(String, String)>, PathRejection>;

/// The routes: `/v1/dlq`, `/v1/outbox`, `/v1/records`, `/v1/sagas`, `/v1/audit`, `/v1/feed`,
/// `/v1/state`, `/v1/streams`.
pub fn operator_router(operations: Arc<dyn Operations>) -> Router {
    let order = |ask: fn(Selection) -> OperatorRequest| {
        post(async move |state: Answering, headers: HeaderMap, body: Body| match chosen(&headers, body).await {
            Ok(chosen) => answered(&state, ask(chosen)).await,
            Err(response) => response,
        })
    };
    let list = |ask: fn(&RawQuery) -> Result<OperatorRequest, RequestError>| {
        get(async move |state: Answering, query: RawQuery| match ask(&query) {
            Ok(ask) => answered(&state, ask).await,
            Err(refusal) => refused(&refusal),
        })
    };
    let show = |ask: fn(String) -> OperatorRequest| {
        get(async move |state: Answering, key: Key| match key {
            Ok(Path(key)) => answered(&state, ask(key)).await,
            Err(_) => refused(&not_utf8()),
        })
    };
    let list_of = |ask: fn(String, EntryFilter) -> OperatorRequest| {
        get(async move |state: Answering, processor: Key, query: RawQuery| match (processor, parse(&query)) {
            (Ok(Path(processor)), Ok(filter)) => answered(&state, ask(processor, filter)).await,
            (_, Err(refusal)) => refused(&refusal),
            (Err(_), _) => refused(&not_utf8()),
        })
    };
    // A saga may have the name of an order.
    let named = |verb: SagaAction, order: MethodRouter<Arc<dyn Operations>>| {
        order.get(async move |state: Answering| answered(&state, OperatorRequest::Saga(verb.name().to_owned())).await)
    };
    Router::new()
        .route("/v1/dlq", list(|query| parse(query).map(OperatorRequest::Letters)))
        .route("/v1/dlq/{key}", show(OperatorRequest::Letter))
        .route("/v1/dlq/redrive", order(OperatorRequest::Redrive))
        .route("/v1/dlq/discard", order(OperatorRequest::Discard))
        .route("/v1/outbox", list(|query| parse(query).map(OperatorRequest::RefusedMessages)))
        .route("/v1/outbox/{id}", show(OperatorRequest::RefusedMessage))
        .route("/v1/outbox/redrive", order(OperatorRequest::RedriveOutgoing))
        .route("/v1/outbox/discard", order(OperatorRequest::DiscardOutgoing))
        .route("/v1/records", list(|query| parse(query).map(OperatorRequest::Records)))
        .route("/v1/records/{key}", show(OperatorRequest::Record))
        .route("/v1/records/{key}/history", show(OperatorRequest::History))
        .route("/v1/records/evict", order(OperatorRequest::Evict))
        .route("/v1/records/give-up", order(OperatorRequest::GiveUp))
        .route("/v1/audit", list(|query| parse(query).map(OperatorRequest::Audit)))
        .route("/v1/feed", get(events))
        .route("/v1/state/{processor}", list_of(OperatorRequest::State))
        .route("/v1/state/{processor}/{key}", get(state_value))
        .route("/v1/streams/{processor}", list_of(OperatorRequest::Streams))
        .route("/v1/streams/{processor}/{stream}", get(stream_events))
        .route("/v1/sagas", list(|query| parse(query).map(OperatorRequest::Sagas)))
        .route("/v1/sagas/{id}", show(OperatorRequest::Saga))
        .route(
            "/v1/sagas/retry",
            named(SagaAction::Retry, order(|chosen| OperatorRequest::ResumeSaga(SagaAction::Retry, chosen))),
        )
        .route(
            "/v1/sagas/skip",
            named(SagaAction::Skip, order(|chosen| OperatorRequest::ResumeSaga(SagaAction::Skip, chosen))),
        )
        .route(
            "/v1/sagas/resolve",
            named(SagaAction::Resolve, order(|chosen| OperatorRequest::ResumeSaga(SagaAction::Resolve, chosen))),
        )
        .method_not_allowed_fallback(no_such_method)
        .with_state(operations)
}

async fn state_value(state: Answering, path: KeyOf) -> Response {
    match path {
        Ok(Path((processor, key))) => answered(&state, OperatorRequest::StateValue(processor, key)).await,
        Err(_) => refused(&not_utf8()),
    }
}

async fn stream_events(state: Answering, path: KeyOf, query: RawQuery) -> Response {
    match (path, parse(&query)) {
        (Ok(Path((processor, stream))), Ok(filter)) => {
            answered(&state, OperatorRequest::StreamEvents(processor, stream, filter)).await
        }
        (_, Err(refusal)) => refused(&refusal),
        (Err(_), _) => refused(&not_utf8()),
    }
}

fn not_utf8() -> RequestError {
    RequestError::Invalid("the key in the path is not UTF-8".into())
}

async fn no_such_method() -> Response {
    let detail = "GET lists and shows; POST to /v1/dlq/redrive and discard, /v1/outbox/redrive and discard, \
                  /v1/records/evict, and /v1/sagas/retry, skip and resolve";
    problem(StatusCode::METHOD_NOT_ALLOWED, "method", detail)
}

async fn answered(operations: &Arc<dyn Operations>, ask: OperatorRequest) -> Response {
    // A task of its own: a client that goes away must not abandon what it has asked for half way.
    match tokio::spawn(operations.perform(ask)).await {
        Ok(Ok(value)) => as_json(&value),
        Ok(Err(refusal)) => refused(&refusal),
        Err(error) => {
            tracing::error!("answering an operator failed: {error}");
            let detail = "the host failed; see its log, and look at what was done before you ask again";
            problem(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
        }
    }
}

fn as_json(value: &Value) -> Response {
    with_type(value.to_string(), "application/json")
}

fn with_type(text: String, media_type: &'static str) -> Response {
    let mut response = text.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn refused(refusal: &RequestError) -> Response {
    let (status, code) = refusal.status();
    problem(status, code, &refusal.to_string())
}

/// Reads the fields of a query; an error if a name is there twice.
fn parse<T: DeserializeOwned>(RawQuery(query): &RawQuery) -> Result<T, RequestError> {
    let mut fields = Map::new();
    for (name, value) in form_urlencoded::parse(query.as_deref().unwrap_or_default().as_bytes()) {
        if fields.insert(name.to_string(), Value::String(value.into_owned())).is_some() {
            return Err(RequestError::Invalid(format!("{name} is there twice")));
        }
    }
    serde_json::from_value(Value::Object(fields)).map_err(|error| RequestError::Invalid(error.to_string()))
}

/// The body of an order. It must say that it is JSON, which a page in a browser cannot without
/// being asked first.
async fn chosen(headers: &HeaderMap, body: Body) -> Result<Selection, Response> {
    let media_type = binary::media_type(headers).ok().flatten().unwrap_or_default();
    if !hapax_core::is_json_type(&media_type) {
        let detail = "send the order as application/json";
        return Err(problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", detail));
    }
    let body = read_body(headers, body, ORDER_BYTES_MAX).await.map_err(|error| error.response())?;
    serde_json::from_slice(&body).map_err(|error| refused(&RequestError::Invalid(format!("the order: {error}"))))
}

/// Where a reader of the feed stands.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Since {
    after: Option<String>,
    #[serde(deserialize_with = "number")]
    limit: Option<usize>,
    #[serde(deserialize_with = "number")]
    wait_ms: Option<usize>,
}

async fn events(State(operations): Answering, query: RawQuery, headers: HeaderMap) -> Response {
    match wait_for_events(&*operations, &query).await {
        Ok(page) => feed(page, &headers),
        Err(refusal) => refused(&refusal),
    }
}

/// The events after the cursor; where there are none yet, those that come while it waits.
async fn wait_for_events(operations: &dyn Operations, query: &RawQuery) -> Result<FeedPage, RequestError> {
    let since: Since = parse(query)?;
    let limit = limit(since.limit, LISTED)?;
    let wait_ms = since.wait_ms.unwrap_or(0);
    if wait_ms > WAIT_MS_MAX {
        return Err(RequestError::Invalid(format!("wait_ms: {wait_ms} is more than {WAIT_MS_MAX}; ask again instead")));
    }
    let end = Instant::now() + Duration::from_millis(wait_ms as u64);
    loop {
        // Before it is asked: what comes in between has changed the feed.
        let changed = operations.feed_changed();
        let page = operations.events(since.after.clone(), limit).await?;
        if !page.events.is_empty() || page.truncated || Instant::now() >= end {
            return Ok(page);
        }
        if let Ok(false) = tokio::time::timeout_at(end, changed).await {
            return Ok(page);
        }
    }
}

/// One value; or a line an event, and a last one that says where to go on, for who asks for that.
fn feed(page: FeedPage, headers: &HeaderMap) -> Response {
    let FeedPage { events, next, truncated } = page;
    let accepted = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if !accepted.contains(LINES) {
        return as_json(&json!({ "events": events, "next": next, "truncated": truncated }));
    }
    let last = json!({ "next": next, "truncated": truncated });
    let lines = events.iter().chain([&last]).map(|value| format!("{value}\n")).collect();
    with_type(lines, LINES)
}
