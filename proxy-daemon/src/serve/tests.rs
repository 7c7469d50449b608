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
use crate::dataplane::traffic::{
    Abilities, Amount, Counters, Current, EndpointKey, Sample, Sink, TrafficSource,
};
use crate::dataplane::{Fill, FlowRelease, PlaneError};
use crate::model::{ObjectName, Protocol, Rejected};
use crate::policy::{FrontendKey, LocalReady, PortName};
use crate::sync::{Failing, HealthCheck, Observer as _, SyncKind, SyncReport, Totals, Work};

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
        Self::with(&[])
    }

    fn with(arguments: &[&str]) -> Self {
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
        let usual = ["proxy-daemon", "--nodeport-addresses=primary"];
        let config = Config::from_args([&usual[..], arguments].concat(), "node-a").unwrap();
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
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}\r\n");
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
async fn healthy_before_the_first_change() {
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
    let failing = |since| {
        move |report: &mut SyncReport| {
            let (object, error) = ("frontend".to_owned(), "map SLOTS is full".to_owned());
            report.failing = vec![Failing { object, error, since }];
        }
    };
    let since = bed.at(1_000);
    bed.synced(5_999, failing(since));
    assert!(announced.try_recv().is_err(), "a failure gets its time to pass");
    bed.synced(6_000, failing(since));
    bed.synced(7_000, failing(since));
    let told = announced.try_recv().unwrap();
    assert_eq!(told.note, "frontend: map SLOTS is full");
    assert_eq!((told.regarding.kind, told.warning), ("Node", true));
    assert!(announced.try_recv().is_err(), "once");
    bed.synced(8_000, |_| {});
    let again = bed.at(9_000);
    bed.synced(14_000, failing(again));
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

/// kube-proxy 1.36.2's page of a small cluster in nftables mode.
const KUBE_PROXY_PAGE: &str = include_str!("fixtures/kube-proxy-1.36.2-metrics.txt");

fn sample_shape(line: &str) -> String {
    let (name, labels) = line
        .split_once('{')
        .unwrap_or_else(|| (line.split_once(' ').map_or(line, |(name, _)| name), "}"));
    let labels = labels.split_once('}').map_or("", |(labels, _)| labels);
    let names: BTreeSet<&str> =
        labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _)| name).collect();
    format!("{name}{{{}}}", names.into_iter().collect::<Vec<_>>().join(","))
}

#[tokio::test]
async fn metrics_have_the_names_labels_and_buckets_of_kube_proxy() {
    let mut bed = Bed::new();
    bed.queued(1_000, 14, 7);
    bed.synced(2_000, |report| report.kind = SyncKind::Full);
    let page = bed.metrics().await;
    for (what, of) in [("samples", samples as fn(&str) -> BTreeSet<String>), ("types", types)] {
        let (theirs, ours) = (of(KUBE_PROXY_PAGE), of(&page));
        assert!(theirs.len() >= 11, "{what} of kube-proxy: {theirs:?}");
        let missing: Vec<_> = theirs.difference(&ours).collect();
        assert!(missing.is_empty(), "{what} that kube-proxy has: {missing:#?}\n{page}");
    }
    for line in [
        "kubeproxy_sync_proxy_rules_service_changes_total 14",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 7",
        "kubeproxy_sync_proxy_rules_service_changes_pending 0",
    ] {
        assert!(page.contains(line), "{line} is missing from\n{page}");
    }
}

/// Name, label names and bucket of each sample.
fn samples(page: &str) -> BTreeSet<String> {
    let bucket = |line: &str| Some(line.split_once("le=\"")?.1.split('"').next()?.to_owned());
    page.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{} {}", sample_shape(line), bucket(line).unwrap_or_default()))
        .collect()
}

fn types(page: &str) -> BTreeSet<String> {
    page.lines().filter(|line| line.starts_with("# TYPE ")).map(str::to_owned).collect()
}

/// A kernel with one frontend of a Service and one of somebody else's.
struct Counted {
    connections: u64,
    reads: Arc<Mutex<u32>>,
}

fn frontend(address: [u8; 4]) -> FrontendKey {
    let port = NonZeroU16::new(80).unwrap();
    FrontendKey { address: address.into(), protocol: Protocol::Tcp, port }
}

impl TrafficSource for Counted {
    fn abilities(&self) -> Abilities {
        Abilities { refused: true, current: true }
    }

