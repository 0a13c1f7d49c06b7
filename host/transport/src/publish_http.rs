//! HTTP as a client: posts a message as a CloudEvent in binary mode, and hands back what was answered. Plain HTTP only.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::Message;
use hapax_core::transport::{Publisher, TransportError};
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// What a server answered.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// Whether the header `Idempotent-Replayed` says that nothing ran.
    pub replayed: bool,
    /// The body.
    pub body: Bytes,
}

/// Posts messages to one URL.
pub struct HttpPublisher {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
}

impl HttpPublisher {
    /// A publisher to `url`.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        let wrong = |why: &str| TransportError::Broken(format!("the URL `{url}` {why}").into());
        let uri: Uri = url.parse().map_err(|error| wrong(&format!("cannot be read: {error}")))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(wrong("needs TLS, which is not supported yet; send to a proxy on this host")),
            _ => return Err(wrong("must begin with http://")),
        }
        Ok(Self { client: Client::builder(TokioExecutor::new()).build_http(), uri })
    }

    /// Posts one message. Every attribute travels as a `ce-` header; the id also as `Idempotency-Key`.
    pub async fn post(&self, message: &Message) -> Result<HttpAnswer, TransportError> {
        let unavailable = |why: String| TransportError::Unavailable(format!("{}: {why}", self.uri).into());
        let request = self.request(message)?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| unavailable(causes(&error)))?;
            let status = response.status().as_u16();
            let replayed = response.headers().contains_key("idempotent-replayed");
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| unavailable(error.to_string()))?.to_bytes();
            Ok(HttpAnswer { status, replayed, body })
        };
        let timed_out = |_| unavailable(format!("no answer in {} s", TIMEOUT.as_secs()));
        tokio::time::timeout(TIMEOUT, exchange).await.map_err(timed_out)?
    }

    fn request(&self, message: &Message) -> Result<Request<Full<Bytes>>, TransportError> {
        let key = message.idempotency_key.as_ref().unwrap_or(&message.id);
        let mut request =
            Request::post(&self.uri).header("ce-specversion", "1.0").header("idempotency-key", encode(key));
        for (name, value) in message.attributes() {
            let name = if name == "datacontenttype" { "content-type".to_owned() } else { format!("ce-{name}") };
            request = request.header(name, encode(&value));
        }
        if message.content_type.is_none() {
            request = request.header("content-type", "application/json");
        }
        let built = request.body(Full::new(message.data.clone()));
        built.map_err(|error| TransportError::Broken(format!("message {} fits no request: {error}", message.id).into()))
    }
}

impl Publisher for HttpPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>> {
        Box::pin(async move {
            for message in batch {
                let HttpAnswer { status, body, .. } = self.post(message).await?;
                let said = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
                let text = format!("{} answered {status}: {said}", self.uri);
                match status {
                    200..=299 => {}
                    408 | 409 | 425 | 429 | 500..=599 => return Err(TransportError::Unavailable(text.into())),
                    _ => return Err(TransportError::Broken(text.into())),
                }
            }
            Ok(())
        })
    }
}

/// A header's value by the CloudEvents HTTP binding: what is not printable ASCII is percent-encoded, and `"` and `%` too.
fn encode(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b' ' | b'"' | b'%' => out.push_str(&format!("%{byte:02X}")),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
