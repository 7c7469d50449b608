//! Taking a node over from kube-proxy's ipvs mode under traffic, and taking down. The
//! state of a real kube-proxy is loaded with the tools it uses; the daemon runs in a root
//! directory that holds none of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use proxy_tests::apiserver::ApiServer;
use proxy_tests::binary::binary;
use proxy_tests::cluster::{Cluster, Host};
use proxy_tests::daemon::Daemon;
use proxy_tests::traffic::{Listen, Protocol, Server};

use crate::daemon::KUBE_PROXY;
use crate::node::{Clients, SYNCED, load_recorded, node_network, plain, until};
use crate::{in_namespace, run, run_with};

const IPTABLES: &str = include_str!("../../fixtures/ipvs-iptables-save.txt");
const SETS: &str = include_str!("../../fixtures/ipvs-ipset-save.txt");
const LINK: &str = include_str!("../../fixtures/ipvs-kube-ipvs0.txt");

/// What kube-proxy made for Services that are gone by now.
const STALE: [&str; 2] = ["-A -t 10.96.0.99:80 -s rr", "-A -t 10.99.0.2:31999 -s rr"];

/// Everything at once on an emulated node.
const LONG: Duration = Duration::from_secs(180);

const BACKENDS: [&str; 2] = ["legacy", "nft"];

/// A root directory with nothing in it but the daemon and the libraries it is linked to.
struct Jail {
    root: PathBuf,
    program: PathBuf,
}

impl Jail {
    fn new() -> Self {
        // Never removed: the guest's files go with it, and `/sys` is mounted in there.
        let root = tempfile::tempdir().expect("a directory").keep();
        let daemon = binary("proxy-daemon");
        let listed = run("ldd", &[daemon.to_str().expect("a path")]);
        let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries {
            let to = root.join(file.trim_start_matches('/'));
            fs::create_dir_all(to.parent().expect("a directory")).expect("made");
            fs::copy(file, to).expect("a library");
        }
        fs::copy(&daemon, root.join("proxy-daemon")).expect("the daemon");
        for directory in ["proc", "sys"] {
            fs::create_dir(root.join(directory)).expect("made");
            let to = root.join(directory);
            run("mount", &["--bind", &format!("/{directory}"), to.to_str().expect("a path")]);
        }
        let program = root.join("start.sh");
        let chroot = run("sh", &["-c", "command -v chroot"]);
        let script = format!(
            "#!/bin/sh\nexec env -i PATH=/nowhere {} {} /proxy-daemon \"$@\"\n",
            chroot.trim(),
            root.display()
        );
        fs::write(&program, script).expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
        let jail = Self { root, program };
        jail.holds_no_tools();
        jail
    }

    fn holds_no_tools(&self) {
        let root = self.root.to_str().expect("a path");
        let tools = ["iptables", "ip6tables", "nft", "ipset", "ipvsadm", "modprobe", "ip"];
        let files = run("find", &[root, "-xdev", "-type", "f", "-perm", "-u+x"]);
        let names: BTreeSet<&str> = files.lines().filter_map(|f| f.rsplit('/').next()).collect();
        assert!(names.contains("proxy-daemon"));
        assert!(tools.iter().all(|tool| !names.contains(tool)), "{names:?}");
    }

    fn daemon(&self, api: &ApiServer) -> Daemon {
        api.write_kubeconfig(&self.root.join("kubeconfig"), None).expect("a kubeconfig");
        let arguments = [
            "--hostname-override=node-a",
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
            "--kubeconfig=/kubeconfig",
            "--ipvs-sync-period=4s",
            "-v=4",
        ];
        Daemon::start(&self.program, &self.root, &arguments).expect("the daemon")
    }

    /// `--cleanup`: what it said.
    fn cleanup(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.program)
            .arg("--cleanup")
            .args(arguments)
            .output()
            .expect("the daemon");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    }
}

