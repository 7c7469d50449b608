//! `sessionAffinity: ClientIP`.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::context::Context;
use super::look::{from, of, who};
use super::service::{Front, Target};
use super::{Case, case};
use crate::traffic::Protocol;

pub(super) const CASES: &[Case] = &[
    case("a client stays with one endpoint; without affinity it does not", sticks),
    case("one endpoint across all frontends of a Service port", across_frontends),
    case("an endpoint that leaves is forgotten at once", moves),
    case("affinity that is turned off forgets", turned_off),
    case("the timeout slides with traffic, and ends", timeout),
];

const ENDPOINTS: &[&str] = &["a0", "a1", "b0"];

fn client_ip(seconds: u32) -> Value {
    json!({
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
    })
}

/// The one server that answers all of `count` connections.
fn the_one(cx: &Context<'_>, client: &str, target: Target, count: usize) -> Result<String> {
    let by_server = who(cx.cluster(), client, target, count)?;
    ensure!(by_server.len() == 1, "{client} -> {target:?}: {by_server:?}");
    by_server.into_keys().next().context("somebody answers")
}

fn sticks(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer];
    let web = cx.service("web", fronts).endpoints(ENDPOINTS).spec(&client_ip(600));
    let free = cx.service("free", &[]).endpoints(ENDPOINTS);
    cx.program(&[&web, &free])?;
    for client in ["a3", "node-a", "outside"] {
        for target in web.everywhere() {
            the_one(cx, client, target, 8)?;
        }
    }
    cx.look(&[from(&["a3", "outside"]).to(&free.at(Front::Cluster)).answers(ENDPOINTS)])
}

fn across_frontends(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer, Front::NodePort];
    let web = cx.service("web", fronts).endpoints(ENDPOINTS).spec(&client_ip(600));
    cx.program(&[&web])?;
    let mut targets = web.everywhere();
    targets.extend(cx.node_ports_of(&web, 0));
    let mut wrong = Vec::new();
    // A node is another client at each frontend: to an address of its own a socket connects
    // from that very address (`ip_route_output_key_hash_rcu`).
    for client in ["a3", "outside"] {
        let mut servers: BTreeMap<(Protocol, bool), BTreeSet<String>> = BTreeMap::new();
        for &target in &targets {
            let server = the_one(cx, client, target, 4)?;
            servers.entry((target.0, target.1.is_ipv6())).or_default().insert(server);
        }
        for ((protocol, v6), servers) in servers {
            if servers.len() > 1 {
                let family = if v6 { "IPv6" } else { "IPv4" };
                wrong.push(format!("{client} {protocol} {family}: {servers:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "several servers for one client: {}", wrong.join("; "));
    Ok(())
}

fn moves(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).spec(&client_ip(600));
    let all = web.clone().endpoints(ENDPOINTS);
    cx.program(&[&all])?;
    let jobs: Vec<(&str, Target)> = ["a3", "outside"]
        .into_iter()
        .flat_map(|client| web.everywhere().into_iter().map(move |target| (client, target)))
        .collect();
    let mut held = BTreeSet::new();
    for &(client, target) in &jobs {
        held.insert(the_one(cx, client, target, 3)?);
    }
    // Every endpoint that holds a client goes, one in each of the ways to go.
    let gone = held.iter().next().context("somebody answers")?;
    let rest: Vec<&str> = ENDPOINTS.iter().copied().filter(|name| name != gone).collect();
    let unready = format!("{gone} unready");
    for endpoints in [rest.clone(), [rest.clone(), vec![unready.as_str()]].concat()] {
        let fewer = web.clone().endpoints(&endpoints);
        cx.program(&[&fewer])?;
        for &(client, target) in &jobs {
            let server = the_one(cx, client, target, 3)?;
            ensure!(&server != gone, "{client} -> {target:?} still reaches {gone}");
        }
        cx.program(&[&all])?;
    }
    // At last nobody is left but one.
    let last = web.endpoints(&["b1"]);
    cx.program(&[&last])?;
    for &(client, target) in &jobs {
        let server = the_one(cx, client, target, 3)?;
        ensure!(server == "b1", "{client} -> {target:?} reaches {server}");
    }
    Ok(())
}

fn turned_off(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(ENDPOINTS);
    let sticky = web.clone().spec(&client_ip(600));
    cx.program(&[&sticky])?;
    for target in web.everywhere() {
        the_one(cx, "a3", target, 4)?;
    }
    let off = web.clone().spec(&json!({"sessionAffinity": "None", "sessionAffinityConfig": null}));
    cx.program(&[&off])?;
    cx.look(&[from(&["a3", "outside"]).to(&web.everywhere()).answers(ENDPOINTS)])
}

/// Affinity for this long, asked for at this pace, forgotten after this pause.
const SHORT: u32 = 3;
const PACE: Duration = Duration::from_millis(1200);
const FORGOTTEN: Duration = Duration::from_millis(4500);

/// Datagrams only: the kernel's IPVS keeps a client's affinity while its last connection is
/// remembered, which for TCP is two minutes after its end (`ip_vs_conn_expire`).
fn timeout(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(ENDPOINTS).spec(&client_ip(SHORT));
    cx.program(&[&web])?;
    let ipvs = cx.bed.mode() == "ipvs";
    if ipvs {
        cx.restart(0, &["--ipvs-udp-timeout=1s"])?;
    }
    let targets = of(Protocol::Udp, &web.at(Front::Cluster));
    let result = slides_and_ends(cx, &targets);
    if ipvs {
        // The kernel keeps what it was given.
        cx.restart(0, &["--ipvs-udp-timeout=5m"])?;
    }
    result
}

fn slides_and_ends(cx: &Context<'_>, targets: &[Target]) -> Result<()> {
    let ask = || -> Result<Vec<String>> {
        targets.iter().map(|target| the_one(cx, "a3", *target, 1)).collect()
    };
    let first = ask()?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2 * u64::from(SHORT)) {
        thread::sleep(PACE);
        let now = ask()?;
        ensure!(now == first, "moved from {first:?} to {now:?} although in use");
    }
    let mut moved = vec![false; targets.len()];
    for _ in 0..6 {
        thread::sleep(FORGOTTEN);
        for (moved, (now, first)) in moved.iter_mut().zip(ask()?.iter().zip(&first)) {
            *moved |= now != first;
        }
        if moved.iter().all(|moved| *moved) {
            return Ok(());
        }
    }
    anyhow::bail!("clients never moved although idle for longer than {SHORT} s: {first:?}")
}
