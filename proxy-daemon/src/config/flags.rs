//! The command line: kube-proxy's names, defaults and meanings, and a few of our own.
//!
//! Every value is taken as text here and judged in [`super::build`], so that all
//! mistakes of a command line are reported together instead of one per attempt.

use std::path::PathBuf;

use clap::builder::styling::Styles;
use clap::{Args, Parser, Subcommand};

const ABOUT: &str =
    "Programs Kubernetes Services into the kernel of this node, in kube-proxy's place";

const LONG_ABOUT: &str = "Programs Kubernetes Services into the kernel of this node, in kube-proxy's \
                     place.\n\nFlags carry kube-proxy's names and meanings. Durations are written \
                     30s, 1m0s, 2h45m; switches --flag, --flag=true or --flag=false; lists are \
                     separated by commas.";

const EXAMPLES: &str = "\
Examples:
  In a cluster, as the DaemonSet of deploy/ runs it:
    proxy-daemon --proxy-mode=ipvs --hostname-override=$(NODE_NAME) \\
        --cluster-cidr=10.244.0.0/16,fd00:10:244::/56

  On a node, with a kubeconfig and least-connection scheduling:
    proxy-daemon --kubeconfig=/etc/kubernetes/proxy.conf --ipvs-scheduler=lc

  Without Kubernetes, from a directory of Service and EndpointSlice YAML:
    proxy-daemon --manifests=./services --hostname-override=node-a

  With kube-proxy's own configuration, which names another mode or none:
    proxy-daemon config check --proxy-mode=ipvs /var/lib/kube-proxy/config.conf
    proxy-daemon --config=/var/lib/kube-proxy/config.conf --proxy-mode=ipvs

  Take everything down that this daemon programmed on the node:
    proxy-daemon --cleanup

  See how it is doing:
    curl -s localhost:10256/healthz
    curl -s localhost:10249/metrics | grep -v '^#'

Exit status: 0 after --cleanup, --help and --version; 2 for a mistake in the flags or the \
configuration; 1 for anything else that stops the daemon, with the reason on standard error.";

/// Short help texts fit a terminal; the long ones teach.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "proxy-daemon",
    disable_version_flag = true,
    about = ABOUT,
    long_about = LONG_ABOUT,
    disable_help_subcommand = true,
    after_long_help = EXAMPLES,
    after_help = "--help has examples and the whole explanations.",
    args_override_self = true,
    styles = Styles::plain(),
    max_term_width = 100
)]
pub struct Flags {
    #[command(flatten)]
    pub mode: ModeFlags,
    #[command(flatten)]
    pub source: SourceFlags,
    #[command(flatten)]
    pub traffic: TrafficFlags,
    #[command(flatten)]
    pub ipvs: IpvsFlags,
    #[command(flatten)]
    pub conntrack: ConntrackFlags,
    #[command(flatten)]
    pub serving: ServingFlags,
    #[command(flatten)]
    pub host: HostFlags,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Work on configuration files
    #[command(subcommand, disable_help_subcommand = true)]
    Config(ConfigCommand),
}

#[derive(Debug, Clone, Subcommand)]
pub enum ConfigCommand {
    /// Explain a kube-proxy configuration: what carries over, what has no effect, what is wrong
    ///
    /// Reads a KubeProxyConfiguration, with the daemon's own options behind it if there are
    /// any, or a ConfigMap that holds one: kubectl -n kube-system get configmap kube-proxy
    /// -o yaml | proxy-daemon config check -
    ///
    /// Exit status: 0 when the daemon would start with it, 2 when not.
    Check(CheckArgs),
}

#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// The file; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// As on the daemon's command line: the mode where the file has none that exists here
    #[arg(long, value_name = "MODE", default_value = "", hide_default_value = true)]
    pub proxy_mode: String,

    /// Unknown fields count as mistakes
    #[arg(long)]
    pub strict: bool,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "What to do")]
pub struct ModeFlags {
    /// Data plane: ipvs or ebpf
    ///
    /// ipvs makes virtual servers of the kernel's IPVS; ebpf attaches programs to sockets
    /// and devices. kube-proxy's iptables and nftables modes do not exist here.
    #[arg(long, value_name = "MODE", default_value = "ipvs")]
    pub proxy_mode: String,

