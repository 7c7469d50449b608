//! A simulated cluster in network namespaces.
//!
//! ```text
//!   fabric (10.99.0.1, and .254 for an API server)      outside (10.99.0.200)
//!      |  bridge br0, 10.99.0.0/24, fd00:99::/64             |
//!      +-----------------------+-----------------------------+
//!      |                       |
//!   node-a 10.99.0.2        node-b 10.99.0.3
//!      | cni0 10.244.0.1       | cni0 10.244.1.1
//!      +- pods 10.244.0.2...   +- pods 10.244.1.2...
//! ```
//!
//! As with the most common CNI set-up, pods hang on a bridge `cni0` whose ports allow
//! hairpin, and bridged packets pass the IP hooks (br_netfilter): without the latter the
//! reply of a pod to a pod of the same node would bypass the translation back.
//! Nodes route each other's pod ranges over the fabric; the fabric routes nothing beyond
//! these, so an address nobody programmed ends there as unreachable.

mod cgroup;
mod host;
mod layout;

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::offload::like_hardware;

pub use cgroup::{ClusterCgroup, mount_point as cgroup2_mount_point};
pub use host::{Host, HostCommand, Spawned};
pub use layout::{
    API_SERVER_V4, API_SERVER_V6, Families, OUTSIDE_EXTRA_V4, OUTSIDE_EXTRA_V6, VIP_RANGES_V4,
    VIP_RANGES_V6,
};

/// Neighbour discovery would hold addresses back for a second each; addresses here are
/// unique by construction.
const EVERY_HOST_V6: &[(&str, &str)] = &[
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
];
/// A lost INIT is sent again after 3 s by default, which is as long as a test waits.
const SCTP: &[(&str, &str)] = &[("sctp/rto_min", "200"), ("sctp/rto_initial", "500")];
const NO_V6: &[(&str, &str)] =
    &[("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/default/disable_ipv6", "1")];
/// What the kubelet and common distributions set; `rp_filter` 2 (loose) is what systemd ships.
const ROUTER_V4: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "2"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
];
const ROUTER_V6: &[(&str, &str)] = &[("ipv6/conf/all/forwarding", "1")];
const BRIDGE_NETFILTER: &[(&str, &str)] =
    &[("bridge/bridge-nf-call-iptables", "1"), ("bridge/bridge-nf-call-ip6tables", "1")];

/// How long a host may take until it reaches its gateway, and how often it tries.
const LINK_TIMEOUT: Duration = Duration::from_secs(20);
const LINK_POLL: Duration = Duration::from_millis(50);

/// What to build; see [`Cluster::builder`].
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    nodes: u8,
    pods: Vec<u8>,
    outside: bool,
    sockets: Sockets,
    families: Families,
}

/// Whose sockets are in the cgroups of their hosts when a thread of the caller makes them
/// ([`Host::in_netns`]), so that programs at these see them. Processes always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sockets {
    #[default]
    Nobodys,
    /// The nodes' own; pods are then like virtual machines, which have a kernel of their own.
    OfNodes,
    Everybodys,
}

impl ClusterBuilder {
    /// Named `node-a`, `node-b`, ... in zones `z1`, `z2`, ...
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// Pods with host numbers 2, 3, ... in their node's range.
    pub fn pods_per_node(mut self, pods: u8) -> Self {
        self.pods = (2..).take(usize::from(pods)).collect();
        self
    }

    /// Pods with these host numbers on every node: 5 is 10.244.i.5 and fd00:10:244:i::5.
    pub fn pod_host_numbers(mut self, numbers: &[u8]) -> Self {
        self.pods = numbers.to_vec();
        self
    }

    /// A client on the fabric that is no part of the cluster.
    pub fn outside_client(mut self) -> Self {
        self.outside = true;
        self
    }

    pub fn sockets(mut self, whose: Sockets) -> Self {
        self.sockets = whose;
        self
    }

    pub fn dual_stack(mut self) -> Self {
        self.families = Families::Dual;
        self
    }

    pub fn ipv4_only(mut self) -> Self {
        self.families = Families::V4;
        self
    }

    pub fn ipv6_only(mut self) -> Self {
        self.families = Families::V6;
        self
    }

    /// Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), ip(8) and a cgroup v2 mount.
    pub fn build(self) -> Result<Cluster> {
        ensure!((1..=26).contains(&self.nodes), "1 to 26 nodes, not {}", self.nodes);
        ensure!(
            self.pods.iter().all(|number| (2..=254).contains(number)),
            "pod host numbers are 2 to 254 (1 is the gateway)"
        );
        let cgroup = ClusterCgroup::create(self.sockets != Sockets::Nobodys)?;
        let families = self.families;
        load_bridge_netfilter();
        let fabric = host("fabric", &cgroup, families.fabric(1))?;
        let outside = if self.outside {
            Some(host("outside", &cgroup, families.fabric(layout::OUTSIDE_NUMBER))?)
        } else {
            None
        };
        let mut nodes = Vec::new();
        for index in 0..self.nodes {
            nodes.push(Node::create(index, &self, &cgroup)?);
        }
        let cluster = Cluster { nodes, outside, fabric, families, cgroup };
        cluster.wire()?;
        cluster.wait_for_links()?;
        Ok(cluster)
    }
}

