//! UDP flows through changes of what they lead to: conntrack entries of endpoints that
//! are gone, and of the time before the Service.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use proxy_tests::apiserver::{ApiServer, Options};
use proxy_tests::binary::binary;
use proxy_tests::cluster::{API_SERVER_V4, Cluster, Host};
use proxy_tests::daemon::Daemon;
use proxy_tests::traffic::{
    ConnectSpec, Listen, Protocol, RateReport, RateSpec, Server, UdpRate, connect,
};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);
/// Datagrams of each flow.
const PER_SECOND: u32 = 20;
const TARGET_PORT: u16 = 5353;

const CLUSTER_IP: &str = "10.96.0.53";
const CLUSTER_IP_V6: &str = "fd00:10:96::53";
const EXTERNAL_IP: &str = "198.51.100.53";
const NODE_PORT: u16 = 30053;

/// Pods 0 and 1 serve, pod 2 is a client, on one node; and a client outside.
pub struct Bed {
    daemon: Option<Daemon>,
    api: ApiServer,
    directory: tempfile::TempDir,
    cluster: Cluster,
}

impl Bed {
    pub fn new(objects: impl IntoIterator<Item = Value>) -> Self {
        assert_eq!(std::env::var("PROXY_VM").as_deref(), Ok("1"), "cargo xtask vm");
        // ctnetlink is not among them: that the kernel loads it when asked is tested too.
        let modules = ["ip_vs", "ip_vs_rr", "dummy", "nf_tables", "nf_conntrack", "br_netfilter"];
        Command::new("modprobe").arg("-qa").args(modules).status().expect("modprobe");
        let cluster = Cluster::builder().pods_per_node(3).outside_client().build().expect("bed");
        let listen = SocketAddr::from((API_SERVER_V4, 6443));
        let options = Options {
            listen,
            kubernetes_endpoint: Some(listen),
            tls: false,
            managed_fields: false,
            // Without the node's own network.
            service_ranges: ["10.96.0.0/16", "fd00:10:96::/108"]
                .map(|range| range.parse().expect("a range"))
                .to_vec(),
            ..Options::default()
        };
        let api = cluster.fabric().in_netns(|| ApiServer::start(options)).expect("enter");
        let api = api.expect("the test API server");
        let directory = tempfile::tempdir().expect("a directory");
        api.write_kubeconfig(&directory.path().join("kubeconfig"), None).expect("a kubeconfig");
        let mut bed = Self { daemon: None, api, directory, cluster };
        let addresses: Vec<Value> = (bed.node().addresses().iter())
            .map(|address| json!({"type": "InternalIP", "address": address}))
            .collect();
        bed.apply([json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-a"},
            "status": {"addresses": addresses}})]);
        bed.apply(objects);
        let daemon = bed.node().in_netns(|| bed.start()).expect("enter");
        bed.daemon = Some(daemon);
        bed.wait_for("node_dataplane_frontends", |n| n >= 1.0);
        bed
    }

    fn start(&self) -> Daemon {
        let kubeconfig = self.directory.path().join("kubeconfig");
        Daemon::start(
            &binary("proxy-daemon"),
            self.directory.path(),
            &[
                "--hostname-override=node-a",
                "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
                &format!("--kubeconfig={}", kubeconfig.display()),
                "-v=4",
            ],
        )
        .expect("the daemon")
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("started")
    }

    fn wait_for(&self, metric: &str, wanted: impl Fn(f64) -> bool + Send) -> f64 {
        let found = self.node().in_netns(|| self.daemon().wait_for(metric, LONG, wanted));
        found.expect("enter").expect("the metric")
    }

    fn metric(&self, name: &str) -> f64 {
        let page = self.node().in_netns(|| self.daemon().metric(name)).expect("enter");
        page.expect("metrics").unwrap_or_default()
    }

    fn apply(&self, objects: impl IntoIterator<Item = Value>) {
        for object in objects {
            self.api.store().apply(object).expect("an object");
        }
    }

    pub fn node(&self) -> &Host {
        self.cluster.node(0)
    }

    pub fn pod(&self, number: usize) -> &Host {
        self.cluster.pod(0, number)
    }

    pub fn outside(&self) -> &Host {
        self.cluster.outside().expect("asked for")
    }

    pub fn on_node(&self, program: &str, arguments: &[&str]) -> String {
        self.node().command(program).args(arguments).stdout_of().expect("its output")
    }

    /// Conntrack entries of the node that contain all of this, as conntrack(8) writes them.
    fn entries(&self, protocol: &str, parts: &[&str]) -> Vec<String> {
        let all = [("ipv4", &["-L"]), ("ipv6", &["-L"])].map(|(family, list)| {
            self.on_node("conntrack", &[list[0], "-f", family, "-p", protocol])
        });
        all.concat()
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part)))
            .map(str::to_owned)
            .collect()
    }

    /// Waits until these pods, and no others, are the real servers of the ClusterIPs.
    fn until_served_by(&self, pods: &[usize]) {
        let wanted: Vec<String> = (pods.iter())
            .flat_map(|pod| self.pod(*pod).addresses())
            .map(|address| SocketAddr::new(address, TARGET_PORT).to_string())
            .collect();
        self.until("the real servers", || {
            let table = self.on_node("ipvsadm", &["-Sn"]);
            let of = |vip: &str| {
                let server = format!("-a -u {vip}:53 ");
                table.lines().filter(|line| line.starts_with(&server)).collect::<Vec<_>>()
            };
            let lines = [of(CLUSTER_IP), of(&format!("[{CLUSTER_IP_V6}]"))].concat();
            lines.len() == wanted.len()
                && wanted.iter().all(|at| lines.iter().any(|line| line.contains(at.as_str())))
        });
    }

    pub fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !condition() {
            assert!(Instant::now() < end, "{what} never came\n{}", self.daemon().log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Every way in that the contract names, each with the client that uses it.
    fn ways(&self) -> Vec<Way<'_>> {
        let node = self.node().ipv4().expect("dual-stack");
        [
            ("pod to ClusterIP", self.pod(2), format!("{CLUSTER_IP}:53")),
            ("pod to ClusterIP, IPv6", self.pod(2), format!("[{CLUSTER_IP_V6}]:53")),
            ("host to ClusterIP", self.node(), format!("{CLUSTER_IP}:53")),
            ("outside to ClusterIP, IPv6", self.outside(), format!("[{CLUSTER_IP_V6}]:53")),
            ("outside to node port", self.outside(), format!("{node}:{NODE_PORT}")),
            ("outside to external IP", self.outside(), format!("{EXTERNAL_IP}:53")),
        ]
        .into_iter()
        .map(|(name, client, target)| Way {
            name,
            client,
            target: target.parse().expect("an address"),
        })
        .collect()
    }

    /// Starts a steady flow on each way.
    fn send(&self) -> Vec<(Way<'_>, UdpRate)> {
        self.ways().into_iter().map(|way| (way, way.send())).collect()
    }
}