    /// Remove from this node what the daemon programmed and what kube-proxy left, then exit
    ///
    /// Nothing else goes. Virtual servers within --ipvs-exclude-cidrs stay, and while
    /// kube-proxy runs so does what is its own.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub cleanup: String,

    /// kube-proxy's configuration file; it goes before all flags that it has a field for
    ///
    /// Except --hostname-override and the flags of the log, which go before the file. A mode
    /// that does not exist here, or none, is replaced by --proxy-mode. A second YAML document
    /// of kind NodeDataplaneConfiguration, which kube-proxy does not read, holds this daemon's
    /// own options. When the file changes the daemon exits, to be started again with it.
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true)]
    pub config: String,

    /// A file with a NodeDataplaneConfiguration alone: this daemon's own options
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true)]
    pub dataplane_config: String,

    /// Write the configuration as it results from all flags and files to this file, then exit
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true)]
    pub write_config_to: String,

    /// Check and prepare the kernel (modules, settings), then exit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub init_only: String,

    /// Print the version and exit; raw says more
    #[arg(long, value_name = "true|false|raw", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub version: String,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Where Services come from")]
pub struct SourceFlags {
    /// Kubeconfig file with the API server's address and credentials
    ///
    /// Without it (and without --manifests) the Pod's service account is used.
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true)]
    pub kubeconfig: String,

    /// URL of the API server; goes before the one in the kubeconfig
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    pub master: String,

    /// Name of this node's Node object [default: the host name]
    ///
    /// Decides which endpoints are local. It must be metadata.name of the Node, which the
    /// downward API gives a Pod as spec.nodeName.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub hostname_override: String,

    /// Read Service, EndpointSlice and Node YAML from this directory instead of an API server
    ///
    /// Files are watched: saving one programs it. A file that cannot be read keeps its last
    /// good content. No cluster is needed.
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    pub manifests: String,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Traffic")]
pub struct TrafficFlags {
    /// Pod CIDR of the cluster, one per address family
    ///
    /// Sources in it count as pods when --detect-local-mode is ClusterCIDR; other traffic to
    /// cluster IPs is masqueraded. Example: 10.244.0.0/16,fd00:10:244::/56
    #[arg(long, value_name = "CIDR,...", default_value = "", hide_default_value = true)]
    pub cluster_cidr: String,

    /// How to tell traffic of this node's pods: ClusterCIDR, NodeCIDR, BridgeInterface or
    /// InterfaceNamePrefix
    ///
    /// ClusterCIDR: source in --cluster-cidr. NodeCIDR: source in the Node's spec.podCIDRs.
    /// BridgeInterface: comes in by --pod-bridge-interface. InterfaceNamePrefix: comes in by an
    /// interface whose name begins with --pod-interface-name-prefix.
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR")]
    pub detect_local_mode: String,

    /// Bridge that all pods of the node hang on, for BridgeInterface. Example: cni0
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub pod_bridge_interface: String,

    /// Beginning of the pods' interface names, for InterfaceNamePrefix. Example: veth
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub pod_interface_name_prefix: String,

    /// Node addresses that node ports answer on: CIDRs, or "primary"
    ///
    /// primary is the Node's own address of each family. Unset: all of the node's addresses
    /// except loopback. May be repeated.
    #[arg(long, value_name = "CIDR,...|primary")]
    pub nodeport_addresses: Vec<String>,

    /// The node's own address, in place of the Node object's of that family
    ///
    /// For --nodeport-addresses=primary. Nothing is bound to it; the name is kube-proxy's.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub bind_address: String,

    /// Whether node ports answer on IPv4 loopback addresses, where the mode can do that
    ///
    /// ipvs mode cannot, neither here nor in kube-proxy.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "true")]
    pub iptables_localhost_nodeports: String,

    /// Masquerade all traffic to cluster IPs, also that of pods
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub masquerade_all: String,

    /// Bit of the packet mark (0 to 31) for packets to be masqueraded
    ///
    /// kube-proxy's name; change it where another program uses the same bit.
    #[arg(long, value_name = "BIT", default_value = "14")]
    pub iptables_masquerade_bit: String,