fn host(name: &str, cgroup: &ClusterCgroup, address: layout::Pair) -> Result<Host> {
    Host::create(name.to_owned(), cgroup.child(name)?, cgroup.is_threaded(), address)
}

/// Built into some kernels, a module in others; where it is missing a test that needs it
/// sees so by [`Cluster::has_bridge_netfilter`].
fn load_bridge_netfilter() {
    if !Path::new("/proc/sys/net/bridge").exists() {
        let _ = Command::new("modprobe").args(["-q", "br_netfilter"]).status();
    }
}

/// Asks the gateway on a port where nobody listens until it refuses.
fn wait_for_gateway(host: &Host, (v4, v6): layout::Pair) -> Result<()> {
    host.in_netns(|| {
        for gateway in v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)) {
            let deadline = Instant::now() + LINK_TIMEOUT;
            loop {
                match TcpStream::connect_timeout(&(gateway, 1).into(), LINK_POLL) {
                    Ok(_) => break,
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => break,
                    Err(error) if Instant::now() > deadline => {
                        return Err(error)
                            .with_context(|| format!("{} to its gateway {gateway}", host.name()));
                    }
                    // Some errors come at once.
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        }
        Ok(())
    })?
}

/// A machine of the cluster; derefs to its [`Host`] (the node's own namespace).
#[derive(Debug)]
pub struct Node {
    host: Host,
    index: u8,
    zone: String,
    pods: Vec<Pod>,
    cgroup: std::path::PathBuf,
}

impl Deref for Node {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    fn create(index: u8, what: &ClusterBuilder, cgroup: &ClusterCgroup) -> Result<Self> {
        let families = what.families;
        let name = format!("node-{}", char::from(b'a' + index));
        let threaded = cgroup.is_threaded();
        let address = families.fabric(layout::FIRST_NODE_NUMBER + index);
        let host_cgroup = cgroup.child(&format!("{name}/host"))?;
        let host = Host::create(name.clone(), host_cgroup, threaded, address)?;
        let mut made = Vec::new();
        let pods_join = what.sockets == Sockets::Everybodys;
        for &number in &what.pods {
            let address = families.pod(index, number);
            let pod_name = format!("{name}-pod-{number}");
            let pod_cgroup = cgroup.child(&format!("{name}/pod-{number}"))?;
            let host = Host::create(pod_name, pod_cgroup, pods_join, address)?;
            made.push(Pod { host, number });
        }
        let zone = format!("z{}", index + 1);
        Ok(Self { host, index, zone, pods: made, cgroup: cgroup.child(&name)? })
    }

    pub fn zone(&self) -> &str {
        &self.zone
    }

    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// The cgroup over the node's own processes and all its pods.
    pub fn node_cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The ranges of its pods, as in the Node's `spec.podCIDRs`.
    pub fn pod_cidrs(&self, families: Families) -> Vec<String> {
        families.pod_cidrs(self.index)
    }
}

/// A pod: a namespace joined to its node's `cni0` by a veth pair named `eth0` inside.
#[derive(Debug)]
pub struct Pod {
    host: Host,
    number: u8,
}

impl Deref for Pod {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Pod {
    /// Its host number in the node's pod range.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The name of its veth end on the node.
    pub fn node_interface(&self) -> String {
        format!("veth{}", self.number)
    }
}

/// Nodes, pods, fabric and perhaps an outside client. Dropping it ends every process
/// started in it; the namespaces go with the last of them.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    outside: Option<Host>,
    fabric: Host,
    families: Families,
    cgroup: ClusterCgroup,
}

