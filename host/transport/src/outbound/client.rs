//! The call: grants and addresses are checked, one connection is made to exactly the address that
//! was checked, one request goes out on it, one answer is read within time and size. A connection
//! is never used twice, so no answer is ever taken for another call's, and nothing is sent again
//! unasked.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Outbound, OutboundError, OutboundRequest, OutboundResponse, fault};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use url::{Host, Url};

use super::grant::{Grant, Target};
use super::secrets::Secrets;
use crate::publisher::http::causes;

/// Headers that belong to the connection and not to the call: the host's own.
const NOT_THE_CALLS: [&str; 10] = [
    "host",
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Limits of a processor's calls. A limit is that of one call, unless it says otherwise.
#[derive(Debug, Clone)]
pub struct OutsideLimits {
    /// A whole call: waiting for its turn, connecting, sending, and the answer to its last byte.
    pub timeout: Duration,
    /// Bytes of an answer's body.
    pub response_bytes: usize,
    /// Bytes of an answer's head.
    pub head_bytes: usize,
    /// Calls under way at one time, of all messages of the processor.
    pub calls: usize,
}

impl Default for OutsideLimits {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), response_bytes: 1 << 20, head_bytes: 64 << 10, calls: 64 }
    }
}

/// Finds the addresses of a name. Asked once a call.
pub trait Resolve: Send + Sync + 'static {
    /// All addresses of `name`.
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>>;
}

/// The machine's own resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|found| found.ip()).collect()) })
    }
}

/// Makes the calls of one processor over HTTP/1.1. Follows no redirect, uses no proxy, decodes no
/// content coding.
pub struct HttpOutside {
    grants: Vec<Grant>,
    secrets: Secrets,
    limits: OutsideLimits,
    resolver: Arc<dyn Resolve>,
    tls: Arc<ClientConfig>,
    places: Semaphore,
}

impl HttpOutside {
    /// A client for what `grants` allows. `more_roots` are certificates in PEM of authorities that
    /// are trusted beside the machine's own; the error is a sentence for whoever set them.
    pub fn new(
        grants: Vec<Grant>,
        secrets: Secrets,
        limits: OutsideLimits,
        more_roots: Option<&[u8]>,
    ) -> Result<Self, String> {
        let places = Semaphore::new(limits.calls.clamp(1, Semaphore::MAX_PERMITS));
        let tls = Arc::new(tls(more_roots)?);
        Ok(Self { grants, secrets, limits, resolver: Arc::new(SystemResolver), tls, places })
    }

    /// Replaces the resolver, which finds the addresses of a name.
    #[must_use]
    pub fn resolving_by(self, resolver: Arc<dyn Resolve>) -> Self {
        Self { resolver, ..self }
    }

    async fn exchange(&self, request: &OutboundRequest) -> Result<OutboundResponse, OutboundError> {
        let _place = self.places.acquire().await.expect("the semaphore is never closed");
        let url = Url::parse(&request.url).map_err(|error| invalid(&request.url, &error.to_string()))?;
        let target = Target::of(&url).map_err(|why| invalid(&request.url, &why))?;
        let grant = self.grant(&target)?;
        let head = self.head(request, &url, &target)?;
        let address = self.address(grant, &target).await?;
        let connection = TcpStream::connect(address).await.map_err(|error| connect(&target, &error))?;
        let _ = connection.set_nodelay(true);
        let message = head.map(|()| Full::new(request.body.clone()));
        if target.scheme == "http" {
            return self.talk(connection, message).await;
        }
        let name = server_name(&target)?;
        let connector = TlsConnector::from(self.tls.clone());
        let connection = connector.connect(name, connection).await.map_err(|error| connect(&target, &error))?;
        self.talk(connection, message).await
    }

    fn grant(&self, target: &Target) -> Result<&Grant, OutboundError> {
        self.grants.iter().find(|grant| grant.allows(target)).ok_or_else(|| {
            let Target { scheme, host, port } = target;
            let granted: Vec<String> = self.grants.iter().map(|grant| format!("`{grant}`")).collect();
            OutboundError::Denied(format!(
                "{scheme}://{host}:{port} is not among the processor's `http`: {}",
                granted.join(", ")
            ))
        })
    }

