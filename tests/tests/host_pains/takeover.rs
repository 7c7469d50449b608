//! Taking a node over from kube-proxy's iptables and nftables modes under traffic. The rules of a
//! real kube-proxy, with this cluster's addresses in them, are loaded with the tools it uses.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::node::{Clients, run, run_with};
use proxy_tests::witness::Witness;

use super::node::{LONG, until};
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec, tcp};

const IPTABLES: &str = include_str!("../../fixtures/kube-proxy-iptables-save.txt");
const IP6TABLES: &str = include_str!("../../fixtures/kube-proxy-ip6tables-save.txt");
const NFTABLES: &str = include_str!("../../fixtures/kube-proxy-nft-ruleset.txt");

/// The recorded Services' addresses and endpoints, and those of this cluster. `shop/api` was the
/// one with the node port.
const ADDRESSES: [(&str, &str); 10] = [
    // Otherwise the nodes' own network would be inside of it, and what no Service holds dropped.
    ("10.96.0.0/12", "10.96.0.0/15"),
    ("10.101.40.77", "10.96.10.1"),
    ("fd00:10:96::d:bba0", "fd00:10:96::a01"),
    ("10.244.0.7", "10.244.0.2"),
    ("fd00:10:244::7", "fd00:10:244::2"),
    ("10.244.0.9:9000", "10.244.0.3:8080"),
    ("10.244.0.9 . 9000", "10.244.0.3 . 8080"),
    ("10.244.0.9", "10.244.0.3"),
    ("--dport 30900", "--dport 30080"),
    ("tcp . 30900", "tcp . 30080"),
];

fn here(recorded: &str) -> String {
    // The kubelet's own chain would stay, and its rules keep connections tracked.
    let lines = recorded.lines().filter(|line| !line.contains("KUBE-FIREWALL"));
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    ADDRESSES.iter().fold(text, |text, (from, to)| text.replace(from, to))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Legacy,
    Nft,
    Nftables,
}

/// All that kube-proxy made, in this mode.
fn kube_proxy_state(mode: Mode) {
    let backend = match mode {
        Mode::Legacy => "legacy",
        Mode::Nft => "nft",
        Mode::Nftables => {
            run_with(&here(NFTABLES), "nft", &["-f", "-"]);
            return;
        }
    };
    run_with(&here(IPTABLES), &format!("iptables-{backend}-restore"), &["-n", "-w"]);
    run_with(&here(IP6TABLES), &format!("ip6tables-{backend}-restore"), &["-n", "-w"]);
}

/// Something of everything that is not a service proxy's. Nothing of it needs connections to be
/// tracked.
fn foreign_state(mode: Mode) {
    run_with(
        "create mine hash:ip\nadd mine 192.0.2.99\ncreate KUBE-MINE hash:ip\n",
        "ipset",
        &["restore"],
    );
    run_with(
        "table inet mine {\n set s { type ipv4_addr; elements = { 192.0.2.98 } }\n chain c { type \
         filter hook input priority 5; ip saddr @s drop; }\n}\n\
         table ip kube-proxy-mine {\n chain services { ip saddr 192.0.2.98 drop; }\n}\n",
        "nft",
        &["-f", "-"],
    );
    if mode == Mode::Nftables {
        return;
    }
    let backend = if mode == Mode::Legacy { "legacy" } else { "nft" };
    for (program, source) in [("iptables", "192.0.2.99"), ("ip6tables", "2001:db8::99")] {
        let rules = format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
             :KUBE-FIREWALL - [0:0]\n:MINE - [0:0]\n\
             [2:120] -A INPUT -s {source} -j KUBE-FIREWALL\n[5:300] -A INPUT -s {source} -j DROP\n\
             [0:0] -A KUBE-FIREWALL -s {source} -j DROP\n[7:420] -A MINE -s {source}\nCOMMIT\n\
             *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
             :POSTROUTING ACCEPT [0:0]\n:MINE - [0:0]\n\
             [3:180] -A MINE -s {source} -j ACCEPT\nCOMMIT\n\
             *mangle\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n\
             :OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\n\
             :KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
        );
        run_with(&rules, &format!("{program}-{backend}-restore"), &["-c", "-w"]);
    }
}

/// Everything that may hold leftovers or something foreign, as its own tool shows it.
fn snapshot() -> Vec<(&'static str, String)> {
    let mut shots = Vec::new();
    for program in ["iptables-legacy-save", "ip6tables-legacy-save"] {
        // Of policies, what the test's own packets are counted at.
        let saved = run(program, &["-c"]);
        let lines = saved.lines().filter(|line| !line.starts_with('#'));
        let line = |line: &str| match line.split_once(" [") {
            Some((policy, _)) if line.starts_with(':') => format!("{policy}\n"),
            _ => format!("{line}\n"),
        };
        shots.push((program, lines.map(line).collect()));
    }
    shots.push(("nft -s list ruleset", run("nft", &["-s", "list", "ruleset"])));
    shots.push(("ipset save", run("ipset", &["save"])));
    shots
}

fn is_clean() -> bool {
    let left = |text: &str| text.contains("KUBE-SERVICES") || text.contains(" kube-proxy {");
    snapshot().iter().all(|(_, text)| !left(text))
}

fn tables() -> BTreeSet<String> {
    run("nft", &["list", "tables"]).lines().map(ToOwned::to_owned).collect()
}

