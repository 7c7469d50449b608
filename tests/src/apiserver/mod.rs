//! A Kubernetes API server for tests: it answers like the recorded answers of a real
//! one (`tests/fixtures`), it can be made to fail in the ways a real one does, and it
//! counts what it is asked.
//!
//! It runs on threads of its own, in the network namespace of the thread that starts it.
//!
//! ```no_run
//! use proxy_tests::apiserver::{ApiServer, Options};
//! let server = ApiServer::start(Options::default())?;
//! server.store().load_yaml(include_str!("../../fixtures/manifests.yaml"))?;
//! server.write_kubeconfig("/tmp/kubeconfig".as_ref(), None)?;
//! # anyhow::Ok(())
//! ```

mod alloc;
mod body;
mod control;
mod defaults;
mod edit;
pub mod faults;
pub mod generate;
mod http;
pub mod list;
pub mod log;
mod managed;
pub mod object;
mod patch;
mod request;
pub mod resource;
pub mod selector;
mod serve;
pub mod status;
pub mod store;
mod tls;
mod watch;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde_json::json;
use tokio::runtime::Runtime;

use defaults::StatusOf;
pub use faults::{FaultSet, Faults};
pub use log::{RequestLog, Verb};
pub(crate) use patch::merge as merge_patch;
pub use resource::Resource;
pub use store::Store;
use store::{Settings, Write};

/// How a server is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 picks one.
    pub listen: SocketAddr,
    /// Bearer token that clients must send; `None` lets everyone in.
    pub token: Option<String>,
    /// Whether it speaks TLS (HTTP/1.1 and HTTP/2 either way).
    pub tls: bool,
    /// Whether clients must have a certificate of [`ApiServer::issue_client`].
    pub client_certificates: bool,
    /// Addresses besides `listen` that clients reach it at, for its certificate.
    pub extra_addresses: Vec<IpAddr>,
    /// Service ranges, the default family's first.
    pub service_ranges: Vec<IpNetwork>,
    /// Whether objects carry `metadata.managedFields`, about half of their size.
    pub managed_fields: bool,
    /// Time between bookmarks; a real server sends them about every minute.
    pub bookmark_interval: Duration,
    /// Changes of each resource kept for watches and older lists.
    pub history: usize,
    /// Where the `default/kubernetes` Service leads. `None` leaves that Service out.
    pub kubernetes_endpoint: Option<SocketAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: Some("test-token".to_owned()),
            tls: true,
            client_certificates: false,
            extra_addresses: Vec::new(),
            service_ranges: SERVICE_RANGES.to_vec(),
            managed_fields: true,
            bookmark_interval: Duration::from_secs(60),
            history: 100_000,
            // As recorded: an address that is not the client's own.
            kubernetes_endpoint: Some(SocketAddr::from(([192, 0, 2, 2], 16443))),
        }
    }
}

/// State shared by all connections.
#[derive(Debug)]
struct Shared {
    store: Arc<Store>,
    faults: Faults,
    log: RequestLog,
    options: Options,
    address: SocketAddr,
    audits: AtomicU64,
}

impl Shared {
    fn next_audit_id(&self) -> String {
        let number = self.audits.fetch_add(1, Ordering::Relaxed);
        format!("5e1f0000-0000-4000-8003-{number:012x}")
    }
}

/// A running server; dropping it ends it.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    ca_pem: Option<String>,
    clients: Option<Arc<tls::Clients>>,
    runtime: Option<Runtime>,
}

