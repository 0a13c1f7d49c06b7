//! A grant: to which origin a processor may call, and whether that may lie in a private network.
//! Pure; looks up no name.

use std::fmt;
use std::net::IpAddr;

use url::{Host, Url};

use super::address::not_public;

/// Origin that a processor may call: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    scheme: String,
    host: GrantedHost,
    port: u16,
    private: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum GrantedHost {
    Address(IpAddr),
    Name(String),
    /// Subdomains of this, at any depth; not the domain itself.
    Below(String),
}

/// A text that grants nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no grant: {why}; write scheme, host and, if it is not the scheme's own, port: `https://api.example.com`"
)]
pub struct NotAGrant {
    text: String,
    why: String,
}

/// Where a call goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) scheme: String,
    pub(crate) host: Host<String>,
    pub(crate) port: u16,
}

impl Grant {
    /// Reads a grant, `https://api.example.com`, `http://10.0.0.5:8080`, `https://*.example.com`.
    ///
    /// `private` also grants what its name resolves to in a private network or on this host. A
    /// grant that names an address is one for that address, wherever it is; `localhost` is one for
    /// this host.
    pub fn new(text: &str, private: bool) -> Result<Self, NotAGrant> {
        let no = |why: &str| NotAGrant { text: text.to_owned(), why: why.to_owned() };
        let wildcard = text.contains("://*.");
        let url = Url::parse(&text.replacen("://*.", "://", 1)).map_err(|error| no(&error.to_string()))?;
        let Target { scheme, host, port } = Target::of(&url).map_err(|why| no(&why))?;
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(no("it has a path, a query or a fragment"));
        }
        let host = match (host, wildcard) {
            (Host::Domain(name), true) => GrantedHost::Below(name),
            (Host::Domain(name), false) => GrantedHost::Name(name),
            (_, true) => return Err(no("an address has no subdomains")),
            (Host::Ipv4(address), false) => GrantedHost::Address(address.into()),
            (Host::Ipv6(address), false) => GrantedHost::Address(address.into()),
        };
        Ok(Self { scheme, host, port, private })
    }

    /// Returns `true` if the grant covers the origin of `target`.
    pub(crate) fn allows(&self, target: &Target) -> bool {
        let host = match (&self.host, &target.host) {
            (GrantedHost::Address(IpAddr::V4(granted)), Host::Ipv4(asked)) => granted == asked,
            (GrantedHost::Address(IpAddr::V6(granted)), Host::Ipv6(asked)) => granted == asked,
            (GrantedHost::Name(granted), Host::Domain(asked)) => granted == asked,
            (GrantedHost::Below(granted), Host::Domain(asked)) => {
                asked.strip_suffix(granted.as_str()).is_some_and(|front| front.len() > 1 && front.ends_with('.'))
            }
            _ => false,
        };
        host && self.scheme == target.scheme && self.port == target.port
    }

    /// Why it does not let a call go to that address, which its host has resolved to; `None`: it
    /// does.
    pub(crate) fn refuses(&self, address: IpAddr) -> Option<&'static str> {
        let why = not_public(address)?;
        let granted = match &self.host {
            GrantedHost::Address(granted) => *granted == address,
            GrantedHost::Name(name) if name == "localhost" => address.is_loopback(),
            GrantedHost::Name(_) | GrantedHost::Below(_) => false,
        };
        (!granted && !self.private).then_some(why)
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, host, port, .. } = self;
        match host {
            GrantedHost::Address(IpAddr::V6(address)) => write!(f, "{scheme}://[{address}]:{port}"),
            GrantedHost::Address(IpAddr::V4(address)) => write!(f, "{scheme}://{address}:{port}"),
            GrantedHost::Name(name) => write!(f, "{scheme}://{name}:{port}"),
            GrantedHost::Below(name) => write!(f, "{scheme}://*.{name}:{port}"),
        }
    }
}

