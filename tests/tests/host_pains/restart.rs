//! The daemon goes and comes back.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use proxy_tests::traffic::{RateSpec, StreamChecker, StreamSpec, UdpRate};

use super::node::{LONG, until};
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

/// The first pod's sockets are left alone: its packets are translated at a device.
const BY_DEVICE: &str = "--socket-opt-out=pod-2";
const KILLS: usize = 30;
/// Of each sender, to meet the moment in which one daemon's programs take the place of another's.
const DATAGRAMS: u32 = 200;

/// How the trouble comes about: `pain_23` of the guests. Programs, maps and links stay when the
/// daemon dies; the programs of the next one take their place.
///
/// Datagrams are counted one by one: where both daemons' programs are at a device for a moment, the
/// second takes what the first has translated for a client that speaks to the backend itself, ends
/// the flow, and the answer is nobody's.
#[test]
fn pain_23_kills_in_a_loop_cut_nothing() {
    let mut stage = Stage::new(&[BY_DEVICE]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    let vips = CLUSTER_IPS.map(|ip| SocketAddr::new(ip, PORT));
    let pods = [stage.pod(0, 0), stage.pod(0, 1)];
    let (by_device, by_socket) = (pods[0], pods[1]);
    let host = stage.client(Client::Host);
    let outside = stage.client(Client::Outside);
    let node_port = SocketAddr::new(node, NODE_PORT);
    let ways = [
        (by_device, vips[0]),
        (by_device, vips[1]),
        (by_socket, vips[0]),
        (by_socket, vips[1]),
        (host, vips[0]),
        (outside, vips[0]),
        (outside, node_port),
    ];
    let (mut streams, mut rates) = (Vec::new(), Vec::new());
    for (from, target) in ways {
        stage.until_served(from, target);
        let stream = from.in_netns(|| StreamChecker::start(StreamSpec::new(target)));
        streams.push(stream.expect("a namespace").expect("a stream"));
        let rate = RateSpec::new(target, DATAGRAMS);
        // Several of each, so that both endpoints are used.
        for spec in [rate.clone(), rate.clone(), rate.clone().unconnected(), rate.unconnected()] {
            let rate = from.in_netns(|| UdpRate::start(spec)).expect("a namespace");
            rates.push((from.name().to_owned(), target, rate.expect("a sender")));
        }
    }
    let names = ways.map(|(from, target)| format!("{} to {target}", from.name()));
    let mut connections = 0;
    let attached = |stage: &Stage| stage.bed.log(0).matches("attached cgroup").count();
    for _ in 0..KILLS {
        let before = attached(&stage);
        stage.bed.kill_daemon(0).expect("running until killed");
        connections += probe(&stage, node_port);
        stage.bed.start_daemon(0, &[]).expect("a daemon");
        until("the new daemon's programs are attached", LONG, || {
            connections += probe(&stage, node_port);
            attached(&stage) > before
        });
        thread::sleep(Duration::from_millis(100));
        connections += probe(&stage, node_port);
    }
    for (stream, way) in streams.into_iter().zip(names) {
        let report = stream.stop().expect("a report");
        assert!(report.failure.is_none() && report.echoed > 50, "{way}: {report:?}");
    }
    let mut lost = Vec::new();
    let mut sent = 0;
    for (from, target, rate) in rates {
        let report = rate.stop().expect("a report");
        sent += report.sent;
        if report.lost() + report.errors > 0 {
            lost.push(format!("{from} to {target}: {report:?}"));
        }
    }
    assert!(lost.is_empty(), "of {sent} datagrams:\n{}", lost.join("\n"));
    println!("{KILLS} kills, {connections} new connections and {sent} datagrams, none lost");
}

fn probe(stage: &Stage, node_port: SocketAddr) -> u64 {
    let vip = SocketAddr::new(CLUSTER_IPS[0], PORT);
    [(Client::Pod, vip), (Client::Host, vip), (Client::Outside, node_port)]
        .into_iter()
        .map(|(client, target)| {
            stage.must_connect(stage.client(client), &tcp(target, 10)).succeeded
        })
        .sum()
}
