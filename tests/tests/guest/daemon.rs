//! The daemon against the test API server, on a kernel that has IPVS.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proxy_tests::apiserver::{ApiServer, Options};
use proxy_tests::binary::binary;
use proxy_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::{in_namespace, run, run_with};

/// Objects as a real API server listed them, and what kube-proxy's ipvs mode makes of them.
const SERVICES: &str = include_str!("../../fixtures/list-services.http");
const SLICES: &str = include_str!("../../fixtures/list-endpointslices.http");
const NODE: &str = include_str!("../../fixtures/get-node.http");
pub(crate) const KUBE_PROXY: &str = include_str!("../../fixtures/ipvs-ipvsadm-save.txt");

pub(crate) const SYNCED: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
pub(crate) const LONG: Duration = Duration::from_secs(60);

fn body(recorded: &str) -> Value {
    let start = recorded.find("\n{").expect("a JSON body");
    serde_json::from_str(recorded[start..].trim()).expect("JSON")
}

/// The bed: an API server and a directory with its kubeconfig.
struct Bed {
    api: ApiServer,
    directory: tempfile::TempDir,
}

impl Bed {
    fn new(options: Options) -> Self {
        let api = ApiServer::start(options).expect("the test API server");
        let directory = tempfile::tempdir().expect("a directory");
        api.write_kubeconfig(&directory.path().join("kubeconfig"), None).expect("a kubeconfig");
        Self { api, directory }
    }

    fn daemon(&self) -> Daemon {
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

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// The node's links: its address, and a route for everything else, as nodes have.
pub(crate) fn node_network() {
    run("ip", &["link", "add", "eth0", "type", "dummy"]);
    run("ip", &["addr", "add", "10.99.0.2/24", "dev", "eth0"]);
    run("ip", &["addr", "add", "fd00:99::2/64", "dev", "eth0", "nodad"]);
    run("ip", &["link", "set", "eth0", "up"]);
    run("ip", &["route", "add", "default", "dev", "eth0"]);
}

/// Options as fast to serve as they come: the emulated guest is slow.
fn plain() -> Options {
    Options { tls: false, managed_fields: false, ..Options::default() }
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn every_object_of_the_fixtures_becomes_what_the_contract_says() {
    let (found, log) = in_namespace(|| {
        node_network();
        let bed = Bed::new(Options::default());
        load_recorded(&bed.api);
        let daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        daemon
            .wait_for("node_dataplane_frontends", LONG, |n| n > 20.0)
            .expect("the frontends of the fixtures");
        thread::sleep(Duration::from_millis(500));
        (run("ipvsadm", &["-Sn"]), daemon.log())
    });
    // kube-proxy ran on a guest with one address more, and with another IPv6 address.
    let expected: BTreeSet<String> = lines(KUBE_PROXY)
        .into_iter()
        .filter(|line| !line.contains("10.0.2.15"))
        .map(|line| line.replace("fec0::5054:ff:fe12:3456", "fd00:99::2"))
        .chain(hidden_web())
        .collect();
    let found = lines(&found);
    let missing: Vec<_> = expected.difference(&found).collect();
    let extra: Vec<_> = found.difference(&expected).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing {missing:#?}\nextra {extra:#?}\n{log}"
    );
}

/// What kube-proxy's ipvs mode has not: `web` keeps its clients at their endpoint across all
/// its external frontends, whose Local set is not the ClusterIP's: that has a virtual server
/// of its own, on a port that no client can reach.
fn hidden_web() -> Vec<String> {
    let mut lines = Vec::new();
    for (port, target) in [(80, 8080), (443, 8443)] {
        let port = port ^ 0x8000;
        for (address, endpoint) in
            [("10.101.40.77", "10.244.0.7"), ("[fd00:10:96::d:bba0]", "[fd00:10:244::7]")]
        {
            lines.push(format!("-A -t {address}:{port} -s rr -p 600"));
            lines.push(format!("-a -t {address}:{port} -r {endpoint}:{target} -m -w 1"));
        }
    }
    lines
}

/// All recorded objects.
pub(crate) fn load_recorded(api: &ApiServer) {
    api.store().apply(body(NODE)).expect("the Node");
    for list in [body(SERVICES), body(SLICES)] {
        let kind = list["kind"].as_str().expect("a kind").trim_end_matches("List").to_owned();
        let version = list["apiVersion"].clone();
        for item in list["items"].as_array().expect("items") {
            let mut object = item.clone();
            object["kind"] = json!(kind);
            object["apiVersion"] = version.clone();
            api.store().apply(object).expect("a recorded object");
        }
    }
}

/// An echo server on every connection, until the process ends.
pub(crate) fn echo(address: SocketAddr) {
    let listener = TcpListener::bind(address).expect("an address for the server");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo_one(stream));
        }
    });
}

