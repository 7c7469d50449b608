//! `healthCheckNodePort`: one small server per Service that tells a load balancer whether
//! this node has endpoints of it (`externalTrafficPolicy: Local`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use axum::Router;
use axum::extract::ConnectInfo;
use axum::extract::connect_info::IntoMakeServiceWithConnectInfo;
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

/// Where the ports listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// On all addresses of both families, those of loopback among them, as in kube-proxy.
    Everywhere,
    At(IpAddr),
}

impl Place {
    async fn bind(self, port: u16) -> io::Result<TcpListener> {
        let address = match self {
            Self::At(address) => address,
            Self::Everywhere => Ipv6Addr::UNSPECIFIED.into(),
        };
        match TcpListener::bind(SocketAddr::new(address, port)).await {
            // The kernel may have no IPv6.
            Err(error) if self == Self::Everywhere && error.kind() != io::ErrorKind::AddrInUse => {
                TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
            }
            result => result,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everywhere => f.write_str("all addresses"),
            Self::At(address) => address.fmt(f),
        }
    }
}

#[derive(Debug, Clone)]
struct Wanted {
    checks: HashMap<ObjectName, HealthCheck>,
    places: BTreeSet<Place>,
}

/// What is wanted; [`run`] makes it so.
#[derive(Debug)]
pub(super) struct Checks {
    wanted: Mutex<Wanted>,
    everywhere: bool,
    changed: Notify,
}

impl Checks {
    /// Unless they listen `everywhere`, [`Self::listen_on`] says where.
    pub(super) fn new(everywhere: bool) -> Self {
        let places = everywhere.then_some(Place::Everywhere).into_iter().collect();
        let wanted = Mutex::new(Wanted { checks: HashMap::new(), places });
        Self { wanted, everywhere, changed: Notify::new() }
    }

    pub(super) fn set(&self, service: &ObjectName, check: Option<HealthCheck>) {
        self.change(|wanted| match check {
            Some(check) => wanted.checks.insert(service.clone(), check),
            None => wanted.checks.remove(service),
        });
    }