/// Something of everything that is not a service proxy's, in both backends of iptables,
/// so that their tables exist.
fn foreign_state() {
    run("modprobe", &["-a", "ip_vs", "ip_set", "nf_conntrack"]);
    run("ip", &["link", "add", "dummy9", "type", "dummy"]);
    run("ip", &["addr", "add", "192.0.2.77/32", "dev", "dummy9"]);
    run_with(
        "-A -t 192.0.2.77:8080 -s wlc\n-a -t 192.0.2.77:8080 -r 10.244.0.9:9000 -m -w 3\n\
         -A -f 77 -s rr\n",
        "ipvsadm",
        &["-R"],
    );
    run_with(
        "create mine hash:ip\nadd mine 192.0.2.99\ncreate KUBE-MINE hash:ip\n",
        "ipset",
        &["restore"],
    );
    run_with(
        "table inet mine {\n set s { type ipv4_addr; elements = { 192.0.2.98 } }\n chain c { type \
         filter hook input priority 5; ip saddr @s drop; }\n}\n",
        "nft",
        &["-f", "-"],
    );
    for backend in BACKENDS {
        for (program, source) in [("iptables", "192.0.2.99"), ("ip6tables", "2001:db8::99")] {
            let rules = format!(
                "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
                 :KUBE-FIREWALL - [0:0]\n:MINE - [0:0]\n\
                 [2:120] -A INPUT -s {source} -j KUBE-FIREWALL\n[5:300] -A INPUT -s {source} -j DROP\n\
                 [0:0] -A INPUT -p tcp -m tcp --dport 9999 -j MINE\n\
                 [0:0] -A KUBE-FIREWALL -s {source} -j DROP\n[0:0] -A MINE -g KUBE-FIREWALL\n\
                 [7:420] -A MINE -s {source}\nCOMMIT\n\
                 *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
                 :POSTROUTING ACCEPT [0:0]\n:MINE - [0:0]\n\
                 [0:0] -A PREROUTING -p tcp -m tcp --dport 9998 -j MINE\n\
                 [3:180] -A MINE -s {source} -j ACCEPT\nCOMMIT\n\
                 *mangle\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n\
                 :OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\n\
                 :KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
            );
            run_with(&rules, &format!("{program}-{backend}-restore"), &["-c"]);
        }
    }
}

/// kube-proxy's iptables rules for IPv6, of which no record exists: the same rules on the
/// sets of that family.
fn ip6tables() -> String {
    let set = |name: &str| {
        let mut name = name.replacen("KUBE-", "KUBE-6-", 1);
        name.truncate(31);
        name
    };
    let rule = |line: &str| {
        let words: Vec<String> = line
            .split(' ')
            .scan("", |before, word| {
                let named = *before == "--match-set";
                *before = word;
                Some(if named { set(word) } else { word.to_owned() })
            })
            .collect();
        words
            .join(" ")
            .replace("10.244.0.0/16", "fd00:10:244::/56")
            .replace("127.0.0.0/8", "::1/128")
            .replace("icmp-port-unreachable", "icmp6-port-unreachable")
    };
    let lines = IPTABLES.lines().filter(|line| !line.contains("203.0.113.80"));
    lines.map(|line| rule(line) + "\n").collect()
}

/// All that kube-proxy made, with iptables of this variant.
fn kube_proxy_state(backend: &str) {
    run("ip", &["link", "add", "kube-ipvs0", "type", "dummy"]);
    let recorded = LINK.lines().filter_map(|line| {
        let line = line.trim();
        line.strip_prefix("inet6 ").or_else(|| line.strip_prefix("inet "))?.split(' ').next()
    });
    for address in recorded.chain(["10.96.0.99/32", "10.96.0.98/32"]) {
        run("ip", &["addr", "add", address, "dev", "kube-ipvs0"]);
    }
    let stale = "add KUBE-CLUSTER-IP 10.96.0.99,tcp:80\nadd KUBE-NODE-PORT-TCP 31999\n";
    run_with(&format!("{SETS}{stale}"), "ipset", &["restore"]);
    run_with(&format!("{}\n{}\n", recorded_servers(), STALE.join("\n")), "ipvsadm", &["-R"]);
    run_with(IPTABLES, &format!("iptables-{backend}-restore"), &["-n"]);
    run_with(&ip6tables(), &format!("ip6tables-{backend}-restore"), &["-n"]);
    // Without the record's further sysctls nothing is masqueraded.
    fs::write("/proc/sys/net/ipv4/vs/conntrack", "1").expect("a sysctl");
}