    fn read(&mut self, endpoints: bool, sink: &mut dyn Sink) -> Result<(), PlaneError> {
        *self.reads.lock().unwrap() += 1;
        self.connections += 1;
        let counters = Counters {
            connections: self.connections,
            refused: 2,
            requests: Amount { packets: 3, bytes: 300 },
            replies: Amount { packets: 4, bytes: 400 },
        };
        let current = Current { active: 5, inactive: 6 };
        let sample = Sample { incarnation: 0, counters, current };
        sink.frontend(frontend([10, 96, 0, 1]), sample);
        sink.frontend(frontend([10, 9, 9, 9]), sample);
        if endpoints {
            let at = "10.244.0.7:8080".parse().unwrap();
            sink.endpoint(EndpointKey { owner: 1, at }, frontend([10, 96, 0, 1]), sample);
        }
        sink.dropped(0, "no_endpoint", 7);
        Ok(())
    }
}

impl Bed {
    /// The traffic of `shop/web`, whose port has no name.
    fn count_traffic(&mut self) -> Arc<Mutex<u32>> {
        let reads = Arc::default();
        let source = Counted { connections: 10, reads: Arc::clone(&reads) };
        self.status.watch_traffic(Box::new(source));
        let name = PortName { service: ObjectName::new("shop", "web"), port: "".into() };
        self.observer.serves(&frontend([10, 96, 0, 1]), Some((&name, NonZeroU16::new(80))));
        reads
    }
}

#[tokio::test]
async fn traffic_is_that_of_service_ports() {
    let mut bed = Bed::with(&["--endpoint-metrics"]);
    let reads = bed.count_traffic();
    let page = bed.metrics().await;
    let port = "namespace=\"shop\",service=\"web\",port=\"80\",protocol=\"TCP\"";
    let endpoint = format!("{port},endpoint=\"10.244.0.7:8080\"");
    let other = "namespace=\"_other\",service=\"_other\",port=\"_other\",protocol=\"_other\"";
    for line in [
        format!("service_connections_total{{{port}}} 11"),
        format!("service_connections_total{{{other}}} 0"),
        format!("service_refused_total{{{port}}} 2"),
        format!("service_packets_total{{{port},direction=\"in\"}} 3"),
        format!("service_packets_total{{{port},direction=\"out\"}} 4"),
        format!("service_bytes_total{{{port},direction=\"in\"}} 300"),
        format!("service_bytes_total{{{port},direction=\"out\"}} 400"),
        format!("service_current_connections{{{port},state=\"active\"}} 5"),
        format!("service_current_connections{{{port},state=\"inactive\"}} 6"),
        format!("endpoint_connections_total{{{endpoint}}} 11"),
        format!("endpoint_bytes_total{{{endpoint},direction=\"out\"}} 400"),
        "drops_total{reason=\"no_endpoint\"} 7".to_owned(),
        "service_ports{series=\"own\"} 1".to_owned(),
        "service_ports{series=\"other\"} 0".to_owned(),
        "traffic_reading_failures_total 0".to_owned(),
    ] {
        let line = format!("node_dataplane_{line}");
        assert!(page.lines().any(|held| held == line), "{line} is missing from\n{page}");
    }
    assert!(!page.contains("10.9.9.9"), "somebody else's frontend");
    bed.metrics().await;
    assert_eq!(*reads.lock().unwrap(), 1, "scrapes of one second share one reading");
}

/// A kernel that takes its time.
struct Slow {
    begun: std::sync::mpsc::Sender<()>,
    go_on: std::sync::mpsc::Receiver<()>,
}

impl TrafficSource for Slow {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn read(&mut self, _: bool, sink: &mut dyn Sink) -> Result<(), PlaneError> {
        self.begun.send(()).unwrap();
        self.go_on.recv().unwrap();
        sink.frontend(frontend([10, 96, 0, 1]), Sample::default());
        Err(PlaneError::new("test", "the rest cannot be read"))
    }
}

#[tokio::test]
async fn the_engine_does_not_wait_for_a_scrape() {
    let mut bed = Bed::new();
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (release, go_on) = std::sync::mpsc::channel();
    bed.status.watch_traffic(Box::new(Slow { begun, go_on }));
    let status = Arc::clone(&bed.status);
    let scrape =
        std::thread::spawn(move || exposition::render(status.metrics.registry(), None).unwrap().1);
    has_begun.recv_timeout(Duration::from_secs(10)).unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    let engine = std::thread::spawn(move || {
        let name = PortName { service: ObjectName::new("shop", "web"), port: "".into() };
        // More than may wait.
        for number in 0..10_000_u32 {
            let frontend = frontend(number.to_be_bytes());
            bed.observer.serves(&frontend, Some((&name, NonZeroU16::new(80))));
        }
        done.send(()).unwrap();
        bed
    });
    is_done.recv_timeout(Duration::from_secs(10)).expect("the kernel is still being read");
    release.send(()).unwrap();
    let page = scrape.join().unwrap();
    let failed = "node_dataplane_traffic_reading_failures_total 1";
    assert!(page.lines().any(|line| line == failed), "{page}");
    drop(engine.join().unwrap());
}

