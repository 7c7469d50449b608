//! Flags and files to one validated [`Config`].
//!
//! `flags` takes the command line as text, [`value`] parses kube-proxy's kinds of values,
//! `build` judges everything and reports all mistakes together. A file is taken apart by
//! `file` and becomes flags (`fields` says which), which `cli` puts in the right order with
//! those of the command line: one set of rules holds for both. What kube-proxy has and this
//! daemon has no use for is in `inert`.

mod build;
#[cfg(test)]
mod chart_tests;
mod check;
mod cli;
#[cfg(test)]
mod deploy_tests;
mod document;
#[cfg(test)]
mod document_tests;
mod fields;
mod file;
#[cfg(test)]
mod file_tests;
mod flags;
#[cfg(test)]
mod generated_tests;
mod inert;
#[cfg(test)]
mod inert_tests;
mod modes;
#[cfg(test)]
mod own_tests;
#[cfg(test)]
mod tests;
mod tree;
pub mod value;

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;

pub use build::{Problem, Problems};
pub use cli::command;
pub use document::{document, yaml};
pub use flags::Flags;

pub use crate::model::Selection;
use crate::model::{LocalDetect, Node, NodeName};

/// Everything the daemon was told, checked. Immutable for the life of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub proxy_mode: ProxyMode,
    /// Take down what the daemon programmed, then exit.
    pub cleanup: bool,
    /// Prepare the kernel, then exit.
    pub init_only: bool,
    /// Write this configuration there, then exit.
    pub write_config_to: Option<PathBuf>,
    /// The files it was read from.
    pub files: Vec<PathBuf>,
    pub source: Source,
    pub node_name: NodeName,
    pub cluster_cidrs: Vec<IpNetwork>,
    pub detect_local: DetectLocal,
    /// The node's own address of its family, in place of the Node object's.
    pub bind_address: Option<IpAddr>,
    pub node_port_addresses: NodePortAddresses,
    /// Node ports also answer on 127.0.0.0/8, where the mode can do that.
    pub localhost_node_ports: bool,
    pub masquerade: Masquerade,
    /// A removed endpoint's connections may go on for so long.
    pub drain_timeout: Duration,
    pub ipvs: Ipvs,
    pub conntrack: Conntrack,
    pub serving: Serving,
    pub series: SeriesLimits,
    pub logging: Logging,
    /// `None`: find the cgroup2 mount.
    pub cgroup_root: Option<PathBuf>,
    /// Patterns of cgroups.
    pub socket_opt_outs: Vec<String>,
    /// Names and patterns; none: every Ethernet device that is no part of another.
    pub devices: Vec<String>,
    pub xdp: Xdp,
    pub selection: Selection,
    pub direct_server_return: DirectServerReturn,
    /// UDP.
    pub direct_server_return_port: u16,
    pub map_sizes: MapSizes,
    pub map_limits: MapSizes,
    pub bpf_root: PathBuf,
    /// `/proc/sys`, or where the host's is mounted writable.
    pub sysctl_root: PathBuf,
    /// -1000 to 1000.
    pub oom_score_adj: i32,
    /// kube-proxy's settings that have no effect here but are part of its configuration: path of
    /// the field and value, where they are not its default.
    pub inert: Vec<(&'static str, serde_json::Value)>,
    /// The mode as kube-proxy knows it: its file's, which may be another than ours.
    pub kube_proxy_mode: String,
    /// Every flag with its value in force, whether it came from a file or the command line.
    pub flags: Vec<(String, String)>,
    /// Accepted, but without effect here: for the log.
    pub notes: Vec<String>,
    /// Accepted, but probably not what was meant: for the log.
    pub warnings: Vec<String>,
}

/// Entries of ebpf mode's maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    pub frontends: u32,
    pub backends: u32,
    pub slots: u32,
    /// Connections at devices; `None`: by `--conntrack-max-per-core` and `--conntrack-min`.
    pub flows: Option<u32>,
    /// Sockets with a peer; `None`: the default.
    pub sockets: Option<u32>,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self { frontends: 65_536, backends: 327_680, slots: 524_288, flows: None, sockets: None }
    }
}