impl Cluster {
    /// One dual-stack node without pods, unless told otherwise.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            nodes: 1,
            pods: Vec::new(),
            outside: false,
            sockets: Sockets::default(),
            families: Families::Dual,
        }
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    pub fn pod(&self, node: usize, pod: usize) -> &Pod {
        &self.nodes[node].pods[pod]
    }

    /// Every pod, node by node.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// The client outside, if the builder was asked for one.
    pub fn outside(&self) -> Result<&Host> {
        self.outside.as_ref().context("this cluster was built without an outside client")
    }

    /// Where the test API server listens (see [`API_SERVER_V4`]).
    pub fn fabric(&self) -> &Host {
        &self.fabric
    }

    pub fn families(&self) -> Families {
        self.families
    }

    /// The cgroup over everything in this cluster.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Sends the outside client's traffic for `range` (`198.51.100.0/24`) to a node, as an
    /// external router or load balancer would. Service ranges begin at the first node.
    pub fn route_outside_via(&self, range: &str, node: usize) -> Result<()> {
        let is_v6 = range.contains(':');
        let gateway = self.nodes[node]
            .addresses()
            .into_iter()
            .find(|address| address.is_ipv6() == is_v6)
            .with_context(|| format!("{} has no address of {range}'s family", node))?;
        self.outside()?.ip_batch(&layout::replace_route(range, gateway))
    }

    /// Whether bridged packets pass the IP hooks on the nodes.
    pub fn has_bridge_netfilter(&self) -> bool {
        self.nodes[0].sysctl("bridge/bridge-nf-call-iptables").is_ok_and(|value| value == "1")
    }

    /// Makes the links between machines like network cards and cables ([`like_hardware`]).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn finish_frames(&self) -> Result<()> {
        let nodes = self.nodes.iter().map(|node| &node.host);
        for machine in nodes.chain(&self.outside) {
            machine.in_netns(|| like_hardware("eth0"))??;
            self.fabric.in_netns(|| like_hardware(machine.name()))??;
        }
        Ok(())
    }

    fn wire(&self) -> Result<()> {
        self.set_all_sysctls()?;
        self.fabric.ip_batch(&self.fabric_script())?;
        for node in &self.nodes {
            node.ip_batch(&self.node_script(node))?;
            for pod in &node.pods {
                pod.ip_batch(&layout::pod_script(&pod.host, node.index, self.families))?;
            }
        }
        if let Some(outside) = &self.outside {
            let gateways = self.nodes[0].addresses();
            outside.ip_batch(&layout::outside_script(outside, self.families, &gateways))?;
        }
        Ok(())
    }

    /// A bridge port forwards only once the kernel's link watcher has seen its carrier, which
    /// on a busy machine takes a while; a first packet lost then costs the test a second.
    fn wait_for_links(&self) -> Result<()> {
        for node in &self.nodes {
            wait_for_gateway(node, self.families.fabric(1))?;
            for pod in &node.pods {
                wait_for_gateway(pod, self.families.pod(node.index, 1))?;
            }
        }
        match &self.outside {
            Some(outside) => wait_for_gateway(outside, self.families.fabric(1)),
            None => Ok(()),
        }
    }

    fn set_all_sysctls(&self) -> Result<()> {
        let (v4, v6) = (self.families.has_v4(), self.families.has_v6());
        for host in self.hosts() {
            host.set_sysctls(if v6 { EVERY_HOST_V6 } else { NO_V6 })?;
            if host.sysctl("sctp/rto_min").is_ok() {
                host.set_sysctls(SCTP)?;
            }
        }
        for router in self.nodes.iter().map(|node| &node.host).chain([&self.fabric]) {
            if v4 {
                router.set_sysctls(ROUTER_V4)?;
            }
            if v6 {
                router.set_sysctls(ROUTER_V6)?;
            }
        }
        for node in &self.nodes {
            if node.sysctl("bridge/bridge-nf-call-iptables").is_ok() {
                node.set_sysctls(BRIDGE_NETFILTER)?;
            }
        }
        Ok(())
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        let nodes = self.nodes.iter().map(|node| &node.host);
        let pods = self.pods().map(|pod| &pod.host);
        nodes.chain(pods).chain(&self.outside).chain([&self.fabric])
    }

    fn fabric_script(&self) -> String {
        let mut script = layout::fabric_start(self.families);
        for node in &self.nodes {
            script += &layout::fabric_port(&node.host);
            // Otherwise its "unreachable" would not find back to a pod.
            script += &self.routes_to_pods_of(node);
        }
        if let Some(outside) = &self.outside {
            script += &layout::fabric_port(outside);
            script += &layout::routes_to_outside(outside);
        }
        script
    }

    fn routes_to_pods_of(&self, node: &Node) -> String {
        let mut script = String::new();
        for range in self.families.pod_cidrs(node.index) {
            let v6 = range.contains(':');
            if let Some(gateway) = node.addresses().into_iter().find(|ip| ip.is_ipv6() == v6) {
                script += &layout::replace_route(&range, gateway);
            }
        }
        script
    }

    fn node_script(&self, node: &Node) -> String {
        let mut script = layout::node_start(&node.host, node.index, self.families);
        for pod in &node.pods {
            script += &layout::pod_port(&pod.node_interface(), &pod.host);
        }
        for other in self.nodes.iter().filter(|other| other.index != node.index) {
            script += &self.routes_to_pods_of(other);
        }
        if let Some(outside) = &self.outside {
            // Not by way of the fabric, which has no route back to a Service's address and so
            // takes replies from one for forged (rp_filter).
            script += &layout::routes_to_outside(outside);
        }
        script
    }
}
