//! Many CloudEvents in one request: each answered for itself, in the shape of SQS' partial batch
//! responses. A batch is refused as a whole only if it cannot be read as one.

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hapax_core::{Message, Output};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::cloudevents::binary;
use crate::cloudevents::{self, InvalidMessage};
use crate::http::ingress::{HttpIngress, HttpLimits, Refused, failed, read_body};
use crate::http::response::{Answer, problem, respond};

const MEDIA_TYPE: &str = "application/cloudevents-batch+json";

/// One element of the array: a message, or why it is none.
struct Element {
    /// Its id, as far as it has one; else `#` and its place, counted from 0.
    identifier: String,
    read: Result<Message, InvalidMessage>,
}

pub(crate) async fn receive(
    State(door): State<HttpIngress>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let Ok(Path(name)) = path else {
        return problem(StatusCode::BAD_REQUEST, "invalid", "the processor's name in the path is not UTF-8");
    };
    let elements = match read(&headers, body, &door.limits).await {
        Ok(elements) => elements,
        Err(refused) => return refused.response(),
    };
    if let [header, ..] = door.ingress.headers(&name) {
        let detail = format!(
            "{name} knows its messages by the header `{header}`, and a batch has one for all of them; send each in a request of \
             its own"
        );
        return Refused::Batch(StatusCode::BAD_REQUEST, "invalid", detail).response();
    }
    let messages = elements.iter().filter_map(|element| element.read.as_ref().ok().cloned()).collect();
    // A task of its own: a client that goes away must not abandon messages half way.
    match tokio::spawn(door.ingress.deliver_batch(&name, messages)).await {
        Ok(answers) => refused(&answers).map_or_else(|| report(elements, answers), |answer| respond(&name, answer)),
        Err(error) => failed(&name, &error),
    }
}

/// The answer to a batch of which nothing was taken, whatever is in it.
fn refused(answers: &[Answer]) -> Option<Answer> {
    let whole = |answer: &&Answer| matches!(answer, Answer::UnknownProcessor { .. } | Answer::Unavailable { .. });
    answers.first().filter(|_| answers.iter().all(|answer| whole(&answer))).cloned()
}

async fn read(headers: &HeaderMap, body: Body, limits: &HttpLimits) -> Result<Vec<Element>, Refused> {
    check_headers(headers)?;
    let body = match read_body(headers, body, limits.max_batch_bytes).await {
        Err(Refused::Invalid(InvalidMessage::TooLarge { bytes, limit })) => {
            let detail = format!(
                "the batch has {bytes} bytes, over the limit of {limit}; send it in parts, or raise `max_batch_bytes`"
            );
            return Err(Refused::Batch(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail));
        }
        read => read?,
    };
    elements(&body, limits)
}

fn check_headers(headers: &HeaderMap) -> Result<(), Refused> {
    let content_type = binary::media_type(headers)?;
    let content_type = content_type.unwrap_or_default().to_ascii_lowercase();
    if content_type.split(';').next().unwrap_or_default().trim() != MEDIA_TYPE {
        let detail = format!("a batch is sent as {MEDIA_TYPE}; one message goes to /v1/processors/NAME/messages");
        return Err(Refused::MediaType(detail));
    }
    if headers.contains_key(binary::IDEMPOTENCY_KEY) {
        let detail =
            "the header `Idempotency-Key` names one message, and a batch has many: each is known by its own id";
        return Err(Refused::Batch(StatusCode::BAD_REQUEST, "invalid", detail.to_owned()));
    }
    Ok(())
}

fn elements(body: &Bytes, limits: &HttpLimits) -> Result<Vec<Element>, Refused> {
    let raw: Vec<&RawValue> = serde_json::from_slice(body).map_err(|error| {
        let detail = format!("the batch is no JSON array: {error}; write [event, event, ...], each a CloudEvent");
        Refused::Batch(StatusCode::BAD_REQUEST, "invalid", detail)
    })?;
    if raw.len() > limits.max_batch_items {
        let (count, limit) = (raw.len(), limits.max_batch_items);
        let detail = format!(
            "the batch has {count} messages, over the limit of {limit}; send it in parts, or raise `max_batch_items`"
        );
        return Err(Refused::Batch(StatusCode::PAYLOAD_TOO_LARGE, "too-many", detail));
    }
    Ok(raw.iter().enumerate().map(|(place, raw)| element(place, raw.get(), limits.max_message_bytes)).collect())
}

