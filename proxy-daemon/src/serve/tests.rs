//! Both servers over real sockets, against what kube-proxy 1.36.2 answered.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::health::Now;
use super::*;
use crate::config::Config;
use crate::model::{ObjectName, Protocol};
use crate::policy::{FrontendKey, LocalReady};
use crate::sync::{Failing, HealthCheck, Observer as _, SyncKind, SyncReport, Totals, Work};

mod checks;
mod pages;
mod start;
mod zpages;

pub use self::pages::full_page;

/// Wall-clock second 0 of the tests: 2026-11-21T09:00:00Z.
const EPOCH: u64 = 1_795_251_600;

/// A status whose clock the test moves.
struct Bed {
    status: Arc<Status>,
    observer: StatusObserver,
    elapsed: Arc<Mutex<Duration>>,
    start: Instant,
}

impl Bed {
    fn new() -> Self {
        Self::with(&["--nodeport-addresses=primary"])
    }

    /// In service.
    fn with(arguments: &[&str]) -> Self {
        let bed = Self::starting(arguments);
        bed.status.health().enter_service();
        bed
    }

    fn starting(arguments: &[&str]) -> Self {
        let start = Instant::now();
        let elapsed = Arc::new(Mutex::new(Duration::ZERO));
        let clock = {
            let elapsed = Arc::clone(&elapsed);
            move || {
                let elapsed = *elapsed.lock().unwrap();
                Now {
                    monotonic: start + elapsed,
                    wall: SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH) + elapsed,
                }
            }
        };
        let arguments = [&["proxy-daemon"], arguments].concat();
        let config = Config::from_args(arguments, "node-a").unwrap();
        let status = Status::with_clock(&config, &Family::ALL, Box::new(clock));
        Self { observer: status.observer(), status, elapsed, start }
    }

    fn at(&self, millis: u64) -> Instant {
        *self.elapsed.lock().unwrap() = Duration::from_millis(millis);
        self.start + Duration::from_millis(millis)
    }

    fn queued(&mut self, millis: u64, services: usize, slices: usize) {
        let at = self.at(millis);
        self.observer.queued(at, services, slices);
    }

    fn synced(&mut self, millis: u64, edit: impl FnOnce(&mut SyncReport)) {
        let mut report = SyncReport {
            kind: SyncKind::Partial,
            started: self.at(millis),
            duration: Duration::from_micros(1_500),
            service_changes: 0,
            slice_changes: 0,
            triggers: vec![],
            ops_applied: 0,
            ops_failed: 0,
            work: Work::default(),
            releases: vec![],
            fills: vec![],
            pending: 0,
            totals: Totals::default(),
            failing: vec![],
            failing_total: 0,
        };
        edit(&mut report);
        self.observer.synced(&report);
    }

    async fn healthz(&self) -> Reply {
        get(serve(http::health_router(Arc::clone(&self.status))).await, "/healthz", "").await
    }

    async fn livez(&self) -> Reply {
        get(serve(http::health_router(Arc::clone(&self.status))).await, "/livez", "").await
    }

    async fn metrics(&self) -> String {
        let address = serve(http::metrics_router(Arc::clone(&self.status))).await;
        get(address, "/metrics", "").await.body
    }
}

/// What a round tells of an object that fails since then.
fn failing_since(since: Instant) -> impl Fn(&mut SyncReport) {
    move |report| {
        let (object, error) = ("frontend".to_owned(), "map SLOTS is full".to_owned());
        report.failing = vec![Failing { object, error, since }];
        report.failing_total = 1;
    }
}

