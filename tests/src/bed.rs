//! A simulated cluster with a test API server on its fabric and the daemon on its nodes.

use std::fs::{self, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use ipnetwork::{IpNetwork, Ipv4Network};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};

use crate::apiserver::{ApiServer, Options};
use crate::cluster::{
    API_SERVER_V4, API_SERVER_V6, Cluster, Families, Host, HostCommand, Node, Sockets, Spawned,
};
use crate::confinement;
use crate::mounts::{hide_mounts, mount_bpf};
use crate::traffic::{Listen, Protocol, Server};

/// 10.96.0.0 to 10.97.255.255.
const SERVICE_RANGE: IpNetwork =
    IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::new(10, 96, 0, 0), 15).unwrap());

/// Where the API server listens, as usual.
const API_PORT: u16 = 6443;

/// What to build.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The daemon's program.
    pub daemon: PathBuf,
    /// The program that starts it with no more than its DaemonSet allows; without, it has all
    /// that root has.
    pub confined: Option<PathBuf>,
    /// `--proxy-mode`.
    pub mode: &'static str,
    pub families: Families,
    /// Programs at the nodes' cgroups see these.
    pub sockets: Sockets,
    pub nodes: u8,
    pub pods_per_node: u8,
    /// Where logs and the kubeconfig go.
    pub directory: PathBuf,
    /// Arguments of every daemon besides those that name the node and the cluster.
    pub arguments: Vec<String>,
}

/// Everything that runs; dropped in this order.
#[derive(Debug)]
pub struct Bed {
    /// By node.
    daemons: Vec<Option<Spawned>>,
    servers: Vec<Server>,
    api: ApiServer,
    cluster: Cluster,
    settings: Settings,
}

