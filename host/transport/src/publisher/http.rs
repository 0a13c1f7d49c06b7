//! HTTP as a client: posts a message as a CloudEvent in binary mode, and hands back what was
//! answered. Plain HTTP only; follows no redirects.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Message, Published, Publisher, Refusal, SendAnswer, TransportError, Unavailable, fault};
use http::{HeaderMap, HeaderName, Request, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Body;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use crate::cloudevents::binary;

/// Header of a host's answer to a message that it has settled for good, with the outcome: sending
/// the message again changes nothing.
pub(crate) const SETTLED: HeaderName = HeaderName::from_static("hapax-settled");

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Bytes of an answer that an error shows.
const SHOWN_BYTES_MAX: usize = 200;
/// Messages for which a destination may answer, one after the other, that there is nothing at its
/// address, before the address is taken for wrong.
const DOUBTS_MAX: usize = 8;

/// Answer of a server.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// Set if the header `Idempotent-Replayed` says that nothing ran.
    pub replayed: bool,
    /// Outcome, if the header `Hapax-Settled` says that the server has the message and that it has
    /// ended there.
    pub settled: Option<String>,
    /// Time before which the server asked not to be called again, in milliseconds from now.
    pub retry_after_ms: Option<u64>,
    /// The body; empty where it broke off or is larger than 16 MiB.
    pub body: Bytes,
}

/// Posts messages to one URL, one after the other.
pub struct HttpPublisher {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    destination: Arc<str>,
}

/// Meaning of an answer for its message.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    /// The receiver has the message.
    Delivered,
    /// The receiver does not take this message.
    Refused,
    /// Nothing is there, or it is not open to this host: said of the address, or of the message.
    Doubtful,
    /// The receiver cannot take messages now.
    Later,
}

impl HttpAnswer {
    fn meaning(&self) -> Meaning {
        match self.status {
            200..=299 => Meaning::Delivered,
            _ if self.settled.is_some() && !fault::mutated("settled-counts-as-refused") => Meaning::Delivered,
            408 | 425 | 429 | 500..=599 => Meaning::Later,
            // A receiver like this host that has the message under way says when to come again. A
            // conflict without it is the message's own.
            409 if self.retry_after_ms.is_some() => Meaning::Later,
            300..=399 | 401 | 403 | 404 | 405 | 407 | 410 => Meaning::Doubtful,
            _ => Meaning::Refused,
        }
    }
}

/// Answers to the messages of one batch, as they come.
struct Answers<'a> {
    batch: &'a [Message],
    published: Published,
    /// Messages with a doubtful answer since the last message that the receiver took, by index.
    doubts: Vec<(usize, Refusal)>,
    /// Ordering keys with a message that was sent and not delivered: no other of them is sent.
    stopped_keys: Vec<&'a str>,
}

impl<'a> Answers<'a> {
    fn new(batch: &'a [Message]) -> Self {
        let published = Published { answers: vec![SendAnswer::NotSent; batch.len()], unavailable: None };
        Self { batch, published, doubts: Vec::new(), stopped_keys: Vec::new() }
    }

    fn key(&self, index: usize) -> Option<&'a str> {
        self.batch[index].extensions.get("partitionkey").map(String::as_str)
    }

    /// Returns true if a message of the same ordering key was sent in this batch and not delivered.
    fn waits(&self, index: usize) -> bool {
        !self.stopped_keys.is_empty() && self.key(index).is_some_and(|key| self.stopped_keys.contains(&key))
    }

    fn delivered(&mut self, index: usize) {
        self.published.answers[index] = SendAnswer::Delivered;
        self.address_is_right();
    }

    fn refused(&mut self, index: usize, refusal: Refusal) {
        self.published.answers[index] = SendAnswer::Refused(refusal);
        self.stopped_keys.extend(self.key(index));
        self.address_is_right();
    }

    fn doubtful(&mut self, index: usize, refusal: Refusal) {
        self.doubts.push((index, refusal));
        self.stopped_keys.extend(self.key(index));
    }

    /// Somebody reads messages at this address: what was said there before was about the messages.
    fn address_is_right(&mut self) {
        for (index, refusal) in self.doubts.drain(..) {
            self.published.answers[index] = SendAnswer::Refused(refusal);
        }
    }
}

impl HttpPublisher {
    /// A publisher to `url`.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        Ok(Self { client: client(), uri: plain_http(url)?, destination: url.into() })
    }

    /// Posts one message. Every attribute travels as a `ce-` header; the id, or the message's own
    /// key, also as `Idempotency-Key`.
    pub async fn post(&self, message: &Message) -> Result<HttpAnswer, TransportError> {
        let mut request = Request::new(Full::new(message.data.clone()));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = binary::to_headers(message);
        ask(&self.client, request).await
    }

    async fn send(&self, batch: &[Message]) -> Result<Published, TransportError> {
        let mut answers = Answers::new(batch);
        for (index, message) in batch.iter().enumerate() {
            if answers.waits(index) {
                continue;
            }
            let answer = match self.post(message).await {
                Ok(answer) => answer,
                Err(TransportError::Unavailable(reason)) => {
                    answers.published.unavailable = Some(Unavailable::for_now(reason));
                    break;
                }
                Err(broken) => return Err(broken),
            };
            match answer.meaning() {
                Meaning::Delivered => {
                    self.tell_settled(message, &answer);
                    answers.delivered(index);
                }
                Meaning::Refused => answers.refused(index, self.refusal(message, &answer)),
                Meaning::Doubtful => {
                    answers.doubtful(index, self.refusal(message, &answer));
                    if answers.doubts.len() == DOUBTS_MAX {
                        break;
                    }
                }
                Meaning::Later => {
                    let (reason, retry_after_ms) = (self.text(message, &answer).into(), answer.retry_after_ms);
                    answers.published.unavailable =
                        Some(Unavailable { reason, retry_after_ms, is_misconfigured: false });
                    break;
                }
            }
        }
        let Answers { mut published, doubts, .. } = answers;
        if let ([(_, refusal), ..], None) = (&doubts[..], &published.unavailable) {
            published.unavailable = Some(misconfigured(refusal));
        }
        Ok(published)
    }

    /// Says of a message that it has ended at the other side, and not well: this side is done with
    /// it.
    fn tell_settled(&self, message: &Message, answer: &HttpAnswer) {
        if let (Some(outcome), 300..) = (&answer.settled, answer.status) {
            tracing::warn!("outbox: {} has message {} as {outcome:?}; look there", self.uri, message.id);
        }
    }

    fn refusal(&self, message: &Message, answer: &HttpAnswer) -> Refusal {
        let (destination, status) = (self.destination.clone(), Some(answer.status));
        Refusal { destination, status, text: self.text(message, answer).into() }
    }

    fn text(&self, message: &Message, answer: &HttpAnswer) -> String {
        let HttpAnswer { status, body, .. } = answer;
        let said = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES_MAX)]);
        let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{} answered {status} to message {}: {said}", self.uri, message.id)
    }
}

