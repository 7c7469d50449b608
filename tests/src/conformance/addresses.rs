//! Which address of the client an endpoint sees.

use anyhow::Result;

use super::context::{Context, external_local};
use super::look::from;
use super::service::Front;
use super::{Case, case};
use crate::traffic::Protocol;

pub(super) const CASES: &[Case] = &[
    case("a pod keeps its address to a ClusterIP", pod_to_cluster_ip),
    case("external Local keeps the client's address", external_local_keeps),
    case("external Cluster is re-sourced so that replies return", external_cluster),
    case("ClusterIP from outside the cluster is masqueraded", cluster_ip_from_outside),
    case("masqueradeAll masquerades pods too", masquerade_all),
    case("hairpin: an endpoint reaches itself through its Service", hairpin),
    case("local detection by NodeCIDR", node_cidr),
    case("local detection by BridgeInterface", bridge_interface),
    case("local detection by InterfaceNamePrefix", interface_prefix),
];

fn pod_to_cluster_ip(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let targets = web.at(Front::Cluster);
    cx.look(&[
        from(&["a3", "b3"]).to(&targets).answers(&["a0", "b0"]).seen_as_itself(),
        from(&["node-a", "node-b"]).to(&targets).answers(&["a0", "b0"]).seen_as_node(),
    ])
}

fn external_local_keeps(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(&["a0", "b0"]).spec(&external_local());
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(&["outside", "extra"]).to(&external).answers(&["a0"]).seen_as_itself(),
        from(&["outside"]).to(&cx.node_ports_of(&web, 0)).answers(&["a0"]).seen_as_itself(),
        from(&["outside"]).to(&cx.node_ports_of(&web, 1)).answers(&["b0"]).seen_as_itself(),
    ])
}

fn external_cluster(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(&["b0"]);
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(&["outside", "extra"]).to(&external).answers(&["b0"]).seen_as_node_number(0),
        from(&["outside"]).to(&cx.node_ports_of(&web, 0)).answers(&["b0"]).seen_as_node_number(0),
    ])
}

fn cluster_ip_from_outside(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let targets = web.at(Front::Cluster);
    cx.look(&[
        from(&["outside", "extra"]).to(&targets).answers(&["a0", "b0"]).seen_as_node(),
        from(&["a3"]).to(&targets).answers(&["a0", "b0"]).seen_as_itself(),
    ])
}

fn masquerade_all(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.restart(0, &["--masquerade-all"])?;
    let targets = web.at(Front::Cluster);
    cx.look(&[
        from(&["a3", "outside"]).to(&targets).answers(&["a0", "b0"]).seen_as_node(),
        from(&["b3"]).to(&targets).answers(&["a0", "b0"]).seen_as_itself(),
    ])?;
    // And ends with the flag.
    cx.restart(0, &[])?;
    cx.look(&[from(&["a3"]).to(&targets).answers(&["a0", "b0"]).seen_as_itself()])
}

fn hairpin(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer];
    let web = cx.service("web", fronts).endpoints(&["a0"]);
    let two = cx.service("two", &[]).endpoints(&["a0", "a1", "b0"]);
    cx.program(&[&web, &two])?;
    // By its own address the pod could not tell the reply from its own packet; a socket that
    // connects to its own pod has no such trouble. The kernel asks nobody where SCTP connects to.
    let (sockets, packets): (Vec<_>, Vec<_>) =
        web.everywhere().into_iter().partition(|it| cx.by_sockets() && it.0 != Protocol::Sctp);
    let mut looks =
        vec![from(&["a0", "b0"]).to(&two.at(Front::Cluster)).answers(&["a0", "a1", "b0"])];
    if !sockets.is_empty() {
        looks.push(from(&["a0"]).to(&sockets).answers(&["a0"]).seen_as_itself());
    }
    if !packets.is_empty() {
        looks.push(from(&["a0"]).to(&packets).answers(&["a0"]).seen_as_node());
    }
    cx.look(&looks)
}

/// With this way of telling pods, the node's pods keep their addresses and the outside
/// does not.
fn tells(cx: &mut Context<'_>, flags: &[&str]) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.restart(0, flags)?;
    let targets = web.at(Front::Cluster);
    cx.look(&[
        from(&["a3"]).to(&targets).answers(&["a0", "b0"]).seen_as_itself(),
        from(&["outside", "extra"]).to(&targets).answers(&["a0", "b0"]).seen_as_node(),
    ])
}

fn node_cidr(cx: &mut Context<'_>) -> Result<()> {
    tells(cx, &["--detect-local-mode=NodeCIDR", "--cluster-cidr="])
}

fn bridge_interface(cx: &mut Context<'_>) -> Result<()> {
    let flags =
        &["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0", "--cluster-cidr="];
    tells(cx, flags)
}

fn interface_prefix(cx: &mut Context<'_>) -> Result<()> {
    let flags = &[
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=cni",
        "--cluster-cidr=",
    ];
    tells(cx, flags)
}