impl Bed {
    /// Cluster, API server and Node objects, with a client outside; no daemon yet.
    ///
    /// # Errors
    /// When this is not root on a kernel that has what it takes.
    pub fn build(settings: Settings) -> Result<Self> {
        load_modules();
        if settings.mode == "ebpf" {
            hide_mounts()?;
        }
        fs::create_dir_all(&settings.directory)?;
        let builder = Cluster::builder()
            .nodes(settings.nodes)
            .pods_per_node(settings.pods_per_node)
            .outside_client()
            .sockets(settings.sockets);
        let cluster = match settings.families {
            Families::V4 => builder.ipv4_only(),
            Families::V6 => builder.ipv6_only(),
            Families::Dual => builder.dual_stack(),
        }
        .build()?;
        let options = api_options(settings.families);
        let api = cluster.fabric().in_netns(|| ApiServer::start(options))??;
        let bed = Self { daemons: Vec::new(), servers: Vec::new(), api, cluster, settings };
        bed.api.write_kubeconfig(&bed.kubeconfig(), None)?;
        if bed.settings.mode == "ebpf" {
            (0..bed.cluster.nodes().len()).try_for_each(|node| mount_bpf(&bed.bpf_root(node)))?;
        }
        for node in bed.cluster.nodes() {
            bed.apply(node_object(node, bed.cluster.families()))?;
        }
        Ok(bed)
    }

    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    #[must_use]
    pub fn mode(&self) -> &'static str {
        self.settings.mode
    }

    /// Pods are translated as they connect, and not packet by packet.
    #[must_use]
    pub fn by_sockets(&self) -> bool {
        self.settings.mode == "ebpf" && self.settings.sockets == Sockets::Everybodys
    }

    fn kubeconfig(&self) -> PathBuf {
        self.settings.directory.join("kubeconfig")
    }

    /// Where a node's daemon has the BPF file system, in ebpf mode.
    #[must_use]
    pub fn bpf_root(&self, node: usize) -> PathBuf {
        self.settings.directory.join(format!("bpf-{}", self.cluster.node(node).name()))
    }

    /// What each daemon needs for itself where nodes share a kernel.
    fn own_arguments(&self, node: usize) -> Vec<String> {
        if self.settings.mode != "ebpf" {
            return Vec::new();
        }
        let cgroup = match self.settings.confined {
            Some(_) => Path::new(confinement::CGROUP_ROOT),
            None => self.cluster.node(node).node_cgroup(),
        };
        vec![
            format!("--bpf-root={}", self.bpf_root(node).display()),
            format!("--cgroup-root={}", cgroup.display()),
        ]
    }

    /// The daemon's program on a node, behind the one that confines it.
    fn command(&self, node: usize) -> Result<HostCommand<'_>> {
        let on = self.cluster.node(node);
        let Some(confined) = &self.settings.confined else {
            return Ok(on.command(&self.settings.daemon));
        };
        let capabilities = confinement::capabilities_here(self.settings.mode)?.join(",");
        let mut mounts = vec![confinement::shown(&self.settings.directory, None)];
        if self.settings.mode == "ebpf" {
            let root = Some(confinement::CGROUP_ROOT);
            mounts.push(confinement::shown(on.node_cgroup(), root));
        }
        if let Some(object) = std::env::var_os("PROXY_EBPF_OBJECT") {
            mounts.push(confinement::shown(Path::new(&object), None));
        }
        Ok(on
            .command(confined)
            .arg(format!("--capabilities={capabilities}"))
            .args(mounts.iter().map(|mount| format!("--mount={mount}")))
            .arg(&self.settings.daemon)
            .arg(format!("--sysctl-root={}", confinement::SYSCTL_ROOT)))
    }

    fn log_path(&self, node: usize) -> PathBuf {
        self.settings.directory.join(format!("{}.log", self.cluster.node(node).name()))
    }

    /// Starts the daemon on a node, ending the one that runs there; `extra` goes behind the
    /// usual arguments, and so before them where both name a flag. Logs go on in one file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_daemon(&mut self, node: usize, extra: &[String]) -> Result<()> {
        self.kill_daemon(node)?;
        let log = OpenOptions::new().create(true).append(true).open(self.log_path(node))?;
        let on = self.cluster.node(node);
        let daemon = self
            .command(node)?
            .arg(format!("--proxy-mode={}", self.settings.mode))
            .arg(format!("--hostname-override={}", on.name()))
            .arg(format!("--cluster-cidr={}", self.cluster.families().cluster_cidr()))
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(self.own_arguments(node))
            .args(&self.settings.arguments)
            .args(extra)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        if self.daemons.len() <= node {
            self.daemons.resize_with(node + 1, || None);
        }
        self.daemons[node] = Some(daemon);
        Ok(())
    }

    /// On every node.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_daemons(&mut self) -> Result<()> {
        (0..self.cluster.nodes().len()).try_for_each(|node| self.start_daemon(node, &[]))
    }

    /// SIGKILL, as a crash would be.
    ///
    /// # Errors
    /// When it had ended by itself, or cannot be ended.
    pub fn kill_daemon(&mut self, node: usize) -> Result<()> {
        let Some(mut daemon) = self.daemons.get_mut(node).and_then(Option::take) else {
            return Ok(());
        };
        if let Some(status) = daemon.child().try_wait()? {
            bail!("the daemon on node {node} ended by itself: {status}");
        }
        daemon.kill()?;
        Ok(())
    }

    /// The exit status of the daemon on this node, once it has ended by itself.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn daemon_ended(&mut self, node: usize) -> Result<Option<std::process::ExitStatus>> {
        match self.daemons.get_mut(node).and_then(Option::as_mut) {
            Some(daemon) => Ok(daemon.child().try_wait()?),
            None => Ok(None),
        }
    }

    /// Lets go of a daemon that ended by itself.
    pub fn forget_daemon(&mut self, node: usize) {
        if let Some(daemon) = self.daemons.get_mut(node) {
            *daemon = None;
        }
    }

    /// Whether some daemon ended that nobody killed.
    pub fn a_daemon_ended(&mut self) -> bool {
        (0..self.daemons.len()).any(|node| !matches!(self.daemon_ended(node), Ok(None)))
    }

    /// Makes the object, or makes it what `object` says.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn apply(&self, object: Value) -> Result<()> {
        let what = format!("{} {}", object["kind"], object["metadata"]["name"]);
        match self.api.store().apply(object) {
            Ok(_) => Ok(()),
            Err(status) => bail!("the API server refuses {what}: {status}"),
        }
    }

    /// A server called `name` on all addresses of a pod, at each of these ports, until the
    /// bed ends.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn serve(
        &mut self,
        pod: (usize, usize),
        name: &str,
        ports: &[(Protocol, u16)],
    ) -> Result<()> {
        let host: &Host = self.cluster.pod(pod.0, pod.1);
        let mut listen = Vec::new();
        for &(protocol, port) in ports {
            for ip in host.addresses() {
                listen.push(Listen { protocol, address: SocketAddr::new(ip, port) });
            }
        }
        let server = host.in_netns(|| Server::start(name, &listen))??;
        self.servers.push(server);
        Ok(())
    }

    /// The last lines of each daemon's log.
    #[must_use]
    pub fn log_tails(&self, lines: usize) -> String {
        let mut text = String::new();
        for (index, node) in self.cluster.nodes().iter().enumerate() {
            let log = self.log(index);
            let all: Vec<&str> = log.lines().collect();
            text += &format!("--- the last of {}'s log\n", node.name());
            for line in &all[all.len().saturating_sub(lines)..] {
                text += line;
                text.push('\n');
            }
        }
        text
    }

    /// What the daemons on this node have logged so far.
    #[must_use]
    pub fn log(&self, node: usize) -> String {
        fs::read_to_string(self.log_path(node)).unwrap_or_default()
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.settings.directory
    }
}

