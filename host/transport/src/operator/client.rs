//! Asks a running host over HTTP what an operator wants to know or have done. Plain HTTP only;
//! follows no redirects.

use std::time::Duration;

use bytes::Bytes;
use hapax_core::TransportError;
use http::{Method, Request, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde_json::Value;

use crate::operator::request::{OperatorRequest, RequestError};
use crate::publisher::http::{causes, plain_http};

/// Longest wait for one answer: something may be done to many.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Bytes of an answer, at most.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Characters that are not escaped in a path.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Asks one host.
pub struct OperatorClient {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
}

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AskError {
    /// The host says no.
    #[error(transparent)]
    Refused(#[from] RequestError),
    /// The host cannot be reached, or is none.
    #[error("{0}")]
    NoAnswer(String),
}

impl OperatorClient {
    /// A client of the host at `url`.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        plain_http(url)?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self { client, url: url.trim_end_matches('/').to_owned() })
    }

    /// Asks, and waits for the answer.
    pub async fn ask(&self, ask: &OperatorRequest) -> Result<Value, AskError> {
        let (method, path, body) = request(ask);
        let no_answer = |why: String| AskError::NoAnswer(format!("{}: {why}", self.url));
        let uri: Uri = format!("{}{path}", self.url).parse().map_err(|error| no_answer(format!("{error}")))?;
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| no_answer(causes(&error)))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| no_answer(causes(&*error)))?.to_bytes();
            read(status.is_success(), &body).ok_or_else(|| {
                no_answer(format!("answered {status} and nothing that a hapax of this version would; is it one?"))
            })?
        };
        let timed_out = |_| no_answer(format!("no answer in {} s", TIMEOUT.as_secs()));
        tokio::time::timeout(TIMEOUT, exchange).await.map_err(timed_out)?
    }
}

/// The answer, or the refusal; `None` if it is neither.
fn read(success: bool, body: &[u8]) -> Option<Result<Value, AskError>> {
    let value: Value = serde_json::from_slice(body).ok()?;
    if success {
        return Some(Ok(value));
    }
    let refusal = RequestError::of(value["code"].as_str()?, value["detail"].as_str()?.to_owned())?;
    Some(Err(refusal.into()))
}

fn request(ask: &OperatorRequest) -> (Method, String, String) {
    let get = |path: String| (Method::GET, path, String::new());
    let post = |path: &str, body: String| (Method::POST, path.to_owned(), body);
    let one = |path: &str, key: &str, more: &str| get(format!("{path}/{}{more}", utf8_percent_encode(key, PLAIN)));
    match ask {
        OperatorRequest::Letters(filter) => get(format!("/v1/dlq{}", query(filter))),
        OperatorRequest::Letter(key) => one("/v1/dlq", key, ""),
        OperatorRequest::Redrive(chosen) => post("/v1/dlq/redrive", as_json(chosen).to_string()),
        OperatorRequest::Discard(chosen) => post("/v1/dlq/discard", as_json(chosen).to_string()),
        OperatorRequest::Records(filter) => get(format!("/v1/records{}", query(filter))),
        OperatorRequest::Record(key) => one("/v1/records", key, ""),
        OperatorRequest::History(key) => one("/v1/records", key, "/history"),
        OperatorRequest::GiveUp(chosen) => post("/v1/records/give-up", as_json(chosen).to_string()),
        OperatorRequest::Evict(chosen) => post("/v1/records/evict", as_json(chosen).to_string()),
        OperatorRequest::Audit(filter) => get(format!("/v1/audit{}", query(filter))),
        OperatorRequest::Sagas(filter) => get(format!("/v1/sagas{}", query(filter))),
        OperatorRequest::Saga(id) => one("/v1/sagas", id, ""),
        OperatorRequest::RefusedMessages(filter) => get(format!("/v1/outbox{}", query(filter))),
        OperatorRequest::RefusedMessage(id) => one("/v1/outbox", id, ""),
        OperatorRequest::RedriveOutgoing(chosen) => post("/v1/outbox/redrive", as_json(chosen).to_string()),
        OperatorRequest::DiscardOutgoing(chosen) => post("/v1/outbox/discard", as_json(chosen).to_string()),
        OperatorRequest::State(processor, filter) => one("/v1/state", processor, &query(filter)),
        OperatorRequest::StateValue(processor, key) => {
            get(format!("/v1/state/{}/{}", utf8_percent_encode(processor, PLAIN), utf8_percent_encode(key, PLAIN)))
        }
        OperatorRequest::Streams(processor, filter) => one("/v1/streams", processor, &query(filter)),
        OperatorRequest::StreamEvents(processor, stream, filter) => get(format!(
            "/v1/streams/{}/{}{}",
            utf8_percent_encode(processor, PLAIN),
            utf8_percent_encode(stream, PLAIN),
            query(filter)
        )),
        OperatorRequest::ResumeSaga(verb, chosen) => {
            post(&format!("/v1/sagas/{}", verb.name()), as_json(chosen).to_string())
        }
    }
}

fn as_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("texts and numbers")
}

/// A filter as a query, with its question mark.
fn query(filter: &impl Serialize) -> String {
    let mut query = form_urlencoded::Serializer::for_suffix("?".to_owned(), 1);
    if let Value::Object(fields) = as_json(filter) {
        for (name, value) in &fields {
            query.append_pair(name, value.as_str().unwrap_or(&value.to_string()));
        }
    }
    query.finish()
}
