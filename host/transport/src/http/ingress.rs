//! HTTP as a source: CloudEvents in structured and binary mode, each answered with its message's
//! ending. The client is who delivers again; nothing is acknowledged but by a status.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use futures_util::future::{BoxFuture, join_all};
use hapax_core::Message;
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt as _;

use crate::cloudevents::binary;
use crate::cloudevents::{self, InvalidMessage};
use crate::http::batch;
use crate::http::response::{Answer, invalid, problem, respond};

/// Longest wait for a whole body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a body over its limit that are read and thrown away, at most.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// Takes the messages that come over HTTP.
pub trait Ingress: Send + Sync + 'static {
    /// Brings a message to its outcome. Runs on although the client may have gone.
    fn deliver(&self, processor: &str, message: Message) -> BoxFuture<'static, Answer>;

    /// Headers, in lower case, that are to come with a processor's messages: its strategy looks at
    /// them.
    fn headers(&self, _processor: &str) -> &[String] {
        &[]
    }

    /// Brings each message of a batch to its outcome, and returns one answer a message, in their
    /// order. Accepts them in that order.
    fn deliver_batch(&self, processor: &str, messages: Vec<Message>) -> BoxFuture<'static, Vec<Answer>> {
        let deliveries: Vec<_> = messages.into_iter().map(|message| self.deliver(processor, message)).collect();
        Box::pin(join_all(deliveries))
    }

    /// Returns an error text if no messages are taken. `GET /readyz` asks for it.
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Limits of the door.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// Bytes of one body, at most.
    pub max_message_bytes: usize,
    /// Bytes of one batch, at most. Each of its messages keeps to `max_message_bytes` too.
    pub max_batch_bytes: usize,
    /// Messages of one batch, at most.
    pub max_batch_items: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self { max_message_bytes: 1 << 20, max_batch_bytes: 16 << 20, max_batch_items: 1_000 }
    }
}

#[derive(Clone)]
pub(crate) struct HttpIngress {
    pub(crate) ingress: Arc<dyn Ingress>,
    pub(crate) limits: HttpLimits,
}

/// The routes: `POST /v1/processors/{name}/messages` and `.../batch`, `GET /healthz` (the process
/// lives) and `GET /readyz` (it takes messages).
pub fn router(ingress: Arc<dyn Ingress>, limits: HttpLimits) -> Router {
    Router::new()
        .route("/v1/processors/{name}/messages", post(receive))
        .route("/v1/processors/{name}/batch", post(batch::receive))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(nowhere)
        .method_not_allowed_fallback(no_such_method)
        .with_state(HttpIngress { ingress, limits })
}

async fn ready(State(door): State<HttpIngress>) -> Response {
    match door.ingress.ready() {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => problem(StatusCode::SERVICE_UNAVAILABLE, "unavailable", &reason),
    }
}

async fn nowhere() -> Response {
    let detail = "nothing is here; send messages to /v1/processors/NAME/messages. A key in a path needs its `/` as %2F, its `%` \
                  as %25 and its `#` as %23";
    problem(StatusCode::NOT_FOUND, "not-found", detail)
}

async fn no_such_method() -> Response {
    let detail = "POST /v1/processors/NAME/messages or .../batch; GET /healthz and /readyz";
    problem(StatusCode::METHOD_NOT_ALLOWED, "method", detail)
}

async fn receive(
    State(door): State<HttpIngress>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let Ok(Path(name)) = path else {
        return problem(StatusCode::BAD_REQUEST, "invalid", "the processor's name in the path is not UTF-8");
    };
    let read = read_body(&headers, body, door.limits.max_message_bytes).await;
    let mut message = match read.and_then(|body| message(&headers, body)) {
        Ok(message) => message,
        Err(refused) => return refused.response(),
    };
    message.headers = wanted(&headers, door.ingress.headers(&name));
    // A task of its own: a client that goes away must not abandon a message half way.
    match tokio::spawn(door.ingress.deliver(&name, message)).await {
        Ok(answer) => respond(&name, answer),
        Err(error) => failed(&name, &error),
    }
}