impl MapSizes {
    /// What they may grow to.
    pub const LIMITS: Self =
        Self { frontends: 1 << 20, backends: 1 << 22, slots: 1 << 24, flows: None, sockets: None };
}

/// Where ebpf mode attaches its program at XDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Xdp {
    #[default]
    Off,
    /// In the driver where it can, else generic.
    Auto,
    Native,
    Generic,
}

impl fmt::Display for Xdp {
    /// The value of the flag.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// Whether packets go to another node's endpoints as they came, for these to answer the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectServerReturn {
    #[default]
    Off,
    /// Other nodes' are taken, none are sent.
    Accept,
    On,
}

impl fmt::Display for DirectServerReturn {
    /// The value of the flag.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Accept => "accept",
            Self::On => "on",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    Ipvs,
    Ebpf,
}

impl fmt::Display for ProxyMode {
    /// The value of the flag, and the body of `/proxyMode`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipvs => "ipvs",
            Self::Ebpf => "ebpf",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Api {
        /// `None`: the Pod's service account.
        kubeconfig: Option<PathBuf>,
        /// Goes before the URL of the kubeconfig.
        master: Option<String>,
    },
    Manifests(PathBuf),
}

/// `--detect-local-mode` with what the mode needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectLocal {
    ClusterCidr,
    NodeCidr,
    BridgeInterface(String),
    InterfaceNamePrefix(String),
}

