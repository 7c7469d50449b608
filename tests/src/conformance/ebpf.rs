//! What only ebpf mode has.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::clients::Client;
use super::context::Context;
use super::ipvs::process_on_all_addresses;
use super::look::{eventually, from, who};
use super::service::{Front, Target};
use super::{Case, case};
use crate::ebpf::older_than;
use crate::traffic::{ConnectSpec, Listen, Protocol, Server, connect};

pub(super) const CASES: &[Case] = &[
    case("weights by annotation, changed live", weights),
    case("a VIP's unused port never reaches a process of the node", process_on_all_addresses),
    case("an external address that is another node's: its other ports are that node's", anothers),
    case("a UDP socket that is connected sends by address, too", send_to_connected),
    case("new connections are spread evenly", even_spread),
    case("a port used for a node port is free for the ClusterIP afterwards", same_port_again),
    case("a node port on 127.0.0.1 is the node's own, of sockets in its namespace", localhost),
    case("--cleanup removes all that is ours", cleanup),
];

/// For one connection; datagrams are not sent again.
const ANSWER: Duration = Duration::from_secs(3);

const WEIGHTS: &str = "node-dataplane/weights";

/// Chosen at random or by a hash, so the shares only come near.
fn weights(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    let weighted =
        |weights: &str| web.clone().with(&json!({"metadata": {"annotations": {WEIGHTS: weights}}}));
    for (weights, heavy) in [("zone/z1=3,zone/z2=1", "a0"), ("node/node-b=3,*=1", "b0")] {
        cx.program(&[&weighted(weights)])?;
        for target in web.at(Front::Cluster) {
            let by_server = who(cx.cluster(), "a3", target, 200)?;
            let share = by_server.get(heavy).copied().unwrap_or(0);
            // 150 are expected; 25 are four times the standard deviation.
            ensure!(share.abs_diff(150) <= 25, "{weights}: {target:?}: {by_server:?}");
        }
    }
    Ok(())
}

/// From one client by the same frontend: 400 connections on four endpoints, so 100 on each with
/// a standard deviation of 9.
fn even_spread(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "a1", "b0", "b1"]);
    cx.program(&[&web])?;
    let node_ports = cx.node_ports_of(&web, 0);
    for (client, targets) in [("a3", web.at(Front::Cluster)), ("outside", node_ports)] {
        for target in targets {
            let by_server: BTreeMap<String, u64> = who(cx.cluster(), client, target, 400)?;
            ensure!(by_server.len() == 4, "{target:?}: {by_server:?}");
            for share in by_server.values() {
                ensure!(share.abs_diff(100) <= 45, "{target:?}: {by_server:?}");
            }
        }
    }
    Ok(())
}

/// `--iptables-localhost-nodeports`, which is on unless told otherwise: IPv4, as kube-proxy. Where
/// the kernel cannot tell whose 127.0.0.1 a socket means (before 5.14), nobody's.
fn localhost(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["b0"]);
    cx.program(&[&web])?;
    let at = |ip: IpAddr| web.node_ports(vec![ip]);
    let told_apart = !older_than(5, 14)?;
    for from in ["node-a", "a3"] {
        let client = Client::named(cx.cluster(), from)?;
        // The last one the kernel takes for the first.
        let local = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::UNSPECIFIED];
        for (protocol, target) in local.into_iter().flat_map(|ip| at(ip.into())) {
            let spec = ConnectSpec::new(protocol, target, 3).timeout(ANSWER);
            let report = client.host.in_netns(|| connect(&spec))??;
            let expected = if from == "node-a" && cx.has_v4() && told_apart { 3 } else { 0 };
            ensure!(report.succeeded == expected, "{from} to {target}: {:?}", report.examples);
        }
    }
    Ok(())
}