async fn serve(router: axum::Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

#[derive(Debug)]
struct Reply {
    code: u16,
    headers: String,
    body: String,
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (held, value) = line.split_once(": ")?;
            held.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

async fn get(address: SocketAddr, path: &str, headers: &str) -> Reply {
    ask(address, "GET", path, headers, "").await
}

async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a whole head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Reply { code, headers: head.to_owned(), body: body.to_owned() }
}

#[tokio::test]
async fn healthy_answers_are_those_of_kube_proxy() {
    let mut bed = Bed::new();
    bed.queued(1_000, 2, 3);
    bed.synced(2_000, |_| {});
    bed.at(7_500);
    let reply = bed.healthz().await;
    assert_eq!(reply.code, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    // Field for field what fixtures of kube-proxy 1.36.2 hold, times apart.
    assert_eq!(
        reply.body,
        concat!(
            r#"{"lastUpdated":"2026-11-21T09:00:07.5Z","currentTime":"2026-11-21T09:00:07.5Z","#,
            r#""nodeEligible":true,"healthy":true,"status":{"#,
            r#""IPv4":{"lastUpdated":"2026-11-21T09:00:02.0015Z","healthy":true},"#,
            r#""IPv6":{"lastUpdated":"2026-11-21T09:00:02.0015Z","healthy":true}}}"#
        )
    );
    let reply = bed.livez().await;
    assert_eq!(
        reply.body,
        concat!(
            r#"{"lastUpdated":"2026-11-21T09:00:07.5Z","currentTime":"2026-11-21T09:00:07.5Z","#,
            r#""healthy":true,"status":{"#,
            r#""IPv4":{"lastUpdated":"2026-11-21T09:00:02.0015Z","healthy":true},"#,
            r#""IPv6":{"lastUpdated":"2026-11-21T09:00:02.0015Z","healthy":true}}}"#
        )
    );
}

#[tokio::test]
async fn healthy_without_a_change() {
    let bed = Bed::new();
    bed.at(3_600_000);
    let reply = bed.healthz().await;
    assert_eq!((reply.code, &reply.json()["status"]), (200, &serde_json::json!({})));
}

#[tokio::test]
async fn a_change_that_waits_longer_than_twice_the_sync_period() {
    let mut bed = Bed::new();
    bed.synced(0, |_| {});
    bed.queued(10_000, 1, 0);
    bed.queued(50_000, 1, 0);
    bed.synced(55_000, |report| report.pending = 1);
    bed.at(69_999);
    assert_eq!(bed.livez().await.code, 200);
    bed.at(70_000);
    for reply in [bed.livez().await, bed.healthz().await] {
        assert_eq!(reply.code, 503);
        let body = reply.json();
        assert_eq!(body["healthy"], false);
        assert_eq!(body["status"]["IPv4"]["healthy"], false);
        assert_eq!(body["lastUpdated"], "2026-11-21T09:00:00.0015Z", "the last good round");
    }
    bed.synced(71_000, |_| {});
    assert_eq!(bed.livez().await.code, 200);
}

#[tokio::test]
async fn nothing_was_ever_programmed() {
    let mut bed = Bed::new();
    bed.queued(0, 1, 1);
    bed.at(60_000);
    let reply = bed.livez().await;
    assert_eq!(reply.code, 503);
    assert_eq!(reply.json()["status"]["IPv6"]["lastUpdated"], "0001-01-01T00:00:00Z");
}

#[tokio::test]
async fn an_object_that_keeps_failing_is_named() {
    let mut bed = Bed::new();
    let since = bed.at(1_000);
    bed.synced(31_000, |report| {
        report.failing_total = 1;
        report.failing = vec![Failing {
            object: "virtual server TCP 10.96.0.1:443".to_owned(),
            error: "ENOENT: No such file or directory".to_owned(),
            since,
        }];
    });
    bed.at(60_999);
    let reply = bed.livez().await;
    assert_eq!(reply.code, 200, "a failure gets its time to pass");
    bed.at(61_000);
    let reply = bed.livez().await;
    assert_eq!(reply.code, 503);
    assert_eq!(
        reply.json()["failing"],
        serde_json::json!([{
            "object": "virtual server TCP 10.96.0.1:443",
            "error": "ENOENT: No such file or directory",
            "since": "2026-11-21T09:00:01Z",
        }])
    );
    bed.synced(62_000, |_| {});
    let reply = bed.livez().await;
    assert_eq!((reply.code, reply.json().get("failing")), (200, None));
}

#[tokio::test]
async fn an_object_that_keeps_failing_is_announced_once_until_it_works_again() {
    let mut bed = Bed::new();
    let (announcer, mut announced) = crate::watch::announce::Announcer::new();
    bed.status.announce_through(announcer);
    let since = bed.at(1_000);
    bed.synced(5_999, failing_since(since));
    assert!(announced.try_recv().is_err(), "a failure gets its time to pass");
    bed.synced(6_000, failing_since(since));
    bed.synced(7_000, failing_since(since));
    let told = announced.try_recv().unwrap();
    assert_eq!(told.note, "frontend: map SLOTS is full");
    assert_eq!((told.regarding.kind, told.warning), ("Node", true));
    assert!(announced.try_recv().is_err(), "once");
    bed.synced(8_000, |_| {});
    let again = bed.at(9_000);
    bed.synced(14_000, failing_since(again));
    assert!(announced.try_recv().is_ok(), "it had worked between");
}

#[tokio::test]
async fn a_service_without_its_frontend_is_told_who_has_it() {
    let mut bed = Bed::new();
    let (announcer, mut announced) = crate::watch::announce::Announcer::new();
    bed.status.announce_through(announcer);
    let frontend = FrontendKey {
        address: [10, 96, 0, 1].into(),
        protocol: Protocol::Tcp,
        port: std::num::NonZeroU16::new(80).unwrap(),
    };
    let name = |name| ObjectName::new("shop", name);
    bed.observer.conflict(&name("copy"), &name("web"), &frontend);
    let told = announced.try_recv().unwrap();
    assert_eq!(told.regarding.name, name("copy"));
    assert_eq!(told.note, "TCP 10.96.0.1:80 is served for shop/web, the older of the two");
}

#[tokio::test]
async fn a_node_that_goes_is_unhealthy_but_alive() {
    let mut bed = Bed::new();
    bed.synced(0, |_| {});
    for (eligible, code) in [(Some(false), 503), (Some(true), 200), (None, 503)] {
        bed.observer.node(eligible);
        let reply = bed.healthz().await;
        assert_eq!(reply.code, code, "{eligible:?}");
        assert_eq!(reply.json()["nodeEligible"], code == 200);
        assert_eq!(reply.json()["status"]["IPv4"]["healthy"], true);
        assert_eq!(bed.livez().await.code, 200, "{eligible:?}");
    }
    let metrics = bed.metrics().await;
    assert!(metrics.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 2\n"), "{metrics}");
    assert!(metrics.contains("kubeproxy_proxy_livez_total{code=\"200\"} 3\n"), "{metrics}");
}

#[tokio::test]
async fn metrics_server_routes() {
    let bed = Bed::new();
    let address = serve(http::metrics_router(Arc::clone(&bed.status))).await;
    let mode = get(address, "/proxyMode", "").await;
    assert_eq!((mode.code, mode.body.as_str()), (200, "ipvs"));
    assert_eq!(mode.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(mode.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(get(address, "/healthz", "").await.body, "ok");
    let configz = get(address, "/configz", "").await.json();
    let kube_proxy = &configz["kubeproxy.config.k8s.io"];
    assert_eq!(kube_proxy["kind"], "KubeProxyConfiguration");
    assert_eq!(kube_proxy["conntrack"]["tcpEstablishedTimeout"], "24h0m0s");
    assert_eq!(kube_proxy["nodePortAddresses"], serde_json::json!(["primary"]));
    let missing = get(address, "/nothing", "").await;
    assert_eq!((missing.code, missing.body.as_str()), (404, "404 page not found\n"));
    let page = get(address, "/metrics", "Accept: text/plain;version=0.0.4\r\n").await;
    assert_eq!(page.header("content-type"), Some(exposition::CLASSIC));
    let page = get(address, "/metrics", "Accept: application/openmetrics-text\r\n").await;
    assert_eq!(page.header("content-type"), Some(exposition::OPEN_METRICS));
    assert!(page.body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn binding_is_retried_unless_it_must_not_fail() {
    let held = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = held.local_addr().unwrap();
    let fatal = bind("--healthz-bind-address", address, true, BIND_RETRY);
    let error = tokio::time::timeout(BIND_RETRY, fatal).await.expect("at once").unwrap_err();
    assert!(error.to_string().contains(&format!("--healthz-bind-address={address}")), "{error}");

    let retried = tokio::spawn(bind("--x", address, false, Duration::from_millis(10)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!retried.is_finished(), "the port is still held");
    drop(held);
    retried.await.unwrap().expect("bound after the port became free");
}

/// Waits at most 5 s for something another task does.
async fn until(mut condition: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen within 5 s");
}
