//! Calls to the outside, over real sockets: who may call what, wherever its name leads, and what a
//! hostile or broken service can do to a call. No test waits for a clock of its own: what must not
//! hang ends by the call's own bounds.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Outbound as _, OutboundError, OutboundRequest, OutboundResponse};
use hapax_transport::outbound::{Grant, HttpOutside, OutsideLimits, Resolve, Secret, Secrets};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// Names and their addresses, as somebody's DNS would have them; each lookup takes the next answer,
/// the last one stays.
#[derive(Default)]
struct Names {
    addresses: BTreeMap<&'static str, Vec<Vec<IpAddr>>>,
    lookups: AtomicU32,
}

impl Resolve for Names {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>> {
        let lookup = self.lookups.fetch_add(1, Ordering::SeqCst) as usize;
        let answers = self.addresses.get(name).cloned().unwrap_or_default();
        let answer = answers.get(lookup).or(answers.last()).cloned();
        Box::pin(std::future::ready(answer.ok_or_else(|| std::io::Error::other("no such name"))))
    }
}

fn names(name: &'static str, answers: &[&[&str]]) -> Arc<Names> {
    let parse = |answer: &&[&str]| answer.iter().map(|address| address.parse().unwrap()).collect();
    Arc::new(Names { addresses: [(name, answers.iter().map(parse).collect())].into(), lookups: AtomicU32::new(0) })
}

/// Bounds that are soon reached.
fn tight() -> OutsideLimits {
    OutsideLimits { timeout: Duration::from_millis(500), response_bytes: 10_000, ..OutsideLimits::default() }
}

fn client(grants: &[(&str, bool)], names: Arc<Names>) -> HttpOutside {
    with_secrets(grants, names, Secrets::default())
}

fn with_secrets(grants: &[(&str, bool)], names: Arc<Names>, secrets: Secrets) -> HttpOutside {
    let grants = grants.iter().map(|(text, private)| Grant::new(text, *private).unwrap()).collect();
    HttpOutside::new(grants, secrets, tight(), None).unwrap().resolving_by(names)
}

async fn get(client: &HttpOutside, url: &str) -> Result<OutboundResponse, OutboundError> {
    ask(client, url, &[]).await
}

async fn ask(client: &HttpOutside, url: &str, headers: &[(&str, &str)]) -> Result<OutboundResponse, OutboundError> {
    let header = |(name, value): &(&str, &str)| ((*name).to_owned(), Bytes::copy_from_slice(value.as_bytes()));
    let headers = headers.iter().map(header).collect();
    client
        .call(&OutboundRequest { method: "GET".into(), url: url.into(), headers, body: Bytes::new(), timeout_ms: None })
        .await
}

/// A service that reads each request's head and then behaves as it is told.
struct Service {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

/// What a service does once it has read a head.
#[derive(Clone)]
enum Does {
    /// Writes this and closes.
    Say(String),
    /// Writes this, then one byte every 20 ms, for as long as anybody reads.
    Drip(String),
    /// Writes this for as long as anybody reads.
    Flood(String, String),
    /// Nothing, and keeps the connection.
    Nothing,
}

fn ok(body: &str) -> Does {
    Does::Say(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
}

impl Service {
    async fn start(does: Does) -> Self {
        Self::start_on(does, None).await
    }

    async fn start_on(does: Does, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = heads.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (does, seen, tls) = (does.clone(), seen.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(connection, does, &seen).await,
                        Some(tls) => {
                            if let Ok(connection) = TlsAcceptor::from(tls).accept(connection).await {
                                serve(connection, does, &seen).await;
                            }
                        }
                    }
                });
            }
        });
        Self { port, heads }
    }

    fn url(&self, host: &str) -> String {
        format!("http://{host}:{}", self.port)
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().clone()
    }
}

