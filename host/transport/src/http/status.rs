//! Status over HTTP: `GET /v1/status` answers JSON, and a client asks for it. The host decides what
//! it says.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::get as on_get;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::TransportError;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::Empty;
use serde_json::Value;

use crate::http::response::problem;
use crate::publisher::http::{HttpAnswer, ask, client, plain_http};

/// Source of the status of a host.
pub trait StatusSource: Send + Sync + 'static {
    /// Returns the status, or an error text if it cannot be had.
    fn status(&self) -> BoxFuture<'_, Result<Value, String>>;
}

/// The route `GET /v1/status`.
pub fn status_router(source: Arc<dyn StatusSource>) -> Router {
    let answer = async move || status(&*source).await;
    Router::new().route("/v1/status", on_get(answer).fallback(async || other_method()))
}

async fn status(source: &dyn StatusSource) -> Response {
    match source.status().await {
        Ok(status) => {
            let mut response = Response::new(status.to_string().into());
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            // What it says is old as soon as it is said.
            response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
            response
        }
        Err(reason) => problem(StatusCode::SERVICE_UNAVAILABLE, "unavailable", &reason),
    }
}

fn other_method() -> Response {
    problem(StatusCode::METHOD_NOT_ALLOWED, "method", "GET /v1/status")
}

/// Gets `url` over plain HTTP.
pub async fn get(url: &str) -> Result<HttpAnswer, TransportError> {
    let uri = plain_http(url)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = uri;
    ask(&client(), request).await
}
