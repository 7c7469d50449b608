//! The proxies that the environment names, read as Go's HTTP client reads them
//! (`golang.org/x/net/http/httpproxy`), and so kube-proxy.
//!
//! `kube` reads `HTTPS_PROXY` as well, but holds `NO_PROXY` against the proxy's own address.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// Schemes of a proxy that the client speaks.
const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];

/// `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.
#[derive(Debug, Default)]
pub(super) struct Proxies {
    http: Option<String>,
    https: Option<String>,
    exempt: Vec<Exempt>,
}

/// What is reached without a proxy.
#[derive(Debug, PartialEq, Eq)]
enum Exempt {
    All,
    Network(IpNetwork),
    Address(IpAddr, Option<u16>),
    /// A domain with all below it; `itself` unless it was given with a dot in front.
    Domain {
        name: String,
        itself: bool,
        port: Option<u16>,
    },
}

impl Proxies {
    /// `variable` looks one up. The names exist in both cases, and the upper one goes before.
    pub(super) fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let given = [name.to_owned(), name.to_lowercase()];
            given.iter().filter_map(|name| variable(name)).find(|value| !value.is_empty())
        };
        let exempt = either("NO_PROXY").unwrap_or_default();
        Self {
            http: either("HTTP_PROXY"),
            https: either("HTTPS_PROXY"),
            exempt: exempt.split(',').filter_map(Exempt::parse).collect(),
        }
    }

    /// The proxy on the way to a server, as it was given. `host` may stand in brackets.
    pub(super) fn towards(&self, https: bool, host: &str, port: u16) -> Option<&str> {
        let proxy = if https { &self.https } else { &self.http };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_lowercase();
        let address: Option<IpAddr> = host.parse().ok();
        let local = host == "localhost" || address.is_some_and(|address| address.is_loopback());
        let exempt = || self.exempt.iter().any(|exempt| exempt.covers(&host, address, port));
        proxy.as_deref().filter(|_| !local && !exempt())
    }
}

impl Exempt {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_lowercase();
        if text == "*" {
            return Some(Self::All);
        }
        if text.contains('/')
            && let Ok(network) = text.parse()
        {
            return Some(Self::Network(network));
        }
        // The colons of an address of IPv6 without brackets are no port's.
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, Some(port.parse().ok()?))
            }
            _ => (text.as_str(), None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = host.parse() {
            return Some(Self::Address(address, port));
        }
        let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        let name = host.trim_start_matches('.').to_owned();
        let itself = name.len() == host.len();
        (!name.is_empty()).then_some(Self::Domain { name, itself, port })
    }

    fn covers(&self, host: &str, address: Option<IpAddr>, port: u16) -> bool {
        let at = |only: Option<u16>| only.is_none_or(|only| only == port);
        match self {
            Self::All => true,
            Self::Network(network) => address.is_some_and(|address| network.contains(address)),
            Self::Address(exempt, only) => address == Some(*exempt) && at(*only),
            Self::Domain { name, itself, port: only } => {
                let below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|head| head.ends_with('.') || (head.is_empty() && *itself));
                below && at(*only)
            }
        }
    }
}

/// The URL of a proxy as the client wants it: HTTP when it has no scheme, which the environment
/// allows.
pub(super) fn url(given: &str) -> Result<String, String> {
    let complete = if given.contains("://") { given.to_owned() } else { format!("http://{given}") };
    let (scheme, rest) = complete.split_once("://").unwrap_or_default();
    if !SCHEMES.contains(&scheme) {
        return Err(format!("the scheme {scheme:?} is none of {}", SCHEMES.join(", ")));
    }
    if rest.is_empty() || rest.starts_with(['/', ':', '?']) {
        return Err("no host in it".to_owned());
    }
    // Both leave names to the proxy here.
    Ok(complete.replacen("socks5h://", "socks5://", 1))
}

/// Without the credentials that may stand in it.
pub(super) fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if scheme.is_empty() { rest.to_owned() } else { format!("{scheme}://{rest}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        Proxies::of_environment(|name| {
            variables.iter().find(|(held, _)| *held == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_servers_scheme_says_which_proxy_and_capitals_go_first() {
        let both = proxies(&[
            ("HTTP_PROXY", "http://plain:3128"),
            ("HTTPS_PROXY", ""),
            ("https_proxy", "tls:3128"),
        ]);
        assert_eq!(both.towards(true, "192.0.2.1", 6443), Some("tls:3128"));
        assert_eq!(both.towards(false, "192.0.2.1", 8080), Some("http://plain:3128"));
        let upper = proxies(&[("HTTPS_PROXY", "a"), ("https_proxy", "b")]);
        assert_eq!(upper.towards(true, "192.0.2.1", 6443), Some("a"));
        assert_eq!(upper.towards(false, "192.0.2.1", 6443), None);
        assert_eq!(proxies(&[]).towards(true, "192.0.2.1", 6443), None);
    }

    #[test]
    fn what_no_proxy_names_is_reached_directly() {
        let none = "10.96.0.0/12, 192.0.2.7,192.0.2.8:6443,[fd00::7]:6443,fd00::8,fd00:1::/64,\
                    .svc,example.com,*.wild.test,ported.test:443,,";
        let proxies = proxies(&[("HTTPS_PROXY", "http://p:1"), ("NO_PROXY", none)]);
        for (host, port, through) in [
            ("10.96.0.1", 443, false),
            ("10.112.0.1", 443, true),
            ("192.0.2.7", 6443, false),
            ("192.0.2.8", 6443, false),
            ("192.0.2.8", 443, true),
            ("[fd00::7]", 6443, false),
            ("[fd00::7]", 443, true),
            ("[fd00::8]", 443, false),
            ("[fd00:1::9]", 443, false),
            ("kubernetes.default.SVC", 443, false),
            ("svc", 443, true),
            ("example.com", 443, false),
            ("api.example.com", 443, false),
            ("badexample.com", 443, true),
            ("a.wild.test", 443, false),
            ("wild.test", 443, true),
            ("ported.test", 443, false),
            ("ported.test", 6443, true),
            // Never, whatever is said.
            ("localhost", 6443, false),
            ("127.0.0.1", 6443, false),
            ("[::1]", 6443, false),
        ] {
            assert_eq!(proxies.towards(true, host, port).is_some(), through, "{host}:{port}");
        }
    }

    #[test]
    fn a_star_exempts_everything() {
        let proxies = proxies(&[("HTTPS_PROXY", "http://p:1"), ("no_proxy", "a.test, *")]);
        assert_eq!(proxies.towards(true, "192.0.2.1", 6443), None);
    }

    #[test]
    fn a_proxys_url_is_completed_and_its_credentials_stay_out_of_the_log() {
        assert_eq!(url("proxy:3128").as_deref(), Ok("http://proxy:3128"));
        assert_eq!(url("socks5h://proxy:1080").as_deref(), Ok("socks5://proxy:1080"));
        assert!(url("ftp://proxy").is_err_and(|reason| reason.contains("ftp")));
        assert!(url("http://").is_err());
        assert_eq!(redacted("http://user:p@ss@proxy:3128"), "http://proxy:3128");
        assert_eq!(redacted("user:pass@proxy:3128"), "proxy:3128");
    }
}
