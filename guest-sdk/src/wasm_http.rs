//! Inside a component: a call over `wasi:http/outgoing-handler`, from the first byte to the last.
//! Not compiled for tests.

use std::time::Duration;

use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingResponse, Method, OutgoingBody, OutgoingRequest, RequestOptions, Scheme,
};
use wasip2::io::streams::StreamError;

use crate::http::{HttpError, Request, Response};

/// Most bytes that a stream takes in one write.
const WRITE_BYTES: usize = 4_096;
/// Most bytes that are read at a time.
const READ_BYTES: u64 = 64 << 10;

pub(crate) fn call(request: &Request) -> Result<Response, HttpError> {
    let outgoing = head(request)?;
    let body = outgoing.body().map_err(|()| invalid("it takes no body"))?;
    let options = request.timeout.map(options).transpose()?;
    let answer = outgoing_handler::handle(outgoing, options).map_err(code)?;
    write(body, &request.body)?;
    answer.subscribe().block();
    let answer = answer.get().and_then(Result::ok).ok_or_else(|| unanswered("it was answered twice"))?.map_err(code)?;
    read(&answer)
}

fn head(request: &Request) -> Result<OutgoingRequest, HttpError> {
    let (scheme, rest) = request.url.split_once("://").ok_or_else(|| invalid("its URL has no scheme"))?;
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    let path = match path.as_bytes().first() {
        None => "/".to_owned(),
        Some(b'?') => format!("/{path}"),
        Some(_) => path.to_owned(),
    };
    let headers: Vec<_> =
        request.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect();
    let fields = Fields::from_list(&headers).map_err(|error| invalid(&format!("its headers: {error:?}")))?;
    let outgoing = OutgoingRequest::new(fields);
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => Scheme::Other(other.to_owned()),
    };
    let set = outgoing
        .set_method(&method(&request.method))
        .and_then(|()| outgoing.set_scheme(Some(&scheme)))
        .and_then(|()| outgoing.set_authority(Some(authority)))
        .and_then(|()| outgoing.set_path_with_query(Some(&path)));
    set.map_err(|()| invalid(&format!("`{} {}`", request.method, request.url)))?;
    Ok(outgoing)
}

fn method(name: &str) -> Method {
    match name {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "DELETE" => Method::Delete,
        "OPTIONS" => Method::Options,
        "PATCH" => Method::Patch,
        other => Method::Other(other.to_owned()),
    }
}

fn options(timeout: Duration) -> Result<RequestOptions, HttpError> {
    let options = RequestOptions::new();
    let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
    options.set_first_byte_timeout(Some(nanoseconds)).map_err(|()| invalid("the host takes no timeouts"))?;
    Ok(options)
}

fn write(body: OutgoingBody, bytes: &[u8]) -> Result<(), HttpError> {
    let stream = body.write().map_err(|()| invalid("its body was taken"))?;
    for chunk in bytes.chunks(WRITE_BYTES) {
        // Who stops reading has mostly answered already: that tells why.
        if stream.blocking_write_and_flush(chunk).is_err() {
            break;
        }
    }
    drop(stream);
    OutgoingBody::finish(body, None).map_err(code)
}

fn read(answer: &IncomingResponse) -> Result<Response, HttpError> {
    let text = |(name, value): (String, Vec<u8>)| (name, String::from_utf8_lossy(&value).into_owned());
    let headers = answer.headers().entries().into_iter().map(text).collect();
    let incoming = answer.consume().map_err(|()| unanswered("its body was taken"))?;
    let mut body = Vec::new();
    {
        let stream = incoming.stream().map_err(|()| unanswered("its body was taken"))?;
        loop {
            match stream.blocking_read(READ_BYTES) {
                Ok(bytes) => body.extend(bytes),
                Err(StreamError::Closed) => break,
                Err(StreamError::LastOperationFailed(error)) => return Err(unanswered(&error.to_debug_string())),
            }
        }
    }
    drop(IncomingBody::finish(incoming));
    Ok(Response { status: answer.status(), headers, body })
}

fn code(code: ErrorCode) -> HttpError {
    match code {
        ErrorCode::HttpRequestDenied => HttpError::Denied,
        ErrorCode::HttpRequestUriInvalid => HttpError::Invalid("its URL".to_owned()),
        ErrorCode::HttpRequestMethodInvalid => HttpError::Invalid("its method".to_owned()),
        ErrorCode::InternalError(Some(text)) => HttpError::Unanswered(text),
        other => HttpError::Unanswered(format!("{other:?}")),
    }
}

fn invalid(what: &str) -> HttpError {
    HttpError::Invalid(what.to_owned())
}

fn unanswered(what: &str) -> HttpError {
    HttpError::Unanswered(what.to_owned())
}
