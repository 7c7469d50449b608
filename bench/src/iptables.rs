//! The rules that kube-proxy's iptables mode (v1.36, `pkg/proxy/iptables/proxier.go`)
//! writes for ClusterIP Services, as input for `iptables-restore --noflush`.
//!
//! Written in the form `iptables-save` prints, to be compared with what a real kube-proxy
//! left in a kernel (`fixtures/iptables-save.txt`). Left out are the nfacct matches,
//! which count and decide nothing, and everything for kinds of Services that are not
//! measured.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{Ipv4Addr, SocketAddrV4};

/// A TCP port of a Service.
#[derive(Debug, Clone)]
pub struct ServicePort {
    /// `namespace/name:port`, as in the rules' comments.
    pub name: String,
    pub cluster_ip: Ipv4Addr,
    pub port: u16,
    pub endpoints: Vec<SocketAddrV4>,
}

/// What is set up once: the jumps from the built-in chains, one `iptables -C` and `-A`
/// each for kube-proxy, and kubelet's or its own KUBE-FIREWALL.
pub const BASE: &str = r#"*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
*nat
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
COMMIT
"#;

/// Head of both tables' fixed chains, which every sync writes anew.
const FILTER_HEAD: &str = r#"*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
"#;
const FILTER_TAIL: &str = r#"-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"#;
const NAT_HEAD: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";
const NAT_FIXED: &str = r#"-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
"#;
const NAT_TAIL: &str = r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"#;

/// Input for one sync: the fixed chains and KUBE-SERVICES whole, as kube-proxy writes them
/// every time, and the chains of those Services for which `changed` holds: all of them in
/// a full sync, one of them after a change of one (kube-proxy's partial sync).
///
/// `cluster_cidr` is kube-proxy's `--cluster-cidr`.
#[must_use]
pub fn sync(
    services: &[ServicePort],
    cluster_cidr: &str,
    changed: impl Fn(&ServicePort) -> bool,
) -> String {
    let mut filter = String::from(FILTER_HEAD);
    let mut chains = String::new();
    let mut rules = String::from(NAT_FIXED);
    let mut portals = String::new();
    for service in services {
        let (name, ip, port) = (&service.name, service.cluster_ip, service.port);
        // Writing to a String cannot fail, here and below.
        if service.endpoints.is_empty() {
            let _ = writeln!(
                filter,
                "-A KUBE-SERVICES -d {ip}/32 -p tcp -m comment --comment \"{name} has no endpoints\" -m tcp --dport {port} -j REJECT --reject-with icmp-port-unreachable"
            );
            continue;
        }
        let chain = service_chain(name);
        let _ = writeln!(
            portals,
            "-A KUBE-SERVICES -d {ip}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {port} -j {chain}"
        );
        if changed(service) {
            service_rules(service, cluster_cidr, (&mut chains, &mut rules));
        }
    }
    [&filter, FILTER_TAIL, NAT_HEAD, &chains, &rules, &portals, NAT_TAIL].concat()
}

fn service_rules(
    service: &ServicePort,
    cluster_cidr: &str,
    (chains, rules): (&mut String, &mut String),
) {
    let (name, ip, port) = (&service.name, service.cluster_ip, service.port);
    let chain = service_chain(name);
    let _ = writeln!(chains, ":{chain} - [0:0]");
    let _ = writeln!(
        rules,
        "-A {chain} ! -s {cluster_cidr} -d {ip}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {port} -j KUBE-MARK-MASQ"
    );
    let count = service.endpoints.len();
    for (nth, endpoint) in service.endpoints.iter().enumerate() {
        let target = endpoint_chain(name, endpoint);
        // Each takes its share of what the ones before it left; the last takes the rest.
        let chance = match count - nth {
            1 => String::new(),
            left => format!(
                " -m statistic --mode random --probability {:.10}",
                1.0 / f64::from(u32::try_from(left).unwrap_or(u32::MAX))
            ),
        };
        let _ = writeln!(
            rules,
            "-A {chain} -m comment --comment \"{name} -> {endpoint}\"{chance} -j {target}"
        );
    }
    for endpoint in &service.endpoints {
        let target = endpoint_chain(name, endpoint);
        let _ = writeln!(chains, ":{target} - [0:0]");
        let _ = write!(
            rules,
            "-A {target} -s {}/32 -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
             -A {target} -p tcp -m comment --comment \"{name}\" -m tcp -j DNAT --to-destination {endpoint}\n",
            endpoint.ip()
        );
    }
}

fn service_chain(name: &str) -> String {
    format!("KUBE-SVC-{}", hash(name, ""))
}