fn is_held() -> bool {
    tables().iter().any(|table| table.ends_with(" proxy-daemon-hold"))
}

fn until_seen(what: &str, stage: &Stage, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < end, "not within {LONG:?}: {what}\n{}", stage.bed.log_tails(60));
        thread::sleep(Duration::from_millis(20));
    }
}

fn take_over_from(mode: Mode) {
    let mut stage = Stage::without_daemons(&["--ipvs-sync-period=1s"], None);
    let inside = |stage: &Stage, work: &(dyn Fn() -> bool + Sync)| {
        stage.client(Client::Host).in_netns(work).expect("the node")
    };
    let on_node = stage.client(Client::Host);
    let closing = [("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")];
    on_node.set_sysctls(&closing).expect("entries of connections that ended go soon");
    // So few that sockets which go to an endpoint by themselves get, by and by, the ports of
    // connections that kube-proxy translated to the same endpoint.
    let few = [("ipv4/ip_local_port_range", "40000 40999"), ("ipv4/tcp_tw_reuse", "1")];
    stage.pod(0, 1).set_sysctls(&few).expect("few ports");
    let prepared = on_node.in_netns(|| {
        foreign_state(mode);
        let before = snapshot();
        kube_proxy_state(mode);
        assert!(!is_clean(), "there is something to remove");
        // A kube-proxy that still runs holds its port.
        (before, TcpListener::bind("0.0.0.0:10256").expect("kube-proxy's port"))
    });
    let (before, kube_proxy) = prepared.expect("the node");
    stage.web(&spec("NodePort"), &[], &[(0, 0), (0, 1)]);
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[0]).expect("an address");
    let vips = CLUSTER_IPS.map(|ip| SocketAddr::new(ip, PORT));
    let node_port = SocketAddr::new(node, NODE_PORT);
    let ways = [
        (stage.pod(0, 1), vips[0]),
        (stage.pod(0, 1), vips[1]),
        (stage.client(Client::Host), vips[0]),
        (stage.client(Client::Outside), node_port),
    ];
    let hosts = [stage.client(Client::Host), stage.pod(0, 0), stage.pod(0, 1)];
    let witness = Witness::of(&hosts).expect("the hosts").with_maps(&stage.bed.bpf_root(0));
    let clients: Vec<Clients> = ways
        .iter()
        .map(|(from, target)| {
            stage.until_served(from, *target);
            from.in_netns(|| Clients::watched(*target, witness.clone())).expect("a namespace")
        })
        .collect();
    thread::sleep(Duration::from_secs(1));

    stage.bed.start_daemon(0, &[]).expect("a daemon");
    until_seen("kube-proxy", &stage, || stage.bed.log(0).contains("seems to run"));
    thread::sleep(Duration::from_secs(2));
    assert!(!inside(&stage, &is_clean), "nothing is taken away from one that runs");
    drop(kube_proxy);
    until_seen("all of kube-proxy's gone", &stage, || inside(&stage, &is_clean));
    // Long enough for the look whether anything comes back, and for a look at connections.
    let exchanges: Vec<usize> = clients.iter().map(Clients::exchanges).collect();
    thread::sleep(Duration::from_secs(8));
    let log = stage.bed.log(0);
    assert!(inside(&stage, &is_held), "connections go on\n{log}");
    assert!(!log.contains("cannot remove"), "{log}");
    for (client, before) in clients.iter().zip(exchanges) {
        assert!(client.exchanges() > before + 20, "{} exchanges\n{log}", client.exchanges());
    }
    for client in clients {
        println!("{mode:?}: {}", client.stop());
    }
    until_seen("nothing held any more", &stage, || !inside(&stage, &is_held));
    let after = stage.client(Client::Host).in_netns(snapshot).expect("the node");
    for ((what, before), (_, after)) in before.iter().zip(&after) {
        assert_eq!(before, after, "{what} differs\n{log}");
    }
    for (client, target) in [(Client::Pod, vips[0]), (Client::Outside, node_port)] {
        stage.must_connect(stage.client(client), &tcp(target, 50));
    }

    // Taking down removes kube-proxy's as well.
    stage.client(Client::Host).in_netns(|| kube_proxy_state(mode)).expect("the node");
    stage.bed.start_daemon(0, &["--cleanup".to_owned()]).expect("a daemon that cleans up");
    until("cleaned up", LONG, || stage.bed.daemon_ended(0).expect("asked").is_some());
    stage.bed.forget_daemon(0);
    let after = stage.client(Client::Host).in_netns(snapshot).expect("the node");
    assert_eq!(before, after, "{}", stage.bed.log_tails(20));
}

/// How the trouble comes about: `pain_12` of the guests. What is new here: the kernel stops to
/// track connections when the last rule that needs it goes, and kube-proxy's connections are then
/// translated no more.
#[test]
fn pain_12_taking_over_from_kube_proxy_on_legacy_iptables_is_not_felt() {
    take_over_from(Mode::Legacy);
}

#[test]
fn pain_12_taking_over_from_kube_proxy_on_nft_iptables_is_not_felt() {
    take_over_from(Mode::Nft);
}

#[test]
fn pain_12_taking_over_from_kube_proxy_on_nftables_is_not_felt() {
    take_over_from(Mode::Nftables);
}