/// Returns the reason not to go on after an answer that says nothing of the message, but of the
/// address.
fn misconfigured(refusal: &Refusal) -> Unavailable {
    let help = match refusal.status {
        Some(300..=399) => "Redirects are not followed; name the new URL",
        Some(401 | 403 | 407) => "The destination does not let this host in; correct its rights or the URL",
        _ => "Nothing takes messages there; correct the URL or the destination",
    };
    let reason = format!("{}. {help}", refusal.text).into();
    Unavailable { reason, retry_after_ms: None, is_misconfigured: true }
}

impl Publisher for HttpPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<Published, TransportError>> {
        Box::pin(self.send(batch))
    }
}

/// A client for requests with bodies of kind `B`.
pub(crate) fn client<B>() -> Client<HttpConnector, B>
where
    B: Body + Send,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

/// The URL, if it is one that can be asked.
pub(crate) fn plain_http(url: &str) -> Result<Uri, TransportError> {
    let wrong = |why: &str| TransportError::Broken(format!("the URL `{url}` {why}").into());
    let uri: Uri = url.parse().map_err(|error| wrong(&format!("cannot be read: {error}")))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(wrong("needs TLS, which is not supported yet; send to a proxy on this host")),
        _ => return Err(wrong("must begin with http://")),
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(wrong("holds a user or a password, which is not supported yet; take it out"));
    }
    Ok(uri)
}

/// Sends a request, and waits for the answer.
pub(crate) async fn ask<B>(client: &Client<HttpConnector, B>, request: Request<B>) -> Result<HttpAnswer, TransportError>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let uri = request.uri().clone();
    let unavailable = |why: String| TransportError::Unavailable(format!("{uri}: {why}").into());
    let exchange = async {
        let response = client.request(request).await.map_err(|error| unavailable(causes(&error)))?;
        let status = response.status().as_u16();
        let headers = response.headers();
        let replayed = headers.contains_key("idempotent-replayed");
        let settled = text_of(headers, &SETTLED).map(str::to_owned);
        let retry_after_ms =
            text_of(headers, &header::RETRY_AFTER).and_then(|text| retry_after_ms(text, SystemTime::now()));
        // The status has decided; a body that cannot be read takes nothing back.
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        Ok(HttpAnswer { status, replayed, settled, retry_after_ms, body })
    };
    let timed_out = |_| unavailable(format!("no answer in {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, exchange).await.map_err(timed_out)?
}

fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Reads `Retry-After`: seconds, or a time in the form of HTTP.
fn retry_after_ms(text: &str, now: SystemTime) -> Option<u64> {
    if let Ok(seconds) = text.trim().parse::<u64>() {
        return Some(seconds.saturating_mul(1_000));
    }
    let at = OffsetDateTime::parse(text.trim(), &Rfc2822).ok()?;
    u64::try_from((at - OffsetDateTime::from(now)).whole_milliseconds().max(0)).ok()
}

pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(status: u16, settled: bool, retry_after: bool) -> Meaning {
        let settled = settled.then(|| "dead-lettered".to_owned());
        let retry_after_ms = retry_after.then_some(1_000);
        HttpAnswer { status, replayed: false, settled, retry_after_ms, body: Bytes::new() }.meaning()
    }

    #[test]
    fn each_answer_has_one_meaning() {
        for (statuses, expected) in [
            ([200, 201, 202, 204].as_slice(), Meaning::Delivered),
            (&[400, 402, 409, 413, 415, 422, 431], Meaning::Refused),
            (&[301, 307, 308, 401, 403, 404, 405, 407, 410], Meaning::Doubtful),
            (&[408, 425, 429, 500, 501, 502, 503, 504], Meaning::Later),
        ] {
            for status in statuses {
                assert_eq!(meaning(*status, false, false), expected, "{status}");
                assert_eq!(meaning(*status, true, false), Meaning::Delivered, "{status}, settled");
            }
        }
        assert_eq!(meaning(409, false, true), Meaning::Later);
        assert_eq!(meaning(422, false, true), Meaning::Refused);
    }

    #[test]
    fn retry_after_is_seconds_or_a_time() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, expected) in [
            ("120", Some(120_000)),
            ("0", Some(0)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10_000)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
            ("1.5", None),
        ] {
            assert_eq!(retry_after_ms(text, now), expected, "{text}");
        }
    }
}