async fn serve(mut connection: impl AsyncRead + AsyncWrite + Unpin, does: Does, seen: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match connection.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    seen.lock().push(String::from_utf8(head).unwrap());
    match does {
        Does::Say(text) => {
            let _ = connection.write_all(text.as_bytes()).await;
            let _ = connection.shutdown().await;
        }
        Does::Drip(text) => {
            let _ = connection.write_all(text.as_bytes()).await;
            while connection.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Does::Flood(text, again) => {
            let _ = connection.write_all(text.as_bytes()).await;
            while connection.write_all(again.as_bytes()).await.is_ok() {}
        }
        Does::Nothing => {
            let _ = connection.read(&mut [0]).await;
        }
    }
}

fn denied(answer: Result<OutboundResponse, OutboundError>) -> String {
    match answer {
        Err(OutboundError::Denied(why)) => why,
        other => panic!("not denied: {other:?}"),
    }
}

/// Proves G81.
#[tokio::test]
async fn what_is_granted_is_called_and_nothing_else() {
    let service = Service::start(ok("hello")).await;
    let url = service.url("127.0.0.1");
    let client = client(&[(&url, false)], names("x.test", &[&["127.0.0.1"]]));
    let answer = get(&client, &format!("{url}/a%20b?c=d#e")).await.unwrap();
    assert_eq!((answer.status, &answer.body[..]), (200, &b"hello"[..]));
    let why = denied(get(&client, "http://example.com/").await);
    assert!(why.contains("example.com") && why.contains(&url), "{why}");
    for elsewhere in [
        format!("http://127.0.0.1:{}/", service.port.wrapping_add(1)),
        format!("https://127.0.0.1:{}/", service.port),
        format!("http://127.0.0.2:{}/", service.port),
        format!("http://x.test:{}/", service.port),
    ] {
        denied(get(&client, &elsewhere).await);
    }
    let heads = service.heads();
    assert_eq!(heads.len(), 1, "nothing that was denied was sent");
    assert!(heads[0].starts_with("GET /a%20b?c=d HTTP/1.1\r\n"), "{}", heads[0]);
}

/// Proves G82, G125.
#[tokio::test]
async fn a_granted_name_that_leads_into_this_network_is_denied() {
    let service = Service::start(ok("secret")).await;
    let grant = service.url("api.test");
    for address in ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    {
        let client = client(&[(&grant, false)], names("api.test", &[&[address]]));
        let why = denied(get(&client, &grant).await);
        assert!(why.contains("api.test") && why.contains("private = true"), "{why}");
    }
    assert_eq!(service.heads().len(), 0);
    let granted = client(&[(&grant, true)], names("api.test", &[&["127.0.0.1"]]));
    assert_eq!(get(&granted, &grant).await.unwrap().status, 200);
}

/// Proves G82.
#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_called() {
    let service = Service::start(ok("secret")).await;
    let grant = service.url("api.test");
    // The name leads somewhere public at the first lookup, and to this host at the next.
    let rebinding = names("api.test", &[&["192.0.1.1"], &["127.0.0.1"]]);
    let client = client(&[(&grant, false)], rebinding.clone());
    let answer = get(&client, &grant).await;
    assert!(!matches!(answer, Ok(_) | Err(OutboundError::Denied(_))), "it went where it was checked: {answer:?}");
    assert_eq!(rebinding.lookups.load(Ordering::SeqCst), 1, "a call looks a name up once");
    assert_eq!(service.heads().len(), 0);
}