impl Drop for Bed {
    /// What was mounted for the daemons goes, or else the directory could not.
    fn drop(&mut self) {
        self.daemons.clear();
        for node in 0..self.cluster.nodes().len() {
            // Most modes mount nothing.
            let _ = umount2(&self.bpf_root(node), MntFlags::MNT_DETACH);
        }
    }
}

fn api_options(families: Families) -> Options {
    let listen: IpAddr =
        if families.has_v4() { API_SERVER_V4.into() } else { API_SERVER_V6.into() };
    let listen = SocketAddr::new(listen, API_PORT);
    let mut options = Options { listen, kubernetes_endpoint: Some(listen), ..Options::default() };
    // Without the nodes' own network, which is inside of what was recorded: then what no
    // Service holds is not dropped.
    options.service_ranges[0] = SERVICE_RANGE;
    options.service_ranges.retain(|range| match range {
        IpNetwork::V4(_) => families.has_v4(),
        IpNetwork::V6(_) => families.has_v6(),
    });
    options
}

/// Modules that the kernel does not load by itself inside a namespace. What is built in, or
/// truly missing, is for the daemon to judge.
fn load_modules() {
    let modules =
        ["ip_vs", "ip_vs_rr", "dummy", "nf_tables", "nf_conntrack", "br_netfilter", "sctp"];
    let _ = Command::new("modprobe").arg("-qa").args(modules).status();
}

/// The Node object of a simulated node.
#[must_use]
pub fn node_object(node: &Node, families: Families) -> Value {
    let cidrs = node.pod_cidrs(families);
    let addresses: Vec<Value> = node
        .addresses()
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": node.name(),
            "labels": {
                "kubernetes.io/hostname": node.name(),
                "topology.kubernetes.io/zone": node.zone(),
            },
        },
        "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
        "status": {"addresses": addresses},
    })
}

/// For messages about an address that should be there.
///
/// # Errors
/// When the host has no address of that family.
pub fn address_like(host: &Host, like: IpAddr) -> Result<IpAddr> {
    host.address_like(like).with_context(|| format!("{} has no address like {like}", host.name()))
}
