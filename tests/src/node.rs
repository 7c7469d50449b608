//! One node alone in a network namespace: its links, an API server beside it, the daemon,
//! servers on addresses of its own, and clients that count.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "what tests stand on: whatever fails shall end the test"
)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::apiserver::{ApiServer, Options};
use crate::binary::binary;
use crate::daemon::Daemon;
use crate::traffic::{Held, Listen, Protocol, Server};
use crate::witness::Witness;
use serde_json::{Value, json};

/// Objects as a real API server had them.
const NODE: &str = include_str!("../fixtures/get-node.http");
const SERVICES: &str = include_str!("../fixtures/list-services.http");
const SLICES: &str = include_str!("../fixtures/list-endpointslices.http");

pub const SYNCED: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
/// Rounds that compared everything with the kernel, for each address family.
pub const FULL_ROUNDS: &str = "kubeproxy_sync_full_proxy_rules_duration_seconds_count";
pub const LONG: Duration = Duration::from_secs(60);
/// For one exchange: much longer than the emulated guest needs.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The body of a recorded answer.
fn body(recorded: &str) -> Value {
    let start = recorded.find("\n{").expect("a JSON body");
    serde_json::from_str(recorded[start..].trim()).expect("JSON")
}

/// Gives the API server all recorded objects.
pub fn load_recorded(api: &ApiServer) {
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

/// Waits until `holds`.
pub fn until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + timeout;
    while !holds() {
        assert!(Instant::now() < end, "not within {timeout:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// An API server that has the Node, and a directory with its kubeconfig and the logs.
#[derive(Debug)]
pub struct Bed {
    pub api: ApiServer,
    directory: tempfile::TempDir,
}

impl Bed {
    /// Lays the node's links, too.
    pub fn new(options: Options) -> Self {
        node_network();
        let api = ApiServer::start(options).expect("the test API server");
        let directory = tempfile::tempdir().expect("a directory");
        api.write_kubeconfig(&directory.path().join("kubeconfig"), None).expect("a kubeconfig");
        let bed = Self { api, directory };
        bed.apply([body(NODE)]);
        bed
    }

    /// A file of the directory, in which `kubeconfig` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn apply(&self, objects: impl IntoIterator<Item = Value>) {
        for object in objects {
            self.api.store().apply(object).expect("an object the API server takes");
        }
    }

    pub fn daemon(&self) -> Daemon {
        self.daemon_with(&[])
    }

    /// The daemon with these arguments besides the usual ones.
    pub fn daemon_with(&self, extra: &[&str]) -> Daemon {
        let kubeconfig = self.directory.path().join("kubeconfig");
        let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
        let mut arguments = vec![
            "--hostname-override=node-a",
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
            &kubeconfig,
            "-v=4",
        ];
        arguments.extend(extra);
        Daemon::start(&binary("proxy-daemon"), self.directory.path(), &arguments)
            .expect("the daemon")
    }
}

/// Its address, and a route for everything else, as nodes have.
pub fn node_network() {
    let dummy = Command::new("ip").args(["link", "add", "eth0", "type", "dummy"]).output();
    if !dummy.is_ok_and(|output| output.status.success()) {
        // A kernel without dummies: a pair whose other end answers nothing.
        run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
        run("ip", &["link", "set", "eth1", "up"]);
    }
    run("ip", &["addr", "add", "10.99.0.2/24", "dev", "eth0"]);
    run("ip", &["addr", "add", "fd00:99::2/64", "dev", "eth0", "nodad"]);
    run("ip", &["link", "set", "eth0", "up"]);
    run("ip", &["route", "add", "default", "dev", "eth0"]);
}

/// Options as fast to serve as they come: the emulated guest is slow.
pub fn plain() -> Options {
    Options { tls: false, managed_fields: false, ..Options::default() }
}

/// The ClusterIP and port of [`web`], and the port its endpoints listen on.
pub const WEB: &str = "10.96.0.80:80";
const WEB_TARGET: u16 = 8080;

pub fn web_address() -> SocketAddr {
    WEB.parse().expect("an address")
}

/// The Service `shop/web` with these endpoints.
pub fn web(endpoints: &[&str]) -> Vec<Value> {
    vec![
        json!({"kind": "Service", "apiVersion": "v1",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.80", "ports": [{"port": 80, "targetPort": WEB_TARGET}]}}),
        slice("web", endpoints),
    ]
}

/// An EndpointSlice of a Service in `shop`.
pub fn slice(service: &str, endpoints: &[&str]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
        .collect();
    json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"port": WEB_TARGET, "protocol": "TCP"}],
        "endpoints": endpoints})
}

/// A server for [`web`] on a new address of the node, called by that address.
pub fn serve(endpoint: &str) -> Server {
    run("ip", &["addr", "add", &format!("{endpoint}/24"), "dev", "eth0"]);
    let address = SocketAddr::new(endpoint.parse().expect("an address"), WEB_TARGET);
    Server::start(endpoint, &[Listen { protocol: Protocol::Tcp, address }]).expect("a server")
}

