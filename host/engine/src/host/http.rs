//! `wasi:http/outgoing-handler`: each request becomes a call of the message, made or answered by
//! the pipeline. Sends nothing itself; who may call what is not decided here.

use std::time::Duration;

use bytes::Bytes;
use hapax_core::{OutboundCall, OutboundCaller, OutboundError, OutboundRequest, OutboundResponse};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use wasmtime::component::Linker;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView};

use super::HostState;

/// Bytes of a request's body, at most.
const REQUEST_BYTES_MAX: usize = 16 << 20;

/// HTTP state of an instance.
#[derive(Default)]
pub(crate) struct Http {
    ctx: WasiHttpCtx,
    door: HttpIngress,
}

/// Where requests go: to the caller of the message that the guest works on.
#[derive(Default)]
struct HttpIngress {
    caller: Option<OutboundCaller>,
}

pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)
}

impl WasiHttpView for HostState {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        let caller = self.items.selected().and_then(|item| item.context.caller());
        let wasi = self.wasi.as_mut().expect("HTTP is linked only for components that import it");
        let (table, http) = wasi.http();
        http.door.caller = caller;
        WasiHttpCtxView { hooks: &mut http.door, table, ctx: &mut http.ctx }
    }
}

/// Future that `wasmtime_wasi_http` expects from the sender of a request.
type Sending = Box<
    dyn Future<Output = Result<(http::Response<WasiBody>, Box<dyn Future<Output = Result<(), Error>> + Send>), Error>>
        + Send,
>;

impl WasiHttpHooks for HttpIngress {
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Sending {
        // Its place is that in which the guest has called, whatever is answered first.
        let call = self.caller.as_ref().map(OutboundCaller::next);
        Box::new(async move {
            let response = made(call, request, options).await?;
            let done: Box<dyn Future<Output = Result<(), Error>> + Send> = Box::new(std::future::ready(Ok(())));
            Ok((response, done))
        })
    }
}

async fn made(
    call: Option<OutboundCall>,
    request: http::Request<WasiBody>,
    options: Option<RequestOptions>,
) -> Result<http::Response<WasiBody>, Error> {
    let call = call.ok_or(Error::HttpRequestDenied)?;
    let request = whole(request, options).await?;
    match call.send(request).await {
        Ok(response) => answer(response),
        Err(error) => {
            // The guest gets a code; the reason is for the operator.
            tracing::warn!("an outbound call was not answered: {error}");
            Err(code(error))
        }
    }
}

/// The request with its whole body: what is journalled and compared.
async fn whole(request: http::Request<WasiBody>, options: Option<RequestOptions>) -> Result<OutboundRequest, Error> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, REQUEST_BYTES_MAX).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            Error::HttpRequestBodySize(Some(REQUEST_BYTES_MAX as u64))
        } else {
            Error::InternalError(Some(error.to_string()))
        }
    })?;
    let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        (name.as_str().to_owned(), Bytes::copy_from_slice(value.as_bytes()))
    };
    Ok(OutboundRequest {
        method: head.method.as_str().to_owned(),
        url: head.uri.to_string(),
        headers: head.headers.iter().filter(|(name, _)| **name != http::header::HOST).map(header).collect(),
        body: body.to_bytes(),
        timeout_ms: options.and_then(timeout_ms),
    })
}

/// The guest bounds the parts of a call; the host bounds the whole.
fn timeout_ms(options: RequestOptions) -> Option<u64> {
    let parts = [options.connect_timeout, options.first_byte_timeout, options.between_bytes_timeout];
    let sum = parts.into_iter().flatten().reduce(Duration::saturating_add)?;
    Some(u64::try_from(sum.as_millis()).unwrap_or(u64::MAX).max(1))
}

fn answer(response: OutboundResponse) -> Result<http::Response<WasiBody>, Error> {
    let body = Full::new(response.body).map_err(|never| match never {}).boxed_unsync();
    let mut answer = http::Response::new(body);
    *answer.status_mut() = http::StatusCode::from_u16(response.status).map_err(|_| Error::HttpProtocolError)?;
    for (name, value) in response.headers {
        let name = http::HeaderName::from_bytes(name.as_bytes()).map_err(|_| Error::HttpProtocolError)?;
        let value = http::HeaderValue::from_maybe_shared(value).map_err(|_| Error::HttpProtocolError)?;
        answer.headers_mut().append(name, value);
    }
    Ok(answer)
}

/// Returns the error that the guest gets for a call without an answer.
fn code(error: OutboundError) -> Error {
    match error {
        OutboundError::Denied(_) => Error::HttpRequestDenied,
        OutboundError::Invalid(_) => Error::HttpRequestUriInvalid,
        OutboundError::Connect(_) => Error::ConnectionRefused,
        OutboundError::Timeout(_) => Error::HttpResponseTimeout,
        OutboundError::TooLarge(limit) => Error::HttpResponseBodySize(Some(limit as u64)),
        OutboundError::Broken(_) => Error::HttpResponseIncomplete,
        OutboundError::Diverged(text) | OutboundError::Ended(text) => Error::InternalError(Some(text)),
    }
}
