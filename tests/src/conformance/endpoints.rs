//! Which endpoints a client reaches.

use anyhow::Result;
use serde_json::json;

use super::context::{Context, external_local, internal_local};
use super::look::{from, refusable};
use super::service::Front;
use super::{Case, case};

pub(super) const CASES: &[Case] = &[
    case("all that are ready, and they follow changes", ready),
    case("Cluster: terminating ones when none is ready", terminating_cluster),
    case("Local: terminating ones when none is ready here", terminating_local),
    case("zone hints keep traffic in the zone", zone_hints),
    case("zone hints: incomplete, or none for this zone: all", zone_hints_ignored),
    case("node hints go before zone hints; incomplete ones do not count", node_hints),
    case("internal Local reaches local endpoints only", internal_policy),
    case("external Local reaches local endpoints only, from outside", external_policy),
    case("short-circuit: pods and nodes reach a Local Service by its external address", circuit),
    case("short-circuit: also by a node port, and from a node without endpoints", circuit_node),
    case("internal Local stays Local when the Service is external", both_local),
];

fn ready(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "a1 unready", "b0"]);
    cx.program(&[&web])?;
    let targets = web.at(Front::Cluster);
    let everybody = &["a3", "b3", "node-a", "outside"];
    cx.look(&[from(everybody).to(&targets).answers(&["a0", "b0"])])?;
    let moved = web.clone().endpoints(&["a0 unready", "a1", "b0", "b1"]);
    cx.program(&[&moved])?;
    cx.look(&[from(everybody).to(&targets).answers(&["a1", "b0", "b1"])])?;
    // A slice that goes takes its endpoints along.
    for slice in web.slices(cx.cluster())? {
        cx.delete("EndpointSlice", slice["metadata"]["name"].as_str().unwrap_or_default())?;
    }
    cx.settle()?;
    cx.look(&[from(&["a3"]).to(&refusable(&targets)).refused()])
}

fn terminating_cluster(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]);
    let ending =
        web.clone().endpoints(&["a0 terminating", "b0 terminating", "b1 ending", "a1 unready"]);
    cx.program(&[&ending])?;
    let targets = web.everywhere();
    let everybody = &["a3", "b3", "outside"];
    cx.look(&[from(everybody).to(&targets).answers(&["a0", "b0"])])?;
    let one_ready = web.endpoints(&["a0 terminating", "b0 terminating", "b1", "a1 unready"]);
    cx.program(&[&one_ready])?;
    cx.look(&[from(everybody).to(&targets).answers(&["b1"])])
}

fn terminating_local(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).spec(&external_local());
    let ending = web.clone().endpoints(&["a0 terminating", "a1 ending", "b0"]);
    cx.program(&[&ending])?;
    cx.look(&[
        // Here none is ready; elsewhere one is.
        from(&["outside"]).to(&web.at(Front::Balancer)).answers(&["a0"]),
        from(&["a3", "b3"]).to(&web.at(Front::Cluster)).answers(&["b0"]),
    ])?;
    let one_ready = web.clone().endpoints(&["a0 terminating", "a1", "b0"]);
    cx.program(&[&one_ready])?;
    cx.look(&[
        from(&["outside"]).to(&web.at(Front::Balancer)).answers(&["a1"]),
        from(&["a3"]).to(&web.at(Front::Cluster)).answers(&["a1", "b0"]),
    ])
}

fn zone_hints(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&[
        "a0 zone=z1",
        "b0 zone=z1",
        "a1 zone=z2",
        "b1 zone=z2",
    ]);
    cx.program(&[&web])?;
    cx.look(&[
        // The hint says for which zone an endpoint is, not where it stands.
        from(&["a3", "node-a", "outside"]).to(&web.everywhere()).answers(&["a0", "b0"]),
        from(&["b3", "node-b"]).to(&web.everywhere()).answers(&["a1", "b1"]),
    ])
}