#[tokio::test]
async fn no_traffic_is_read_where_nobody_asks_for_it() {
    for arguments in [&["--service-metrics-limit=0"][..], &["--metrics-bind-address="]] {
        let mut bed = Bed::with(arguments);
        let reads = bed.count_traffic();
        let page = bed.metrics().await;
        assert!(!page.contains("service_connections"), "{page}");
        assert_eq!(*reads.lock().unwrap(), 0, "{arguments:?}");
    }
}

/// A page with a sample of everything that can be on it.
pub async fn full_page() -> String {
    let mut bed = Bed::with(&["--endpoint-metrics"]);
    bed.count_traffic();
    bed.status.chose(vec![("tc", "tcx".to_owned()), ("map_reads", "batch".to_owned())]);
    bed.status.watch_source(Arc::new(SourceStats::default()));
    bed.queued(1_000, 3, 2);
    bed.synced(2_000, |report| {
        report.kind = SyncKind::Full;
        report.triggers = vec![SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH + 1)];
    });
    bed.synced(3_000, |report| {
        report.fills = vec![Fill { table: "SLOTS", used: 1, capacity: 2, growths: 0 }];
    });
    bed.observer.rejected(&Rejected {
        kind: "EndpointSlice",
        name: ObjectName::new("shop", "web-1"),
        reason: "port".to_owned(),
    });
    bed.healthz().await;
    bed.livez().await;
    bed.metrics().await
}

/// kube-proxy's names are what they are: two that no name of ours may be like.
const NAMES_OF_KUBE_PROXY: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total non-counter \
     metrics should not have \"_total\" suffix";

#[tokio::test]
async fn promtool_has_no_complaint() {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let page = full_page().await;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("promtool: {error}; `cargo xtask setup` installs it"));
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let complaints: Vec<_> =
        said.lines().filter(|line| !line.is_empty() && *line != NAMES_OF_KUBE_PROXY).collect();
    assert!(complaints.is_empty(), "{complaints:#?}\n{page}");
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {said}", output.status);
}

#[tokio::test]
async fn every_metric_is_documented_and_every_one_documented_is_there() {
    let operate = include_str!("../../../docs/operate.md");
    let compared = include_str!("../../../docs/metrics.md");
    let page = full_page().await;
    let ours: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    for name in &ours {
        let short = ["kubeproxy_", "node_dataplane_"].iter().find_map(|p| name.strip_prefix(p));
        let known = match short {
            Some(short) if name.starts_with("kubeproxy_") => compared.contains(short),
            Some(short) => {
                operate.contains(&format!("`{short}")) || operate.contains(&format!(" `{short}"))
            }
            None => name.starts_with("process_"),
        };
        assert!(known, "{name} is in no table");
    }
    // Rows of the comparison say `same` or why not.
    for row in compared.lines().filter(|row| row.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = format!("kubeproxy_{}", cells[1].trim_matches('`'));
        assert_eq!(cells[4].starts_with("same"), ours.contains(name.as_str()), "{row}");
    }
    for line in KUBE_PROXY_PAGE.lines().filter_map(|line| line.strip_prefix("# TYPE kubeproxy_")) {
        let name = line.split(' ').next().unwrap();
        assert!(compared.contains(&format!("| `{name}` |")), "{name} of kube-proxy");
    }
}

#[tokio::test]
async fn info_says_what_was_chosen() {
    let page = full_page().await;
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    for wanted in [
        format!(
            "node_dataplane_runtime_info{{mode=\"ipvs\",kernel=\"{release}\",ip_families=\"IPv4,IPv6\""
        ),
        "scheduler=\"rr\"".to_owned(),
        "node_port_addresses=\"primary\"".to_owned(),
        format!(
            "node_dataplane_build_info{{version=\"{}\",kubernetes=\"1.36\"",
            env!("CARGO_PKG_VERSION")
        ),
        "node_dataplane_ebpf_info{tc=\"tcx\",map_reads=\"batch\"} 1".to_owned(),
    ] {
        assert!(page.contains(&wanted), "{wanted} is missing from\n{page}");
    }
}