impl DetectLocal {
    /// The value of the flag.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ClusterCidr => "ClusterCIDR",
            Self::NodeCidr => "NodeCIDR",
            Self::BridgeInterface(_) => "BridgeInterface",
            Self::InterfaceNamePrefix(_) => "InterfaceNamePrefix",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All of the node's addresses except loopback.
    All,
    /// The Node object's first address of each family.
    Primary,
    /// The node's addresses within these.
    Cidrs(Vec<IpNetwork>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Masquerade {
    /// All traffic to cluster IPs, not only that from outside the cluster.
    pub all: bool,
    /// 0 to 31.
    pub bit: u8,
}

impl Masquerade {
    /// The packet mark of packets to be masqueraded; also its mask.
    #[must_use]
    pub const fn mark(self) -> u32 {
        1 << self.bit
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipvs {
    pub scheduler: String,
    /// Longest time between two full comparisons with the kernel; above 0.
    pub sync_period: Duration,
    /// Shortest time between two rounds; at most `sync_period`.
    pub min_sync_period: Duration,
    pub strict_arp: bool,
    /// `None` leaves the kernel's; else at least a second, which is the kernel's unit.
    pub tcp_timeout: Option<Duration>,
    pub tcp_fin_timeout: Option<Duration>,
    pub udp_timeout: Option<Duration>,
    pub exclude_cidrs: Vec<IpNetwork>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conntrack {
    /// `None` leaves the kernel's limit.
    pub max_per_core: Option<NonZeroU32>,
    pub min: u32,
    /// `None` leaves the kernel's, here and below.
    pub tcp_established_timeout: Option<Duration>,
    pub tcp_close_wait_timeout: Option<Duration>,
    pub tcp_be_liberal: bool,
    pub udp_timeout: Option<Duration>,
    pub udp_stream_timeout: Option<Duration>,
}

impl Conntrack {
    /// `nf_conntrack_max` for a node of so many cores; `None` leaves the kernel's.
    #[must_use]
    pub fn max(&self, cores: u32) -> Option<u32> {
        self.max_per_core.map(|per_core| per_core.get().saturating_mul(cores).max(self.min))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serving {
    /// `None`: not served.
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// Failure to bind ends the daemon.
    pub hard_fail: bool,
    /// `/debug/` beside the metrics.
    pub profiling: bool,
}

/// What may have metrics of traffic of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeriesLimits {
    /// 0: none are read.
    pub service_ports: usize,
    pub endpoints: bool,
    /// Where endpoints have any.
    pub endpoint_limit: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logging {
    pub verbosity: u32,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

impl Logging {
    /// klog's numbers on tracing's levels: `-v=2`, which most clusters set, stays quiet.
    #[must_use]
    pub const fn level(self) -> tracing::Level {
        match self.verbosity {
            0..=3 => tracing::Level::INFO,
            4..=5 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        }
    }
}

fn version() -> String {
    concat!("proxy-daemon ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// As `--version=raw` of kube-proxy: for tools.
fn version_raw() -> String {
    serde_json::json!({
        "name": "proxy-daemon",
        "version": env!("CARGO_PKG_VERSION"),
        "kubernetes": KUBERNETES,
        "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    })
    .to_string()
}

/// Whose flags, fields and metrics these are.
pub const KUBERNETES: &str = "1.36";

/// Why there is no [`Config`].
#[derive(Debug)]
pub enum Usage {
    /// `--help`, or a command line that cannot be taken apart.
    Clap(Box<clap::Error>),
    /// The answer to `--version` or `config check`, for standard output.
    Print { text: String, code: u8 },
    /// Values that cannot be used, all of them.
    Problems(Problems),
}

impl Usage {
    /// Prints help and version on standard output, mistakes on standard error.
    ///
    /// # Errors
    /// When the stream cannot be written.
    pub fn print(&self) -> std::io::Result<()> {
        use std::io::Write as _;
        match self {
            Self::Clap(error) => error.print(),
            Self::Print { text, .. } => writeln!(std::io::stdout(), "{text}"),
            Self::Problems(problems) => writeln!(std::io::stderr(), "{problems}"),
        }
    }

    /// 0 for help and version, 2 for a mistake.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Clap(error) if !error.use_stderr() => 0,
            Self::Print { code, .. } => *code,
            Self::Clap(_) | Self::Problems(_) => 2,
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clap(error) => error.fmt(f),
            Self::Print { text, .. } => text.fmt(f),
            Self::Problems(problems) => problems.fmt(f),
        }
    }
}

impl std::error::Error for Usage {}

impl Config {
    /// The command line (`arguments` begins with the program's name) and the host's name,
    /// which is the node's unless a flag says otherwise.
    ///
    /// # Errors
    /// [`Usage`], which the caller prints and exits with.
    pub fn from_args<I, T>(arguments: I, hostname: &str) -> Result<Self, Usage>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        let arguments = arguments.into_iter().map(|argument| dashes(argument.into())).collect();
        cli::config(arguments, hostname)
    }

    /// Whether a daemon that runs with `self` would do the same with `other`.
    #[must_use]
    pub fn same_effect(&self, other: &Self) -> bool {
        let quiet = |config: &Self| Self {
            inert: vec![],
            kube_proxy_mode: String::new(),
            flags: vec![],
            notes: vec![],
            warnings: vec![],
            ..config.clone()
        };
        quiet(self) == quiet(other)
    }

    /// What counts as traffic of this node's pods, given the Node as it is now. NodeCIDR
    /// mode knows nothing before the Node has its pod CIDRs.
    #[must_use]
    pub fn local_detect(&self, node: Option<&Node>) -> LocalDetect {
        let cidrs = |cidrs: &[IpNetwork]| match cidrs {
            [] => LocalDetect::Unknown,
            _ => LocalDetect::Cidrs(cidrs.to_vec()),
        };
        match &self.detect_local {
            DetectLocal::ClusterCidr => cidrs(&self.cluster_cidrs),
            DetectLocal::NodeCidr => cidrs(node.map_or(&[], |node| &node.pod_cidrs)),
            DetectLocal::BridgeInterface(name) => LocalDetect::Bridge(name.as_str().into()),
            DetectLocal::InterfaceNamePrefix(prefix) => {
                LocalDetect::InterfacePrefix(prefix.as_str().into())
            }
        }
    }

    /// How old a change may get, or how long an object may fail, before health is bad.
    #[must_use]
    pub const fn health_timeout(&self) -> Duration {
        self.ipvs.sync_period.saturating_mul(2)
    }
}

/// kube-proxy takes `_` for `-` in names of flags, and old manifests use it.
fn dashes(argument: OsString) -> OsString {
    let Some(text) = argument.to_str().filter(|text| text.starts_with("--")) else {
        return argument;
    };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    format!("{}{value}", name.replace('_', "-")).into()
}