fn element(place: usize, text: &str, limit: usize) -> Element {
    let bytes = text.len();
    let read = match bytes > limit {
        true => Err(InvalidMessage::TooLarge { bytes, limit }),
        false => cloudevents::parse(text.as_bytes()),
    };
    let id = match &read {
        Ok(message) => Some(message.id.clone()),
        Err(_) => serde_json::from_str::<Value>(text).ok().and_then(|value| value["id"].as_str().map(str::to_owned)),
    };
    Element { identifier: id.filter(|id| !id.is_empty()).unwrap_or_else(|| format!("#{place}")), read }
}

/// 200 with what became of each element; those that are to be sent again are named once more, as
/// SQS has it.
fn report(elements: Vec<Element>, answers: Vec<Answer>) -> Response {
    let mut answers = answers.into_iter();
    let (mut failures, mut results) = (Vec::new(), Vec::new());
    for Element { identifier, read } in elements {
        let ended = match read {
            Ok(_) => answers.next().map_or_else(nothing, ended),
            Err(error) => Ended { settled: false, outcome: "invalid", more: error_of(&error.to_string()) },
        };
        if !ended.settled {
            failures.push(json!({ "itemIdentifier": identifier }));
        }
        let mut result = Map::from_iter([("id".into(), json!(identifier)), ("outcome".into(), json!(ended.outcome))]);
        result.extend(ended.more);
        results.push(Value::Object(result));
    }
    let body = json!({ "batchItemFailures": failures, "results": results });
    let mut response = Response::new(Body::from(body.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Answer for one message.
struct Ended {
    /// Set if the message must not be sent again.
    settled: bool,
    outcome: &'static str,
    more: Map<String, Value>,
}

fn ended(answer: Answer) -> Ended {
    let settled = |outcome, more| Ended { settled: true, outcome, more };
    let again = |outcome, more| Ended { settled: false, outcome, more };
    match answer {
        Answer::Completed { output } => settled("completed", result_of(&output)),
        Answer::Replayed { output } => settled("duplicate", result_of(&output)),
        Answer::Failed { error, replayed: true } => settled("duplicate", error_of(&error)),
        Answer::Failed { error, replayed: false } => settled("dead-lettered", error_of(&error)),
        Answer::Mismatch { .. } => {
            settled("mismatch", error_of("the idempotency key was used before with another body"))
        }
        Answer::Stale => settled("stale", Map::new()),
        Answer::Parked { awaits, until_ms } => {
            settled("parked", Map::from_iter([("awaits".into(), json!(awaits)), ("until_ms".into(), json!(until_ms))]))
        }
        Answer::InFlight => again("in-flight", error_of("a message with this key is being processed; ask again")),
        Answer::RetryLater { error, after_ms } => {
            let mut more = error_of(&error);
            more.insert("retry_after_ms".into(), json!(after_ms));
            again("retry", more)
        }
        Answer::Paused { after_ms } => {
            let mut more = error_of("the processor is paused (circuit breaker); nothing ran");
            more.insert("retry_after_ms".into(), json!(after_ms));
            again("paused", more)
        }
        Answer::UnknownProcessor { .. } => again("unavailable", error_of("there is no such processor")),
        Answer::Unavailable { reason } => again("unavailable", error_of(&reason)),
    }
}

/// Returns the answer for a message that the host gave none for. An ingress answers every message
/// of a batch: this is a fault, and nothing is known of the message.
fn nothing() -> Ended {
    Ended { settled: false, outcome: "unavailable", more: error_of("the host gave no answer; sending again is safe") }
}

fn error_of(error: &str) -> Map<String, Value> {
    Map::from_iter([("error".into(), json!(error))])
}

/// JSON as it is, other text as a string, bytes in base64.
fn result_of(output: &Output) -> Map<String, Value> {
    if output.data.is_empty() {
        return Map::new();
    }
    let json = output.content_type.as_deref().is_some_and(hapax_core::is_json_type);
    let value = match std::str::from_utf8(&output.data) {
        Ok(text) if json => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        Ok(text) => json!(text),
        Err(_) => return Map::from_iter([("result_base64".into(), json!(STANDARD.encode(&output.data)))]),
    };
    Map::from_iter([("result".into(), value)])
}