    /// The head of the request, with its secrets in place.
    fn head(&self, request: &OutboundRequest, url: &Url, target: &Target) -> Result<http::Request<()>, OutboundError> {
        let wrong = |what: &str| invalid(&request.url, what);
        let mut path = url.path().to_owned();
        if let Some(query) = url.query() {
            path = format!("{path}?{query}");
        }
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or_default().to_owned(),
        };
        let method = http::Method::from_bytes(request.method.as_bytes()).map_err(|_| wrong("it has no such method"))?;
        if method == http::Method::CONNECT {
            return Err(wrong("the host makes no tunnels"));
        }
        let mut headers = HeaderMap::new();
        headers.insert(http::header::HOST, HeaderValue::from_str(&host).map_err(|_| wrong("its host is none"))?);
        for (name, value) in &request.headers {
            if NOT_THE_CALLS.iter().any(|of_connection| name.eq_ignore_ascii_case(of_connection)) {
                continue;
            }
            let value = self.secrets.put_into(value, target).map_err(OutboundError::Denied)?;
            let bad = || wrong(&format!("its header `{name}` cannot be sent"));
            let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad())?;
            headers.append(key, HeaderValue::from_bytes(&value).map_err(|_| bad())?);
        }
        let mut head = http::Request::new(());
        (*head.method_mut(), *head.headers_mut()) = (method, headers);
        *head.uri_mut() = path.parse().map_err(|_| wrong("its path cannot be sent"))?;
        Ok(head)
    }

    /// The address to connect to: checked, and not looked up again.
    async fn address(&self, grant: &Grant, target: &Target) -> Result<SocketAddr, OutboundError> {
        let found = match &target.host {
            Host::Ipv4(address) => vec![IpAddr::from(*address)],
            Host::Ipv6(address) => vec![IpAddr::from(*address)],
            Host::Domain(name) => self.resolver.resolve(name).await.map_err(|error| connect(target, &error))?,
        };
        let mut refused = None;
        for address in found {
            match grant.refuses(address) {
                Some(why) if !fault::mutated("address-unchecked") => refused = Some((address, why)),
                _ => return Ok(SocketAddr::new(address, target.port)),
            }
        }
        Err(match refused {
            Some((address, why)) => OutboundError::Denied(format!(
                "{} is at {address}, which is {why}; if that is meant, grant it with `private = true`",
                target.host
            )),
            None => OutboundError::Connect(format!("{} has no address", target.host)),
        })
    }

    /// One request and its answer, on a connection of their own.
    async fn talk(
        &self,
        connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        message: http::Request<Full<Bytes>>,
    ) -> Result<OutboundResponse, OutboundError> {
        let broken = |error: &hyper::Error| OutboundError::Broken(causes(error));
        let mut builder = hyper::client::conn::http1::Builder::new();
        builder.max_buf_size(self.limits.head_bytes.max(8 << 10));
        let (mut sender, driver) = builder.handshake(TokioIo::new(connection)).await.map_err(|error| broken(&error))?;
        // Dropped with this future: whoever gives the call up closes its connection.
        let mut driver = std::pin::pin!(driver);
        let exchange = async {
            let answer = sender.send_request(message).await.map_err(|error| broken(&error))?;
            self.read(answer).await
        };
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => return answer,
            _ = &mut driver => {}
        }
        exchange.await
    }

    async fn read(&self, answer: http::Response<hyper::body::Incoming>) -> Result<OutboundResponse, OutboundError> {
        let status = answer.status().as_u16();
        let header = |(name, value): (&HeaderName, &HeaderValue)| {
            (name.as_str().to_owned(), Bytes::copy_from_slice(value.as_bytes()))
        };
        let headers = answer.headers().iter().map(header).collect();
        let limit = if fault::mutated("answer-unlimited") { usize::MAX } else { self.limits.response_bytes };
        let body = Limited::new(answer.into_body(), limit).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                OutboundError::TooLarge(limit)
            } else {
                OutboundError::Broken(causes(&*error))
            }
        })?;
        Ok(OutboundResponse { status, headers, body: body.to_bytes() })
    }
}

impl Outbound for HttpOutside {
    fn call<'a>(&'a self, request: &'a OutboundRequest) -> BoxFuture<'a, Result<OutboundResponse, OutboundError>> {
        let own = request.timeout_ms.map_or(Duration::MAX, Duration::from_millis);
        let timeout = own.min(self.limits.timeout);
        Box::pin(async move {
            match tokio::time::timeout(timeout, self.exchange(request)).await {
                Ok(answer) => answer,
                Err(_) => Err(OutboundError::Timeout(timeout.as_millis() as u64)),
            }
        })
    }
}

fn invalid(url: &str, why: &str) -> OutboundError {
    OutboundError::Invalid(format!("`{url}`: {why}"))
}

fn connect(target: &Target, error: &std::io::Error) -> OutboundError {
    OutboundError::Connect(format!("{}:{}: {}", target.host, target.port, causes(error)))
}

fn server_name(target: &Target) -> Result<ServerName<'static>, OutboundError> {
    match &target.host {
        Host::Domain(name) => {
            ServerName::try_from(name.clone()).map_err(|error| OutboundError::Invalid(format!("`{name}`: {error}")))
        }
        Host::Ipv4(address) => Ok(ServerName::IpAddress(IpAddr::from(*address).into())),
        Host::Ipv6(address) => Ok(ServerName::IpAddress(IpAddr::from(*address).into())),
    }
}

/// TLS with the machine's authorities and those in `more_roots`.
fn tls(more_roots: Option<&[u8]>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    // Where the machine has none, calls over TLS fail by name of the authority; others need none.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for certificate in more_roots.map(CertificateDer::pem_slice_iter).into_iter().flatten() {
        let certificate = certificate.map_err(|error| format!("a certificate cannot be read: {error}"))?;
        roots.add(certificate).map_err(|error| format!("a certificate cannot be used: {error}"))?;
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS cannot be set up: {error}"))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