/// The other node translates the first; the socket of the second is translated here, or its
/// packets are, and the other node must let the endpoint's answers pass as they are.
fn same_port_again(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["b0"]);
    cx.program(&[&web])?;
    let client = Client::named(cx.cluster(), "a3")?;
    let from_port = |port, (protocol, target): Target| {
        let source = SocketAddr::new(client.address(target.ip())?, port);
        let spec = ConnectSpec::new(protocol, target, 1).source(source).timeout(ANSWER);
        let report = client.host.in_netns(|| connect(&spec))??;
        ensure!(report.failed() == 0, "{protocol} {target}: {:?}", report.examples);
        anyhow::Ok(())
    };
    let by_node_port = cx.node_ports_of(&web, 1);
    let by_cluster_ip = web.at(Front::Cluster);
    ensure!(by_node_port.len() == by_cluster_ip.len(), "{by_node_port:?}, {by_cluster_ip:?}");
    for (port, target) in (42_000..).zip(by_node_port) {
        from_port(port, target)?;
    }
    for (port, target) in (42_000..).zip(by_cluster_ip) {
        from_port(port, target)?;
    }
    Ok(())
}

/// What kube-proxy leaves alone: a load balancer of nodes (as of k3s) has the addresses of all.
fn anothers(cx: &mut Context<'_>) -> Result<()> {
    const PORT: u16 = 2_222;
    let theirs = cx.node(1).addresses();
    let targets: Vec<Target> = theirs
        .iter()
        .flat_map(|ip| [Protocol::Tcp, Protocol::Udp].map(|p| (p, SocketAddr::new(*ip, PORT))))
        .collect();
    let listen: Vec<Listen> = targets
        .iter()
        .map(|(protocol, address)| Listen { protocol: *protocol, address: *address })
        .collect();
    let _process = cx.node(1).in_netns(|| Server::start("sshd", &listen))??;
    let mut web = cx.service("web", &[Front::External]).endpoints(&["a0", "b0"]);
    web.ports.retain(|port| port.protocol != Protocol::Sctp);
    web.external_ips = theirs;
    cx.program(&[&web])?;
    let clients = ["a3", "node-a", "b3", "node-b", "outside"];
    cx.look(&[
        from(&clients).to(&web.at(Front::External)).answers(&["a0", "b0"]),
        from(&clients).to(&targets).answers(&["sshd"]),
    ])
}

/// The kernel takes answers of the address that it was connected to and of no other.
fn send_to_connected(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "a1", "b0", "b1"]);
    cx.program(&[&web])?;
    let client = Client::named(cx.cluster(), "a3")?;
    for (_, target) in web.at(Front::Cluster).into_iter().filter(|it| it.0 == Protocol::Udp) {
        for _ in 0..20 {
            client.host.in_netns(|| -> Result<()> {
                let own = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(own)?;
                socket.connect(target)?;
                socket.set_read_timeout(Some(ANSWER))?;
                let mut answer = [0; 512];
                for by_address in [false, true] {
                    let request = b"who";
                    if by_address {
                        socket.send_to(request, target)?;
                    } else {
                        socket.send(request)?;
                    }
                    let got = socket.recv(&mut answer);
                    got.with_context(|| format!("{target}, by address: {by_address}"))?;
                }
                Ok(())
            })??;
        }
    }
    Ok(())
}

fn cleanup(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::External]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.look(&[from(&["b3"]).to(&web.everywhere()).answers(&["a0", "b0"])])?;
    let pins = cx.bed.bpf_root(1).join("proxy-daemon");
    ensure!(pins.is_dir(), "{} is not there", pins.display());
    let result = cleaned(cx, &pins);
    cx.restart(1, &[])?;
    result?;
    cx.look(&[from(&["b3"]).to(&web.everywhere()).answers(&["a0", "b0"])])
}

fn cleaned(cx: &mut Context<'_>, pins: &std::path::Path) -> Result<()> {
    cx.bed.start_daemon(1, &["--cleanup".to_owned()])?;
    let status = eventually(Duration::from_secs(15), || {
        cx.bed.daemon_ended(1)?.context("the cleanup goes on")
    });
    cx.bed.forget_daemon(1);
    ensure!(status?.success(), "--cleanup fails\n{}", cx.bed.log_tails(5));
    ensure!(!pins.exists(), "pins are left: {:?}", fs::read_dir(pins)?.collect::<Vec<_>>());
    for device in ["eth0", "cni0"] {
        for direction in ["ingress", "egress"] {
            let filters = cx
                .node(1)
                .command("tc")
                .args(["filter", "show", "dev", device, direction])
                .stdout_of()?;
            ensure!(!filters.contains("tc_"), "left at {device}: {filters}");
        }
    }
    Ok(())
}
