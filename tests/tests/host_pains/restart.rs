//! The daemon goes and comes back.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::traffic::{RateSpec, StreamChecker, StreamSpec, UdpRate};

use super::node::{LONG, until};
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

/// How the trouble comes about: `pain_23` of the guests. Programs, maps and links stay when the
/// daemon dies; the next one attaches its own before it removes those.
#[test]
fn pain_23_kills_in_a_loop_cut_nothing() {
    let mut stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    let ways = [
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Pod, SocketAddr::new(CLUSTER_IPS[1], PORT)),
        (Client::Host, SocketAddr::new(CLUSTER_IPS[0], PORT)),
        (Client::Outside, SocketAddr::new(node, NODE_PORT)),
    ];
    let (mut streams, mut rates) = (Vec::new(), Vec::new());
    for (client, target) in ways {
        let from = stage.client(client);
        stage.until_served(from, target);
        let stream = from.in_netns(|| StreamChecker::start(StreamSpec::new(target)));
        streams.push(stream.expect("a namespace").expect("a stream"));
        let rate = from.in_netns(|| UdpRate::start(RateSpec::new(target, 50)));
        rates.push(rate.expect("a namespace").expect("a sender"));
    }
    let mut connections = 0;
    for _ in 0..10 {
        stage.bed.kill_daemon(0).expect("running until killed");
        let mut probe = |stage: &Stage| {
            for (client, target) in ways {
                let report = stage.must_connect(stage.client(client), &tcp(target, 20));
                connections += report.succeeded;
            }
        };
        probe(&stage);
        stage.bed.start_daemon(0, &[]).expect("a daemon");
        let attached = |stage: &Stage| stage.bed.log(0).matches("attached cgroup").count();
        let before = attached(&stage);
        probe(&stage);
        until("the new daemon's programs are attached", LONG, || {
            probe(&stage);
            attached(&stage) >= before
        });
        std::thread::sleep(Duration::from_millis(200));
        probe(&stage);
    }
    for (stream, way) in streams.into_iter().zip(ways) {
        let report = stream.stop().expect("a report");
        assert!(report.failure.is_none() && report.echoed > 50, "{way:?}: {report:?}");
    }
    for (rate, way) in rates.into_iter().zip(ways) {
        let report = rate.stop().expect("a report");
        assert_eq!(report.lost(), 0, "{way:?}: {report:?}");
    }
    println!("10 kills, {connections} new connections, none lost; streams and datagrams went on");
}