    /// How long connections of a removed endpoint may go on
    ///
    /// A removed endpoint gets no new connection at once; its open ones continue until they
    /// end or this time is over. 15m is the kernel's own limit for an idle IPVS connection.
    #[arg(long, value_name = "DURATION", default_value = "15m0s")]
    pub drain_timeout: String,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "IPVS")]
pub struct IpvsFlags {
    /// Scheduler of the virtual servers: rr, wrr, lc, wlc, sh, mh, sed, nq, ...
    ///
    /// Any the kernel has; its module is ip_vs_NAME.
    #[arg(long, value_name = "NAME", default_value = "rr")]
    pub ipvs_scheduler: String,

    /// Longest time between two comparisons of the kernel with what should be there
    ///
    /// Twice this is also how old an unprogrammed change may get before /healthz says 503.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub ipvs_sync_period: String,

    /// Shortest time between two rounds of programming; 0 programs every change at once
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub ipvs_min_sync_period: String,

    /// Answer ARP only on the interface that holds the address (arp_ignore=1, arp_announce=2)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub ipvs_strict_arp: String,

    /// Idle time after which IPVS forgets a TCP connection; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub ipvs_tcp_timeout: String,

    /// The same after a FIN; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub ipvs_tcpfin_timeout: String,

    /// The same for UDP; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub ipvs_udp_timeout: String,

    /// Virtual servers of others in these blocks are never deleted
    ///
    /// Those that kube-proxy made and no Service wants go otherwise, when the daemon takes
    /// the node over from it. --cleanup leaves all virtual servers in these blocks.
    #[arg(long, value_name = "CIDR,...")]
    pub ipvs_exclude_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection tracking")]
pub struct ConntrackFlags {
    /// Tracked connections per CPU core; 0 leaves the kernel's limit and ignores --conntrack-min
    #[arg(long, value_name = "N", default_value = "32768")]
    pub conntrack_max_per_core: String,

    /// Tracked connections at least, whatever --conntrack-max-per-core comes to
    #[arg(long, value_name = "N", default_value = "131072")]
    pub conntrack_min: String,

    /// Idle timeout of established TCP connections; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "24h0m0s")]
    pub conntrack_tcp_timeout_established: String,

    /// Timeout of TCP connections in CLOSE_WAIT; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "1h0m0s")]
    pub conntrack_tcp_timeout_close_wait: String,

    /// Do not drop TCP packets outside the tracked window (nf_conntrack_tcp_be_liberal=1)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub conntrack_tcp_be_liberal: String,

    /// Idle timeout of UDP flows without a reply; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub conntrack_udp_timeout: String,

    /// Idle timeout of UDP flows with replies; 0 leaves the kernel's
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub conntrack_udp_timeout_stream: String,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Health, metrics and logs")]
pub struct ServingFlags {
    /// Address of /healthz and /livez; empty disables
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,

    /// Address of /metrics, /proxyMode, /configz, /statusz and /flagz; empty disables
    ///
    /// 0.0.0.0:10249 lets Prometheus scrape from other nodes.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: String,

    /// Deprecated: the port of a --healthz-bind-address that has none; 0 disables
    #[arg(long, value_name = "PORT", default_value = "10256", hide_short_help = true)]
    pub healthz_port: String,

    /// Deprecated: the port of a --metrics-bind-address that has none; 0 disables
    #[arg(long, value_name = "PORT", default_value = "10249", hide_short_help = true)]
    pub metrics_port: String,

    /// Service ports with traffic metrics of their own; all others share one series; 0 reads none
    ///
    /// Each has six series, in ipvs mode seven. With more Service ports than this, those get
    /// them that have traffic on this node, first come, first served.
    #[arg(long, value_name = "N", default_value = "1000")]
    pub service_metrics_limit: String,

    /// Traffic metrics of each endpoint as well
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub endpoint_metrics: String,

    /// With --endpoint-metrics: endpoints with metrics of their own; all others share one series
    #[arg(long, value_name = "N", default_value = "1000")]
    pub endpoint_metrics_limit: String,

    /// Exit when one of these addresses cannot be bound, instead of trying again
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub bind_address_hard_fail: String,

