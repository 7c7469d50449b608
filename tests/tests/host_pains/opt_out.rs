//! Clients that must not be translated as they connect.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use proxy_tests::cluster::Host;
use proxy_tests::traffic::Held;

use super::node::PATIENCE;
use super::stage::{CLUSTER_IPS, Client, PORT, Stage, spec};

/// How a socket's peer is written in `/proc/net/tcp`: the kernel's own view, which no program
/// changes.
fn hex(address: SocketAddr) -> String {
    let IpAddr::V4(ip) = address.ip() else { panic!("{address} is no IPv4 address") };
    format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port())
}

fn has_peer(host: &Host, peer: SocketAddr) -> bool {
    let table = host.in_netns(|| fs::read_to_string("/proc/thread-self/net/tcp"));
    let table = table.expect("a namespace").expect("its sockets");
    table.lines().any(|line| line.split_whitespace().nth(2) == Some(&hex(peer)))
}

/// A client in the kernel (NFS) or a proxy in the pod (Istio) takes the address that its socket
/// is connected to for the Service's (cilium/cilium #22063, #21541).
#[test]
fn pain_25_a_pod_that_opted_out_is_served_packet_by_packet() {
    let stage = Stage::new(&["--socket-opt-out=none-*,pod-2"]);
    stage.web(&spec("ClusterIP"), &[], &[(1, 0)]);
    let vip = SocketAddr::new(CLUSTER_IPS[0], PORT);
    let held: Vec<(&Host, Held)> = [stage.pod(0, 0), stage.pod(0, 1), stage.client(Client::Host)]
        .into_iter()
        .map(|host| {
            stage.until_served(host, vip);
            let held = host.in_netns(|| Held::open(vip, PATIENCE)).expect("a namespace");
            (host, held.expect("a connection"))
        })
        .collect();
    let opted_out: Vec<bool> = held.iter().map(|(host, _)| has_peer(host, vip)).collect();
    assert_eq!(opted_out, [true, false, false], "whose sockets have the Service's address");
}
