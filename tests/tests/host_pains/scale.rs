//! What must not grow with the number of Services, or no more than with their endpoints.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proxy_daemon::dataplane::ebpf::Tables;
use proxy_daemon::dataplane::ebpf::pins::Pins;
use proxy_tests::apiserver::Options;
use proxy_tests::cluster::ClusterCgroup;
use proxy_tests::daemon::{Daemon, Page};
use proxy_tests::mounts::{hide_mounts, mount_bpf};
use proxy_tests::node::{
    Bed, FULL_ROUNDS, PATIENCE, from_environment, in_namespace, plain, run, scale, serve, web,
    web_address,
};
use proxy_tests::traffic::{Held, Listen, Protocol, Server};

use super::node::{LONG, until};

const PROGRAMMING: Duration = Duration::from_secs(300);
const REQUESTS: &str = "node_dataplane_netlink_requests_total";

/// A node alone, with what a daemon in ebpf mode needs.
struct Node {
    arguments: Vec<String>,
    bpf: tempfile::TempDir,
}

impl Node {
    fn daemon(&self, bed: &Bed, more: &[&str]) -> Daemon {
        let mut arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        arguments.extend(more);
        bed.daemon_with(&arguments)
    }
}

/// Runs `test` in namespaces of its own, with its sockets in the daemon's cgroup.
fn on_node<T: Send + 'static>(test: impl FnOnce(&Node) -> T + Send + 'static) -> T {
    let cgroup = ClusterCgroup::create(true).expect("a cgroup");
    let members = cgroup.path().to_owned();
    let result = in_namespace(move || {
        hide_mounts().expect("mounts of its own");
        fs::write(members.join("cgroup.threads"), "0").expect("the thread in the cgroup");
        let bpf = tempfile::tempdir().expect("a directory");
        // It goes with the mount namespace.
        mount_bpf(bpf.path()).expect("bpffs");
        let arguments = vec![
            "--proxy-mode=ebpf".to_owned(),
            format!("--bpf-root={}", bpf.path().display()),
            format!("--cgroup-root={}", members.display()),
        ];
        let node = Node { arguments, bpf };
        let result = test(&node);
        nix::mount::umount2(node.bpf.path(), nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
        result
    });
    drop(cgroup);
    result
}

/// `default/kubernetes`, `shop/web` and so many more, all programmed and compared once.
fn programmed(daemon: &Daemon, services: usize) {
    let all = services as f64 + 2.0;
    daemon.wait_for("node_dataplane_frontends", PROGRAMMING, |n| n >= all).expect("all Services");
    daemon.wait_for(FULL_ROUNDS, PROGRAMMING, |n| n > 0.0).expect("compared once");
}

/// Writes and operations of some resyncs in which nothing had changed, and how many they were.
fn resyncs(node: &Node, services: usize) -> (f64, f64, f64) {
    let bed = Bed::new(plain());
    bed.api.store().load_generated(services, 2);
    bed.apply(web(&["10.99.0.11"]));
    let daemon = node.daemon(&bed, &["--ipvs-sync-period=300ms"]);
    programmed(&daemon, services);
    let page = |wanted: f64| {
        // Counted for each of two families.
        daemon.wait_for(FULL_ROUNDS, PROGRAMMING, |n| n / 2.0 >= wanted).expect("a resync");
        let page = Page::fetch().expect("metrics");
        let read = |name| page.sum(name).unwrap_or(0.0);
        (read(FULL_ROUNDS) / 2.0, read(REQUESTS), read("node_dataplane_ops_total"))
    };
    let before = page(2.0);
    let after = page(before.0 + 4.0);
    (after.1 - before.1, after.2 - before.2, after.0 - before.0)
}

/// How the trouble comes about: `pain_10` of the guests. Here a resync reads the maps and writes
/// only where they are not as they should be.
#[test]
fn pain_10_a_resync_of_nothing_writes_nothing_whatever_the_number_of_services() {
    for services in [100, scale(10_000)] {
        let (writes, ops, count) = on_node(move |node| resyncs(node, services));
        println!("{services} Services: {writes} writes, {ops} operations in {count} resyncs");
        assert_eq!((writes, ops), (0.0, 0.0), "{services} Services, {count} resyncs");
    }
}

/// How the trouble comes about: `pain_11` of the guests. Frontends get their ids in the order in
/// which they are written, the lowest first.
#[test]
fn pain_11_the_address_of_the_api_works_first() {
    let services = scale(10_000);
    on_node(move |node| {
        let endpoint = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2)), 16_443);
        let bed = Bed::new(Options { kubernetes_endpoint: Some(endpoint), ..plain() });
        let listen = Listen { protocol: Protocol::Tcp, address: endpoint };
        let _server = Server::start("api", &[listen]).expect("a server");
        // Names of most others sort before `default/kubernetes`.
        bed.api.store().load_generated_in("a-namespace", services, 2);
        bed.apply(web(&["10.99.0.11"]));
        let begun = Instant::now();
        let mut daemon = node.daemon(&bed, &[]);
        let api = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 443);
        let soon = Duration::from_millis(200);
        until("the API's address works", PROGRAMMING, || Held::open(api, soon).is_ok());
        let took = begun.elapsed();
        programmed(&daemon, services);
        println!("the API's address after {took:.1?}, all after {:.1?}", begun.elapsed());
        daemon.kill().expect("running until killed");
        let pins = Pins::open(node.bpf.path()).expect("the pins");
        let frontends = Tables::open(&pins).expect("the maps").frontends().expect("frontends");
        let with_ports = frontends.iter().filter(|(key, _)| key.port().to_host() > 0);
        let (first, _) = with_ports.min_by_key(|(_, value)| value.id.0).expect("frontends");
        let first = SocketAddr::new(first.address().into(), first.port().to_host());
        assert_eq!(first, api, "the first of {} that was written", frontends.len());
    });
}

