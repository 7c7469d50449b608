//! A certificate authority and a server certificate, new for every server, and certificates of
//! clients.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};

/// What TLS needs on both sides.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) config: Arc<ServerConfig>,
    pub(super) ca_pem: String,
    pub(super) clients: Arc<Clients>,
}

/// Certificates of clients.
pub(super) struct Clients {
    issuer: Issuer<'static, KeyPair>,
    /// Those that are good, as DER.
    good: Mutex<HashSet<Vec<u8>>>,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

impl Clients {
    /// A certificate and its key, as PEM.
    pub(super) fn issue(&self) -> anyhow::Result<(String, String)> {
        let mut client = CertificateParams::new(Vec::new())?;
        client.distinguished_name.push(DnType::CommonName, "system:node-dataplane");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = client.signed_by(&key, &self.issuer)?;
        let der = certificate.der().to_vec();
        self.good.lock().unwrap_or_else(PoisonError::into_inner).insert(der);
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// What was issued so far is good no more, as after its end.
    pub(super) fn expire(&self) {
        self.good.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// As rustls verifies, and the certificate must be good still.
#[derive(Debug)]
struct Verifier {
    inner: Arc<dyn ClientCertVerifier>,
    clients: Arc<Clients>,
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let good = self.clients.good.lock().unwrap_or_else(PoisonError::into_inner);
        if !good.contains(end_entity.as_ref()) {
            return Err(CertificateError::Expired.into());
        }
        self.inner.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Makes both certificates. The server's is good for the names that in-cluster clients
/// use, for the loopback addresses and for `addresses`. With `of_clients` a client must have a
/// certificate too.
pub(super) fn generate(addresses: &[IpAddr], of_clients: bool) -> anyhow::Result<Tls> {
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    ca.distinguished_name.push(DnType::CommonName, "kubernetes");
    let ca_key = KeyPair::generate()?;
    let ca_certificate = ca.self_signed(&ca_key)?;
    let ca_pem = ca_certificate.pem();
    let issuer = Issuer::new(ca, ca_key);

    let fixed = ["localhost", "kubernetes", "kubernetes.default.svc", "127.0.0.1", "::1"];
    let mut names: Vec<String> = fixed.map(str::to_owned).into();
    names.extend(addresses.iter().map(ToString::to_string));
    let mut server = CertificateParams::new(names)?;
    server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    let key = KeyPair::generate()?;
    let certificate = server.signed_by(&key, &issuer)?;

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let clients = Arc::new(Clients { issuer, good: Mutex::default() });
    let config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let config = if of_clients {
        let mut roots = RootCertStore::empty();
        roots.add(ca_certificate.der().clone())?;
        let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let (inner, clients) = (inner.build()?, clients.clone());
        config.with_client_cert_verifier(Arc::new(Verifier { inner, clients }))
    } else {
        config.with_no_client_auth()
    };
    let mut config = config
        .with_single_cert(vec![certificate.der().clone()], key)
        .context("server certificate")?;
    if of_clients {
        // Who resumes a session is not asked for a certificate again.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
    }
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Tls { config: Arc::new(config), ca_pem, clients })
}
