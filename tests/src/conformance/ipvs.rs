//! What only ipvs mode has.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::context::Context;
use super::look::{eventually, from, who};
use super::service::{Front, Service, Target};
use super::{Case, case};
use crate::traffic::{Listen, Protocol, Server};

pub(super) const CASES: &[Case] = &[
    case("the scheduler is the flag's", scheduler_flag),
    case("a scheduler that the kernel lacks ends the start and is named", unknown_scheduler),
    case("a Service's own scheduler by annotation, changed live", scheduler_annotation),
    case("weights by annotation, changed live", weights),
    case("the drain timeout is for endpoints that are gone", drain_timeout),
    case("sysctls", sysctls),
    case("strict ARP, and timeouts as asked", arp_and_timeouts),
    case("a VIP's unused port never reaches a process of the node", process_on_all_addresses),
    case("--cleanup removes what is ours and nothing else", cleanup),
];

/// Annotations of the project.
const SCHEDULER: &str = "ipvs.node-dataplane/scheduler";
const WEIGHTS: &str = "node-dataplane/weights";

/// The scheduler of the Service's first ClusterIP, over TCP. Not from `/proc/net/ip_vs`,
/// which leaves out as many as the other node has.
fn scheduler_of(cx: &Context<'_>, web: &Service) -> Result<String> {
    let ip = *web.cluster_ips.first().context("an address")?;
    let start = format!("-A -t {} -s ", SocketAddr::new(ip, 80));
    let table = cx.node(0).command("ipvsadm").arg("-Sn").stdout_of()?;
    let scheduler = table.lines().find_map(|line| line.strip_prefix(&start));
    let rest = scheduler.with_context(|| format!("no line {start:?} in\n{table}"))?;
    Ok(rest.split_whitespace().next().unwrap_or_default().to_owned())
}

fn uses(cx: &Context<'_>, web: &Service, wanted: &str) -> Result<()> {
    eventually(Duration::from_secs(10), || {
        let scheduler = scheduler_of(cx, web)?;
        ensure!(scheduler == wanted, "{scheduler} and not {wanted}");
        Ok(())
    })
}

fn scheduler_flag(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    uses(cx, &web, "rr")?;
    cx.restart(0, &["--ipvs-scheduler=wlc"])?;
    uses(cx, &web, "wlc")?;
    cx.look(&[from(&["a3"]).to(&web.at(Front::Cluster)).only(&["a0", "b0"])])
}

fn unknown_scheduler(cx: &mut Context<'_>) -> Result<()> {
    cx.bed.start_daemon(0, &["--ipvs-scheduler=nosuch".to_owned()])?;
    let ended = eventually(Duration::from_secs(15), || {
        cx.bed.daemon_ended(0)?.context("the daemon goes on")
    });
    cx.bed.forget_daemon(0);
    let log = cx.bed.log(0);
    cx.restart(0, &[])?;
    ensure!(!ended?.success(), "exit status 0");
    let last = log.lines().last().unwrap_or_default();
    ensure!(last.contains("nosuch"), "its last words: {last}");
    Ok(())
}

fn scheduler_annotation(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    let plain = cx.service("plain", &[]).endpoints(&["a0", "b0"]);
    let annotated =
        |name: &str| web.clone().with(&json!({"metadata": {"annotations": {SCHEDULER: name}}}));
    cx.program(&[&annotated("sh"), &plain])?;
    uses(cx, &web, "sh")?;
    uses(cx, &plain, "rr")?;
    let target = *web.at(Front::Cluster).first().context("a frontend")?;
    let stream = cx.stream("a3", target)?;
    cx.program(&[&annotated("lc")])?;
    uses(cx, &web, "lc")?;
    // Nobody has this one: the Service goes on with the flag's.
    cx.program(&[&annotated("nosuch")])?;
    cx.look(&[from(&["a3"]).to(&web.at(Front::Cluster)).only(&["a0", "b0"])])?;
    cx.program(&[&web])?;
    uses(cx, &web, "rr")?;
    let report = stream.stop()?;
    ensure!(report.failure.is_none() && report.echoed > 0, "cut: {:?}", report.failure);
    Ok(())
}

fn weights(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    let weighted = |weights: &str| {
        let annotations = json!({SCHEDULER: "wrr", WEIGHTS: weights});
        web.clone().with(&json!({"metadata": {"annotations": annotations}}))
    };
    for (weights, heavy) in [("zone/z1=3,zone/z2=1", "a0"), ("node/node-b=3,*=1", "b0")] {
        cx.program(&[&weighted(weights)])?;
        for target in web.at(Front::Cluster) {
            let by_server = who(cx.cluster(), "a3", target, 40)?;
            let share = by_server.get(heavy).copied().unwrap_or(0);
            ensure!((25..=35).contains(&share), "{weights}: {target:?}: {by_server:?}");
        }
    }
    Ok(())
}

fn drain_timeout(cx: &mut Context<'_>) -> Result<()> {
    const BEYOND: Duration = Duration::from_secs(8);
    let web = cx.service("web", &[]);
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    cx.restart(0, &["--drain-timeout=3s"])?;
    let target = *web.at(Front::Cluster).first().context("a frontend")?;
    let (first, second) = (cx.stream("a3", target)?, cx.stream("a3", target)?);
    cx.program(&[&web.clone().endpoints(&["b0 terminating", "a0"])])?;
    std::thread::sleep(BEYOND);
    let report = first.stop()?;
    ensure!(report.failure.is_none(), "b0 is there and its connection ended: {report:?}");
    cx.program(&[&web.clone().endpoints(&["a0"])])?;
    // The client may have to wait for an answer before it sees that.
    std::thread::sleep(2 * BEYOND);
    let report = second.stop()?;
    ensure!(report.failure.is_some(), "b0 is gone and its connection lives: {report:?}");
    Ok(())
}

