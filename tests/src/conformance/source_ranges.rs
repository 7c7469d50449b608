//! `loadBalancerSourceRanges`.

use anyhow::Result;
use serde_json::{Value, json};

use super::context::{Context, external_local};
use super::look::from;
use super::service::Front;
use super::{Case, case};

pub(super) const CASES: &[Case] = &[
    case("load-balancer addresses take clients in range only, pods included", guarded),
    case("node port, ClusterIP and external IP are not guarded", unguarded),
    case("pods in range pass; ranges follow changes", changes),
    case("a zero prefix means all", zero_prefix),
    case("ranges guard under external Local too", local),
];

/// The documentation ranges hold the outside client's second address and not its first.
const EXTRA: &[&str] = &["203.0.113.0/26", "2001:db8::/64"];
const PODS_OF_A: &[&str] = &["10.244.0.0/24", "fd00:10:244::/64"];

fn ranges(ranges: &[&str]) -> Value {
    json!({"loadBalancerSourceRanges": ranges})
}

fn guarded(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0"]);
    let web = web.spec(&ranges(EXTRA));
    cx.program(&[&web])?;
    let targets = web.at(Front::Balancer);
    cx.look(&[
        from(&["extra"]).to(&targets).answers(&["a0", "b0"]),
        from(&["outside", "a3", "b3"]).to(&targets).dropped(),
    ])
}

fn unguarded(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::Balancer, Front::External, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(&["a0", "b0"]).spec(&ranges(EXTRA));
    cx.program(&[&web])?;
    let open = [web.at(Front::Cluster), web.at(Front::External), cx.node_ports_of(&web, 0)];
    cx.look(&[
        from(&["outside", "extra", "a3", "node-a"]).to(&open.concat()).answers(&["a0", "b0"]),
        from(&["outside"]).to(&web.at(Front::Balancer)).dropped(),
    ])
}

fn changes(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0"]);
    let some = web.clone().spec(&ranges(&[EXTRA, PODS_OF_A].concat()));
    cx.program(&[&some])?;
    let targets = web.at(Front::Balancer);
    cx.look(&[
        from(&["extra", "a3"]).to(&targets).answers(&["a0", "b0"]),
        from(&["outside", "b3"]).to(&targets).dropped(),
    ])?;
    let pods = web.clone().spec(&ranges(PODS_OF_A));
    cx.program(&[&pods])?;
    cx.look(&[
        from(&["a3"]).to(&targets).answers(&["a0", "b0"]),
        from(&["extra"]).to(&targets).dropped(),
    ])?;
    let open = web.spec(&json!({"loadBalancerSourceRanges": null}));
    cx.program(&[&open])?;
    cx.look(&[from(&["extra", "outside", "b3"]).to(&targets).answers(&["a0", "b0"])])
}

fn zero_prefix(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0"]);
    let web = web.spec(&ranges(&[EXTRA, &["0.0.0.0/0", "::/0"]].concat()));
    cx.program(&[&web])?;
    let everybody = &["outside", "extra", "a3", "node-a"];
    cx.look(&[from(everybody).to(&web.at(Front::Balancer)).answers(&["a0", "b0"])])
}

fn local(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0"]);
    let web = web.spec(&ranges(EXTRA)).spec(&external_local());
    cx.program(&[&web])?;
    let targets = web.at(Front::Balancer);
    cx.look(&[
        from(&["extra"]).to(&targets).answers(&["a0"]).seen_as_itself(),
        from(&["outside", "a3"]).to(&targets).dropped(),
    ])
}