fn echo_one(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || stream.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)
}

/// What the clients saw.
#[derive(Default)]
pub(crate) struct Traffic {
    pub stop: AtomicBool,
    pub exchanges: AtomicUsize,
    pub connects: AtomicUsize,
    pub failures: AtomicUsize,
}

impl Traffic {
    fn count(&self, result: &std::io::Result<()>, good: &AtomicUsize) {
        let counter = if result.is_ok() { good } else { &self.failures };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connections that live through everything, and one new connection after the other.
pub(crate) fn traffic(to: SocketAddr, shared: &Arc<Traffic>) -> Vec<JoinHandle<()>> {
    let client = |work: fn(SocketAddr, &Traffic)| {
        let shared = Arc::clone(shared);
        thread::spawn(move || work(to, &shared))
    };
    let long = |to: SocketAddr, shared: &Traffic| {
        let mut stream = TcpStream::connect(to).expect("the first connection");
        while !shared.stop.load(Ordering::Relaxed) {
            let result = exchange(&mut stream);
            shared.count(&result, &shared.exchanges);
            thread::sleep(Duration::from_millis(20));
        }
    };
    let short = |to: SocketAddr, shared: &Traffic| {
        while !shared.stop.load(Ordering::Relaxed) {
            let result = TcpStream::connect_timeout(&to, Duration::from_secs(5))
                .and_then(|mut stream| exchange(&mut stream));
            shared.count(&result, &shared.connects);
            thread::sleep(Duration::from_millis(10));
        }
    };
    vec![client(long), client(long), client(long), client(short)]
}

fn web(endpoints: &[&str]) -> Vec<Value> {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
        .collect();
    vec![
        json!({"kind": "Service", "apiVersion": "v1",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.80", "ports": [{"port": 80, "targetPort": 8080}]}}),
        json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "metadata": {"name": "web-1", "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints}),
    ]
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn kill_9_and_restart_under_traffic_lose_nothing_and_write_nothing() {
    in_namespace(|| {
        node_network();
        for endpoint in ["10.99.0.11", "10.99.0.12"] {
            run("ip", &["addr", "add", &format!("{endpoint}/24"), "dev", "eth0"]);
            echo(SocketAddr::new(endpoint.parse().expect("an address"), 8080));
        }
        let bed = Bed::new(plain());
        bed.api.store().apply(body(NODE)).expect("the Node");
        for object in web(&["10.99.0.11", "10.99.0.12"]) {
            bed.api.store().apply(object).expect("an object");
        }
        let mut daemon = bed.daemon();
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 1.0).expect("programmed");
        let shared = Arc::new(Traffic::default());
        let vip: SocketAddr = "10.96.0.80:80".parse().expect("an address");
        let clients = traffic(vip, &shared);
        let before = run("ipvsadm", &["-Sn"]);
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(1));
            daemon.kill().expect("running until killed");
            thread::sleep(Duration::from_secs(1));
            daemon = bed.daemon();
            daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("synced again");
            let written = daemon.metric("node_dataplane_ops_total").expect("metrics");
            assert_eq!(written.unwrap_or(0.0), 0.0, "writes after a restart\n{}", daemon.log());
            assert_eq!(run("ipvsadm", &["-Sn"]), before);
        }
        shared.stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("a client");
        }
        let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        assert_eq!(read(&shared.failures), 0);
        assert!(read(&shared.exchanges) > 100 && read(&shared.connects) > 20, "traffic did flow");
        println!(
            "2 kills: {} exchanges on 3 connections, {} new connections, 0 failures",
            read(&shared.exchanges),
            read(&shared.connects)
        );
    });
}

/// `/proc/net/ip_vs` leaves out as many virtual servers as other namespaces have.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn virtual_servers_of_other_namespaces_hide_none_of_ours() {
    in_namespace(|| {
        thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("another namespace");
            let servers: String =
                (1..=40).map(|n| format!("-A -t 192.0.2.{n}:80 -s rr\n")).collect();
            run_with(&servers, "ipvsadm", &["-R"]);
            // Held until the test process ends.
            thread::park();
        });
        node_network();
        let bed = Bed::new(plain());
        bed.api.store().apply(body(NODE)).expect("the Node");
        bed.api.store().load_generated(100, 5);
        let mut daemon = bed.daemon();
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 101.0).expect("programmed");
        daemon.kill().expect("running until killed");
        daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("synced again");
        let written = daemon.metric("node_dataplane_ops_total").expect("metrics");
        assert_eq!(written.unwrap_or(0.0), 0.0, "writes after a restart\n{}", daemon.log());
    });
}