    /// Only what node ports listen on as well: `--nodeport-addresses` may keep a network out.
    pub(super) fn listen_on(&self, addresses: &[IpAddr]) {
        if !self.everywhere {
            let places = addresses.iter().copied().filter(bindable).map(Place::At).collect();
            self.change(|wanted| wanted.places = places);
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Wanted) -> T) {
        change(&mut self.wanted.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    fn snapshot(&self) -> Wanted {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A link-local address of IPv6 is none without its link.
fn bindable(address: &IpAddr) -> bool {
    !matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// What the servers of one Service have in common.
struct Check {
    service: ObjectName,
    port: u16,
    local_endpoints: Mutex<LocalReady>,
    announced: AtomicBool,
}

impl Check {
    fn local_endpoints(&self) -> LocalReady {
        *self.local_endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Servers of one Service. Dropping one frees its port.
struct Running {
    check: Arc<Check>,
    /// Each set holds one task; dropping the set aborts it.
    servers: BTreeMap<Place, JoinSet<()>>,
}

impl Running {
    fn new(service: ObjectName, HealthCheck { port, local_endpoints }: HealthCheck) -> Self {
        let local_endpoints = Mutex::new(local_endpoints);
        let announced = AtomicBool::new(false);
        let check = Arc::new(Check { service, port, local_endpoints, announced });
        Self { check, servers: BTreeMap::new() }
    }

    fn tell(&self, local_endpoints: LocalReady) {
        *self.check.local_endpoints.lock().unwrap_or_else(PoisonError::into_inner) =
            local_endpoints;
    }

    fn listen(&mut self, places: &BTreeSet<Place>, status: &Arc<Status>) {
        self.servers.retain(|place, _| places.contains(place));
        for &place in places {
            self.servers.entry(place).or_insert_with(|| {
                let mut task = JoinSet::new();
                task.spawn(serve(Arc::clone(status), Arc::clone(&self.check), place));
                task
            });
        }
    }
}

pub(super) async fn run(status: Arc<Status>) -> Result<(), ServeError> {
    let mut running: HashMap<ObjectName, Running> = HashMap::new();
    loop {
        let Wanted { checks, places } = status.checks.snapshot();
        // Removals first: a port may pass from one Service to another in one step.
        running.retain(|service, server| {
            checks.get(service).is_some_and(|check| check.port == server.check.port)
        });
        for (service, check) in checks {
            let server =
                running.entry(service.clone()).or_insert_with(|| Running::new(service, check));
            server.tell(check.local_endpoints);
            server.listen(&places, &status);
        }
        status.checks.changed.notified().await;
    }
}

async fn serve(status: Arc<Status>, check: Arc<Check>, place: Place) {
    let mut retry = FIRST_RETRY;
    loop {
        let error = match place.bind(check.port).await {
            Ok(listener) => match axum::serve(listener, router(&status, &check)).await {
                Ok(()) => return,
                Err(error) => error,
            },
            Err(error) => error,
        };
        if retry > FIRST_RETRY {
            cannot_serve(&status, &check, place, &error, retry);
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 4).min(LAST_RETRY);
    }
}

/// Any path, as in kube-proxy.
fn router(
    status: &Arc<Status>,
    check: &Arc<Check>,
) -> IntoMakeServiceWithConnectInfo<Router, SocketAddr> {
    let (status, check) = (Arc::clone(status), Arc::clone(check));
    let router = Router::new().fallback(move |peer: ConnectInfo<SocketAddr>| {
        // A client of IPv4 comes to the socket of both with a mapped address.
        let family = Family::of(peer.ip().to_canonical());
        let local = check.local_endpoints().seen_over(family);
        let keeping_up = status.health().is_keeping_up(status.now());
        let answer = answer(&check.service, local, keeping_up);
        async move { answer }
    });
    router.into_make_service_with_connect_info::<SocketAddr>()
}

fn cannot_serve(
    status: &Status,
    Check { service, port, announced, .. }: &Check,
    place: Place,
    error: &io::Error,
    retry: Duration,
) {
    warn!(%service, port, %place, %error, retry_in = ?retry,
          "health-check node port cannot be served: load balancers will avoid this node");
    // As kube-proxy has it; once, while this is tried again and again.
    if !announced.swap(true, Ordering::Relaxed) {
        status.announce(Announcement {
            regarding: Regarding::by_name("Service", service.clone()),
            warning: true,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: format!(
                "health-check node port {port} cannot be served on this node ({place}), so that \
                 load balancers will avoid it: {error}"
            ),
        });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::watch::announce::Announcer;

    #[test]
    fn nobody_listens_where_the_link_would_have_to_be_said() {
        let checks = Checks::new(false);
        let [link_local, usable]: [IpAddr; 2] =
            ["fe80::1", "2001:db8::1"].map(|address| address.parse().unwrap());
        checks.listen_on(&[link_local, usable]);
        assert_eq!(checks.snapshot().places, BTreeSet::from([Place::At(usable)]));
    }

    #[test]
    fn a_port_that_cannot_be_served_is_announced_once() {
        let config = Config::from_args(["proxy-daemon"], "a").unwrap();
        let status = Status::new(&config, &Family::ALL);
        let (announcer, mut announced) = Announcer::new();
        status.announce_through(announcer);
        let local_endpoints = LocalReady::default();
        let web = ObjectName::new("shop", "web");
        let check = Running::new(web, HealthCheck { port: 30_100, local_endpoints }).check;
        for place in [Place::Everywhere, Place::At(Ipv4Addr::LOCALHOST.into()), Place::Everywhere] {
            cannot_serve(&status, &check, place, &io::Error::other("taken"), FIRST_RETRY);
        }
        let told = announced.try_recv().unwrap();
        assert!(told.note.contains("30100") && told.note.contains("taken"), "{}", told.note);
        assert!(announced.try_recv().is_err(), "once");
    }
}
