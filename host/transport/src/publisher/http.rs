//! HTTP as a client: posts a message as a CloudEvent in binary mode, and hands back what was
//! answered. Plain HTTP only; follows no redirects.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Message, Publisher, TransportError};
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Body;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::cloudevents::binary;

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Bytes of an answer that an error shows.
const SHOWN_BYTES_MAX: usize = 200;

/// Answer of a server.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// Set if the header `Idempotent-Replayed` says that nothing ran.
    pub replayed: bool,
    /// The body; empty where it broke off or is larger than 16 MiB.
    pub body: Bytes,
}

/// Posts messages to one URL, one after the other.
pub struct HttpPublisher {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    /// Ids of a batch that failed half way which were accepted: not posted again when the batch is.
    accepted: HashSet<String>,
}

impl HttpPublisher {
    /// A publisher to `url`.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        Ok(Self { client: client(), uri: plain_http(url)?, accepted: HashSet::new() })
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

    async fn send(&self, message: &Message) -> Result<(), TransportError> {
        let HttpAnswer { status, body, .. } = self.post(message).await?;
        let said = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES_MAX)]).into_owned();
        let text = format!("{} answered {status} to message {}: {said}", self.uri, message.id);
        match status {
            200..=299 => Ok(()),
            300..=399 => {
                Err(TransportError::Broken(format!("{text}. Redirects are not followed; name the new URL").into()))
            }
            // 409 is a receiver like this host that has the same message under way.
            408 | 409 | 425 | 429 | 500..=599 => Err(TransportError::Unavailable(text.into())),
            _ => Err(TransportError::Broken(format!("{text}. Fix the receiver or the URL, and start again").into())),
        }
    }
}

impl Publisher for HttpPublisher {
    fn publish<'a>(&'a mut self, batch: &'a [Message]) -> BoxFuture<'a, Result<(), TransportError>> {
        Box::pin(async move {
            for message in batch {
                if !self.accepted.contains(&message.id) {
                    self.send(message).await?;
                    self.accepted.insert(message.id.clone());
                }
            }
            self.accepted.clear();
            Ok(())
        })
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
        let replayed = response.headers().contains_key("idempotent-replayed");
        // The status has decided; a body that cannot be read takes nothing back.
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(HttpAnswer { status, replayed, body: body.map(|body| body.to_bytes()).unwrap_or_default() })
    };
    let timed_out = |_| unavailable(format!("no answer in {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, exchange).await.map_err(timed_out)?
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
