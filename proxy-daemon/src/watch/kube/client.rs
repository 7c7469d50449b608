//! The API client: which server, with which credentials.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

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

/// As kube-proxy: the kubeconfig's server and credentials, `master` in place of its
/// server; without either, the Pod's service account. In a Pod `master` alone replaces
/// only the address: the one in the Pod's environment is a ClusterIP, which does not work
/// before this daemon does.
pub async fn client(
    kubeconfig: Option<&Path>,
    master: Option<&str>,
) -> Result<Client, ClientError> {
    let (mut config, from) = match (kubeconfig, master) {
        (Some(path), _) => (from_kubeconfig(path).await?, path.display().to_string()),
        (None, Some(url)) => (at_master(Config::incluster().ok(), url)?, format!("--master {url}")),
        (None, None) => {
            let config =
                Config::incluster().map_err(|error| ClientError::NotInCluster(Box::new(error)))?;
            (config, "the Pod's service account".to_owned())
        }
    };
    if let (Some(_), Some(url)) = (kubeconfig, master) {
        config = at_master(Some(config), url)?;
    }
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    if config.root_cert.is_none() && config.cluster_url.scheme_str() == Some("http") {
        // Or the system's certificates are loaded, of which a minimal image has none.
        config.root_cert = Some(Vec::new());
    }
    // Retries are the source's: it logs and counts them.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| ClientError::Setup { from, error: Box::new(error) })
}

async fn from_kubeconfig(path: &Path) -> Result<Config, ClientError> {
    let failed = |error| ClientError::Kubeconfig { path: path.to_owned(), error: Box::new(error) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    // The library would go on without credentials.
    if let Some(user) = missing_user(&kubeconfig) {
        return Err(ClientError::NoSuchUser { path: path.to_owned(), user: user.to_owned() });
    }
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)
}

fn missing_user(kubeconfig: &Kubeconfig) -> Option<&str> {
    let current = kubeconfig.current_context.as_deref()?;
    let named = kubeconfig.contexts.iter().find(|context| context.name == current)?;
    let user = named.context.as_ref()?.user.as_deref()?;
    let known = kubeconfig.auth_infos.iter().any(|info| info.name == user);
    (!known && !user.is_empty()).then_some(user)
}

/// The credentials of `config`, if there are any, at another address.
fn at_master(config: Option<Config>, url: &str) -> Result<Config, ClientError> {
    let bare = from_master(url)?;
    let Some(mut config) = config else { return Ok(bare) };
    config.cluster_url = bare.cluster_url;
    Ok(config)
}

/// Anonymous access, as for tests and `kubectl proxy`.
fn from_master(url: &str) -> Result<Config, ClientError> {
    let failed = |reason: String| ClientError::Master { url: url.to_owned(), reason };
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(failed("must begin with http:// or https://".to_owned()));
    }
    match url.parse() {
        Ok(parsed) => Ok(Config::new(parsed)),
        Err(error) => Err(failed(format!("not a URL: {error}"))),
    }
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
        let error = client(path, master).await.err().expect("an error").to_string();
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
        assert!(at_master(None, "192.0.2.1").is_err());
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
        let text = error(None, Some("10.0.0.1:6443")).await;
        assert_eq!(text, "--master \"10.0.0.1:6443\": must begin with http:// or https://");
    }

    #[tokio::test]
    async fn outside_a_cluster_the_error_says_what_to_give() {
        let text = error(None, None).await;
        assert!(text.contains("--kubeconfig") && text.contains("--master"), "{text}");
    }

    #[tokio::test]
    async fn a_good_kubeconfig_makes_a_client_with_and_without_master() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), GOOD).expect("written");
        for master in [None, Some("http://127.0.0.1:1")] {
            client(Some(file.path()), master).await.expect("a client");
        }
    }
}