/// kube-proxy ran on a guest with one address more, and with another IPv6 address.
fn recorded_servers() -> String {
    let lines = KUBE_PROXY.lines().filter(|line| !line.contains("10.0.2.15"));
    let lines: Vec<_> =
        lines.map(|line| line.replace("fec0::5054:ff:fe12:3456", "fd00:99::2")).collect();
    lines.join("\n")
}

/// iptables without what counts packets that the test or the kernel itself sends (of IPv6, at
/// any time): policies, and rules but those for a source that
/// sends nothing.
fn iptables(program: &str) -> String {
    // Between reading a rule and asking for its set's name, the set may go.
    let mut saved = saved(program);
    until("a ruleset in one piece", LONG, || {
        if saved.is_none() {
            saved = self::saved(program);
        }
        saved.is_some()
    });
    let saved = saved.unwrap_or_default();
    let lines = saved.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| match line.split_once(']') {
            _ if line.starts_with(':') => line.split(" [").next().unwrap_or(line),
            Some((_, rule)) if line.starts_with('[') && !rule.contains(" -s ") => rule.trim_start(),
            _ => line,
        })
        .map(|line| format!("{line}\n"))
        .collect()
}

fn saved(program: &str) -> Option<String> {
    let output = Command::new(program).arg("-c").output().expect("iptables-save");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("text"))
}

/// Everything that may hold leftovers or something foreign, as its own tool shows it.
fn snapshot() -> Vec<(&'static str, String)> {
    let mut shots = Vec::new();
    for program in ["iptables-legacy-save", "ip6tables-legacy-save"] {
        shots.push((program, iptables(program)));
    }
    shots.push(("nft -s list ruleset", run("nft", &["-s", "list", "ruleset"])));
    shots.push(("ipset save", run("ipset", &["save"])));
    shots.push(("ipvsadm -Sn", run("ipvsadm", &["-Sn"])));
    // Timers of a bridge run on.
    let links = run("ip", &["-d", "addr"]);
    let mut timer = false;
    let words = links.split(' ').filter(|word| !word.is_empty()).filter(|word| {
        let value = std::mem::replace(&mut timer, word.ends_with("_timer"));
        !value
    });
    shots.push(("ip -d addr", words.collect::<Vec<_>>().join(" ")));
    shots
}

fn assert_same(before: &[(&str, String)], after: &[(&str, String)], log: &str) {
    for ((what, before), (_, after)) in before.iter().zip(after) {
        assert_eq!(before, after, "{what} differs\n{log}");
    }
}

/// What of a ruleset is not the daemon's own table.
fn without_own_table(ruleset: &str) -> String {
    let mut own = false;
    let others = ruleset.lines().filter(|line| {
        own = own || line.ends_with(" proxy-daemon {");
        let skip = own;
        own = own && *line != "}";
        !skip
    });
    others.map(|line| format!("{line}\n")).collect()
}

fn is_clean() -> bool {
    let sets = run("ipset", &["list", "-n"]);
    let left = |line: &str| line.starts_with("KUBE-") && line != "KUBE-MINE";
    let iptables = ["legacy", "nft"].iter().all(|backend| {
        ["iptables", "ip6tables"].iter().all(|program| {
            // It stumbles over a set that goes while it reads.
            saved(&format!("{program}-{backend}-save")).is_some_and(|saved| {
                !saved.contains(":KUBE-SERVICES ") && !saved.contains(":KUBE-IPVS-FILTER ")
            })
        })
    });
    !sets.lines().any(left) && iptables
}

fn wait_until(what: &str, daemon: &Daemon, done: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what} took too long\n{}", daemon.log());
        sleep(Duration::from_millis(200));
    }
}

