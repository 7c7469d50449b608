//! The address plan, and the ip(8) batch scripts that lay it out.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Host;

/// Which address families the cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    V4,
    V6,
    Dual,
}

/// An address per family the cluster has.
pub(super) type Pair = (Option<Ipv4Addr>, Option<Ipv6Addr>);

/// Host number of the outside client on the fabric.
pub(super) const OUTSIDE_NUMBER: u8 = 200;
/// Host number of `node-a` on the fabric.
pub(super) const FIRST_NODE_NUMBER: u8 = 2;

/// A second address of the fabric's namespace, meant for the API server.
pub const API_SERVER_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);
pub const API_SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0xfe);

/// A second address of the outside client, from the documentation ranges (RFC 5737,
/// RFC 3849), so that source ranges can tell it from its fabric address.
pub const OUTSIDE_EXTRA_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
pub const OUTSIDE_EXTRA_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5);

/// Service addresses the outside client reaches through the first node: ClusterIPs,
/// external IPs, load balancer addresses.
pub const VIP_RANGES_V4: &[&str] = &["10.96.0.0/12", "198.51.100.0/24", "203.0.113.64/26"];
pub const VIP_RANGES_V6: &[&str] = &["fd00:10:96::/108", "2001:db8:1::/48"];

impl Families {
    pub fn has_v4(self) -> bool {
        self != Families::V6
    }

    pub fn has_v6(self) -> bool {
        self != Families::V4
    }

    fn pair(self, v4: Ipv4Addr, v6: Ipv6Addr) -> Pair {
        (self.has_v4().then_some(v4), self.has_v6().then_some(v6))
    }

    /// 10.99.0.N and fd00:99::N.
    pub(super) fn fabric(self, number: u8) -> Pair {
        self.pair(
            Ipv4Addr::new(10, 99, 0, number),
            Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, number.into()),
        )
    }

    /// 10.244.node.N and fd00:10:244:node::N.
    pub(super) fn pod(self, node: u8, number: u8) -> Pair {
        self.pair(
            Ipv4Addr::new(10, 244, node, number),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, number.into()),
        )
    }

    pub(super) fn pod_cidrs(self, node: u8) -> Vec<String> {
        let (v4, v6) = self.pod(node, 0);
        let v4 = v4.map(|network| format!("{network}/24"));
        let v6 = v6.map(|network| format!("{network}/64"));
        v4.into_iter().chain(v6).collect()
    }

    /// The ranges all pods are in, as in `--cluster-cidr`.
    pub fn cluster_cidr(self) -> &'static str {
        match self {
            Families::V4 => "10.244.0.0/16",
            Families::V6 => "fd00:10:244::/56",
            Families::Dual => "10.244.0.0/16,fd00:10:244::/56",
        }
    }
}

pub(super) fn replace_route(range: &str, gateway: IpAddr) -> String {
    format!("route replace {range} via {gateway}\n")
}

fn add_addresses(script: &mut String, interface: &str, pair: Pair) {
    let (v4, v6) = pair;
    if let Some(address) = v4 {
        let _ = writeln!(script, "addr add {address}/24 dev {interface}");
    }
    if let Some(address) = v6 {
        let _ = writeln!(script, "addr add {address}/64 dev {interface} nodad");
    }
}

fn default_routes(script: &mut String, pair: Pair) {
    let (v4, v6) = pair;
    for gateway in v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)) {
        script.push_str(&replace_route("default", gateway));
    }
}

/// Learning which ports want multicast takes seconds during which neighbour solicitations
/// are lost, hence no snooping.
const BRIDGE: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";

pub(super) fn fabric_start(families: Families) -> String {
    let mut script = format!("link set lo up\nlink add br0 {BRIDGE}\nlink set br0 up\n");
    add_addresses(&mut script, "br0", families.fabric(1));
    let api_server = families.pair(API_SERVER_V4, API_SERVER_V6);
    add_addresses(&mut script, "br0", api_server);
    script
}

/// A fabric port whose other end is `eth0` of `host`.
pub(super) fn fabric_port(host: &Host) -> String {
    let name = host.name();
    let netns = host.netns_path();
    format!(
        "link add {name} type veth peer name eth0 netns {netns}\n\
         link set {name} master br0 up\n"
    )
}

/// Replies to the client's second address find their way from any node.
pub(super) fn routes_to_outside(outside: &Host) -> String {
    let v4 = outside.ipv4().map(|via| replace_route("203.0.113.0/26", via.into()));
    let v6 = outside.ipv6().map(|via| replace_route("2001:db8::/64", via.into()));
    v4.into_iter().chain(v6).collect()
}

pub(super) fn node_start(host: &Host, index: u8, families: Families) -> String {
    let mut script =
        format!("link set lo up\nlink set eth0 up\nlink add cni0 {BRIDGE}\nlink set cni0 up\n");
    add_addresses(&mut script, "eth0", (host.ipv4(), host.ipv6()));
    add_addresses(&mut script, "cni0", families.pod(index, 1));
    default_routes(&mut script, families.fabric(1));
    script
}

/// A port of `cni0` whose other end is `eth0` of `pod`.
pub(super) fn pod_port(interface: &str, pod: &Host) -> String {
    let netns = pod.netns_path();
    format!(
        "link add {interface} type veth peer name eth0 netns {netns}\n\
         link set {interface} master cni0 up\n\
         link set {interface} type bridge_slave hairpin on\n"
    )
}

pub(super) fn pod_script(pod: &Host, node: u8, families: Families) -> String {
    let mut script = String::from("link set lo up\nlink set eth0 up\n");
    add_addresses(&mut script, "eth0", (pod.ipv4(), pod.ipv6()));
    default_routes(&mut script, families.pod(node, 1));
    script
}

/// The client outside: its addresses, and the Service ranges by way of one node.
pub(super) fn outside_script(outside: &Host, families: Families, via: &[IpAddr]) -> String {
    let mut script = String::from("link set lo up\nlink set eth0 up\n");
    add_addresses(&mut script, "eth0", (outside.ipv4(), outside.ipv6()));
    if families.has_v4() {
        let _ = writeln!(script, "addr add {OUTSIDE_EXTRA_V4}/32 dev lo");
    }
    if families.has_v6() {
        let _ = writeln!(script, "addr add {OUTSIDE_EXTRA_V6}/128 dev lo nodad");
    }
    for gateway in via {
        let ranges = if gateway.is_ipv4() { VIP_RANGES_V4 } else { VIP_RANGES_V6 };
        for range in ranges {
            script.push_str(&replace_route(range, *gateway));
        }
    }
    script
}
