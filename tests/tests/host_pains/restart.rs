//! The daemon goes and comes back.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use proxy_tests::apiserver::Resource;
use proxy_tests::traffic::{Held, RateSpec, StreamChecker, StreamSpec, UdpRate};

use super::node::{LONG, PATIENCE, until};
use super::overflow::metric;
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

/// The first pod's sockets are left alone: its packets are translated at a device.
const BY_DEVICE: &str = "--socket-opt-out=pod-2";
const KILLS: usize = 30;
/// A second from each sender, to meet the moment in which one daemon's programs take the place of
/// another's. More would overflow the servers' sockets whenever the machine has no time for them.
const DATAGRAMS: u32 = 40;

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
    let attached = |stage: &Stage| stage.bed.log(0).matches("\"attached\" cgroup").count();
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

/// How the trouble comes about: `pain_05` and `pain_06` of the guests. Nothing is drained here: an
/// endpoint that goes leaves the maps at once, whatever its clients hold, and a crash in between
/// leaves nothing half done.
#[test]
fn pain_05_06_an_endpoint_that_is_ready_again_after_a_crash_is_used_and_nothing_drains() {
    let mut stage = Stage::new(&[]);
    let both = [(1, 0), (1, 1)];
    stage.web(&spec("NodePort"), &[], &both);
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    let ways = [
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Outside, SocketAddr::new(node, NODE_PORT)),
    ];
    let removed = stage.pod(1, 0).name().to_owned();
    let mut held = Vec::new();
    for (client, target) in ways {
        let from = stage.client(client);
        stage.until_served(from, target);
        let open = || Held::open_to(&removed, target, PATIENCE);
        held.push(from.in_netns(open).expect("a namespace").expect("a connection"));
    }
    let backends =
        |stage: &Stage| metric(stage, "node_dataplane_table_entries{table=\"BACKENDS\"}");
    let all = backends(&stage);
    stage.endpoints(&both[1..]);
    // One of two, of each family and protocol; the API's own stays.
    until("the endpoint is gone", LONG, || backends(&stage) == all - 4);
    assert_eq!(metric(&stage, "node_dataplane_draining_backends"), 0, "with a client that stays");
    stage.bed.kill_daemon(0).expect("running until killed");
    stage.endpoints(&both);
    stage.bed.start_daemon(0, &[]).expect("a daemon");
    until("the first sync", LONG, || synced(&stage));
    assert_eq!(backends(&stage), all);
    for ((client, target), mut held) in ways.into_iter().zip(held) {
        held.echo().expect("the old connection");
        let report = stage.must_connect(stage.client(client), &tcp(target, 40));
        assert!(report.by_server.contains_key(&removed), "{client:?}: {report:?}");
    }
}

fn synced(stage: &Stage) -> bool {
    let name = "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}";
    super::overflow::metric_so_far(stage, name).is_some_and(|count| count > 0)
}

/// How the trouble comes about: `pain_22` of the guests.
#[test]
fn pain_22_what_was_deleted_while_the_watch_was_down_is_gone_at_the_first_sync() {
    let stage = Stage::new(&["--ipvs-sync-period=1h"]);
    stage.web(&spec("NodePort"), &[], &[(1, 0)]);
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    let ways = [
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Host, SocketAddr::new(CLUSTER_IPS[1], PORT)),
        (Client::Outside, SocketAddr::new(node, NODE_PORT)),
    ];
    for (client, target) in ways {
        stage.until_served(stage.client(client), target);
    }
    let entries =
        |stage: &Stage| metric(stage, "node_dataplane_table_entries{table=\"FRONTENDS\"}");
    let api = stage.bed.api();
    let before = entries(&stage);
    api.faults().set(|faults| faults.refuse = true);
    let open = |resource| api.requests().open_watches(resource);
    until("the watches are cut", LONG, || {
        open(Resource::Service) + open(Resource::EndpointSlice) == 0
    });
    for (resource, name) in [
        (Resource::Service, "web"),
        (Resource::EndpointSlice, "web-ipv4"),
        (Resource::EndpointSlice, "web-ipv6"),
    ] {
        api.store().remove(resource, "shop", name).expect("an object to delete");
    }
    api.store().compact();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(entries(&stage), before, "nothing goes while the API server is away");
    for (client, target) in ways {
        stage.must_connect(stage.client(client), &tcp(target, 5));
    }
    api.faults().clear();
    until("what was deleted is gone", LONG, || entries(&stage) < before);
    for (client, target) in ways {
        until("nobody answers", LONG, || {
            let spec = tcp(target, 1).timeout(Duration::from_millis(300));
            stage.connect(stage.client(client), &spec).failed() == 1
        });
    }
    for kind in ["missing", "unwanted"] {
        let name = format!("node_dataplane_divergent_objects{{state=\"{kind}\"}}");
        assert_eq!(metric(&stage, &name), 0, "{kind}");
    }
}