fn zone_hints_ignored(cx: &mut Context<'_>) -> Result<()> {
    let some = cx.service("some", &[]).endpoints(&["a0 zone=z1", "b0", "b1 zone=z2"]);
    let other = cx.service("other", &[]).endpoints(&["a0 zone=z2", "b0 zone=z2"]);
    // An endpoint that is not ready needs no hint.
    let unready = cx.service("unready", &[]).endpoints(&["a0 zone=z1", "b0 zone=z2", "b1 unready"]);
    cx.program(&[&some, &other, &unready])?;
    cx.look(&[
        from(&["a3"]).to(&some.at(Front::Cluster)).answers(&["a0", "b0", "b1"]),
        from(&["a3"]).to(&other.at(Front::Cluster)).answers(&["a0", "b0"]),
        from(&["a3"]).to(&unready.at(Front::Cluster)).answers(&["a0"]),
    ])
}

fn node_hints(cx: &mut Context<'_>) -> Result<()> {
    let both = cx.service("both", &[]).endpoints(&[
        "a0 zone=z1 node=node-a",
        "a1 zone=z1 node=node-b",
        "b0 zone=z2 node=node-b",
        "b1 zone=z2 node=node-a",
    ]);
    let some = cx.service("some", &[]).endpoints(&["a0 node=node-a", "b0"]);
    let elsewhere = cx.service("elsewhere", &[]).endpoints(&["a0 node=node-b", "b0 node=node-b"]);
    cx.program(&[&both, &some, &elsewhere])?;
    cx.look(&[
        from(&["a3"]).to(&both.at(Front::Cluster)).answers(&["a0", "b1"]),
        from(&["b3"]).to(&both.at(Front::Cluster)).answers(&["a1", "b0"]),
        from(&["a3"]).to(&some.at(Front::Cluster)).answers(&["a0", "b0"]),
        from(&["a3"]).to(&elsewhere.at(Front::Cluster)).answers(&["a0", "b0"]),
    ])
}

fn internal_policy(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0", "b1"]);
    let web = web.spec(&internal_local());
    cx.program(&[&web])?;
    let targets = web.at(Front::Cluster);
    cx.look(&[
        from(&["a3", "node-a", "outside"]).to(&targets).answers(&["a0"]),
        from(&["b3", "node-b"]).to(&targets).answers(&["b0", "b1"]),
    ])?;
    let everywhere = web.spec(&json!({"internalTrafficPolicy": "Cluster"}));
    cx.program(&[&everywhere])?;
    cx.look(&[from(&["a3", "b3"]).to(&targets).answers(&["a0", "b0", "b1"])])
}

fn external_policy(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(&["a0", "b0", "b1"]);
    let web = web.spec(&external_local());
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(&["outside"]).to(&external).answers(&["a0"]),
        from(&["outside"]).to(&cx.node_ports_of(&web, 0)).answers(&["a0"]),
        from(&["outside"]).to(&cx.node_ports_of(&web, 1)).answers(&["b0", "b1"]),
        from(&["a3"]).to(&web.at(Front::Cluster)).answers(&["a0", "b0", "b1"]),
    ])?;
    cx.enter_by_second_node(&external)?;
    cx.look(&[from(&["outside"]).to(&external).answers(&["b0", "b1"])])
}

fn circuit(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer];
    let web = cx.service("web", fronts).endpoints(&["a0", "b0", "b1"]);
    let web = web.spec(&external_local());
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(&["a3", "node-a", "b3", "node-b"]).to(&external).answers(&["a0", "b0", "b1"]),
        from(&["outside"]).to(&external).answers(&["a0"]),
    ])
}

fn circuit_node(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(&["b0", "b1"]).spec(&external_local());
    cx.program(&[&web])?;
    let external = [web.at(Front::External), web.at(Front::Balancer)].concat();
    let own_ports = cx.node_ports_of(&web, 0);
    cx.look(&[
        from(&["a3", "node-a", "b3", "node-b"]).to(&external).answers(&["b0", "b1"]),
        from(&["a3", "node-a"]).to(&own_ports).answers(&["b0", "b1"]),
        from(&["outside"]).to(&external).dropped(),
        from(&["outside"]).to(&own_ports).dropped(),
    ])
}

fn both_local(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0", "b1"]);
    let web = web.spec(&external_local()).spec(&internal_local());
    cx.program(&[&web])?;
    cx.look(&[
        from(&["a3", "node-a"]).to(&web.at(Front::Cluster)).answers(&["a0"]),
        from(&["b3"]).to(&web.at(Front::Cluster)).answers(&["b0", "b1"]),
        from(&["outside"]).to(&web.at(Front::Balancer)).answers(&["a0"]),
    ])
}