fn endpoint_chain(name: &str, endpoint: &SocketAddrV4) -> String {
    format!("KUBE-SEP-{}", hash(name, &endpoint.to_string()))
}

/// 16 letters of base 32, as kube-proxy takes from a SHA-256: only that they are spread
/// matters here.
fn hash(name: &str, endpoint: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, name, endpoint).hash(&mut hasher);
        let bits = hasher.finish();
        (0..8).map(move |at| char::from(LETTERS[(bits >> (at * 5) & 31) as usize]))
    };
    half(0).chain(half(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const REAL: &str = include_str!("../fixtures/iptables-save.txt");
    const CIDR: &str = "10.244.0.0/16";

    fn service(name: &str, ip: &str, port: u16, endpoints: &[&str]) -> ServicePort {
        ServicePort {
            name: name.to_owned(),
            cluster_ip: ip.parse().unwrap(),
            port,
            endpoints: endpoints.iter().map(|e| e.parse().unwrap()).collect(),
        }
    }

    /// The rule without the hashes in chain names and without nfacct.
    fn shape(rule: &str) -> String {
        let mut words = rule.split_whitespace().peekable();
        let mut shape = Vec::new();
        while let Some(word) = words.next() {
            match (word, words.peek().copied()) {
                ("-m", Some("nfacct")) => {
                    // Its own name, the option and the counter's name.
                    let _ = words.nth(2);
                }
                _ if word.starts_with("KUBE-SVC-") => shape.push("KUBE-SVC"),
                _ if word.starts_with("KUBE-SEP-") => shape.push("KUBE-SEP"),
                _ => shape.push(word),
            }
        }
        shape.join(" ")
    }

    fn rules(text: &str) -> BTreeSet<String> {
        text.lines().filter(|line| line.starts_with("-A ")).map(shape).collect()
    }

    #[test]
    fn the_same_services_give_the_rules_that_kube_proxy_left() {
        let services = [
            service("kube-system/kube-dns:dns-tcp", "10.96.0.10", 53, &["10.244.0.5:53"]),
            service("default/kubernetes:https", "10.96.0.1", 443, &["192.0.2.2:16443"]),
            service("shop/behind-proxy-lb:http", "10.109.55.211", 80, &[]),
        ];
        let ours = rules(&(BASE.to_owned() + &sync(&services, CIDR, |_| true)));
        let real = rules(REAL);
        let made_up: Vec<_> = ours.difference(&real).collect();
        assert!(made_up.is_empty(), "kube-proxy has no such rules: {made_up:#?}");
        // The fixture's other Services are of kinds that are not measured here.
        let about = |rule: &&String| {
            let names =
                ["kube-dns:dns-tcp", "default/kubernetes", "behind-proxy-lb", "kubernetes "];
            names.iter().any(|name| rule.contains(name))
        };
        let missing: Vec<_> = real.difference(&ours).filter(about).collect();
        assert!(missing.is_empty(), "kube-proxy has these besides: {missing:#?}");
    }

    #[test]
    fn ten_endpoints_share_by_probability() {
        let endpoints: Vec<String> = (1..=10).map(|n| format!("10.128.0.{n}:8080")).collect();
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        let text = sync(&[service("scale/a:http", "10.96.0.9", 80, &endpoints)], CIDR, |_| true);
        let chances: Vec<f64> = text
            .lines()
            .filter_map(|line| line.split_once("--mode random --probability "))
            .map(|(_, rest)| rest.split(' ').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(chances.len(), 9, "{text}");
        let mut left = 1.0;
        for chance in chances {
            assert!((left * chance - 0.1).abs() < 1e-6);
            left *= 1.0 - chance;
        }
        assert_eq!(text.matches("-j DNAT").count(), 10);
        assert_eq!(text.lines().filter(|line| line.starts_with(":KUBE-SEP-")).count(), 10);
    }

    #[test]
    fn a_partial_sync_has_all_portals_and_one_services_chains() {
        let services: Vec<_> = (1..=20)
            .map(|n| service(&format!("a/s{n}:p"), &format!("10.96.1.{n}"), 80, &["10.128.0.1:1"]))
            .collect();
        let text = sync(&services, CIDR, |service| service.name == "a/s7:p");
        assert_eq!(text.matches("-A KUBE-SERVICES -d").count(), 20);
        assert_eq!(text.lines().filter(|line| line.starts_with(":KUBE-SVC-")).count(), 1);
        assert_eq!(text.matches("-j DNAT").count(), 1);
    }
}