fn sysctls(cx: &mut Context<'_>) -> Result<()> {
    let mut expected = vec![
        ("ipv4/vs/conntrack", "1"),
        ("ipv4/vs/expire_nodest_conn", "1"),
        ("ipv4/vs/expire_quiescent_template", "1"),
        // The kernel's own; 0 breaks new connections on kernels since 5.9, which both are.
        ("ipv4/vs/conn_reuse_mode", "1"),
    ];
    if cx.has_v4() {
        expected.push(("ipv4/ip_forward", "1"));
    }
    for (name, wanted) in expected {
        let value = cx.node(0).sysctl(name)?;
        ensure!(value == wanted, "{name} is {value}");
    }
    Ok(())
}

fn arp_and_timeouts(cx: &mut Context<'_>) -> Result<()> {
    let timeouts = |cx: &Context<'_>| -> Result<String> {
        cx.node(0).command("ipvsadm").args(["-L", "--timeout"]).stdout_of()
    };
    let before = timeouts(cx)?;
    for name in ["ipv4/conf/all/arp_ignore", "ipv4/conf/all/arp_announce"] {
        let value = cx.node(0).sysctl(name)?;
        ensure!(value == "0", "{name} is {value} without being asked for");
    }
    cx.restart(
        0,
        &[
            "--ipvs-strict-arp",
            "--ipvs-tcp-timeout=17m",
            "--ipvs-tcpfin-timeout=3m",
            "--ipvs-udp-timeout=4m",
        ],
    )?;
    for (name, wanted) in [("ipv4/conf/all/arp_ignore", "1"), ("ipv4/conf/all/arp_announce", "2")] {
        let value = cx.node(0).sysctl(name)?;
        ensure!(value == wanted, "{name} is {value}");
    }
    let now = timeouts(cx)?;
    ensure!(now.contains("1020 180 240"), "timeouts: {now}, before: {before}");
    // The kernel keeps what it was given.
    let kept = &["--ipvs-tcp-timeout=15m", "--ipvs-tcpfin-timeout=2m", "--ipvs-udp-timeout=5m"];
    cx.restart(0, kept)?;
    cx.node(0)
        .set_sysctls(&[("ipv4/conf/all/arp_ignore", "0"), ("ipv4/conf/all/arp_announce", "0")])
}

pub(super) fn process_on_all_addresses(cx: &mut Context<'_>) -> Result<()> {
    const PORT: u16 = 2222;
    let mut listen = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        if cx.has_v4() {
            listen.push(Listen { protocol, address: ([0; 4], PORT).into() });
        }
        if cx.has_v6() {
            listen.push(Listen { protocol, address: ([0_u16; 8], PORT).into() });
        }
    }
    let _process = cx.node(0).in_netns(|| Server::start("sshd", &listen))??;
    let web = cx.service("web", &[Front::External, Front::Balancer]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let ports = |addresses: &[IpAddr]| -> Vec<Target> {
        let target = |&ip| [Protocol::Tcp, Protocol::Udp].map(|p| (p, SocketAddr::new(ip, PORT)));
        addresses.iter().flat_map(target).collect()
    };
    let vips = ports(&[&web.cluster_ips[..], &web.external_ips, &web.balancer_ips].concat());
    cx.look(&[
        // It is there, by the node's own address.
        from(&["outside"]).to(&ports(&cx.node(0).addresses())).answers(&["sshd"]),
        from(&["a3", "node-a", "outside"]).to(&vips).refused(),
    ])
}

fn cleanup(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::External]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.look(&[from(&["b3"]).to(&web.everywhere()).answers(&["a0", "b0"])])?;
    let foreign = if cx.has_v4() { "192.0.2.9:99" } else { "[2001:db8:9::9]:99" };
    let ipvsadm = |cx: &Context<'_>, arguments: &[&str]| -> Result<String> {
        cx.node(1).command("ipvsadm").args(arguments).stdout_of()
    };
    ipvsadm(cx, &["-A", "-t", foreign, "-s", "rr"])?;
    let result = cleaned(cx, foreign);
    ipvsadm(cx, &["-D", "-t", foreign])?;
    cx.restart(1, &[])?;
    result?;
    cx.look(&[from(&["b3"]).to(&web.everywhere()).answers(&["a0", "b0"])])
}

fn cleaned(cx: &mut Context<'_>, foreign: &str) -> Result<()> {
    cx.bed.start_daemon(1, &["--cleanup".to_owned()])?;
    let status = eventually(Duration::from_secs(15), || {
        cx.bed.daemon_ended(1)?.context("the cleanup goes on")
    });
    cx.bed.forget_daemon(1);
    ensure!(status?.success(), "--cleanup fails\n{}", cx.bed.log_tails(5));
    let left = cx.node(1).command("ipvsadm").arg("-Sn").stdout_of()?;
    ensure!(left.trim() == format!("-A -t {foreign} -s rr"), "virtual servers left: {left}");
    let links = cx.node(1).command("ip").args(["-o", "link"]).stdout_of()?;
    ensure!(!links.contains("kube-ipvs0"), "links left: {links}");
    let tables = cx.node(1).command("nft").args(["list", "tables"]).stdout_of()?;
    ensure!(!tables.contains("proxy-daemon"), "tables left: {tables}");
    Ok(())
}