impl ApiServer {
    /// Starts a server. May be called inside or outside an async runtime.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let mut addresses = options.extra_addresses.clone();
        addresses.push(options.listen.ip());
        let tls = options
            .tls
            .then(|| tls::generate(&addresses, options.client_certificates))
            .transpose()?;
        let listener = serve::bind(options.listen)
            .with_context(|| format!("listening on {}", options.listen))?;
        let address = listener.local_addr()?;
        let store = Arc::new(Store::new(Settings {
            service_ranges: options.service_ranges.clone(),
            managed_fields: options.managed_fields,
            history: options.history,
        }));
        let faults = Faults::new(store.clone());
        let log = RequestLog::default();
        let shared =
            Arc::new(Shared { store, faults, log, options, address, audits: AtomicU64::new(1) });
        add_default_objects(&shared)?;
        // Its threads inherit the network namespace of this one.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("test-apiserver")
            .enable_all()
            .build()?;
        let clients = tls.as_ref().map(|tls| tls.clients.clone());
        let (ca_pem, config) = tls.map(|tls| (tls.ca_pem, tls.config)).unzip();
        runtime.spawn(serve::accept_loop(shared.clone(), listener, config));
        Ok(Self { shared, ca_pem, clients, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Its URL: `https://127.0.0.1:43211`.
    pub fn url(&self) -> String {
        let scheme = if self.ca_pem.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.shared.address)
    }

    /// The certificate authority that signed its certificate, if it speaks TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// A client's certificate and key, as PEM.
    pub fn issue_client(&self) -> anyhow::Result<(String, String)> {
        self.clients.as_ref().context("the server speaks no TLS")?.issue()
    }

    /// Clients' certificates that were issued so far are refused from now on. Connections that
    /// are open stay.
    pub fn expire_clients(&self) {
        if let Some(clients) = &self.clients {
            clients.expire();
        }
    }

    /// The token that clients must send.
    pub fn token(&self) -> Option<&str> {
        self.shared.options.token.as_deref()
    }

    /// Writes a kubeconfig. `server` replaces the URL, for clients that reach the server
    /// at another address than it listens on (see `Options::extra_addresses`).
    pub fn write_kubeconfig(&self, path: &Path, server: Option<&str>) -> anyhow::Result<()> {
        let mut cluster = json!({"server": server.map_or_else(|| self.url(), str::to_owned)});
        if let Some(pem) = self.ca_pem() {
            cluster["certificate-authority-data"] = json!(STANDARD.encode(pem));
        }
        let user = self.token().map_or_else(|| json!({}), |token| json!({"token": token}));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        let text = serde_yaml_ng::to_string(&config)?;
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// What it holds.
    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// How it misbehaves.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// What it was asked.
    pub fn requests(&self) -> &RequestLog {
        &self.shared.log
    }

    /// Waits until at least `count` watches of a resource are open; says whether they
    /// came in time. Blocks the thread: in async tests use a blocking task.
    pub fn wait_for_watches(&self, resource: Resource, count: usize, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            if self.requests().open_watches(resource) >= count {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for the threads is forbidden inside an async test.
            runtime.shutdown_background();
        }
    }
}

/// The ranges of ClusterIPs and the Service of the API itself, which every cluster has from
/// its first second.
fn add_default_objects(shared: &Shared) -> anyhow::Result<()> {
    add_service_cidr(shared)?;
    let Some(endpoint) = shared.options.kubernetes_endpoint else {
        return Ok(());
    };
    let write = Write { manager: "kube-apiserver", status: StatusOf::Server, subresource: None };
    let first = shared.options.service_ranges.first().context("no service range given")?;
    let address = first.iter().nth(1).context("the service range has no first address")?;
    let service = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
                     "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": address.to_string(), "ipFamilyPolicy": "SingleStack",
                 "ports": [{"name": "https", "port": 443, "targetPort": endpoint.port()}]},
    });
    shared.store.create(Resource::Service, service, write)?;
    let family = if endpoint.is_ipv4() { "IPv4" } else { "IPv6" };
    let slice = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
                     "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": family,
        "endpoints": [{"addresses": [endpoint.ip().to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": endpoint.port(), "protocol": "TCP"}],
    });
    shared.store.create(Resource::EndpointSlice, slice, write)?;
    Ok(())
}

/// As a server of 1.36 makes it of `--service-cluster-ip-range`.
fn add_service_cidr(shared: &Shared) -> anyhow::Result<()> {
    let write = Write { manager: "kube-apiserver", status: StatusOf::Client, subresource: None };
    let ranges: Vec<String> =
        shared.options.service_ranges.iter().map(ToString::to_string).collect();
    let object = json!({
        "metadata": {"name": "kubernetes",
                     "finalizers": ["networking.k8s.io/service-cidr-finalizer"]},
        "spec": {"cidrs": ranges},
        "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "",
                                   "message": "Kubernetes Service CIDR is ready",
                                   "lastTransitionTime": "2026-11-21T08:36:20Z"}]},
    });
    shared.store.create(Resource::ServiceCidr, object, write)?;
    Ok(())
}

/// Service ranges of the recorded cluster. Its IPv6 addresses spread over 20 bits.
#[allow(clippy::unwrap_used, reason = "evaluated when compiled, and fails there")]
const SERVICE_RANGES: [IpNetwork; 2] = [
    IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::new(10, 96, 0, 0), 12).unwrap()),
    IpNetwork::V6(Ipv6Network::new_checked(FIRST_IPV6, 108).unwrap()),
];
const FIRST_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0);