#[tokio::test]
async fn metrics_count_what_a_round_did() {
    let mut bed = Bed::new();
    let started = SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH);
    bed.queued(1_000, 3, 2);
    bed.synced(2_000, |report| {
        report.service_changes = 2;
        report.pending = 3;
        report.triggers = vec![started - Duration::from_secs(1), started + Duration::from_secs(1)];
        report.ops_applied = 5;
        report.ops_failed = 1;
        report.work = Work { requests: 6, dumps: 2, sends: 1 };
        let release = |released| FlowRelease {
            family: Family::V4,
            duration: Duration::from_millis(3),
            released,
        };
        report.releases = vec![release(Some(7)), release(None)];
        report.failing_total = 1;
        report.totals = Totals {
            services: 10,
            frontends: 12,
            backends: 30,
            no_local_external: 4,
            ..Totals::default()
        };
    });
    bed.observer.rejected(&Rejected {
        kind: "EndpointSlice",
        name: ObjectName::new("shop", "web-1"),
        reason: "port".to_owned(),
    });
    bed.status.watch_source(Arc::new(SourceStats::default()));
    let page = bed.metrics().await;
    for line in [
        "kubeproxy_sync_proxy_rules_service_changes_pending 1",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2",
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1",
        "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.5\",ip_family=\"IPv4\"} 0",
        "kubeproxy_network_programming_duration_seconds_bucket{le=\"1\",ip_family=\"IPv4\"} 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"external\"} 4",
        "node_dataplane_ops_total{result=\"applied\"} 5",
        "node_dataplane_ops_total{result=\"failed\"} 1",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 7",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 0",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 2",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket{le=\"0.002\",ip_family=\"IPv4\"} 0",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket{le=\"0.004\",ip_family=\"IPv4\"} 2",
        "node_dataplane_conntrack_failures_total 1",
        "node_dataplane_netlink_requests_total 6",
        "node_dataplane_netlink_dumps_total 2",
        "node_dataplane_netlink_sends_total 1",
        "node_dataplane_frontends 12",
        "node_dataplane_backends 30",
        "node_dataplane_failing_objects 1",
        "node_dataplane_rejected_objects_total{kind=\"EndpointSlice\"} 1",
        "node_dataplane_source_connected{kind=\"EndpointSlice\"} 0.0",
        "node_dataplane_source_lists_total{kind=\"Service\"} 0",
        "node_dataplane_source_errors_total{kind=\"Node\",cause=\"expired\"} 0",
        "node_dataplane_rejected_parts_total{kind=\"EndpointSlice\",part=\"port\"} 0",
    ] {
        assert!(page.lines().any(|held| held == line), "{line} is missing from\n{page}");
    }
    assert!(!page.contains("last_timestamp_seconds{"), "a round with a failure is no success");
    let resident = page
        .lines()
        .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
        .and_then(|value| value.parse::<f64>().ok());
    assert!(resident.is_some_and(|bytes| bytes > 1e6), "{resident:?}");
    assert!(page.contains("# TYPE process_cpu_seconds_total counter"), "{page}");
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

#[tokio::test]
async fn health_check_node_port_follows_the_endpoints() {
    let mut bed = Bed::new();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let serving = Serving { healthz: None, metrics: None, hard_fail: false };
    tokio::spawn(run(Arc::clone(&bed.status), serving));
    let web = ObjectName::new("shop", "web");

    bed.observer.health_check(
        &web,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(1), v6: Some(3) } }),
    );
    until(async || TcpStream::connect(address).await.is_ok()).await;
    let reply = get(address, "/any/path", "").await;
    assert_eq!(reply.code, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(reply.header("x-load-balancing-endpoint-weight"), Some("1"));
    assert_eq!(
        reply.body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
         \t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"
    );

    bed.observer.health_check(
        &web,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(0), v6: Some(3) } }),
    );
    until(async || get(address, "/", "").await.code == 503).await;
    let over_v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    assert_eq!(get(over_v6, "/", "").await.json()["localEndpoints"], 3, "of that family");
    assert_eq!(get(address, "/", "").await.json()["localEndpoints"], 0);

    // The port passes to another Service; the proxy falls behind.
    bed.observer.health_check(&web, None);
    let other = ObjectName::new("shop", "other");
    bed.observer.health_check(
        &other,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(2), v6: Some(3) } }),
    );
    until(async || {
        TcpStream::connect(address).await.is_ok()
            && get(address, "/", "").await.json()["service"]["name"] == "other"
    })
    .await;
    bed.queued(0, 1, 0);
    bed.at(60_000);
    let reply = get(address, "/", "").await;
    assert_eq!((reply.code, &reply.json()["serviceProxyHealthy"]), (503, &Value::Bool(false)));

    bed.observer.health_check(&other, None);
    until(async || TcpStream::connect(address).await.is_err()).await;
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
