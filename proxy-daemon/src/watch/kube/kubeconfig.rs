//! A kubeconfig, read as client-go reads it.
//!
//! `kube` has this as well, but takes a server without a scheme for a URL, and a certificate
//! authority without a certificate for one; and it does not say which files it read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::Config;
use kube::config::{AuthInfo, Cluster, Kubeconfig, KubeconfigError};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::client::ClientError;
use super::{proxies, server};

/// Files with what was in them when they were read.
pub(super) type Contents = HashMap<PathBuf, Vec<u8>>;

/// What a kubeconfig comes to.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) config: Config,
    /// The file, and those that it names and the client does not read again by itself.
    pub(super) contents: Contents,
}

/// `master` replaces the server.
pub(super) fn parse(path: &Path, master: Option<&str>) -> Result<Parsed, ClientError> {
    // Before it is parsed: what is written meanwhile then differs at the next look.
    let text = std::fs::read(path).map_err(|error| ClientError::File {
        file: path.to_owned(),
        field: None,
        path: path.to_owned(),
        error,
    })?;
    let failed = |error| ClientError::Kubeconfig { path: path.to_owned(), error: Box::new(error) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    let (names, cluster, mut user) = current(path, &kubeconfig)?;
    let mut reading = Reading { file: path, contents: Contents::from([(path.to_owned(), text)]) };
    let authority = reading.authority(&names.cluster, &cluster)?;
    reading.identity(&names.user, &user)?;
    let tls = authority.is_some()
        || user.client_certificate.is_some()
        || user.client_certificate_data.is_some()
        || cluster.insecure_skip_tls_verify == Some(true);
    let at_cluster = |field: &str, reason: String| ClientError::Field {
        file: path.to_owned(),
        field: format!("clusters: {:?}: {field}", names.cluster),
        reason,
    };
    let url = match master {
        // `--master` names itself in what is wrong with it.
        Some(url) => super::client::master_url(url, tls)?,
        None => {
            let given = cluster.server.as_deref().unwrap_or_default();
            server::url(given, tls)
                .map_err(|reason| at_cluster("server", format!("{given:?}: {reason}")))?
        }
    };
    let parsed = url.parse();
    let mut config = Config::new(
        parsed.map_err(|error| at_cluster("server", format!("{url:?} is no URL: {error}")))?,
    );
    if let Some(exec) = &mut user.exec
        && exec.provide_cluster_info
    {
        exec.cluster = Some((&cluster).try_into().map_err(failed)?);
    }
    if let Some(given) = cluster.proxy_url.as_ref().filter(|url| !url.is_empty()) {
        let url = proxies::url(given).map_err(|reason| at_cluster("proxy-url", reason))?;
        let parsed = url.parse();
        config.proxy_url =
            Some(parsed.map_err(|error| at_cluster("proxy-url", format!("no URL: {error}")))?);
    }
    config.root_cert = authority;
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or(false);
    config.disable_compression = cluster.disable_compression.unwrap_or(false);
    config.tls_server_name = cluster.tls_server_name;
    config.auth_info = user;
    Ok(Parsed { config, contents: reading.contents })
}

struct Names {
    cluster: String,
    user: String,
}

/// The cluster and the user of the current context.
fn current(path: &Path, held: &Kubeconfig) -> Result<(Names, Cluster, AuthInfo), ClientError> {
    let failed = |error| ClientError::Kubeconfig { path: path.to_owned(), error: Box::new(error) };
    let name = held
        .current_context
        .as_ref()
        .ok_or_else(|| failed(KubeconfigError::CurrentContextNotSet))?;
    let context = held
        .contexts
        .iter()
        .find(|context| context.name == *name)
        .and_then(|context| context.context.as_ref())
        .ok_or_else(|| failed(KubeconfigError::LoadContext(name.clone())))?;
    let cluster = held
        .clusters
        .iter()
        .find(|cluster| cluster.name == context.cluster)
        .and_then(|cluster| cluster.cluster.clone())
        .ok_or_else(|| failed(KubeconfigError::LoadClusterOfContext(context.cluster.clone())))?;
    let user = context.user.clone().unwrap_or_default();
    let info = held.auth_infos.iter().find(|info| info.name == user);
    if info.is_none() && !user.is_empty() {
        return Err(ClientError::NoSuchUser { path: path.to_owned(), user });
    }
    let info = info.and_then(|info| info.auth_info.clone()).unwrap_or_default();
    Ok((Names { cluster: context.cluster.clone(), user }, cluster, info))
}

struct Reading<'a> {
    file: &'a Path,
    contents: Contents,
}

impl Reading<'_> {
    /// The certificates of the authority, if one is given.
    fn authority(
        &mut self,
        name: &str,
        cluster: &Cluster,
    ) -> Result<Option<Vec<Vec<u8>>>, ClientError> {
        let at = |field: &str| format!("clusters: {name:?}: {field}");
        let (field, pem) =
            match (&cluster.certificate_authority_data, &cluster.certificate_authority) {
                (Some(data), _) if !data.is_empty() => {
                    let field = at("certificate-authority-data");
                    let pem = STANDARD
                        .decode(data)
                        .map_err(|error| self.wrong(&field, format!("not base64: {error}")))?;
                    (field, pem)
                }
                (_, Some(path)) if !path.is_empty() => {
                    let field = at("certificate-authority");
                    let pem = self.read(&field, path)?;
                    (field, pem)
                }
                _ => return Ok(None),
            };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem)
            .map(|certificate| certificate.map(|certificate| certificate.to_vec()))
            .collect();
        match certificates {
            Ok(certificates) if certificates.is_empty() => {
                Err(self.wrong(&field, "no certificate in PEM".to_owned()))
            }
            Ok(certificates) => Ok(Some(certificates)),
            Err(error) => Err(self.wrong(&field, error.to_string())),
        }
    }

    /// Only reads the files, so that a change of them is seen; the client takes them from there.
    fn identity(&mut self, name: &str, user: &AuthInfo) -> Result<(), ClientError> {
        let files = [
            (
                "client-certificate",
                &user.client_certificate,
                user.client_certificate_data.is_some(),
            ),
            ("client-key", &user.client_key, user.client_key_data.is_some()),
        ];
        for (field, path, overridden) in files {
            if let (Some(path), false) = (path, overridden) {
                self.read(&format!("users: {name:?}: {field}"), path)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, field: &str, path: &str) -> Result<Vec<u8>, ClientError> {
        let content = std::fs::read(path).map_err(|error| ClientError::File {
            file: self.file.to_owned(),
            field: Some(field.to_owned()),
            path: path.into(),
            error,
        })?;
        self.contents.insert(path.into(), content.clone());
        Ok(content)
    }

    fn wrong(&self, field: &str, reason: String) -> ClientError {
        ClientError::Field { file: self.file.to_owned(), field: field.to_owned(), reason }
    }
}
