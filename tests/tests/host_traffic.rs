//! The traffic programs over a simulated cluster without any proxy: what they count must
//! be right before anything is judged by it.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is the failed test")]

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::{Cluster, Host};
use proxy_tests::traffic::{
    ConnectReport, ConnectSpec, FailureKind, Listen, Protocol, RateSpec, Server, StreamChecker,
    StreamSpec, UdpRate, connect,
};

fn serve(host: &Host, protocol: Protocol, port: u16) -> Server {
    let addresses = host.addresses();
    let listen: Vec<Listen> = addresses
        .into_iter()
        .map(|ip| Listen { protocol, address: SocketAddr::new(ip, port) })
        .collect();
    host.in_netns(|| Server::start(host.name(), &listen)).expect("enter").expect("serve")
}

fn send(host: &Host, spec: &ConnectSpec) -> ConnectReport {
    host.in_netns(|| connect(spec)).expect("enter").expect("connect")
}

#[test]
fn connections_are_counted_by_server_and_by_source() {
    let cluster = Cluster::builder().nodes(2).pods_per_node(1).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(1, 0));
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let server = serve(target, protocol, 8080);
        for &address in server.addresses() {
            let spec = ConnectSpec::new(protocol, address, 100).concurrency(10);
            let report = send(client, &spec);
            assert_eq!(report.succeeded, 100, "{report:?}");
            assert_eq!(report.by_server.get(target.name()), Some(&100));
            let own: IpAddr = client.address_like(address.ip()).expect("dual-stack");
            assert_eq!(report.by_source.get(&own), Some(&100), "{report:?}");
            assert!(report.latency.p50_us > 0 && report.latency.max_us >= report.latency.p99_us);
        }
        assert_eq!(server.served(), 200);
    }
}

#[test]
fn failures_are_told_apart() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(0, 1));
    let quick = Duration::from_millis(500);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for address in target.addresses() {
            let spec = ConnectSpec::new(protocol, SocketAddr::new(address, 9), 3).timeout(quick);
            let report = send(client, &spec);
            assert_eq!(report.count(FailureKind::Refused), 3, "{protocol} {address} {report:?}");
            assert_eq!(report.failed(), 3);
        }
        // A route to nowhere is what a silent drop looks like.
        client.ip_batch("route replace 192.0.2.0/24 dev eth0\n").expect("route");
        let nowhere: SocketAddr = "192.0.2.1:80".parse().expect("address");
        let report = send(client, &ConnectSpec::new(protocol, nowhere, 2).timeout(quick));
        assert_eq!(report.count(FailureKind::Timeout), 2, "{report:?}");
    }
    let elsewhere: SocketAddr = "10.97.0.1:80".parse().expect("address");
    let report = send(client, &ConnectSpec::new(Protocol::Tcp, elsewhere, 1));
    assert_eq!(report.count(FailureKind::Unreachable), 1, "the fabric says so: {report:?}");
}

#[test]
fn one_source_port_serves_a_thousand_connections_quickly() {
    let cluster =
        Cluster::builder().nodes(1).pods_per_node(2).ipv4_only().build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(0, 1));
    let server = serve(target, Protocol::Tcp, 8080);
    let source = SocketAddr::new(client.addresses()[0], 40_000);
    let spec = ConnectSpec::new(Protocol::Tcp, server.addresses()[0], 1000).source(source);
    let report = send(client, &spec);
    assert_eq!(report.succeeded, 1000, "{report:?}");
    assert!(report.latency.p99_us < 50_000, "{report:?}");
}