#[derive(Clone, Copy)]
struct Way<'a> {
    name: &'static str,
    client: &'a Host,
    target: SocketAddr,
}

impl Way<'_> {
    fn is_external(&self) -> bool {
        !self.name.contains("ClusterIP")
    }

    /// From one port that stays the same, so that it is one flow.
    fn source(&self) -> SocketAddr {
        let address = self.client.address_like(self.target.ip()).expect("of that family");
        let port = if self.target.port() == NODE_PORT { 40_001 } else { 40_002 };
        SocketAddr::new(address, port)
    }

    fn send(&self) -> UdpRate {
        let source = Some(self.source());
        let spec = RateSpec { source, ..RateSpec::new(self.target, PER_SECOND) };
        self.client.in_netns(|| UdpRate::start(spec)).expect("enter").expect("a sender")
    }
}

fn reports<'a>(flows: Vec<(Way<'a>, UdpRate)>) -> Vec<(Way<'a>, RateReport)> {
    flows.into_iter().map(|(way, flow)| (way, flow.stop().expect("its report"))).collect()
}

fn serve(pod: &Host) -> Server {
    let listen: Vec<Listen> = (pod.addresses().into_iter())
        .flat_map(|ip| {
            let address = SocketAddr::new(ip, TARGET_PORT);
            [Protocol::Udp, Protocol::Tcp].map(|protocol| Listen { protocol, address })
        })
        .collect();
    pod.in_netns(|| Server::start(pod.name(), &listen)).expect("enter").expect("a server")
}