    /// Serve /debug/flags/v beside the metrics, to change how much is logged
    ///
    /// kube-proxy also serves profiles of its Go runtime with it; there are none here.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "false")]
    pub profiling: String,

    /// Log verbosity: 0 to 3 what matters, 4 and 5 every change, 6 and more everything
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value = "0")]
    pub verbosity: String,

    /// Format of the log lines: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub logging_format: String,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Host")]
pub struct HostFlags {
    /// How late the kernel kills the daemon when memory runs out: -1000 (never) to 1000
    ///
    /// To lower it the kernel asks for CAP_SYS_RESOURCE; without, it stays as it is.
    #[arg(long, value_name = "N", default_value = "-999", allow_hyphen_values = true)]
    pub oom_score_adj: String,

    /// cgroup v2 directory whose sockets ebpf mode serves [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    pub cgroup_root: String,

    /// cgroups below --cgroup-root whose sockets ebpf mode leaves alone, by comma; * for any part
    /// of a name
    ///
    /// Their packets are translated at the devices instead. For clients that must see a Service's
    /// own address. Example: kubepods.slice/*/kubepods-*-podUID.slice
    #[arg(long, value_name = "PATHS", default_value = "", hide_default_value = true)]
    pub socket_opt_out: String,

    /// Devices whose packets ebpf mode translates, by comma; * at the end of a name for any
    /// [default: every Ethernet device that is no part of another]
    #[arg(long, value_name = "NAMES", default_value = "", hide_default_value = true)]
    pub devices: String,

    /// Entries of ebpf mode's maps, by comma, when they are made: frontends (an address and port),
    /// backends (an endpoint of a Service port), slots (an endpoint of a frontend's set), flows (a
    /// connection at a device), sockets (one that connect() or sendmsg() sent to an endpoint)
    ///
    /// The default of the first three takes 12 MiB; one of them that is full is exchanged for a
    /// larger one, and stays as large until --cleanup. Flows take 380 bytes each, and stay as they
    /// were made: as many as --conntrack-max-per-core and --conntrack-min say, unless that is more
    /// than a 256th of the machine's memory, and 65536 at least. Sockets: 65536.
    #[arg(
        long,
        value_name = "SIZES",
        default_value = "frontends=65536,backends=327680,slots=524288"
    )]
    pub ebpf_map_sizes: String,

    /// What ebpf mode's maps may grow to, by comma, as in --ebpf-map-sizes
    ///
    /// 28 bytes for a backend, 4 for a slot; frontends take memory as they come.
    #[arg(
        long,
        value_name = "SIZES",
        default_value = "frontends=1048576,backends=4194304,slots=16777216"
    )]
    pub ebpf_map_limits: String,

    /// XDP for what comes in from other machines: off, auto (in the driver where it can), native
    /// (in the driver or not at all), generic
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub xdp: String,

    /// How a connection's endpoint is found where the Service does not say: hash of its addresses
    /// and ports, maglev, random; ebpf mode
    ///
    /// With maglev, an endpoint that comes or goes moves few connections of others to another one
    /// when they meet another node. It takes about 100 slots for each endpoint of a Service. A
    /// Service has it by the annotation `ipvs.node-dataplane/scheduler: mh`, too.
    #[arg(long, value_name = "HOW", default_value = "hash")]
    pub ebpf_selection: String,

    /// A client's packets go to another node's endpoint as they came, and that node answers the
    /// client: off, accept (others' are taken, none are sent), on; ebpf mode
    ///
    /// Only when all nodes accept may one send, and the network must let a node send from the
    /// addresses of Services and of other nodes.
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub direct_server_return: String,

    /// UDP port of these packets between nodes, the same on all of them
    #[arg(long, value_name = "PORT", default_value = "6081")]
    pub direct_server_return_port: String,

    /// Where the BPF file system is, or is to be mounted, for what outlives the daemon
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpf_root: String,

    /// Directory of the kernel's settings
    ///
    /// A container that is not privileged has /proc/sys read-only. Mount the host's
    /// /proc/sys/net writable at DIR/net and name DIR here.
    #[arg(long, value_name = "DIR", default_value = "/proc/sys")]
    pub sysctl_root: String,
}
