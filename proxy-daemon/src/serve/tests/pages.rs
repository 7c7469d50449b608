//! What is on the page of the metrics.

use super::*;
use crate::dataplane::traffic::{
    Abilities, Amount, Counters, Current, EndpointKey, Sample, Sink, TrafficSource,
};
use crate::dataplane::{Fill, FlowRelease, PlaneError};
use crate::model::Rejected;
use crate::policy::{FamilyCounts, NoLocal, PortName};

/// kube-proxy 1.36.2's page of a small cluster in nftables mode.
const KUBE_PROXY_PAGE: &str = include_str!("../fixtures/kube-proxy-1.36.2-metrics.txt");

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
    let mut bed = Bed::with(&["--endpoint-metrics", "--nodeport-addresses=primary"]);
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
    let mut bed = Bed::with(&["--endpoint-metrics", "--nodeport-addresses=primary"]);
    bed.count_traffic();
    bed.status.chose(vec![("tc", "tcx".to_owned()), ("map_reads", "batch".to_owned())]);
    bed.status.watch_source(Arc::new(SourceStats::default()));
    bed.queued(1_000, 3, 2);
    bed.synced(2_000, |report| {
        report.kind = SyncKind::Full;
        report.triggers =
            vec![(Family::V4, SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH + 1))];
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
    let operate = include_str!("../../../../docs/operate.md");
    let compared = include_str!("../../../../docs/metrics.md");
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
        let [before, after] = [started - Duration::from_secs(1), started + Duration::from_secs(1)];
        report.triggers = vec![
            (Family::V4, before),
            (Family::V4, after),
            (Family::V6, after),
            (Family::V6, after),
        ];
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
            no_local: NoLocal {
                internal: FamilyCounts { v4: 0, v6: 3 },
                external: FamilyCounts { v4: 1, v6: 4 },
            },
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
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 2",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"} 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"internal\"} 3",
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
}

#[tokio::test]
async fn metrics_tell_what_the_process_takes() {
    let page = Bed::new().metrics().await;
    let resident = page
        .lines()
        .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
        .and_then(|value| value.parse::<f64>().ok());
    assert!(resident.is_some_and(|bytes| bytes > 1e6), "{resident:?}");
    assert!(page.contains("# TYPE process_cpu_seconds_total counter"), "{page}");
}