/// Link-local addresses are tentative for a while.
fn settled_addresses() {
    let end = Instant::now() + LONG;
    while run("ip", &["addr"]).contains("tentative") {
        assert!(Instant::now() < end, "addresses stay tentative");
        sleep(Duration::from_millis(100));
    }
}

/// Servers in the pods that the recorded endpoints name.
fn serve_recorded(cluster: &Cluster) -> Vec<Server> {
    let serve = |pod: usize, ports: &[u16]| {
        let pod = cluster.pod(0, pod);
        let listens: Vec<Listen> = pod
            .addresses()
            .into_iter()
            .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)))
            .map(|address| Listen { protocol: Protocol::Tcp, address })
            .collect();
        pod.in_netns(|| Server::start(pod.name(), &listens)).expect("a pod").expect("a server")
    };
    vec![serve(0, &[53, 9153]), serve(1, &[8080, 8443]), serve(2, &[9000])]
}

/// Clients of all kinds.
fn start_traffic(cluster: &Cluster) -> Vec<Clients> {
    let from = |host: &Host, to: &str| {
        let to: SocketAddr = to.parse().expect("an address");
        host.in_netns(|| Clients::with_pause(to, Duration::from_millis(100))).expect("a client")
    };
    vec![
        from(cluster.pod(0, 0), "10.101.40.77:80"),
        from(cluster.pod(0, 2), "[fd00:10:96::d:bba0]:80"),
        from(cluster.pod(0, 1), "10.96.0.10:53"),
        from(cluster.node(0), "10.102.195.2:9000"),
        from(cluster.outside().expect("an outside client"), "10.99.0.2:30900"),
    ]
}

fn take_over_from(backend: &str) {
    run("modprobe", &["-a", "br_netfilter"]);
    let cluster = Cluster::builder()
        .pod_host_numbers(&[5, 7, 9, 20])
        .outside_client()
        .build()
        .expect("a cluster");
    let node = cluster.node(0);
    let jail = Jail::new();
    let (before, api, kube_proxy) = node
        .in_netns(|| {
            foreign_state();
            let before = snapshot();
            kube_proxy_state(backend);
            assert!(!is_clean(), "there is something to remove");
            let api = ApiServer::start(plain()).expect("the test API server");
            load_recorded(&api);
            // A kube-proxy that still runs holds its port.
            (before, api, TcpListener::bind("0.0.0.0:10256").expect("kube-proxy's port"))
        })
        .expect("the node");
    let _servers = serve_recorded(&cluster);
    let clients = start_traffic(&cluster);
    sleep(Duration::from_secs(3));
    node.in_netns(|| take_over(&jail, &api, kube_proxy, &before, clients)).expect("the node");
    println!("taken over from iptables-{backend}");
}

