//! HTTP as a source: CloudEvents in structured and binary mode, each answered with its message's ending. The client is who
//! delivers again; nothing is acknowledged but by a status.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::{get, post};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Message, Output};
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::json;

use crate::cloudevents::{self, InvalidMessage};

/// What takes the messages.
pub trait Ingress: Send + Sync + 'static {
    /// Brings a message to its ending. Runs on although the client may have gone.
    fn deliver(&self, processor: &str, message: Message) -> BoxFuture<'static, Answer>;
}

/// How a message ended, for its client.
#[derive(Debug, Clone)]
pub enum Answer {
    /// It ran: 200 with its result.
    Completed {
        /// The result.
        output: Output,
    },
    /// It had run before: 200 with the stored result, and `Idempotent-Replayed: true`.
    Replayed {
        /// The stored result.
        output: Output,
    },
    /// It failed for good, now or before: 422.
    Failed {
        /// What went wrong.
        error: String,
        /// Whether it failed before, and nothing ran now.
        replayed: bool,
    },
    /// Its key was used with another body: 422.
    Mismatch,
    /// It is being processed: 409.
    InFlight,
    /// It failed and may be sent again later: 503 with `Retry-After`.
    RetryLater {
        /// What went wrong.
        error: String,
        /// Not before this many milliseconds.
        after_ms: u64,
    },
    /// There is no such processor: 404.
    UnknownProcessor {
        /// Those that there are.
        known: Vec<String>,
    },
    /// The host cannot take messages: 503.
    Unavailable {
        /// Why.
        reason: String,
    },
}

/// Limits of the door.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// Bytes of one body, at most.
    pub max_message_bytes: usize,
}

#[derive(Clone)]
struct Door {
    ingress: Arc<dyn Ingress>,
    limits: HttpLimits,
}

/// The routes: `POST /v1/processors/{name}/messages`, and `GET /healthz`.
pub fn router(ingress: Arc<dyn Ingress>, limits: HttpLimits) -> Router {
    Router::new()
        .route("/v1/processors/{name}/messages", post(receive))
        .route("/healthz", get(async || "ok\n"))
        .with_state(Door { ingress, limits })
}

async fn receive(State(door): State<Door>, Path(name): Path<String>, headers: HeaderMap, body: Body) -> Response {
    let limit = door.limits.max_message_bytes;
    let body = match Limited::new(body, limit).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return invalid(&InvalidMessage::TooLarge { bytes: limit + 1, limit });
        }
        Err(error) => return problem(StatusCode::BAD_REQUEST, "body", &format!("the body broke off: {error}"), None),
    };
    let message = match message(&headers, body) {
        Ok(message) => message,
        Err(Refused::Invalid(error)) => return invalid(&error),
        Err(Refused::MediaType(detail)) => {
            return problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", &detail, None);
        }
    };
    // A task of its own: a client that goes away must not abandon a message half way.
    match tokio::spawn(door.ingress.deliver(&name, message)).await {
        Ok(answer) => respond(&name, answer),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, "internal", &error.to_string(), None),
    }
}

enum Refused {
    Invalid(InvalidMessage),
    MediaType(String),
}

fn field(field: &str, reason: &str) -> Refused {
    Refused::Invalid(InvalidMessage::Field { field: field.into(), reason: reason.into() })
}

/// The message of a request: structured, binary, or a plain body under an `Idempotency-Key`.
fn message(headers: &HeaderMap, body: Bytes) -> Result<Message, Refused> {
    let content_type = text(headers, header::CONTENT_TYPE.as_str())?;
    let essence = content_type.as_deref().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let key = text(headers, "idempotency-key")?;
    if key.as_deref() == Some("") {
        return Err(field("Idempotency-Key", "is empty; leave the header out, or give a key"));
    }
    let mut message = match essence.to_ascii_lowercase().as_str() {
        "application/cloudevents+json" => cloudevents::parse(&body).map_err(Refused::Invalid)?,
        other if other.starts_with("application/cloudevents") => {
            return Err(Refused::MediaType(format!(
                "{other} is not supported yet; send one event as JSON, or binary mode"
            )));
        }
        _ => binary(headers, content_type, key.as_deref(), body)?,
    };
    message.idempotency_key = key;
    Ok(message)
}

