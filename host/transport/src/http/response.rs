//! Answers over HTTP: a result with 200, everything else as a problem by RFC 9457. One rule over
//! the codes: 4xx but 409 means "not again like this", 409 and 503 mean "again later, it is safe".
//! `Hapax-Settled` on a 4xx says that the host has the message all the same.

use axum::body::Body;
use axum::response::Response;
use hapax_core::Output;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::json;

use crate::cloudevents::InvalidMessage;
use crate::publisher::http::SETTLED;

const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Outcome of a message, for its client.
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
        /// Error of the message.
        error: String,
        /// Set if the message failed before, and nothing ran now.
        replayed: bool,
    },
    /// Its key was used with another body: 422.
    Mismatch {
        /// Set if the host holds this body as a dead letter.
        held: bool,
    },
    /// A newer version was processed before: 422.
    Stale,
    /// It waits for the one before it and runs then: 202.
    Parked {
        /// The version that is awaited.
        awaits: u64,
        /// When the wait is over, in milliseconds since the Unix epoch.
        until_ms: u64,
    },
    /// It is being processed: 409.
    InFlight,
    /// It failed and may be sent again later: 503 with `Retry-After`.
    RetryLater {
        /// Error of the message.
        error: String,
        /// Not before this many milliseconds.
        after_ms: u64,
    },
    /// Its processor's circuit breaker is open, and nothing ran: 503 with `Retry-After`.
    Paused {
        /// Not before this many milliseconds.
        after_ms: u64,
    },
    /// There is no such processor: 404.
    UnknownProcessor {
        /// Names of the processors that exist.
        known: Vec<String>,
    },
    /// The host cannot take messages: 503.
    Unavailable {
        /// Why.
        reason: String,
    },
}

/// The response to a message for `processor`.
pub(crate) fn respond(processor: &str, answer: Answer) -> Response {
    use StatusCode as Code;
    match answer {
        Answer::Completed { output } => result(output),
        Answer::Replayed { output } => replayed(result(output)),
        Answer::Failed { error, replayed: false } => {
            settled("dead-lettered", problem(Code::UNPROCESSABLE_ENTITY, "failed", &error))
        }
        Answer::Failed { error, replayed: true } => {
            settled("duplicate", replayed(problem(Code::UNPROCESSABLE_ENTITY, "failed", &error)))
        }
        Answer::Mismatch { held } => {
            let detail = "the idempotency key was used before with another body; give the message a key of its own";
            let response = problem(Code::UNPROCESSABLE_ENTITY, "mismatch", detail);
            if held { settled("mismatch", response) } else { response }
        }
        Answer::Stale => {
            let detail = "a newer version of what this message is about was processed before; there is nothing to do";
            settled("stale", problem(Code::UNPROCESSABLE_ENTITY, "stale", detail))
        }
        Answer::Parked { awaits, until_ms } => accepted(awaits, until_ms),
        Answer::InFlight => retry_after(
            1,
            problem(Code::CONFLICT, "in-flight", "a message with this key is being processed; ask again"),
        ),
        Answer::RetryLater { error, after_ms } => {
            retry_after(after_ms.div_ceil(1_000), problem(Code::SERVICE_UNAVAILABLE, "retry", &error))
        }
        Answer::Paused { after_ms } => {
            let detail =
                "the processor fails too often and is paused (circuit breaker); nothing ran, send it again later";
            retry_after(after_ms.div_ceil(1_000), problem(Code::SERVICE_UNAVAILABLE, "paused", detail))
        }
        Answer::UnknownProcessor { known } => {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let detail = format!("there is no processor `{processor}`; there are: {known}");
            problem(Code::NOT_FOUND, "unknown-processor", &detail)
        }
        Answer::Unavailable { reason } => problem(Code::SERVICE_UNAVAILABLE, "unavailable", &reason),
    }
}

/// The response to input that is no message.
pub(crate) fn invalid(error: &InvalidMessage) -> Response {
    let detail = error.to_string();
    match error {
        InvalidMessage::TooLarge { .. } => problem(StatusCode::PAYLOAD_TOO_LARGE, "too-large", &detail),
        InvalidMessage::NotJson(_) => problem(StatusCode::BAD_REQUEST, "invalid", &detail),
        InvalidMessage::Field { field, .. } => problem_with(StatusCode::BAD_REQUEST, "invalid", &detail, Some(field)),
    }
}

/// An error by RFC 9457, with a `code` for programs.
pub(crate) fn problem(status: StatusCode, code: &str, detail: &str) -> Response {
    problem_with(status, code, detail, None)
}

fn problem_with(status: StatusCode, code: &str, detail: &str, field: Option<&str>) -> Response {
    let mut body = json!({
        "type": "about:blank",
        "title": status.canonical_reason().unwrap_or_default(),
        "status": status.as_u16(),
        "code": code,
        "detail": detail,
    });
    if let Some(field) = field {
        body["field"] = json!(field);
    }
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

fn result(output: Output) -> Response {
    let mut response = Response::new(Body::from(output.data));
    // A media type that no header can hold is the guest's mistake; its bytes still arrive.
    let media_type = output.content_type.map(|media_type| {
        HeaderValue::try_from(media_type).unwrap_or(HeaderValue::from_static("application/octet-stream"))
    });
    if let Some(media_type) = media_type {
        response.headers_mut().insert(header::CONTENT_TYPE, media_type);
    }
    // The bytes are a guest's: no browser shall guess that they are a page.
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// It is kept, and runs later.
fn accepted(awaits: u64, until_ms: u64) -> Response {
    let body = json!({ "outcome": "parked", "awaits": awaits, "until_ms": until_ms });
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::ACCEPTED;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn replayed(mut response: Response) -> Response {
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    response
}

/// Says that the host has the message, durably, and that sending it again changes nothing: this
/// is not a refusal to take it.
fn settled(outcome: &'static str, mut response: Response) -> Response {
    response.headers_mut().insert(SETTLED, HeaderValue::from_static(outcome));
    response
}

fn retry_after(seconds: u64, mut response: Response) -> Response {
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    response
}