/// Within the node's namespace, while traffic runs.
fn take_over(
    jail: &Jail,
    api: &ApiServer,
    kube_proxy: TcpListener,
    before: &[(&'static str, String)],
    clients: Vec<Clients>,
) {
    let daemon = jail.daemon(api);
    daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
    wait_until("seeing kube-proxy", &daemon, || daemon.log().contains("seems to run"));
    assert!(!is_clean() && run("ipvsadm", &["-Sn"]).contains(STALE[0]), "nothing was taken away");
    drop(kube_proxy);
    wait_until("taking over", &daemon, is_clean);
    wait_until("deleting servers", &daemon, || !run("ipvsadm", &["-Sn"]).contains(STALE[0]));
    // Some traffic on what is there now, and the look whether anything comes back.
    let before_more: Vec<usize> = clients.iter().map(Clients::exchanges).collect();
    wait_until("more traffic", &daemon, || {
        clients.iter().zip(&before_more).all(|(client, n)| client.exchanges() > n + 20)
    });
    sleep(Duration::from_secs(5));
    let log = daemon.log();
    assert!(!log.contains("came back") && !log.contains("cannot remove"), "{log}");

    let servers = run("ipvsadm", &["-Sn"]);
    let lines: BTreeSet<&str> = servers.lines().map(str::trim_end).collect();
    for line in recorded_servers().lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        assert!(lines.contains(line), "{line} was adopted\n{servers}\n{log}");
    }
    for line in STALE {
        assert!(!lines.contains(line), "{line} is wanted by nobody\n{log}");
    }
    let addresses = run("ip", &["addr", "show", "dev", "kube-ipvs0"]);
    assert!(addresses.contains("10.96.0.10/32") && !addresses.contains("10.96.0.9"), "{addresses}");
    // All else is as it was.
    let after = snapshot();
    for ((what, before), (_, after)) in before.iter().zip(&after) {
        match *what {
            "ipvsadm -Sn" => {
                let foreign = before.lines().all(|line| after.contains(line));
                assert!(foreign, "foreign virtual servers\n{before}\n{after}\n{log}");
            }
            "ip -d addr" => {}
            "nft -s list ruleset" => assert_eq!(*before, without_own_table(after), "{log}"),
            _ => assert_eq!(before, after, "{what} differs\n{log}"),
        }
    }
    for client in clients {
        println!("{}", client.stop());
    }
    drop(daemon);
    let said = jail.cleanup(&[]);
    assert_same(before, &snapshot(), &format!("{log}\n{said}"));
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_12_taking_over_from_kube_proxy_on_legacy_iptables_is_not_felt() {
    take_over_from("legacy");
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_12_taking_over_from_kube_proxy_on_nft_iptables_is_not_felt() {
    take_over_from("nft");
}

/// kube-proxy runs `nft`, `iptables-restore` and `ipset` of its image, which fail when the
/// node's kernel or ruleset is newer than they are, and slow down with the node's iptables
/// flavour. Here the daemon has no program to run.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_18_19_without_any_tool_a_node_is_programmed_and_left_as_it_was() {
    in_namespace(|| {
        node_network();
        settled_addresses();
        foreign_state();
        let before = snapshot();
        let jail = Jail::new();
        let api = ApiServer::start(plain()).expect("the test API server");
        load_recorded(&api);
        let daemon = jail.daemon(&api);
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n > 20.0).expect("programmed");
        sleep(Duration::from_secs(1));
        assert_ne!(before, snapshot());
        let log = daemon.log();
        drop(daemon);
        let said = jail.cleanup(&[]);
        assert_same(&before, &snapshot(), &format!("{log}\n{said}"));
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_12_cleanup_removes_what_kube_proxy_left_unless_it_runs() {
    for backend in BACKENDS {
        in_namespace(move || {
            node_network();
            settled_addresses();
            foreign_state();
            let before = snapshot();
            kube_proxy_state(backend);
            let jail = Jail::new();
            let whole = snapshot();
            let kube_proxy = TcpListener::bind("0.0.0.0:10256").expect("kube-proxy's port");
            let said = jail.cleanup(&[]);
            assert!(said.contains("kube-proxy runs in ipvs mode"), "{said}");
            assert_same(&whole, &snapshot(), &said);
            drop(kube_proxy);
            let excluded = jail.cleanup(&["--ipvs-exclude-cidrs=10.96.0.99/32"]);
            let servers = run("ipvsadm", &["-Sn"]);
            assert!(servers.contains(STALE[0]) && !servers.contains(STALE[1]), "{excluded}");
            let said = jail.cleanup(&[]);
            assert_same(&before, &snapshot(), &said);
        });
    }
}

/// The kernel's modules of legacy iptables are not loaded by looking for its tables.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_node_without_legacy_iptables_stays_without() {
    in_namespace(|| {
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        if loaded("ip_tables") {
            run("modprobe", &["-r", "iptable_filter", "iptable_nat", "iptable_mangle"]);
            run("modprobe", &["-r", "ip_tables"]);
        }
        assert!(!loaded("ip_tables"));
        node_network();
        let said = Jail::new().cleanup(&[]);
        assert!(said.contains("removed 0 iptables chains"), "{said}");
        assert!(!loaded("ip_tables"), "{said}");
    });
}