fn binary(
    headers: &HeaderMap,
    content_type: Option<String>,
    key: Option<&str>,
    body: Bytes,
) -> Result<Message, Refused> {
    let required = |name: &str, default: Option<&str>| -> Result<String, Refused> {
        let given = text(headers, &format!("ce-{name}"))?.filter(|value| !value.is_empty());
        given.or(default.map(str::to_owned)).ok_or_else(|| {
            field(name, "is missing: send the header `ce-id` with `ce-source` and `ce-type`, or an `Idempotency-Key`")
        })
    };
    if let Some(version) = text(headers, "ce-specversion")?
        && version != "1.0"
    {
        return Err(field("specversion", &format!("is {version}; this host reads 1.0")));
    }
    // A plain body under a key is a message too: the key is its id.
    let plain = key.is_some() && !headers.contains_key("ce-id");
    let id = required("id", key)?;
    let source = required("source", plain.then_some("/http"))?;
    let mut message = Message::new(id, source, required("type", plain.then_some("message"))?);
    message.content_type = content_type;
    message.data = body;
    for name in headers.keys() {
        let Some(attribute) = name.as_str().strip_prefix("ce-") else { continue };
        let value = text(headers, name.as_str())?;
        match attribute {
            "id" | "source" | "type" | "specversion" => {}
            "subject" => message.subject = value,
            "time" => message.time = value,
            "dataschema" => message.data_schema = value,
            other => drop(message.extensions.insert(other.to_owned(), value.unwrap_or_default())),
        }
    }
    if let Some(time) = &message.time
        && hapax_core::message::parse_rfc3339_ms(time).is_none()
    {
        return Err(field("time", &format!("`{time}` is not RFC 3339, such as 2026-11-24T05:00:00Z")));
    }
    Ok(message)
}

/// A header's value, percent-decoded as the CloudEvents HTTP binding asks.
fn text(headers: &HeaderMap, name: &str) -> Result<Option<String>, Refused> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if *first == b'%' && name.starts_with("ce-") => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).map(Some).map_err(|_| field(name, "is not UTF-8"))
}

fn invalid(error: &InvalidMessage) -> Response {
    match error {
        InvalidMessage::TooLarge { .. } => {
            problem(StatusCode::PAYLOAD_TOO_LARGE, "too-large", &error.to_string(), None)
        }
        InvalidMessage::NotJson(_) => problem(StatusCode::BAD_REQUEST, "invalid", &error.to_string(), None),
        InvalidMessage::Field { field, .. } => {
            problem(StatusCode::BAD_REQUEST, "invalid", &error.to_string(), Some(field))
        }
    }
}

fn respond(processor: &str, answer: Answer) -> Response {
    const REPLAYED: &str = "idempotent-replayed";
    let with = |mut response: Response, name: &'static str, value: String| {
        if let Ok(value) = value.parse() {
            response.headers_mut().insert(name, value);
        }
        response
    };
    match answer {
        Answer::Completed { output } => result(output),
        Answer::Replayed { output } => with(result(output), REPLAYED, "true".into()),
        Answer::Failed { error, replayed: false } => problem(StatusCode::UNPROCESSABLE_ENTITY, "failed", &error, None),
        Answer::Failed { error, replayed: true } => {
            with(problem(StatusCode::UNPROCESSABLE_ENTITY, "failed", &error, None), REPLAYED, "true".into())
        }
        Answer::Mismatch => {
            let detail = "the idempotency key was used before with another body; give the message a key of its own";
            problem(StatusCode::UNPROCESSABLE_ENTITY, "mismatch", detail, None)
        }
        Answer::InFlight => {
            let detail = "a message with this key is being processed; ask again";
            with(problem(StatusCode::CONFLICT, "in-flight", detail, None), "retry-after", "1".into())
        }
        Answer::RetryLater { error, after_ms } => {
            let response = problem(StatusCode::SERVICE_UNAVAILABLE, "retry", &error, None);
            with(response, "retry-after", after_ms.div_ceil(1_000).to_string())
        }
        Answer::UnknownProcessor { known } => {
            let detail = format!("there is no processor `{processor}`; there are: {}", known.join(", "));
            problem(StatusCode::NOT_FOUND, "unknown-processor", &detail, None)
        }
        Answer::Unavailable { reason } => problem(StatusCode::SERVICE_UNAVAILABLE, "unavailable", &reason, None),
    }
}

fn result(output: Output) -> Response {
    let mut response = Response::new(Body::from(output.data));
    if let Some(value) = output.content_type.and_then(|value| value.parse().ok()) {
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    response
}

/// An error by RFC 9457.
fn problem(status: StatusCode, code: &str, detail: &str, field: Option<&str>) -> Response {
    let title = status.canonical_reason().unwrap_or_default();
    let mut body =
        json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "code": code, "detail": detail });
    if let Some(field) = field {
        body["field"] = json!(field);
    }
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/problem+json"));
    response
}
