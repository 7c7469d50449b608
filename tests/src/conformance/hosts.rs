//! Endpoints that are processes of a node: the API server, what has the host's network, and
//! what somebody has entered by hand.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::json;

use super::context::Context;
use super::look::from;
use super::service::{Front, Service};
use super::{Case, case};
use crate::ebpf::older_than;
use crate::traffic::{Listen, Protocol, Server};

pub(super) const CASES: &[Case] = &[
    case("a process of the node behind every frontend", named),
    case("the same in a slice that names no node", unnamed),
    case("masqueradeAll: a process of the node is reached from there, too", masquerade_all),
];

const EVERYBODY: &[&str] = &["a3", "b3", "node-a", "node-b", "outside"];
const PORT: u16 = 9_443;

/// At the first node.
fn process(cx: &Context<'_>) -> Result<Server> {
    let addresses = cx.node(0).addresses();
    let listen: Vec<Listen> = [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| {
            let at = |ip: &IpAddr| Listen { protocol, address: SocketAddr::new(*ip, PORT) };
            addresses.iter().map(at).collect::<Vec<_>>()
        })
        .collect();
    cx.node(0).in_netns(|| Server::start("host-a", &listen))?
}

/// A Service that leads there. A node's own SCTP client is asked about by no program where it
/// connects (`docs/ebpf.md`), so it has none.
fn service(cx: &mut Context<'_>, fronts: &[Front], named: bool) -> Result<Service> {
    let mut web = cx.service("web", fronts);
    web.ports.retain(|port| port.protocol != Protocol::Sctp);
    for port in &mut web.ports {
        port.target = PORT;
    }
    cx.apply_object(web.object())?;
    for address in cx.node(0).addresses() {
        let v6 = address.is_ipv6();
        let name = if v6 { "by-hand-v6" } else { "by-hand-v4" };
        let mut slice = web.slice(cx.cluster(), name, v6, &[])?;
        let mut endpoint = json!({"addresses": [address], "conditions": {"ready": true}});
        if named {
            endpoint["nodeName"] = json!(cx.node(0).name());
        }
        slice["endpoints"] = json!([endpoint]);
        cx.apply_object(slice)?;
    }
    cx.settle()?;
    Ok(web)
}

fn everywhere(cx: &mut Context<'_>, is_named: bool) -> Result<()> {
    let _process = process(cx)?;
    let fronts = [Front::External, Front::Balancer, Front::NodePort];
    let web = service(cx, &fronts, is_named)?;
    let node_ports = [cx.node_ports_of(&web, 0), cx.node_ports_of(&web, 1)].concat();
    let all = [web.everywhere(), node_ports].concat();
    cx.look(&[from(EVERYBODY).to(&all).answers(&["host-a"])])
}

fn named(cx: &mut Context<'_>) -> Result<()> {
    everywhere(cx, true)
}

fn unnamed(cx: &mut Context<'_>) -> Result<()> {
    everywhere(cx, false)
}

/// So is the API server, by everything that runs on its node. Where the kernel cannot tell the node's
/// own sockets (before 5.14), ebpf mode leaves them to devices, which nothing passes that stays on
/// the node.
fn masquerade_all(cx: &mut Context<'_>) -> Result<()> {
    let _process = process(cx)?;
    let web = service(cx, &[], false)?;
    cx.restart(0, &["--masquerade-all"])?;
    let targets = web.at(Front::Cluster);
    let told_apart = cx.bed.mode() != "ebpf" || !older_than(5, 14)?;
    let clients: &[&str] =
        if told_apart { &["a3", "node-a", "outside"] } else { &["a3", "outside"] };
    cx.look(&[from(clients).to(&targets).answers(&["host-a"])])
}
