//! Reused source ports, removed endpoints, sticky clients, and how long connections live. Each by
//! a socket that is translated as it connects, and by a device.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::traffic::{ConnectSpec, Held};
use serde_json::json;

use super::node::{LONG, PATIENCE, until};
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

fn vip() -> SocketAddr {
    SocketAddr::new(CLUSTER_IPS[0], PORT)
}

/// From a pod by the ClusterIP, and from outside by a node port.
fn ways(stage: &Stage) -> [(Client, SocketAddr); 2] {
    let node = stage.cluster().node(0).address_like(vip().ip()).expect("an address");
    [(Client::Pod, vip()), (Client::Outside, SocketAddr::new(node, NODE_PORT))]
}

fn served(endpoints: &[(usize, usize)]) -> Stage {
    let stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], endpoints);
    for (client, target) in ways(&stage) {
        stage.until_served(stage.client(client), target);
    }
    stage
}

/// How the trouble comes about: `pain_01` of the guests. A flow of ours that has seen the end of
/// its connection gives way to a SYN.
#[test]
fn pain_01_source_port_reuse_does_not_delay_connects() {
    let stage = served(&[(1, 0), (1, 1)]);
    for ((client, target), count) in ways(&stage).into_iter().zip([10_000, 5_000]) {
        let from = stage.client(client);
        let source = SocketAddr::new(from.address_like(target.ip()).expect("an address"), 40_000);
        let spec = ConnectSpec { deadline: Duration::from_secs(120), ..tcp(target, count) };
        let report = stage.must_connect(from, &spec.source(source));
        println!("{client:?}: {count} connects from one port: {:?}", report.latency);
        assert!(report.latency.p99_us < 50_000, "{client:?}: {report:?}");
    }
}

/// How the trouble comes about: `pain_02` of the guests.
#[test]
fn pain_02_a_removed_pod_gets_no_new_connection_under_port_reuse() {
    let stage = served(&[(1, 0), (1, 1)]);
    let removed = stage.pod(1, 0).name();
    let reached_removed = |client, target: SocketAddr| -> u64 {
        let from = stage.client(client);
        let address = from.address_like(target.ip()).expect("an address");
        let connect = |port| {
            let spec = tcp(target, 1).source(SocketAddr::new(address, port));
            let report = stage.must_connect(from, &spec);
            report.by_server.get(removed).copied().unwrap_or(0)
        };
        (40_000..40_032).map(connect).sum()
    };
    for (client, target) in ways(&stage) {
        assert!(reached_removed(client, target) > 0, "{client:?}");
    }
    stage.endpoints(&[(1, 1)]);
    for (client, target) in ways(&stage) {
        until("no new connection reaches it", Duration::from_secs(2), || {
            reached_removed(client, target) == 0
        });
        for _ in 0..5 {
            assert_eq!(reached_removed(client, target), 0, "{client:?}");
        }
    }
}

/// IPVS keeps a persistence template for as long as the affinity's timeout, also when its
/// endpoint is gone. An entry of ours counts only while the backend is in the set.
#[test]
fn pain_03_a_sticky_client_moves_when_its_endpoint_goes() {
    let stage = Stage::new(&[]);
    let mut sticky = spec("NodePort");
    sticky["sessionAffinity"] = "ClientIP".into();
    sticky["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10_800}});
    let both = [(1, 0), (1, 1)];
    stage.web(&sticky, &[], &both);
    for (client, target) in ways(&stage) {
        let from = stage.client(client);
        stage.endpoints(&both);
        stage.until_served(from, target);
        let of = |report: proxy_tests::traffic::ConnectReport| -> Vec<String> {
            report.by_server.into_keys().collect()
        };
        let before = of(stage.must_connect(from, &tcp(target, 10)));
        assert_eq!(before.len(), 1, "{client:?} is not sticky: {before:?}");
        let stays = both.into_iter().find(|&(n, p)| stage.pod(n, p).name() != before[0]);
        let stays = stays.expect("the other endpoint");
        stage.endpoints(&[stays]);
        let name = stage.pod(stays.0, stays.1).name().to_owned();
        until("the client moves", Duration::from_secs(2), || {
            of(stage.must_connect(from, &tcp(target, 1))) == [name.clone()]
        });
        assert_eq!(of(stage.must_connect(from, &tcp(target, 10))), [name], "{client:?}");
    }
}

/// How the trouble comes about: `pain_07` of the guests. Nothing drains here: a connection is its
/// socket's, or an entry of its own, and neither asks the Service again.
#[test]
fn pain_07_a_connection_lives_until_its_pod_closes_it() {
    let stage = served(&[(1, 0)]);
    let mut held: Vec<Held> = ways(&stage)
        .into_iter()
        .map(|(client, target)| {
            let open = || Held::open(target, PATIENCE);
            stage.client(client).in_netns(open).expect("a namespace").expect("a connection")
        })
        .collect();
    stage.endpoints(&[(1, 1)]);
    let new = stage.pod(1, 1).name();
    for (client, target) in ways(&stage) {
        until("new ones go elsewhere", LONG, || {
            let report = stage.must_connect(stage.client(client), &tcp(target, 4));
            report.by_server.get(new) == Some(&4)
        });
    }
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        for held in &mut held {
            held.echo().expect("the old connection");
        }
        thread::sleep(Duration::from_millis(100));
    }
    held.into_iter().for_each(|held| held.close().expect("closed in order by the pod"));
}