/// Endpoint and weight of the real servers behind a TCP virtual server; none when there is no
/// such virtual server.
pub fn real_servers(frontend: &str) -> BTreeMap<String, u32> {
    let output = Command::new("ipvsadm")
        .args(["-Ln", "-t", frontend])
        .stdin(Stdio::null())
        .output()
        .expect("ipvsadm");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `  -> 10.99.0.11:8080   Masq    1   0   0`, below a heading of the same form.
    text.lines()
        .filter_map(|line| {
            let mut words = line.trim().strip_prefix("->")?.split_whitespace();
            let (at, weight) = (words.next()?, words.nth(1)?.parse().ok()?);
            Some((at.to_owned(), weight))
        })
        .collect()
}

/// The weight of an endpoint of [`web`].
pub fn weight(endpoint: &str) -> Option<u32> {
    real_servers(WEB).get(&format!("{endpoint}:{WEB_TARGET}")).copied()
}

/// Every virtual and real server, as commands that would make them.
pub fn table() -> Vec<String> {
    // Not from /proc/net/ip_vs, which leaves out as many as other namespaces have.
    let mut lines: Vec<String> = run("ipvsadm", &["-Sn"]).lines().map(ToOwned::to_owned).collect();
    lines.sort_unstable();
    lines
}

/// Virtual servers there are.
pub fn virtual_servers() -> usize {
    table().iter().filter(|line| line.starts_with("-A")).count()
}

/// What clients see while something happens.
#[derive(Debug, Default)]
pub struct Traffic {
    pause: Duration,
    witness: Option<Witness>,
    stop: AtomicBool,
    exchanges: AtomicUsize,
    connects: AtomicUsize,
    failures: AtomicUsize,
}

impl Traffic {
    fn count(&self, result: &anyhow::Result<()>, good: &AtomicUsize) {
        if let Err(error) = result {
            println!("traffic: {error:#}");
        }
        let counter = if result.is_ok() { good } else { &self.failures };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Clients at work until they are asked what they saw.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Traffic>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Three connections that live through everything, and one new connection after the
    /// other, from the calling thread's network namespace.
    pub fn start(to: SocketAddr) -> Self {
        Self::with_pause(to, Duration::from_millis(10))
    }

    /// The same with a pause of this length between two connections, and twice that between
    /// exchanges: many clients leave an emulated guest no time for anything else.
    pub fn with_pause(to: SocketAddr, pause: Duration) -> Self {
        Self::of(to, Traffic { pause, ..Traffic::default() })
    }

    /// As [`Self::start`]; `witness` is asked about a new connection that is not answered.
    pub fn watched(to: SocketAddr, witness: Witness) -> Self {
        let pause = Duration::from_millis(10);
        Self::of(to, Traffic { pause, witness: Some(witness), ..Traffic::default() })
    }

    fn of(to: SocketAddr, traffic: Traffic) -> Self {
        let shared = Arc::new(traffic);
        let client = |work: fn(SocketAddr, &Traffic)| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || work(to, &shared))
        };
        let threads = vec![client(hold), client(hold), client(hold), client(reconnect)];
        Self { shared, threads }
    }

    /// Exchanges so far on the connections that live through everything.
    pub fn exchanges(&self) -> usize {
        self.shared.exchanges.load(Ordering::Relaxed)
    }

    /// Ends them: none may have failed, and traffic must have flowed.
    pub fn stop(self) -> String {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client");
        }
        let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let (exchanges, connects) = (read(&self.shared.exchanges), read(&self.shared.connects));
        assert_eq!(read(&self.shared.failures), 0, "of {exchanges} exchanges, {connects} connects");
        assert!(exchanges > 100 && connects > 20, "{exchanges} exchanges, {connects} connects");
        format!("{exchanges} exchanges on 3 connections, {connects} new connections, 0 failures")
    }
}

fn hold(to: SocketAddr, shared: &Traffic) {
    let mut held = Held::open(to, PATIENCE).expect("the first connection");
    while !shared.stop.load(Ordering::Relaxed) {
        let result = held.echo();
        shared.count(&result, &shared.exchanges);
        if result.is_err() {
            return;
        }
        thread::sleep(shared.pause * 2);
    }
}

fn reconnect(to: SocketAddr, shared: &Traffic) {
    while !shared.stop.load(Ordering::Relaxed) {
        let mut look = None;
        let slow = |own| look = shared.witness.as_ref().map(|witness| witness.look(own));
        let result = Held::open_watched(to, PATIENCE, slow).and_then(|mut held| held.echo());
        shared.count(&result, &shared.connects);
        if let Some(seen) = look.and_then(|look| look.join().ok()) {
            println!("traffic: {seen}");
        }
        thread::sleep(shared.pause);
    }
}

/// How many Services tests of size make: `PROXY_SCALE=10000` measures what the project
/// promises; the default keeps a test run short under emulation.
pub fn scale(default: usize) -> usize {
    from_environment("PROXY_SCALE", default)
}

pub fn from_environment(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Runs `test` in a network namespace of its own, which goes with its thread, so that
/// tests run side by side and nothing is left behind.
pub fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        // IPVS takes no destination in a namespace without a local routing table
        // (`inet_addr_type` in `ip_vs_new_dest`): the loopback address makes one.
        run("ip", &["link", "set", "lo", "up"]);
        test()
    })
    .join()
    .expect("the test in its namespace")
}

/// Output of a command that must succeed, given `input`.
pub fn run_with(input: &str, program: &str, arguments: &[&str]) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("its input");
    let output = child.wait_with_output().expect("its output");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// The same without input.
pub fn run(program: &str, arguments: &[&str]) -> String {
    run_with("", program, arguments)
}
