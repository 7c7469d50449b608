//! Where a Service port can be reached.

use anyhow::{Result, ensure};
use serde_json::json;

use super::context::Context;
use super::look::{eventually, from, refusable};
use super::service::Front;
use super::{Case, case};

pub(super) const CASES: &[Case] = &[
    case("ClusterIP from pods, nodes and outside", cluster_ip),
    case("node port on every address of every node", node_port),
    case("node port on chosen addresses only", node_port_addresses),
    case("node port on the Node's own addresses (primary)", node_port_primary),
    case("node port on an address that the node gets later", new_address),
    case("external IP and load-balancer VIP; ipMode Proxy is not programmed", external),
    case("of two claims the older holds, and it moves when the older goes", conflict),
    case("a port that goes, a Service that goes", removed),
];

const EVERYBODY: &[&str] = &["a3", "b3", "node-a", "node-b", "outside"];

fn cluster_ip(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).second_ports().endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let (first, second): (Vec<_>, Vec<_>) =
        web.at(Front::Cluster).into_iter().partition(|(_, address)| address.port() == 80);
    cx.look(&[
        from(EVERYBODY).to(&first).answers(&["a0", "b0"]),
        from(&["a3"]).to(&second).answers(&["a0:8081", "b0:8081"]),
    ])
}

fn node_port(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let own = [cx.node_ports_of(&web, 0), cx.node_ports_of(&web, 1)].concat();
    let bridge = web.node_ports(cx.bridge(0));
    cx.look(&[
        from(EVERYBODY).to(&own).answers(&["a0", "b0"]),
        from(&["a3", "node-a"]).to(&bridge).answers(&["a0", "b0"]),
        // Not a port of the ClusterIP, nor the Service's port one of the node.
        from(&["a3", "outside"]).to(&refusable(&web.node_ports(web.cluster_ips.clone()))).refused(),
    ])
}

fn node_port_addresses(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let bridge = web.node_ports(cx.bridge(0));
    cx.look(&[from(&["a3"]).to(&bridge).answers(&["a0", "b0"])])?;
    cx.restart(0, &["--nodeport-addresses=10.99.0.0/24,fd00:99::/64"])?;
    let fabric = cx.node_ports_of(&web, 0);
    cx.look(&[
        from(&["a3", "outside"]).to(&fabric).answers(&["a0", "b0"]),
        from(&["a3", "node-a"]).to(&refusable(&bridge)).refused(),
    ])?;
    if !cx.has_v4() || !cx.has_v6() {
        return Ok(());
    }
    // The other family is as without the flag.
    for (chosen, is_v4) in [("10.99.0.0/24", true), ("fd00:99::/64,0.0.0.0/0", false)] {
        cx.restart(0, &[&format!("--nodeport-addresses={chosen}")])?;
        let (limited, free): (Vec<_>, Vec<_>) =
            bridge.iter().copied().partition(|(_, address)| address.is_ipv4() == is_v4);
        cx.look(&[
            from(&["a3", "outside"]).to(&fabric).answers(&["a0", "b0"]),
            from(&["a3", "node-a"]).to(&free).answers(&["a0", "b0"]),
            from(&["a3", "node-a"]).to(&refusable(&limited)).refused(),
        ])?;
    }
    Ok(())
}

fn node_port_primary(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.restart(0, &["--nodeport-addresses=primary"])?;
    let fabric = cx.node_ports_of(&web, 0);
    let bridge = refusable(&web.node_ports(cx.bridge(0)));
    cx.look(&[
        from(&["a3", "outside"]).to(&fabric).answers(&["a0", "b0"]),
        from(&["a3", "node-a"]).to(&bridge).refused(),
    ])
}

fn new_address(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let mut addresses: Vec<std::net::IpAddr> = Vec::new();
    let (mut add, mut remove) = (String::new(), String::new());
    if cx.has_v4() {
        addresses.push([10, 99, 0, 77].into());
        add += "addr add 10.99.0.77/24 dev eth0\n";
        remove += "addr del 10.99.0.77/24 dev eth0\n";
    }
    if cx.has_v6() {
        addresses.push([0xfd00, 0x99, 0, 0, 0, 0, 0, 0x77].into());
        add += "addr add fd00:99::77/64 dev eth0 nodad\n";
        remove += "addr del fd00:99::77/64 dev eth0\n";
    }
    let targets = web.node_ports(addresses);
    cx.node(0).ip_batch(&add)?;
    let found = cx.look(&[from(&["outside", "a3"]).to(&targets).answers(&["a0", "b0"])]);
    cx.node(0).ip_batch(&remove)?;
    found?;
    // Nobody has the address any more: its neighbours find it unreachable.
    cx.look(&[from(&["a3"]).to(&targets).nobody()])
}

