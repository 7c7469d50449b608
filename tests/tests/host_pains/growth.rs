//! Maps that turn out too small.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::traffic::{ConnectSpec, Protocol, RateSpec, StreamChecker, StreamSpec, UdpRate};
use serde_json::json;

use super::node::{LONG, until};
use super::overflow::metric_so_far;
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

/// A Service of which only the entries matter: one frontend, and as many endpoints as are asked
/// for.
fn add(stage: &Stage, number: usize, endpoints: usize) {
    let name = format!("more-{number}");
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "clusterIP": format!("10.96.20.{number}"),
            "clusterIPs": [format!("10.96.20.{number}")], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        },
    });
    let addresses: Vec<_> = (0..endpoints)
        .map(|n| json!({"addresses": [format!("10.200.{}.{}", number, n + 1)]}))
        .collect();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4", "endpoints": addresses,
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
    });
    stage.bed.apply(service).expect("a Service");
    stage.bed.apply(slice).expect("an EndpointSlice");
}

fn growths(stage: &Stage) -> [u64; 3] {
    ["FRONTENDS", "SLOTS", "BACKENDS"].map(|table| {
        let name = format!("node_dataplane_table_growths_total{{table=\"{table}\"}}");
        until("the first round is told", LONG, || metric_so_far(stage, &name).is_some());
        metric_so_far(stage, &name).expect("it was there")
    })
}

/// Who reaches the Service, and where: by sockets of both families, and by a device.
pub fn ways(stage: &Stage) -> [(Client, SocketAddr); 4] {
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    [
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[1], PORT)),
        (Client::Host, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Outside, SocketAddr::new(node, NODE_PORT)),
    ]
}

/// Traffic of every kind that goes on for as long as something is done to the daemon.
pub struct Load {
    ways: [(Client, SocketAddr); 4],
    streams: Vec<StreamChecker>,
    rates: Vec<UdpRate>,
    connections: u64,
}

impl Load {
    pub fn start(stage: &Stage) -> Self {
        let ways = ways(stage);
        let (mut streams, mut rates) = (Vec::new(), Vec::new());
        for (client, target) in ways {
            let from = stage.client(client);
            stage.until_served(from, target);
            let once = ConnectSpec::new(Protocol::Udp, target, 1).timeout(Duration::from_secs(1));
            until("datagrams are answered", LONG, || stage.connect(from, &once).failed() == 0);
            let stream = from.in_netns(|| StreamChecker::start(StreamSpec::new(target)));
            streams.push(stream.expect("a namespace").expect("a stream"));
            let rate = from.in_netns(|| UdpRate::start(RateSpec::new(target, 50)));
            rates.push(rate.expect("a namespace").expect("a sender"));
        }
        Self { ways, streams, rates, connections: 0 }
    }

    /// New connections, none of which may fail.
    pub fn probe(&mut self, stage: &Stage, count: usize) {
        for (client, target) in self.ways {
            let report = stage.must_connect(stage.client(client), &tcp(target, count));
            self.connections += report.succeeded;
        }
    }

    pub fn end(self) -> u64 {
        for (stream, way) in self.streams.into_iter().zip(self.ways) {
            let report = stream.stop().expect("a report");
            assert!(report.failure.is_none() && report.echoed > 20, "{way:?}: {report:?}");
        }
        for (rate, way) in self.rates.into_iter().zip(self.ways) {
            let report = rate.stop().expect("a report");
            assert_eq!(report.lost(), 0, "{way:?}: {report:?}");
        }
        self.connections
    }
}

/// The maps are as small as can be and every Service that comes is too much for one of them.
#[test]
fn maps_grow_under_traffic_and_nothing_is_lost() {
    let sizes = "--ebpf-map-sizes=frontends=2,backends=1,slots=1";
    let mut stage = Stage::new(&[sizes, "--ipvs-sync-period=2s"]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let mut load = Load::start(&stage);
    let at_first = growths(&stage);
    assert!(at_first.iter().all(|times| *times >= 2), "{at_first:?}");
    for number in 1..=24 {
        add(&stage, number, 3 * number);
        load.probe(&stage, 10);
    }
    let backends = "node_dataplane_table_entries{table=\"BACKENDS\"}";
    let all = 3 * 24 * 25 / 2 + 8 + 1;
    until("all endpoints have an entry", LONG, || {
        load.probe(&stage, 10);
        metric_so_far(&stage, backends) == Some(all)
    });
    let then = growths(&stage);
    assert!(then.iter().zip(at_first).all(|(then, before)| *then >= before + 2), "{then:?}");
    let capacity = "node_dataplane_table_capacity{table=\"BACKENDS\"}";
    assert_eq!(metric_so_far(&stage, capacity), Some(1024));
    assert_eq!(metric_so_far(&stage, "node_dataplane_failing_objects"), Some(0));
    // The next daemon has them as large as they are.
    stage.bed.kill_daemon(0).expect("running until killed");
    load.probe(&stage, 10);
    let before = stage.bed.log(0).matches("\"attached\" cgroup").count();
    stage.bed.start_daemon(0, &[]).expect("a daemon");
    until("the next daemon serves", LONG, || {
        load.probe(&stage, 10);
        stage.bed.log(0).matches("\"attached\" cgroup").count() > before
    });
    std::thread::sleep(Duration::from_millis(500));
    load.probe(&stage, 10);
    let connections = load.end();
    println!("grown {then:?} times, {connections} new connections, none lost");
    let log = stage.bed.log(0);
    log.lines().filter(|line| line.contains("\"grown\" map=")).for_each(|line| println!("{line}"));
}

/// Killed at any moment of a growth, the daemon leaves maps that the next one takes over.
#[test]
fn a_kill_in_the_middle_of_a_growth_cuts_nothing() {
    let sizes = "--ebpf-map-sizes=frontends=2,backends=1,slots=1";
    let mut stage = Stage::new(&[sizes]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let mut load = Load::start(&stage);
    let mut interrupted = 0;
    let mut open = 0;
    for number in 1..=10 {
        let begun = |stage: &Stage| stage.bed.log(0).matches("\"growing\" map=").count();
        let before = begun(&stage);
        // More than twice as many as there are so far.
        add(&stage, number, 12 << number.min(4));
        add(&stage, 100 + number, 12 << number.min(4));
        let end = Instant::now() + Duration::from_secs(10);
        while begun(&stage) == before && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(30) * u32::try_from(number).unwrap());
        stage.bed.kill_daemon(0).expect("running until killed");
        let log = stage.bed.log(0);
        let ended = log.matches("\"grown\" map=").count();
        interrupted += usize::from(begun(&stage) - ended > open);
        open = begun(&stage) - ended;
        load.probe(&stage, 10);
        let before = log.matches("\"attached\" cgroup").count();
        stage.bed.start_daemon(0, &[]).expect("a daemon");
        until("the next daemon serves", LONG, || {
            load.probe(&stage, 5);
            stage.bed.log(0).matches("\"attached\" cgroup").count() > before
        });
        load.probe(&stage, 10);
    }
    assert!(interrupted >= 3, "{interrupted} of 10 kills came in a growth");
    until("all is programmed", LONG, || {
        metric_so_far(&stage, "node_dataplane_failing_objects") == Some(0)
    });
    let connections = load.end();
    println!("{interrupted} of 10 kills in a growth, {connections} new connections, none lost");
}