/// With every kind of frontend, and with the same ports for TCP.
fn dns() -> Value {
    json!({"kind": "Service", "apiVersion": "v1",
    "metadata": {"name": "dns", "namespace": "shop"},
    "spec": {
        "type": "NodePort", "clusterIP": CLUSTER_IP, "clusterIPs": [CLUSTER_IP, CLUSTER_IP_V6],
        "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
        "externalIPs": [EXTERNAL_IP],
        "ports": [
            {"name": "udp", "port": 53, "targetPort": TARGET_PORT, "protocol": "UDP",
                "nodePort": NODE_PORT},
            {"name": "tcp", "port": 53, "targetPort": TARGET_PORT, "protocol": "TCP",
                "nodePort": NODE_PORT},
        ],
    }})
}

/// The Service's slices of both families.
fn slices(pods: &[&Host]) -> [Value; 2] {
    let addresses = |family: fn(&Host) -> Option<IpAddr>| -> Vec<Value> {
        let endpoint = |address| json!({"addresses": [address], "conditions": {"ready": true}});
        pods.iter().filter_map(|pod| family(pod)).map(endpoint).collect()
    };
    let slice = |kind: &str, endpoints: Vec<Value>| {
        json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": format!("dns-{}", kind.to_lowercase()), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "dns"}},
        "addressType": kind, "endpoints": endpoints, "ports": [
            {"name": "udp", "port": TARGET_PORT, "protocol": "UDP"},
            {"name": "tcp", "port": TARGET_PORT, "protocol": "TCP"},
        ]})
    };
    [
        slice("IPv4", addresses(|pod| pod.ipv4().map(IpAddr::V4))),
        slice("IPv6", addresses(|pod| pod.ipv6().map(IpAddr::V6))),
    ]
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_04_udp_to_a_removed_endpoint_is_not_blackholed() {
    let bed = Bed::new([dns()]);
    let old = serve(bed.pod(0));
    let new = serve(bed.pod(1));
    bed.apply(slices(&[bed.pod(0)]));
    bed.until_served_by(&[0]);

    // Replaced while it still serves: what is lost is lost by us.
    let flows = bed.send();
    std::thread::sleep(Duration::from_secs(1));
    bed.apply(slices(&[bed.pod(1)]));
    bed.until_served_by(&[1]);
    let removed: Vec<String> =
        bed.pod(0).addresses().into_iter().map(|ip| format!("src={ip} ")).collect();
    let port = format!("sport={TARGET_PORT} ");
    bed.until("the end of the old entries", || {
        removed.iter().all(|source| bed.entries("udp", &[source, &port]).is_empty())
    });
    std::thread::sleep(Duration::from_secs(1));
    for (way, report) in reports(flows) {
        println!("replaced, {}: {} sent, {} lost", way.name, report.sent, report.lost());
        let answered: Vec<&str> = report.changes.iter().map(|c| c.server.as_str()).collect();
        let log = bed.daemon().log();
        assert_eq!(answered, [bed.pod(0).name(), bed.pod(1).name()], "{}\n{log}", way.name);
        // One on its way when the real server goes, and one when the tracked flow goes.
        assert!(report.lost() <= 2, "{}: {report:?}\n{log}", way.name);
    }

    // Dead at the moment of the change: until it is programmed, datagrams are lost.
    let flows = bed.send();
    std::thread::sleep(Duration::from_secs(1));
    let changed = Instant::now();
    drop(new);
    bed.apply(slices(&[bed.pod(0)]));
    bed.until_served_by(&[0]);
    let programmed = changed.elapsed();
    std::thread::sleep(Duration::from_secs(2));
    // What was lost before the kernel knew, one after it, and one for the rounding.
    let bound = 2 + u64::from(PER_SECOND) * u64::try_from(programmed.as_millis()).unwrap() / 1000;
    for (way, report) in reports(flows) {
        println!(
            "killed, {}: programmed within {programmed:?}, {} sent, {} lost",
            way.name,
            report.sent,
            report.lost()
        );
        assert!(report.lost() <= bound, "{}: more than {bound}: {report:?}", way.name);
        let last = report.changes.last().expect("answers");
        assert_eq!(last.server, bed.pod(0).name(), "{}: {report:?}", way.name);
    }
    drop(old);
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_udp_flow_that_began_before_its_service_or_its_endpoints_starts_to_work() {
    let bed = Bed::new([]);
    let _server = serve(bed.pod(0));
    bed.apply(slices(&[bed.pod(0)]));
    for first in ["the Service", "the endpoints"] {
        let flows = bed.send();
        std::thread::sleep(Duration::from_secs(1));
        if first == "the Service" {
            // What leaves the node before it is dropped has one.
            for way in bed.ways().into_iter().filter(|way| way.is_external()) {
                let destination = format!("dst={} ", way.target.ip());
                let source = format!("sport={} ", way.source().port());
                let led_elsewhere = bed.entries("udp", &[&destination, &source]);
                assert!(!led_elsewhere.is_empty(), "{}: no entry", way.name);
            }
            bed.apply([dns()]);
        } else {
            bed.apply(slices(&[bed.pod(0)]));
        }
        bed.until_served_by(&[0]);
        std::thread::sleep(Duration::from_secs(2));
        for (way, report) in reports(flows) {
            let lost = report.last_lost_ms.unwrap_or_default();
            println!("before {first}, {}: last lost after {lost} ms: {report:?}", way.name);
            // The last second of the three and more that it ran was without loss.
            let end = u64::from(1000 / PER_SECOND) * report.sent;
            assert!(report.answered >= u64::from(PER_SECOND), "{}: {report:?}", way.name);
            assert!(lost + 1000 < end, "{}: lost until the end: {report:?}", way.name);
        }
        // For the second time round: clients meet a Service without endpoints.
        bed.apply(slices(&[]));
        bed.until_served_by(&[]);
    }
}

/// The entry of a client's flow to a frontend, as [`Bed::insert`] wants it.
struct Entry {
    protocol: &'static str,
    client_port: &'static str,
    to: (&'static str, &'static str),
    endpoint: String,
}

impl Bed {
    fn insert(&self, entry: &Entry) {
        let client = "10.244.0.250";
        let port = entry.client_port;
        let (to, to_port) = entry.to;
        let target = TARGET_PORT.to_string();
        let mut arguments = vec!["-I", "-p", entry.protocol, "-t", "600", "-s", client, "-d", to];
        arguments.extend(["--sport", port, "--dport", to_port, "-r", &entry.endpoint]);
        arguments.extend(["-q", client, "--reply-port-src", &target, "--reply-port-dst", port]);
        if entry.protocol == "tcp" {
            arguments.extend(["--state", "ESTABLISHED"]);
        }
        self.on_node("conntrack", &arguments);
    }

    fn has(&self, entry: &Entry) -> bool {
        let port = format!("sport={} ", entry.client_port);
        !self.entries(entry.protocol, &["src=10.244.0.250 ", &port]).is_empty()
    }
}

/// A Service of one UDP port, as many of them as wanted.
fn numbered(number: u8) -> Value {
    json!({"kind": "Service", "apiVersion": "v1",
        "metadata": {"name": format!("udp-{number}"), "namespace": "many"},
        "spec": {"clusterIP": format!("10.96.1.{number}"),
            "ports": [{"port": 53, "protocol": "UDP"}]}})
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn only_entries_of_what_changed_are_deleted_and_the_table_is_read_once() {
    const LOOKS: &str = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count";
    const DELETED: &str = "kubeproxy_conntrack_reconciler_deleted_entries_total";
    let bed = Bed::new((1..=60).map(numbered).chain([dns()]));
    bed.wait_for("node_dataplane_frontends", |n| n >= 60.0);
    let families = 2.0;
    assert_eq!(bed.wait_for(LOOKS, |n| n >= families), families, "{}", bed.daemon().log());
    bed.apply(slices(&[bed.pod(0), bed.pod(1)]));
    bed.until_served_by(&[0, 1]);
    let at = |pod: usize| bed.pod(pod).ipv4().expect("dual-stack").to_string();
    let entry = |protocol, client_port, to, endpoint| Entry { protocol, client_port, to, endpoint };
    let stale = [
        entry("udp", "1001", (CLUSTER_IP, "53"), at(0)),
        entry("udp", "1002", (EXTERNAL_IP, "53"), at(0)),
        entry("udp", "1003", ("10.99.0.2", "30053"), at(0)),
    ];
    let others = [
        entry("udp", "2001", (CLUSTER_IP, "53"), at(1)),
        entry("udp", "2002", (CLUSTER_IP, "54"), at(0)),
        entry("udp", "2003", ("10.96.1.1", "53"), at(0)),
        entry("udp", "2004", ("192.0.2.9", "53"), at(0)),
        entry("tcp", "2005", (CLUSTER_IP, "53"), at(0)),
    ];
    for entry in stale.iter().chain(&others) {
        bed.insert(entry);
        assert!(bed.has(entry), "{}", entry.client_port);
    }
    let looks = bed.metric(LOOKS);
    let web = json!({"kind": "Service", "apiVersion": "v1",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.80", "ports": [{"port": 80}]}});
    bed.apply([web]);
    bed.until("the TCP Service", || bed.on_node("ipvsadm", &["-Sn"]).contains("10.96.0.80:80"));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(bed.metric(LOOKS), looks, "a change of TCP alone reads nothing");

    let [v4, _] = slices(&[bed.pod(1)]);
    bed.apply([v4]);
    bed.until("the end of the stale entries", || !stale.iter().any(|entry| bed.has(entry)));
    for entry in &others {
        assert!(bed.has(entry), "{} is somebody else's", entry.client_port);
    }
    bed.until("the report", || bed.metric(LOOKS) >= looks + 1.0);
    assert_eq!(bed.metric(LOOKS), looks + 1.0, "of one family");
    assert_eq!(bed.metric(DELETED), 3.0);
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_03_a_sticky_client_moves_when_its_endpoint_goes() {
    let mut sticky = dns();
    sticky["spec"]["sessionAffinity"] = json!("ClientIP");
    let bed = Bed::new([sticky]);
    let _servers = [serve(bed.pod(0)), serve(bed.pod(1))];
    bed.apply(slices(&[bed.pod(0), bed.pod(1)]));
    bed.until_served_by(&[0, 1]);
    for way in bed.ways() {
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let ask = |protocol, count| {
            let spec = ConnectSpec::new(protocol, way.target, count).timeout(LONG);
            way.client.in_netns(|| connect(&spec)).expect("enter").expect("a report")
        };
        let held: Vec<String> = protocols
            .map(|protocol| {
                let report = ask(protocol, 10);
                assert_eq!(report.by_server.len(), 1, "{}: not sticky: {report:?}", way.name);
                report.by_server.into_keys().next().expect("a server")
            })
            .to_vec();
        for (protocol, server) in protocols.into_iter().zip(held) {
            let gone = usize::from(server == bed.pod(1).name());
            bed.apply(slices(&[bed.pod(1 - gone)]));
            bed.until_served_by(&[1 - gone]);
            let begun = Instant::now();
            let report = ask(protocol, 1);
            let took = begun.elapsed();
            println!("{}, {protocol}: {server} gone, answered in {took:?}", way.name);
            let next = bed.pod(1 - gone).name();
            assert_eq!(report.by_server.get(next), Some(&1), "{}: {report:?}", way.name);
            // A lost SYN comes again after 1 s; a lost datagram never.
            assert!(took < Duration::from_secs(1), "{}: {took:?}", way.name);
            bed.apply(slices(&[bed.pod(0), bed.pod(1)]));
            bed.until_served_by(&[0, 1]);
        }
    }
}
