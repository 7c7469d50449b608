//! Connections: reused source ports, removed endpoints, and how long old connections live.

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::Host;
use proxy_tests::traffic::{ConnectSpec, Held};

use super::stage::{CLUSTER_IPS, PORT, Stage, TARGET, spec, tcp};
use crate::in_namespace;
use crate::node::{
    Bed, LONG, PATIENCE, plain, real_servers, serve, until, web, web_address, weight,
};

fn vip() -> SocketAddr {
    SocketAddr::new(CLUSTER_IPS[0], PORT)
}

/// SYNs that a host had to repeat (`TcpExt: TCPSynRetrans`).
fn repeated_syns(host: &Host) -> u64 {
    // Of the calling thread: /proc/net shows the namespace of the process's first one.
    let text = host.in_netns(|| fs::read_to_string("/proc/thread-self/net/netstat"));
    let text = text.expect("a namespace").expect("its counters");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
    let at = lines[0].split(' ').position(|name| name == "TCPSynRetrans").expect("a counter");
    lines[1].split(' ').nth(at).and_then(|value| value.parse().ok()).expect("a number")
}

/// IPVS drops the SYN of a connection whose port was used before and whose conntrack entry is
/// still there (`ip_vs_in_hook` and `ip_vs_conn_uses_old_conntrack` in
/// net/netfilter/ipvs/ip_vs_core.c: "return NF_DROP" when `conn_reuse_mode` is on), so that
/// the client repeats it after 1 s. kube-proxy switches the mode off before 5.9, and so comes
/// to what the next test is about.
///
/// The promise is 10,000 connects and p99 < 50 ms on hardware; `PROXY_CONNECTS` says how many.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_01_source_port_reuse_does_not_delay_connects() {
    let count = std::env::var("PROXY_CONNECTS").ok().and_then(|n| n.parse().ok());
    let count: usize = count.unwrap_or(2_000);
    let stage = Stage::new(&[]);
    stage.web(&spec("ClusterIP"), &[], &[(1, 0), (1, 1)]);
    let client = stage.pod(0, 0);
    stage.until_served(client, vip());
    let before = repeated_syns(client);
    let source = SocketAddr::new(client.address_like(vip().ip()).expect("an address"), 40_000);
    let spec = ConnectSpec { deadline: Duration::from_secs(600), ..tcp(vip(), count) };
    let report = stage.connect(client, &spec.source(source).timeout(PATIENCE));
    // A packet of the connection before may still be on its way when the port is used again, in
    // a guest that shares its processors: one connection of 2,000 was seen to be reset by it.
    assert!(report.failed() <= count as u64 / 1000, "{report:?}\n{}", stage.bed.log_tails(30));
    println!(
        "{count} connects from one port in {} ms: p50 {} us, p99 {} us, max {} us",
        report.took_ms, report.latency.p50_us, report.latency.p99_us, report.latency.max_us
    );
    // A guest that stands still for a second repeats one or two as well; the trouble would
    // repeat one for each connect.
    let repeated = repeated_syns(client) - before;
    assert!(repeated <= count as u64 / 200, "{repeated} SYNs were lost: {report:?}");
    assert_eq!(report.by_server.len(), 2, "both endpoints take part: {report:?}");
}