/// The headers that a processor's strategy looks at, as far as they are text.
fn wanted(headers: &HeaderMap, names: &[String]) -> BTreeMap<String, String> {
    let value = |name: &String| Some((name.clone(), headers.get(name)?.to_str().ok()?.to_owned()));
    names.iter().filter_map(value).collect()
}

/// The answer to a delivery that the host broke off.
pub(crate) fn failed(processor: &str, error: &tokio::task::JoinError) -> Response {
    tracing::error!("delivering to {processor} failed: {error}");
    let detail = "the host failed; see its log. Sending again is safe";
    problem(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
}

/// Why a request is no message.
pub(crate) enum Refused {
    Invalid(InvalidMessage),
    MediaType(String),
    /// It is no batch: status, code, what is wrong.
    Batch(StatusCode, &'static str, String),
    Slow,
    BrokenOff(axum::Error),
}

impl From<InvalidMessage> for Refused {
    fn from(error: InvalidMessage) -> Self {
        Self::Invalid(error)
    }
}

impl Refused {
    pub(crate) fn response(self) -> Response {
        match self {
            Self::Invalid(error) => invalid(&error),
            Self::MediaType(detail) => problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", &detail),
            Self::Batch(status, code, detail) => problem(status, code, &detail),
            Self::Slow => {
                let detail = format!("the body did not arrive in {} s; send it again", BODY_TIMEOUT.as_secs());
                problem(StatusCode::REQUEST_TIMEOUT, "slow", &detail)
            }
            Self::BrokenOff(error) => {
                problem(StatusCode::BAD_REQUEST, "invalid", &format!("the body broke off: {error}; send it again"))
            }
        }
    }
}

/// The whole body, if it keeps to the limit. One that does not is read on and thrown away: a
/// connection that is closed under a client that still writes loses the answer. A client that asks
/// first (`Expect`) is told at once.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, Refused> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    match announced {
        Some(bytes) if bytes > limit && headers.contains_key(header::EXPECT) => {
            return Err(InvalidMessage::TooLarge { bytes, limit }.into());
        }
        _ => {}
    }
    tokio::time::timeout(BODY_TIMEOUT, collect(body, limit)).await.map_err(|_| Refused::Slow)?
}

async fn collect(mut body: Body, limit: usize) -> Result<Bytes, Refused> {
    let mut kept = BytesMut::new();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(Refused::BrokenOff)?.into_data() else { continue };
        bytes += data.len();
        if bytes <= limit {
            kept.extend_from_slice(&data);
        } else {
            kept = BytesMut::new();
            if bytes - limit > DISCARDED_BYTES_MAX {
                break;
            }
        }
    }
    if bytes > limit { Err(InvalidMessage::TooLarge { bytes, limit }.into()) } else { Ok(kept.freeze()) }
}

/// The message of a request: structured, binary, or a plain body under an `Idempotency-Key`.
fn message(headers: &HeaderMap, body: Bytes) -> Result<Message, Refused> {
    let content_type = binary::media_type(headers)?.unwrap_or_default().to_ascii_lowercase();
    match content_type.split(';').next().unwrap_or_default().trim() {
        "application/cloudevents+json" | "application/cloudevents" => {
            let mut message = cloudevents::parse(&body)?;
            message.idempotency_key = binary::key_beside(headers, &message.id)?;
            Ok(message)
        }
        "application/cloudevents-batch+json" => Err(Refused::MediaType(
            "application/cloudevents-batch+json is many messages: send it to /v1/processors/NAME/batch".into(),
        )),
        other if other.starts_with("application/cloudevents") => Err(Refused::MediaType(format!(
            "{other} is not supported; send application/cloudevents+json, or binary mode (`ce-` headers)"
        ))),
        _ => Ok(binary::parse_binary(headers, body)?),
    }
}