/// How many Services of 10 endpoints: `PROXY_SCALE=10000` measures the size that the
/// project promises; the default keeps a test run short under emulation.
fn scale() -> usize {
    std::env::var("PROXY_SCALE").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000)
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn an_endpoint_update_is_a_handful_of_requests_however_many_services_there_are() {
    in_namespace(|| {
        node_network();
        let services = scale();
        let bed = Bed::new(plain());
        bed.api.store().apply(body(NODE)).expect("the Node");
        bed.api.store().load_generated(services, 10);
        for object in web(&["10.99.0.11"]) {
            bed.api.store().apply(object).expect("an object");
        }
        let start = Instant::now();
        let daemon = bed.daemon();
        // default/kubernetes, the generated ones, and ours.
        let all = services as f64 + 2.0;
        let requests = "node_dataplane_netlink_requests_total";
        let dumps = "node_dataplane_netlink_dumps_total";
        let patience = Duration::from_secs(900);
        daemon.wait_for("node_dataplane_frontends", patience, |n| n >= all).expect("all");
        let cold = start.elapsed();
        let read = |name| daemon.metric(name).expect("metrics").unwrap_or(0.0);
        let cold_requests = read(requests);
        println!(
            "{services} Services x 10 endpoints: cold start {:.1} s, {:.1} s CPU, \
             {cold_requests} netlink requests, {} dumps, {} MiB resident",
            cold.as_secs_f64(),
            daemon.cpu().expect("cpu").as_secs_f64(),
            read(dumps),
            daemon.resident().expect("memory") >> 20,
        );
        let mut worst = 0.0f64;
        for round in 0..5u8 {
            let (before, before_dumps) = (read(requests), read(dumps));
            let cpu = daemon.cpu().expect("cpu");
            let extra = format!("10.99.0.{}", 100 + round);
            let start = Instant::now();
            for object in web(&["10.99.0.11", &extra]) {
                bed.api.store().apply(object).expect("an object");
            }
            while !run("ipvsadm", &["-Ln", "-t", "10.96.0.80:80"]).contains(&extra) {
                assert!(start.elapsed() < LONG, "the update never came\n{}", daemon.log());
            }
            let took = start.elapsed();
            thread::sleep(Duration::from_millis(300));
            let sent = read(requests) - before;
            println!(
                "update {round}: {:.0} ms, {sent} netlink requests, {} dumps, {} ms CPU",
                took.as_secs_f64() * 1e3,
                read(dumps) - before_dumps,
                (daemon.cpu().expect("cpu").saturating_sub(cpu)).as_millis(),
            );
            worst = worst.max(sent);
        }
        assert!(worst <= 6.0, "{worst} requests for one endpoint change");
        assert!(bed.path().exists());
    });
}