/// How the trouble comes about: `pain_16` of the guests.
#[test]
fn pain_16_a_change_does_not_wait_for_a_full_resync() {
    let services = scale(10_000);
    on_node(move |node| {
        let bed = Bed::new(plain());
        bed.api.store().load_generated(services, 1);
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints[..1]));
        let daemon = node.daemon(&bed, &[]);
        programmed(&daemon, services);
        let rounds = || daemon.metric("kubeproxy_sync_proxy_rules_duration_seconds_count");
        let rounds = || rounds().expect("metrics").unwrap_or(0.0) / 2.0;
        let before = rounds();
        let stop = AtomicBool::new(false);
        let mut waited = Vec::new();
        thread::scope(|scope| {
            let restless = scope.spawn(|| change_the_node(&stop));
            thread::sleep(Duration::from_secs(1));
            for number in 0..7 {
                let to = endpoints[(number + 1) % 2];
                let first = rounds();
                bed.apply(web(&[to]));
                until("the change during a resync", LONG, || {
                    Held::open(web_address(), PATIENCE).is_ok_and(|held| held.server() == to)
                });
                waited.push(rounds() - first);
            }
            stop.store(true, Ordering::Relaxed);
            restless.join().expect("the thread that changes the Node");
        });
        let done = rounds() - before;
        // At 512 a round. Some rounds pass while the change comes from the API server.
        let all = services as f64 / 512.0;
        println!("{done} rounds; changes waited for {waited:?}, a comparison takes {all:.0}");
        assert!(done > all, "nothing was under way: {done} rounds");
        waited.sort_by(f64::total_cmp);
        assert!(waited[3] < all, "changes wait for {waited:?} rounds, all take {all:.0}");
    });
}

/// An address of the node comes and goes: all Services are compared again each time.
fn change_the_node(stop: &AtomicBool) {
    let begun = Instant::now();
    // Bounded, because a test that fails cannot stop it.
    while begun.elapsed() < PROGRAMMING && !stop.load(Ordering::Relaxed) {
        for what in ["add", "del"] {
            run("ip", &["addr", what, "192.0.2.1/32", "dev", "eth0"]);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// For each Service: its address, its frontend, the range of its slots.
const WRITES_OF_A_SERVICE: f64 = 3.0;

/// A cold start of agents that look at each endpoint together with all others, or write a set anew
/// for each of its members, takes minutes at hundreds of thousands of endpoints, and memory
/// without bound.
#[test]
fn pain_17_a_cold_start_is_one_write_for_each_endpoint_and_bounded_memory() {
    let (services, endpoints) = (scale(1_000), from_environment("PROXY_ENDPOINTS", 50));
    let start = |services: usize| {
        on_node(move |node| {
            let bed = Bed::new(plain());
            bed.api.store().load_generated(services, endpoints);
            bed.apply(web(&["10.99.0.11"]));
            let begun = Instant::now();
            let daemon = node.daemon(&bed, &[]);
            programmed(&daemon, services);
            let writes = daemon.metric(REQUESTS).expect("metrics").expect("a counter");
            let peak = daemon.peak().expect("memory");
            println!(
                "{services} Services with {endpoints} endpoints: {writes} writes, {} MiB, {:.1?}",
                peak >> 20,
                begun.elapsed()
            );
            (writes, peak)
        })
    };
    let (_, little) = start(10);
    let (writes, peak) = start(services);
    // `default/kubernetes` and `shop/web` besides.
    let all = (services * endpoints + 3) as f64;
    let most = all + WRITES_OF_A_SERVICE * (services + 2) as f64;
    assert!(writes <= most, "{writes} writes for {all} endpoints of {services} Services");
    let each = peak.saturating_sub(little) as f64 / all;
    println!("{each:.0} bytes at most for each endpoint");
    assert!(each < 2048.0, "{each} bytes for each endpoint");
}