/// With `conn_reuse_mode=0`, which kube-proxy sets before 5.9 to avoid the delays above, IPVS
/// takes a SYN from a port used before for a packet of the old connection and sends it to the
/// old endpoint, whatever its weight (`ip_vs_in_hook`: `conn_reuse_mode` guards the check for
/// a new connection), until the entry's 2 minutes in TIME_WAIT are over.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_02_a_removed_pod_gets_no_new_connection_under_port_reuse() {
    let stage = Stage::new(&["--drain-timeout=4s"]);
    stage.web(&spec("ClusterIP"), &[], &[(1, 0), (1, 1)]);
    let client = stage.pod(0, 0);
    stage.until_served(client, vip());
    let address = client.address_like(vip().ip()).expect("an address");
    let removed = stage.pod(1, 0).name();
    let connect_from_each_port = || {
        let mut reached_removed = 0;
        for port in 40_000..40_016 {
            let spec = tcp(vip(), 1).source(SocketAddr::new(address, port));
            let report = stage.must_connect(client, &spec);
            reached_removed += report.by_server.get(removed).copied().unwrap_or(0);
        }
        reached_removed
    };
    assert_eq!(connect_from_each_port(), 8, "round robin over two endpoints");

    stage.endpoints(&[(1, 1)]);
    let at = SocketAddr::new(stage.pod(1, 0).address_like(address).expect("an address"), TARGET);
    let weight = || {
        let servers = stage.cluster().node(0).in_netns(|| real_servers(&vip().to_string()));
        servers.expect("a namespace").get(&at.to_string()).copied()
    };
    until("the removed endpoint has weight 0", LONG, || weight() == Some(0));
    assert_eq!(connect_from_each_port(), 0, "while the removed endpoint drains");
    // Its old connections stand in TIME_WAIT for 2 minutes, so the deadline ends it.
    until("the removed endpoint is gone", LONG, || weight().is_none());
    assert_eq!(connect_from_each_port(), 0, "after the removed endpoint was deleted");
}

/// kube-proxy deletes a real server only when it has no connection left and has no deadline
/// (`pkg/proxy/ipvs/graceful_termination.go`, `deleteRsFunc`): one client that never lets go
/// keeps the entry, and the list it is in, for ever.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_06_draining_ends_at_its_deadline() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        let daemon = bed.daemon_with(&["--drain-timeout=8s"]);
        until("programmed", LONG, || weight(endpoints[0]) == Some(1));
        let mut held = Held::open_to(endpoints[0], web_address(), PATIENCE).expect("a connection");

        bed.apply(web(&endpoints[1..]));
        until("no new connections", LONG, || weight(endpoints[0]) == Some(0));
        let begun = Instant::now();
        assert_eq!(daemon.metric("node_dataplane_draining_backends").expect("metrics"), Some(1.0));
        held.echo().expect("an old connection goes on");
        let mut last_echo = Duration::ZERO;
        until("the entry goes at the deadline", LONG, || {
            if held.echo().is_ok() {
                last_echo = begun.elapsed();
            }
            weight(endpoints[0]).is_none()
        });
        let took = begun.elapsed();
        println!(
            "drain timeout 8 s: the entry went after {took:.1?}, last echo at {last_echo:.1?}"
        );
        assert!(took >= Duration::from_secs(7), "the deadline was not waited for: {took:?}");
        assert!(last_echo >= Duration::from_secs(5), "lost long before: {last_echo:?}");
        until("nothing drains", LONG, || {
            daemon.metric("node_dataplane_draining_backends").expect("metrics") == Some(0.0)
        });
    });
}

/// kube-proxy deleted the real server of a removed endpoint at once before 1.13, and still
/// does for UDP and SCTP; with `expire_nodest_conn=1` IPVS then ends its connections at their
/// next packet (`ip_vs_in_hook`, "the server is not available").
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_07_a_connection_lives_until_its_pod_closes_it() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        // Resyncs, and the polls for idle endpoints (every 5 s), happen while it is held.
        let daemon = bed.daemon_with(&["--ipvs-sync-period=1s"]);
        until("programmed", LONG, || weight(endpoints[0]) == Some(1));
        let mut held = Held::open_to(endpoints[0], web_address(), PATIENCE).expect("a connection");

        bed.apply(web(&endpoints[1..]));
        until("no new connections", LONG, || weight(endpoints[0]).unwrap_or(0) == 0);
        for _ in 0..24 {
            held.echo().unwrap_or_else(|error| panic!("cut: {error:#}\n{}", daemon.log()));
            thread::sleep(Duration::from_millis(500));
        }
        assert_eq!(weight(endpoints[0]), Some(0), "still draining");
        held.close().expect("closed in order by the pod");
    });
}
