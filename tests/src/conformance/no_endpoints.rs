//! What a client meets where there is nobody to reach.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::json;

use super::context::{Context, external_local, internal_local};
use super::look::{from, refusable};
use super::service::{Front, Target};
use super::{Case, case};
use crate::traffic::Protocol;

pub(super) const CASES: &[Case] = &[
    case("no endpoint anywhere is refused at once", refused),
    case("endpoints that serve no more are none", unready),
    case(
        "external Local with endpoints only elsewhere is dropped, from outside",
        external_elsewhere,
    ),
    case("internal Local with endpoints only elsewhere is dropped", internal_elsewhere),
    case("Local without any endpoint is refused", local_nowhere),
    case("an unused port of a Service address is refused", unused_port),
    case("a free address of the Service range is dropped", free_address),
];

const FRONTS: &[Front] = &[Front::External, Front::Balancer, Front::NodePort];
const INSIDE: &[&str] = &["a3", "node-a", "b3"];
const EVERYBODY: &[&str] = &["a3", "node-a", "b3", "outside"];

fn refused(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", FRONTS);
    cx.program(&[&web])?;
    let mut targets = refusable(&web.everywhere());
    targets.extend(refusable(&cx.node_ports_of(&web, 0)));
    cx.look(&[from(EVERYBODY).to(&targets).refused()])?;
    // Affinity is over all of a Service's addresses, of which each refuses in its own name.
    let sticky = web.clone().spec(&json!({"sessionAffinity": "ClientIP"}));
    for policy in [json!({}), external_local()] {
        cx.program(&[&sticky.clone().spec(&policy)])?;
        cx.look(&[from(EVERYBODY).to(&targets).refused()])?;
    }
    let served = web.endpoints(&["b0"]);
    cx.program(&[&served])?;
    cx.look(&[from(EVERYBODY).to(&targets).answers(&["b0"])])
}

fn unready(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", FRONTS).endpoints(&["a0 unready", "b0 ending"]);
    cx.program(&[&web])?;
    cx.look(&[from(EVERYBODY).to(&refusable(&web.everywhere())).refused()])
}

fn external_elsewhere(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", FRONTS).endpoints(&["b0"]).spec(&external_local());
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(&["outside"]).to(&external).dropped(),
        from(&["outside"]).to(&cx.node_ports_of(&web, 0)).dropped(),
        from(&["outside"]).to(&cx.node_ports_of(&web, 1)).answers(&["b0"]),
        from(&["a3", "outside"]).to(&web.at(Front::Cluster)).answers(&["b0"]),
    ])
}

fn internal_elsewhere(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["b0"]).spec(&internal_local());
    cx.program(&[&web])?;
    cx.look(&[
        from(&["a3", "node-a", "outside"]).to(&web.at(Front::Cluster)).dropped(),
        from(&["b3", "node-b"]).to(&web.at(Front::Cluster)).answers(&["b0"]),
    ])?;
    // One that appears here ends the silence.
    let here = web.clone().endpoints(&["a0", "b0"]);
    cx.program(&[&here])?;
    cx.look(&[from(&["a3", "node-a"]).to(&web.at(Front::Cluster)).answers(&["a0"])])
}

fn local_nowhere(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]);
    let web = web.spec(&external_local()).spec(&internal_local());
    cx.program(&[&web])?;
    cx.look(&[from(EVERYBODY).to(&refusable(&web.everywhere())).refused()])
}

fn unused_port(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", FRONTS).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let addresses = [&web.cluster_ips, &web.external_ips, &web.balancer_ips].into_iter().flatten();
    let unused: Vec<Target> = addresses
        .flat_map(|&ip| {
            [(Protocol::Tcp, 81), (Protocol::Udp, 81)].map(|(p, n)| (p, SocketAddr::new(ip, n)))
        })
        .collect();
    cx.look(&[
        from(EVERYBODY).to(&unused).refused(),
        from(INSIDE).to(&web.at(Front::Cluster)).answers(&["a0", "b0"]),
    ])?;
    // A port of one protocol is no port of the other.
    let tcp_only = web.clone().spec(&json!({"ports": [
        {"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"}
    ]}));
    cx.program(&[&tcp_only])?;
    let udp: Vec<Target> =
        web.at(Front::Cluster).into_iter().filter(|target| target.0 == Protocol::Udp).collect();
    cx.look(&[from(EVERYBODY).to(&udp).refused()])
}

fn free_address(cx: &mut Context<'_>) -> Result<()> {
    let free: Vec<IpAddr> = cx.cluster_ips();
    let used = cx.service("web", &[]).endpoints(&["a0"]);
    cx.program(&[&used])?;
    let targets: Vec<Target> = free
        .iter()
        .flat_map(|&ip| [Protocol::Tcp, Protocol::Udp].map(|p| (p, SocketAddr::new(ip, 80))))
        .collect();
    cx.look(&[
        from(&["a3"]).to(&used.at(Front::Cluster)).answers(&["a0"]),
        from(EVERYBODY).to(&targets).dropped(),
    ])
}
