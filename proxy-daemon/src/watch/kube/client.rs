//! The API client: which server, with which credentials, and by which way.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::KubeconfigError;
use kube::{Client, Config};
use tracing::{info, warn};

use super::kubeconfig::{self, Contents};
use super::proxies::{self, Proxies};
use super::server;

/// Why there is no client. Each names what to look at.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "not in a cluster ({0}): give --kubeconfig or --master, or run in a Pod with a service account"
    )]
    NotInCluster(#[source] Box<kube::config::InClusterError>),
    #[error("{}: {error}", path.display())]
    Kubeconfig {
        path: PathBuf,
        #[source]
        error: Box<KubeconfigError>,
    },
    #[error("{}: users: the current context names the user {user:?}, which is not there", path.display())]
    NoSuchUser { path: PathBuf, user: String },
    #[error("{}: {field}: {reason}", file.display())]
    Field { file: PathBuf, field: String, reason: String },
    #[error("{}: {}{}: {error}", file.display(), field.as_deref().map_or(String::new(), |field| format!("{field}: ")), path.display())]
    File {
        /// The kubeconfig.
        file: PathBuf,
        /// What in it names `path`; `None` for itself.
        field: Option<String>,
        path: PathBuf,
        #[source]
        error: std::io::Error,
    },
    #[error("--master {url:?}: {reason}")]
    Master { url: String, reason: String },
    #[error("the client cannot be set up from {from}: {error}")]
    Setup {
        from: String,
        #[source]
        error: Box<kube::Error>,
    },
}

/// The API server answers or refuses in milliseconds; a node that is gone never does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection on which nothing comes in for so long is dead: bookmarks come about
/// every minute on every watch. Without this a connection that broke silently (a load
/// balancer that forgot it) would be used until TCP gives up, after 15 minutes.
const READ_TIMEOUT: Duration = Duration::from_secs(150);

/// What the command line says of the API server.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) master: Option<String>,
}

/// A client and what it was made of.
pub(super) struct Made {
    pub(super) client: Client,
    /// The server's URL, for messages.
    pub(super) server: String,
    /// The files that it would be made of differently, had they other contents.
    pub(super) contents: Contents,
}

impl Origin {
    /// As kube-proxy: the kubeconfig's server and credentials, `master` in place of its
    /// server; without either, the Pod's service account. In a Pod `master` alone replaces
    /// only the address: the one in the Pod's environment is a ClusterIP, which does not work
    /// before this daemon does.
    pub(super) fn client(&self) -> Result<Made, ClientError> {
        let master = self.master.as_deref();
        let (mut config, from, contents) = match (&self.kubeconfig, master) {
            (Some(path), _) => {
                let parsed = kubeconfig::parse(path, master)?;
                (parsed.config, path.display().to_string(), parsed.contents)
            }
            (None, Some(url)) => {
                let config = at_master(Config::incluster().ok(), url)?;
                (config, format!("--master {url}"), Contents::new())
            }
            (None, None) => {
                let config = Config::incluster()
                    .map_err(|error| ClientError::NotInCluster(Box::new(error)))?;
                (config, "the Pod's service account".to_owned(), Contents::new())
            }
        };
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        if config.root_cert.is_none() && config.cluster_url.scheme_str() == Some("http") {
            // Or the system's certificates are loaded, of which a minimal image has none.
            config.root_cert = Some(Vec::new());
        }
        // Retries are the source's: it logs and counts them.
        config.default_retry = false;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        if config.proxy_url.is_none() {
            go_by_environment(&mut config);
        }
        if let Some(proxy) = &config.proxy_url {
            let proxy = proxies::redacted(&proxy.to_string());
            info!(%server, %proxy, "the API server is reached through a proxy");
        }
        let client = Client::try_from(config)
            .map_err(|error| ClientError::Setup { from, error: Box::new(error) })?;
        Ok(Made { client, server, contents })
    }
}

/// Lets `config` go by the proxy that the environment names for its server.
fn go_by_environment(config: &mut Config) {
    let url = &config.cluster_url;
    let https = url.scheme_str() != Some("http");
    let port = url.port_u16().unwrap_or(if https { 443 } else { 80 });
    let environment = Proxies::of_environment(|name| std::env::var(name).ok());
    let Some(given) = environment.towards(https, url.host().unwrap_or_default(), port) else {
        return;
    };
    let parsed = proxies::url(given)
        .and_then(|proxy| proxy.parse().map_err(|error| format!("no URL: {error}")));
    match parsed {
        Ok(proxy) => config.proxy_url = Some(proxy),
        // As Go has it.
        Err(reason) => {
            let proxy = proxies::redacted(given);
            warn!(%proxy, "HTTP_PROXY or HTTPS_PROXY: {reason}; going without");
        }
    }
}

/// The credentials of `config`, if there are any, at another address.
fn at_master(config: Option<Config>, url: &str) -> Result<Config, ClientError> {
    let url = master_url(url, config.is_some())?;
    let parsed = url.parse().map_err(|error| ClientError::Master {
        url: url.clone(),
        reason: format!("not a URL: {error}"),
    })?;
    // Without credentials: anonymous access, as for tests and `kubectl proxy`.
    let mut at = config.unwrap_or_else(|| Config::new(Default::default()));
    at.cluster_url = parsed;
    Ok(at)
}