#[test]
fn a_stream_lives_until_its_server_goes() {
    let cluster = Cluster::builder().nodes(2).pods_per_node(1).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(1, 0));
    let server = serve(target, Protocol::Tcp, 8080);
    let start = || {
        let spec = StreamSpec {
            interval: Duration::from_millis(5),
            timeout: Duration::from_millis(300),
            ..StreamSpec::new(server.addresses()[0])
        };
        client.in_netns(|| StreamChecker::start(spec)).expect("enter").expect("stream")
    };
    let (kept, closed) = (start(), start());
    thread::sleep(Duration::from_millis(100));
    let report = kept.stop().expect("report");
    assert_eq!(report.failure, None);
    assert!(report.echoed >= 5 && report.echoed == report.sent, "{report:?}");
    assert_eq!(report.server, target.name());

    let silent = start();
    // The pod's link goes: no reset, only silence.
    cluster
        .node(1)
        .ip_batch(&format!("link set {} down\n", cluster.pod(1, 0).node_interface()))
        .expect("down");
    thread::sleep(Duration::from_millis(500));
    let report = silent.stop().expect("report");
    assert_eq!(report.failure.expect("lost").kind, FailureKind::Timeout);
    drop(closed);
    drop(server);
}

#[test]
fn a_closed_stream_and_an_absent_server_are_reported() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(0, 1));
    let server = serve(target, Protocol::Tcp, 8080);
    let spec = StreamSpec::new(server.addresses()[0]);
    let begin = || client.in_netns(|| StreamChecker::start(spec.clone())).expect("enter");
    let checker = begin().expect("stream");
    drop(server);
    thread::sleep(Duration::from_millis(200));
    let report = checker.stop().expect("report");
    let kind = report.failure.expect("lost").kind;
    assert!(matches!(kind, FailureKind::Closed | FailureKind::Reset), "{kind:?}");
    assert!(begin().is_err(), "nobody listens any more");
}

#[test]
fn datagram_loss_is_dated_and_changes_of_server_are_seen() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(0, 1));
    let server = serve(target, Protocol::Udp, 53);
    let address = server.addresses()[0];
    let spec = RateSpec::new(address, 100);
    let sender = client.in_netns(|| UdpRate::start(spec)).expect("enter").expect("send");
    let began = Instant::now();
    thread::sleep(Duration::from_millis(300));
    drop(server);
    let gone = began.elapsed().as_millis();
    thread::sleep(Duration::from_millis(300));
    let listen = [Listen { protocol: Protocol::Udp, address }];
    let second =
        target.in_netns(|| Server::start("second", &listen)).expect("enter").expect("serve");
    thread::sleep(Duration::from_millis(300));
    let report = sender.stop().expect("report");
    assert!(report.lost() >= 10 && report.answered >= 20, "{report:?}");
    assert!(report.errors > 0, "port unreachable is heard: {report:?}");
    let first_lost = u128::from(report.first_lost_ms.expect("loss"));
    assert!(first_lost + 100 >= gone && first_lost <= gone + 200, "{gone}: {report:?}");
    let servers: Vec<&str> = report.changes.iter().map(|change| change.server.as_str()).collect();
    assert_eq!(servers, [target.name(), "second"]);
    drop(second);
}

#[test]
fn the_program_serves_and_reports_in_its_pods_cgroup() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).build().expect("cluster");
    let (client, target) = (cluster.pod(0, 0), cluster.pod(0, 1));
    let program = env!("CARGO_BIN_EXE_traffic");
    let quiet = std::process::Stdio::null;
    let serving = target.command(program).args(["serve", "--name", "x", "--listen", "tcp:[::]:80"]);
    let serving = serving.stdout(quiet()).stderr(quiet()).spawn().expect("serve");
    let to = format!("tcp:[{}]:80", target.ipv6().expect("dual-stack"));
    let ask = || client.command(program).args(["connect", "--count", "5", &to]).output();
    let deadline = Instant::now() + Duration::from_secs(5);
    let output = loop {
        let output = ask().expect("connect");
        if output.status.success() || Instant::now() > deadline {
            break output;
        }
    };
    let report: ConnectReport = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report.by_server.get("x"), Some(&5), "{report:?}");
    drop(serving);
    let output = ask().expect("connect");
    assert_eq!(output.status.code(), Some(1));
    let report: ConnectReport = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report.count(FailureKind::Refused), 5);
}