fn external(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External, Front::Balancer];
    let web = cx.service("web", fronts).endpoints(&["a0", "b0"]);
    let proxied = cx.service("proxied", &[Front::Balancer]).endpoints(&["a0"]);
    let ingress: Vec<_> =
        proxied.balancer_ips.iter().map(|ip| json!({"ip": ip, "ipMode": "Proxy"})).collect();
    let proxied = proxied.with(&json!({"status": {"loadBalancer": {"ingress": ingress}}}));
    cx.program(&[&web, &proxied])?;
    let targets = [web.at(Front::External), web.at(Front::Balancer)].concat();
    cx.look(&[
        from(EVERYBODY).to(&targets).answers(&["a0", "b0"]),
        from(&["a3"]).to(&proxied.at(Front::Cluster)).answers(&["a0"]),
        // It leaves the node, and beyond it nobody has the address.
        from(&["a3", "node-a", "outside"]).to(&proxied.at(Front::Balancer)).nobody(),
    ])
}

fn conflict(cx: &mut Context<'_>) -> Result<()> {
    let shared = cx.external_ips();
    let mut claim = |name: &str, created: &str, endpoint: &str| {
        let mut service = cx.service(name, &[]).endpoints(&[endpoint]);
        service.external_ips.clone_from(&shared);
        service.with(&json!({"metadata": {"creationTimestamp": created}}))
    };
    // Neither the name nor the order of arrival decides.
    let younger = claim("a-younger", "2026-01-02T00:00:00Z", "b0");
    let older = claim("b-older", "2026-01-01T00:00:00Z", "a0");
    cx.program(&[&younger])?;
    cx.look(&[from(&["a3", "outside"]).to(&younger.at(Front::External)).answers(&["b0"])])?;
    let conflicts = cx.metric(0, "node_dataplane_frontend_conflicts")?;
    cx.program(&[&older])?;
    cx.look(&[
        from(&["a3", "outside"]).to(&older.at(Front::External)).answers(&["a0"]),
        from(&["a3"]).to(&younger.at(Front::Cluster)).answers(&["b0"]),
    ])?;
    eventually(std::time::Duration::from_secs(5), || {
        let now = cx.metric(0, "node_dataplane_frontend_conflicts")?;
        ensure!(now > conflicts, "the conflict is not counted: {now} as before");
        Ok(())
    })?;
    let warned =
        cx.bed.log(0).lines().any(|line| line.starts_with('W') && line.contains("a-younger"));
    ensure!(warned, "no warning names the Service that lost");
    cx.delete("Service", "b-older")?;
    cx.settle()?;
    cx.look(&[from(&["a3", "outside"]).to(&younger.at(Front::External)).answers(&["b0"])])
}

fn removed(cx: &mut Context<'_>) -> Result<()> {
    let two = cx.service("web", &[Front::External]).second_ports().endpoints(&["a0"]);
    let gone = cx.service("gone", &[Front::External]).endpoints(&["a0"]);
    cx.program(&[&two, &gone])?;
    let mut one = two.clone();
    one.ports.retain(|port| port.port == 80);
    let (first, second): (Vec<_>, Vec<_>) =
        two.everywhere().into_iter().partition(|(_, address)| address.port() == 80);
    cx.look(&[
        from(&["a3"]).to(&second).answers(&["a0:8081"]),
        from(&["a3", "outside"]).to(&gone.everywhere()).answers(&["a0"]),
    ])?;
    cx.delete("Service", "gone")?;
    cx.program(&[&one])?;
    cx.look(&[
        from(&["a3", "outside"]).to(&first).answers(&["a0"]),
        from(&["a3", "outside"]).to(&refusable(&second)).refused(),
        from(&["a3", "outside"]).to(&gone.everywhere()).nobody(),
    ])
}