impl Target {
    /// Where a URL leads, in the one spelling of its host; an error that says what is wrong with
    /// it.
    pub(crate) fn of(url: &Url) -> Result<Self, String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("its scheme is `{}`, and not http or https", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it holds a user or a password; send them in a header".into());
        }
        let host = match url.host().ok_or("it has no host")? {
            Host::Domain(name) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                if name.is_empty() {
                    return Err("it has no host".into());
                }
                Host::Domain(name)
            }
            Host::Ipv4(address) => Host::Ipv4(address),
            // One address has one spelling: that which is connected to.
            Host::Ipv6(address) => address.to_ipv4_mapped().map_or(Host::Ipv6(address), Host::Ipv4),
        };
        let port = url.port_or_known_default().ok_or("it has no port")?;
        Ok(Self { scheme: url.scheme().to_owned(), host, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(grant: &str, url: &str) -> bool {
        let grant = Grant::new(grant, false).expect(grant);
        let Ok(url) = Url::parse(url) else { return false };
        Target::of(&url).is_ok_and(|target| grant.allows(&target))
    }

    #[test]
    fn a_grant_is_for_scheme_host_and_port_however_they_are_spelled() {
        let grant = "https://api.example.com";
        for url in ["https://api.example.com/x?y", "https://API.Example.COM:443/", "https://api.example.com./"] {
            assert!(allows(grant, url), "{url}");
        }
        for url in [
            "http://api.example.com/",
            "https://api.example.com:8443/",
            "https://api.example.com.evil.test/",
            "https://evil.test/api.example.com",
            "https://evil.test#https://api.example.com",
            "https://api.example.com@evil.test/",
            "https://user@api.example.com/",
            "https://evil.test\\@api.example.com/",
            "https://example.com/",
            "https://xapi.example.com/",
            "ftp://api.example.com/",
            "file:///etc/passwd",
        ] {
            assert!(!allows(grant, url), "{url}");
        }
        assert!(allows("https://*.example.com", "https://a.b.example.com/"));
        assert!(!allows("https://*.example.com", "https://example.com/"));
        assert!(!allows("https://*.example.com", "https://badexample.com/"));
        assert!(allows("https://b\u{fc}cher.example", "https://xn--bcher-kva.example/"));
        for spelling in ["127.0.0.1", "127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1", "[::ffff:127.0.0.1]"] {
            assert!(allows("http://127.0.0.1:80", &format!("http://{spelling}/")), "{spelling}");
            assert!(!allows("http://127.0.0.2", &format!("http://{spelling}/")), "{spelling}");
        }
        assert!(allows("http://[::1]:8080", "http://[0:0:0:0:0:0:0:1]:8080/"));
    }

    #[test]
    fn a_private_address_needs_a_grant_that_says_so() {
        let refuses = |grant: &str, private, address: &str| {
            Grant::new(grant, private).expect(grant).refuses(address.parse().expect(address))
        };
        assert_eq!(refuses("https://api.example.com", false, "127.0.0.1"), Some("loopback"));
        assert_eq!(refuses("https://api.example.com", false, "8.8.8.8"), None);
        assert_eq!(refuses("https://api.example.com", true, "10.0.0.1"), None);
        assert_eq!(refuses("http://10.0.0.1", false, "10.0.0.1"), None);
        assert_eq!(refuses("http://10.0.0.1", false, "10.0.0.2"), Some("private"));
        assert_eq!(refuses("http://localhost:8080", false, "::1"), None);
        assert_eq!(refuses("http://localhost:8080", false, "10.0.0.1"), Some("private"));
    }

    #[test]
    fn what_grants_nothing_is_told() {
        for (text, why) in [
            ("api.example.com", "relative URL"),
            ("https://api.example.com/v1", "a path"),
            ("https://u:p@api.example.com", "a user or a password"),
            ("ftp://api.example.com", "not http or https"),
            ("https://*.10.0.0.1", "no subdomains"),
            ("", "relative URL"),
        ] {
            let error = Grant::new(text, false).expect_err(text).to_string();
            assert!(error.contains(why) && error.contains("https://api.example.com"), "{error}");
        }
    }
}