/// `tls` decides for a master without a scheme.
pub(super) fn master_url(url: &str, tls: bool) -> Result<String, ClientError> {
    server::url(url, tls).map_err(|reason| ClientError::Master { url: url.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn error(kubeconfig: Option<&str>, master: Option<&str>) -> String {
        let file = tempfile::NamedTempFile::new().expect("a file");
        if let Some(text) = kubeconfig {
            std::fs::write(file.path(), text).expect("written");
        }
        let path = kubeconfig.map(|_| file.path());
        let origin = Origin { kubeconfig: path.map(Into::into), master: master.map(Into::into) };
        let error = origin.client().err().expect("an error").to_string();
        error.replace(&file.path().display().to_string(), "FILE")
    }

    const GOOD: &str = "
apiVersion: v1
kind: Config
current-context: a
contexts: [{name: a, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: 'https://10.0.0.1:6443', insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: t}}]
";

    #[test]
    fn master_replaces_the_address_and_keeps_the_credentials() {
        let mut pod = Config::new("https://10.96.0.1".parse().expect("a URL"));
        pod.auth_info.username = Some("pod".to_owned());
        let config = at_master(Some(pod), "https://192.0.2.1:6443").expect("a config");
        assert_eq!(config.cluster_url.host(), Some("192.0.2.1"));
        assert_eq!(config.auth_info.username.as_deref(), Some("pod"));
        let scheme = |config: Option<Config>| {
            let config = at_master(config, "192.0.2.1:6443").expect("a config");
            config.cluster_url.to_string()
        };
        assert_eq!(scheme(Some(config)), "https://192.0.2.1:6443/");
        assert_eq!(scheme(None), "http://192.0.2.1:6443/");
        assert!(at_master(None, "192.0.2.1/prefix").is_err());
    }

    #[tokio::test]
    async fn errors_name_the_file_and_the_field() {
        let wrong_type =
            GOOD.replace("insecure-skip-tls-verify: true", "insecure-skip-tls-verify: 5");
        let text = error(Some(&wrong_type), None).await;
        assert!(text.starts_with("FILE: "), "{text}");
        assert!(text.contains("line 6"), "{text}");
        let no_user = GOOD.replace("name: u, user", "name: w, user");
        let text = error(Some(&no_user), None).await;
        assert!(text.starts_with("FILE: users: ") && text.contains("\"u\""), "{text}");
        let no_cluster = GOOD.replace("name: c, cluster", "name: d, cluster");
        let text = error(Some(&no_cluster), None).await;
        assert!(text.contains("cluster"), "{text}");
        let bad_ca = GOOD.replace(
            "insecure-skip-tls-verify: true",
            "certificate-authority: /nonexistent/ca.pem",
        );
        let text = error(Some(&bad_ca), None).await;
        assert!(text.starts_with("FILE: ") && text.contains("/nonexistent/ca.pem"), "{text}");
        let no_pem = GOOD
            .replace("insecure-skip-tls-verify: true", "certificate-authority-data: bm8gUEVNCg==");
        assert_eq!(
            error(Some(&no_pem), None).await,
            "FILE: clusters: \"c\": certificate-authority-data: no certificate in PEM"
        );
        let no_key = GOOD.replace(
            "token: t",
            "client-certificate: /nonexistent/a.pem, client-key: /nonexistent/b.pem",
        );
        let text = error(Some(&no_key), None).await;
        assert!(
            text.starts_with("FILE: users: \"u\": client-certificate: /nonexistent/a.pem: "),
            "{text}"
        );
        let scheme = GOOD.replace("https://10.0.0.1", "ftp://10.0.0.1");
        let text = error(Some(&scheme), None).await;
        assert!(text.starts_with("FILE: clusters: \"c\": server: \"ftp://"), "{text}");
        let proxy = GOOD.replace("server:", "proxy-url: 'ftp://10.0.0.2', server:");
        let text = error(Some(&proxy), None).await;
        assert!(text.starts_with("FILE: clusters: \"c\": proxy-url: "), "{text}");
        let text = error(None, Some("ftp://10.0.0.1:6443")).await;
        assert_eq!(
            text,
            "--master \"ftp://10.0.0.1:6443\": the scheme \"ftp\" is neither http nor https"
        );
    }

    #[tokio::test]
    async fn outside_a_cluster_the_error_says_what_to_give() {
        let text = error(None, None).await;
        assert!(text.contains("--kubeconfig") && text.contains("--master"), "{text}");
    }

    fn server(kubeconfig: &str, master: Option<&str>) -> String {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), kubeconfig).expect("written");
        let origin =
            Origin { kubeconfig: Some(file.path().into()), master: master.map(Into::into) };
        origin.client().expect("a client").server
    }

    #[tokio::test]
    async fn a_good_kubeconfig_makes_a_client_with_and_without_master() {
        assert_eq!(server(GOOD, None), "https://10.0.0.1:6443");
        assert_eq!(server(GOOD, Some("http://127.0.0.1:1")), "http://127.0.0.1:1");
        assert_eq!(server(GOOD, Some("192.0.2.1:6443")), "https://192.0.2.1:6443");
    }

    #[tokio::test]
    async fn without_a_scheme_the_settings_of_tls_decide() {
        let bare = GOOD.replace("https://10.0.0.1:6443", "10.0.0.1:6443");
        assert_eq!(server(&bare, None), "https://10.0.0.1:6443");
        let plain = bare.replace(", insecure-skip-tls-verify: true", "");
        assert_eq!(server(&plain, None), "http://10.0.0.1:6443");
    }

    #[tokio::test]
    async fn a_proxy_of_the_kubeconfig_is_used() {
        for proxy in ["http://10.0.0.2:3128", "https://10.0.0.2:3128", "socks5://10.0.0.2:1080"] {
            let text = GOOD.replace("server:", &format!("proxy-url: '{proxy}', server:"));
            server(&text, None);
        }
    }
}