/// Proves G83.
#[tokio::test]
async fn a_redirect_is_an_answer_and_is_not_followed() {
    let inner = Service::start(ok("secret")).await;
    let to = inner.url("127.0.0.1");
    let outer =
        Service::start(Does::Say(format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n"))).await;
    let client = client(&[(&outer.url("127.0.0.1"), false), (&to, false)], names("x", &[&[]]));
    let answer = get(&client, &outer.url("127.0.0.1")).await.unwrap();
    assert_eq!(answer.status, 302);
    assert!(answer.headers.contains(&("location".into(), Bytes::from(to))));
    assert_eq!(inner.heads().len(), 0);
}

/// Proves G81.
#[tokio::test]
async fn a_url_that_hides_where_it_goes_is_taken_at_its_word_or_refused() {
    let service = Service::start(ok("secret")).await;
    let port = service.port;
    let client = client(&[(&format!("http://api.test:{port}"), false)], names("api.test", &[&["192.0.1.1"]]));
    for url in [
        format!("http://api.test@127.0.0.1:{port}/"),
        format!("http://api.test:x@127.0.0.1:{port}/"),
        format!("http://127.0.0.1:{port}\\@api.test/"),
        format!("http://127.0.0.1:{port}#@api.test:{port}/"),
        format!("http://127.1:{port}/"),
        format!("http://0x7f000001:{port}/"),
        format!("http://[::ffff:7f00:1]:{port}/"),
        format!("http://[::1]:{port}/"),
        format!("gopher://api.test:{port}/"),
        "http:///".into(),
        "not a url".into(),
    ] {
        let answer = get(&client, &url).await;
        assert!(matches!(answer, Err(OutboundError::Denied(_) | OutboundError::Invalid(_))), "{url}: {answer:?}");
    }
    assert_eq!(service.heads().len(), 0);
}

/// Proves G80, G125.
#[tokio::test]
async fn an_answer_that_is_too_large_ends_the_call() {
    let large = "x".repeat(10_001);
    let head = "HTTP/1.1 200 OK\r\n";
    let chunk = "2000\r\n".to_owned() + &"x".repeat(0x2000) + "\r\n";
    let header = format!("x: {}\r\n", "x".repeat(1_000));
    for (bomb, does) in [
        ("a body that says its length", ok(&large)),
        ("one that says another", Does::Flood(format!("{head}content-length: 99999999\r\n\r\n"), large.clone())),
        ("chunks without an end", Does::Flood(format!("{head}transfer-encoding: chunked\r\n\r\n"), chunk)),
        ("no length", Does::Flood(format!("{head}\r\n"), large.clone())),
        ("headers without an end", Does::Flood(head.to_owned(), header)),
    ] {
        let service = Service::start(does).await;
        let url = service.url("127.0.0.1");
        let answer = get(&client(&[(&url, false)], names("x", &[&[]])), &url).await;
        assert!(
            matches!(answer, Err(OutboundError::TooLarge(10_000) | OutboundError::Broken(_))),
            "{bomb}: {answer:?}"
        );
    }
    let service = Service::start(ok(&large[1..])).await;
    let url = service.url("127.0.0.1");
    let answer = get(&client(&[(&url, false)], names("x", &[&[]])), &url).await;
    assert_eq!(answer.unwrap().body.len(), 10_000, "up to the bound it is an answer");
}

/// Proves G80.
#[tokio::test]
async fn a_service_that_takes_its_time_is_given_up() {
    let head = "HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n".to_owned();
    for (slow, does) in [
        ("no answer", Does::Nothing),
        ("a body byte by byte", Does::Drip(head)),
        ("a head byte by byte", Does::Drip("HTTP/1.1 200 OK\r\nx: ".into())),
    ] {
        let service = Service::start(does).await;
        let url = service.url("127.0.0.1");
        let answer = get(&client(&[(&url, false)], names("x", &[&[]])), &url).await;
        assert_eq!(answer, Err(OutboundError::Timeout(500)), "{slow}");
    }
}

/// Proves G80.
#[tokio::test]
async fn what_is_no_answer_is_broken_and_not_taken_for_one() {
    for nonsense in
        ["", "hello\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort", "HTTP/1.1 999999 X\r\n\r\n"]
    {
        let service = Service::start(Does::Say(nonsense.into())).await;
        let url = service.url("127.0.0.1");
        let answer = get(&client(&[(&url, false)], names("x", &[&[]])), &url).await;
        assert!(matches!(answer, Err(OutboundError::Broken(_))), "{nonsense}: {answer:?}");
    }
    // Two answers to one question: the first is it, and the other one is nobody's.
    let two = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nb";
    let service = Service::start(Does::Say(two.into())).await;
    let url = service.url("127.0.0.1");
    let client = client(&[(&url, false)], names("x", &[&[]]));
    for _ in 0..2 {
        assert_eq!(get(&client, &url).await.unwrap().body, "a");
    }
}

#[tokio::test]
async fn headers_of_the_connection_are_the_hosts_own() {
    let service = Service::start(ok("")).await;
    let url = service.url("127.0.0.1");
    let client = client(&[(&url, false)], names("x", &[&[]]));
    let smuggled =
        [("host", "evil.test"), ("Transfer-Encoding", "chunked"), ("connection", "upgrade"), ("upgrade", "h2c")];
    ask(&client, &url, &[&smuggled[..], &[("x-own", "1")]].concat()).await.unwrap();
    let head = service.heads()[0].to_ascii_lowercase();
    assert!(head.contains(&format!("host: 127.0.0.1:{}", service.port)) && head.contains("x-own: 1"), "{head}");
    for (name, value) in &smuggled {
        assert!(!head.contains(&format!("{}: {value}", name.to_ascii_lowercase())), "{head}");
    }
    for bad in [("x y", "1"), ("x", "1\r\ny: 2"), ("x", "1\n")] {
        let answer = ask(&client, &url, &[bad]).await;
        assert!(matches!(answer, Err(OutboundError::Invalid(_))), "{bad:?}: {answer:?}");
    }
}

/// Proves G84, G125.
#[tokio::test]
async fn a_secret_goes_where_it_is_for_and_nowhere_else() {
    let [one, other] = [Service::start(ok("")).await, Service::start(ok("")).await];
    let [one_url, other_url] = [one.url("127.0.0.1"), other.url("127.0.0.1")];
    let secret = Secret::new("s3cret".into(), vec![Grant::new(&one_url, false).unwrap()]);
    assert!(!format!("{secret:?}").contains("s3cret"));
    let secrets = Secrets([("token".to_owned(), secret)].into());
    let client = with_secrets(&[(&one_url, false), (&other_url, false)], names("x", &[&[]]), secrets);
    let with = [("authorization", "Bearer {{secret:token}}")];
    ask(&client, &one_url, &with).await.unwrap();
    assert!(one.heads()[0].contains("Bearer s3cret\r\n"), "{}", one.heads()[0]);
    let why = denied(ask(&client, &other_url, &with).await);
    assert!(why.contains("token") && !why.contains("s3cret"), "{why}");
    let why = denied(ask(&client, &one_url, &[("authorization", "{{secret:tokens}}")]).await);
    assert!(why.contains("tokens"), "{why}");
    denied(ask(&client, &one_url, &[("authorization", "{{secret:token")]).await);
    assert_eq!((one.heads().len(), other.heads().len()), (1, 0));
}

#[tokio::test]
async fn a_call_over_tls_wants_a_certificate_of_somebody_it_trusts() {
    let made = rcgen::generate_simple_self_signed(["api.test".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    let service = Service::start_on(ok("over tls"), Some(Arc::new(config))).await;
    let url = |host: &str| format!("https://{host}:{}", service.port);
    let client = |host: &'static str, roots: Option<&[u8]>| {
        let grants = vec![Grant::new(&url(host), true).unwrap()];
        let client = HttpOutside::new(grants, Secrets::default(), tight(), roots).unwrap();
        client.resolving_by(names(host, &[&["127.0.0.1"]]))
    };
    let trusted = made.cert.pem();
    let answer = get(&client("api.test", Some(trusted.as_bytes())), &url("api.test")).await.unwrap();
    assert_eq!(answer.body, "over tls");
    let stranger = get(&client("api.test", None), &url("api.test")).await;
    assert!(matches!(stranger, Err(OutboundError::Connect(_))), "{stranger:?}");
    let other_name = get(&client("other.test", Some(trusted.as_bytes())), &url("other.test")).await;
    assert!(matches!(other_name, Err(OutboundError::Connect(_))), "{other_name:?}");
    let broken = HttpOutside::new(Vec::new(), Secrets::default(), tight(), Some(b"-----BEGIN CERTIFICATE-----\nx"));
    assert!(broken.is_err());
}

hapax_tests::mutations! {
    mutation_an_address_that_is_not_checked_is_found: a_granted_name_that_leads_into_this_network_is_denied is red with "address-unchecked";
    mutation_a_secret_sent_anywhere_is_found: a_secret_goes_where_it_is_for_and_nowhere_else is red with "secret-sent-anywhere";
    mutation_an_answer_without_a_limit_is_found: an_answer_that_is_too_large_ends_the_call is red with "answer-unlimited";
}
