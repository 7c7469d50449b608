//! `healthCheckNodePort`: one small server per Service that tells a load balancer whether
//! this node has endpoints of it (`externalTrafficPolicy: Local`).

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::header::{CONTENT_TYPE, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::ser::{PrettyFormatter, Serializer};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::warn;

use super::{ServeError, Status};
use crate::model::{Family, ObjectName};
use crate::policy::LocalReady;
use crate::sync::HealthCheck;
use crate::watch::announce::{Announcement, Regarding};

/// The first attempts are close together: the port may still be held by the Service that
/// had it a moment ago.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// The header that lets a balancer send in proportion to endpoints.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is wanted; [`run`] makes it so.
#[derive(Debug, Default)]
pub(super) struct Checks {
    wanted: Mutex<HashMap<ObjectName, HealthCheck>>,
    changed: Notify,
}

impl Checks {
    pub(super) fn set(&self, service: &ObjectName, check: Option<HealthCheck>) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        match check {
            Some(check) => wanted.insert(service.clone(), check),
            None => wanted.remove(service),
        };
        drop(wanted);
        self.changed.notify_one();
    }

    fn snapshot(&self) -> HashMap<ObjectName, HealthCheck> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A running server. Dropping it frees the port.
struct Running {
    port: u16,
    local_endpoints: Arc<Mutex<LocalReady>>,
    /// Holds one task; dropping the set aborts it.
    _task: JoinSet<()>,
}

impl Running {
    fn tell(&self, local_endpoints: LocalReady) {
        *self.local_endpoints.lock().unwrap_or_else(PoisonError::into_inner) = local_endpoints;
    }
}

pub(super) async fn run(status: Arc<Status>) -> Result<(), ServeError> {
    let mut running: HashMap<ObjectName, Running> = HashMap::new();
    loop {
        let wanted = status.checks.snapshot();
        // Removals first: a port may pass from one Service to another in one step.
        running.retain(|service, server| {
            wanted.get(service).is_some_and(|check| check.port == server.port)
        });
        for (service, check) in wanted {
            match running.get(&service) {
                Some(server) => {
                    server.tell(check.local_endpoints);
                }
                None => {
                    let server = start(Arc::clone(&status), service.clone(), check);
                    running.insert(service, server);
                }
            }
        }
        status.checks.changed.notified().await;
    }
}

fn start(status: Arc<Status>, service: ObjectName, check: HealthCheck) -> Running {
    let local_endpoints = Arc::new(Mutex::new(check.local_endpoints));
    let mut task = JoinSet::new();
    task.spawn(serve(status, service, check.port, Arc::clone(&local_endpoints)));
    Running { port: check.port, local_endpoints, _task: task }
}

async fn serve(
    status: Arc<Status>,
    service: ObjectName,
    port: u16,
    local_endpoints: Arc<Mutex<LocalReady>>,
) {
    let mut retry = FIRST_RETRY;
    let mut announced = false;
    loop {
        let error = match bind(port).await {
            Ok(listener) => {
                let (status, service) = (Arc::clone(&status), service.clone());
                let local_endpoints = Arc::clone(&local_endpoints);
                // Any path, as in kube-proxy.
                let router = Router::new().fallback(move |peer: ConnectInfo<SocketAddr>| {
                    let ready = *local_endpoints.lock().unwrap_or_else(PoisonError::into_inner);
                    // A client of IPv4 comes to the socket of both with a mapped address.
                    let local = ready.seen_over(Family::of(peer.ip().to_canonical()));
                    let keeping_up = status.health().is_keeping_up(status.now());
                    let answer = answer(&service, local, keeping_up);
                    async move { answer }
                });
                let router = router.into_make_service_with_connect_info::<SocketAddr>();
                match axum::serve(listener, router).await {
                    Ok(()) => return,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        if retry > FIRST_RETRY {
            warn!(%service, port, %error, retry_in = ?retry,
                  "health-check node port cannot be served: load balancers will avoid this node");
            // As kube-proxy has it; once, while this is tried again and again.
            if !announced {
                status.announce(Announcement {
                    regarding: Regarding::by_name("Service", service.clone()),
                    warning: true,
                    reason: "FailedToStartServiceHealthcheck",
                    action: "Listen",
                    note: format!(
                        "health-check node port {port} cannot be served on this node, so that \
                         load balancers will avoid it: {error}"
                    ),
                });
            }
            announced = true;
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 4).min(LAST_RETRY);
    }
}

/// All addresses of both families, or of IPv4 where the kernel has no IPv6.
async fn bind(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        result => result,
    }
}

fn answer(service: &ObjectName, local_endpoints: usize, keeping_up: bool) -> Response {
    let code = if local_endpoints > 0 && keeping_up {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(local_endpoints)),
    ];
    match body(service, local_endpoints, keeping_up) {
        Ok(body) => (code, headers, body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: BodyService<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(serde::Serialize)]
struct BodyService<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// Indented by tabs like kube-proxy's, for balancers that compare text.
fn body(
    service: &ObjectName,
    local_endpoints: usize,
    service_proxy_healthy: bool,
) -> serde_json::Result<Vec<u8>> {
    let body = Body {
        service: BodyService { namespace: &service.namespace, name: &service.name },
        local_endpoints,
        service_proxy_healthy,
    };
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"\t"));
    serde::Serialize::serialize(&body, &mut serializer)?;
    Ok(text)
}
