//! Every field of `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1) and of our own
//! kind, and the flag that means the same: a file is judged by the rules of the flags.
//!
//! Names and zero values are those of `k8s.io/kube-proxy/config/v1alpha1` of Kubernetes 1.36.

use super::inert::{Inert, Kind};

/// A field of a file.
#[derive(Debug)]
pub struct Field {
    /// Keys joined by dots, from the root of the document.
    pub path: &'static str,
    pub shape: Shape,
    /// Whether a zero value (false, 0, 0s, "") is one: Go has a pointer there. Elsewhere it
    /// stands for kube-proxy's default, as an absent field does.
    pub zero_counts: bool,
    pub target: Target,
}

/// What YAML it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Bool,
    /// Go's int32, or uint32.
    Integer,
    Float,
    Text,
    /// Text with units; an integer is refused, as kube-proxy refuses it.
    Duration,
    /// A duration, or an integer of nanoseconds.
    Flush,
    /// Text or an integer.
    Quantity,
    TextList,
    /// A word of a choice. `on` and `off` are taken for what they look like, and for what other
    /// readers of YAML make of them, which is true and false.
    Word,
    /// Of names to whole numbers.
    Numbers,
    /// Of names to booleans.
    Gates,
    /// A list of `filePattern` and `verbosity`.
    Vmodule,
}

#[derive(Debug)]
pub enum Target {
    Flag(&'static str),
    /// Only in the file, and without effect.
    Inert(Inert),
}

const fn flag(path: &'static str, shape: Shape, flag: &'static str) -> Field {
    Field { path, shape, zero_counts: false, target: Target::Flag(flag) }
}

/// A pointer in Go.
const fn pointer(path: &'static str, shape: Shape, flag: &'static str) -> Field {
    Field { path, shape, zero_counts: true, target: Target::Flag(flag) }
}

const fn inert(
    path: &'static str,
    shape: Shape,
    kind: Kind,
    default: &'static str,
    why: &'static str,
) -> Field {
    Field {
        path,
        shape,
        zero_counts: false,
        target: Target::Inert(Inert { flag: path, kind, default, why }),
    }
}

const NFTABLES: &str = "it is for kube-proxy's nftables mode, which the file does not name";
const NFTABLES_PERIOD: &str = "ipvs.syncPeriod and ipvs.minSyncPeriod set the periods of both \
                               modes";

pub const KUBE_PROXY: &[Field] = &[
    flag("featureGates", Shape::Gates, "--feature-gates"),
    flag("clientConnection.kubeconfig", Shape::Text, "--kubeconfig"),
    inert(
        "clientConnection.acceptContentTypes",
        Shape::Text,
        Kind::Text,
        "",
        "objects are asked for in JSON",
    ),
    flag("clientConnection.contentType", Shape::Text, "--kube-api-content-type"),
    flag("clientConnection.qps", Shape::Float, "--kube-api-qps"),
    flag("clientConnection.burst", Shape::Integer, "--kube-api-burst"),
    flag("logging.format", Shape::Text, "--logging-format"),
    flag("logging.flushFrequency", Shape::Flush, "--log-flush-frequency"),
    flag("logging.verbosity", Shape::Integer, "--v"),
    flag("logging.vmodule", Shape::Vmodule, "--vmodule"),
    flag("logging.options.text.splitStream", Shape::Bool, "--log-text-split-stream"),
    flag("logging.options.text.infoBufferSize", Shape::Quantity, "--log-text-info-buffer-size"),
    flag("logging.options.json.splitStream", Shape::Bool, "--log-json-split-stream"),
    flag("logging.options.json.infoBufferSize", Shape::Quantity, "--log-json-info-buffer-size"),
    flag("hostnameOverride", Shape::Text, "--hostname-override"),
    flag("bindAddress", Shape::Text, "--bind-address"),
    flag("healthzBindAddress", Shape::Text, "--healthz-bind-address"),
    flag("metricsBindAddress", Shape::Text, "--metrics-bind-address"),
    flag("bindAddressHardFail", Shape::Bool, "--bind-address-hard-fail"),
    flag("enableProfiling", Shape::Bool, "--profiling"),
    flag("showHiddenMetricsForVersion", Shape::Text, "--show-hidden-metrics-for-version"),
    flag("mode", Shape::Text, "--proxy-mode"),
    pointer("iptables.masqueradeBit", Shape::Integer, "--iptables-masquerade-bit"),
    flag("iptables.masqueradeAll", Shape::Bool, "--masquerade-all"),
    pointer("iptables.localhostNodePorts", Shape::Bool, "--iptables-localhost-nodeports"),
    flag("iptables.syncPeriod", Shape::Duration, "--iptables-sync-period"),
    flag("iptables.minSyncPeriod", Shape::Duration, "--iptables-min-sync-period"),
    flag("ipvs.syncPeriod", Shape::Duration, "--ipvs-sync-period"),
    flag("ipvs.minSyncPeriod", Shape::Duration, "--ipvs-min-sync-period"),
    flag("ipvs.scheduler", Shape::Text, "--ipvs-scheduler"),
    flag("ipvs.excludeCIDRs", Shape::TextList, "--ipvs-exclude-cidrs"),
    flag("ipvs.strictARP", Shape::Bool, "--ipvs-strict-arp"),
    flag("ipvs.tcpTimeout", Shape::Duration, "--ipvs-tcp-timeout"),
    flag("ipvs.tcpFinTimeout", Shape::Duration, "--ipvs-tcpfin-timeout"),
    flag("ipvs.udpTimeout", Shape::Duration, "--ipvs-udp-timeout"),
    Field {
        zero_counts: true,
        ..inert("nftables.masqueradeBit", Shape::Integer, Kind::Count, "14", NFTABLES)
    },
    inert("nftables.masqueradeAll", Shape::Bool, Kind::Bool, "false", NFTABLES),
    inert("nftables.syncPeriod", Shape::Duration, Kind::Duration, "30s", NFTABLES_PERIOD),
    inert("nftables.minSyncPeriod", Shape::Duration, Kind::Duration, "1s", NFTABLES_PERIOD),
    flag("winkernel.networkName", Shape::Text, "--network-name"),
    flag("winkernel.sourceVip", Shape::Text, "--source-vip"),
    flag("winkernel.enableDSR", Shape::Bool, "--enable-dsr"),
    flag("winkernel.rootHnsEndpointName", Shape::Text, "--root-hnsendpoint-name"),
    flag("winkernel.forwardHealthCheckVip", Shape::Bool, "--forward-healthcheck-vip"),
    flag("detectLocalMode", Shape::Text, "--detect-local-mode"),
    flag("detectLocal.bridgeInterface", Shape::Text, "--pod-bridge-interface"),
    flag("detectLocal.interfaceNamePrefix", Shape::Text, "--pod-interface-name-prefix"),
    flag("clusterCIDR", Shape::Text, "--cluster-cidr"),
    flag("nodePortAddresses", Shape::TextList, "--nodeport-addresses"),
    pointer("oomScoreAdj", Shape::Integer, "--oom-score-adj"),
    pointer("conntrack.maxPerCore", Shape::Integer, "--conntrack-max-per-core"),
    pointer("conntrack.min", Shape::Integer, "--conntrack-min"),
    pointer(
        "conntrack.tcpEstablishedTimeout",
        Shape::Duration,
        "--conntrack-tcp-timeout-established",
    ),
    pointer("conntrack.tcpCloseWaitTimeout", Shape::Duration, "--conntrack-tcp-timeout-close-wait"),
    flag("conntrack.tcpBeLiberal", Shape::Bool, "--conntrack-tcp-be-liberal"),
    flag("conntrack.udpTimeout", Shape::Duration, "--conntrack-udp-timeout"),
    flag("conntrack.udpStreamTimeout", Shape::Duration, "--conntrack-udp-timeout-stream"),
    flag("configSyncPeriod", Shape::Duration, "--config-sync-period"),
    inert(
        "portRange",
        Shape::Text,
        Kind::PortRange,
        "",
        "kube-proxy itself has had no use for it since its userspace mode went",
    ),
    flag("windowsRunAsService", Shape::Bool, "--windows-service"),
];

/// Our own kind. Here every value given counts.
pub const OWN: &[Field] = &[
    pointer("mode", Shape::Text, "--proxy-mode"),
    pointer("manifests", Shape::Text, "--manifests"),
    pointer("drainTimeout", Shape::Duration, "--drain-timeout"),
    pointer("cgroupRoot", Shape::Text, "--cgroup-root"),
    pointer("sysctlRoot", Shape::Text, "--sysctl-root"),
    pointer("metrics.serviceLimit", Shape::Integer, "--service-metrics-limit"),
    pointer("metrics.endpoints", Shape::Bool, "--endpoint-metrics"),
    pointer("metrics.endpointLimit", Shape::Integer, "--endpoint-metrics-limit"),
    pointer("ebpf.bpfRoot", Shape::Text, "--bpf-root"),
    pointer("ebpf.devices", Shape::TextList, "--devices"),
    pointer("ebpf.socketOptOut", Shape::TextList, "--socket-opt-out"),
    pointer("ebpf.xdp", Shape::Word, "--xdp"),
    pointer("ebpf.selection", Shape::Word, "--ebpf-selection"),
    pointer("ebpf.directServerReturn", Shape::Word, "--direct-server-return"),
    pointer("ebpf.directServerReturnPort", Shape::Integer, "--direct-server-return-port"),
    pointer("ebpf.mapSizes", Shape::Numbers, "--ebpf-map-sizes"),
    pointer("ebpf.mapLimits", Shape::Numbers, "--ebpf-map-limits"),
];

/// The field that is meant most probably by an unknown one.
pub fn nearest(fields: &'static [Field], path: &str) -> Option<&'static str> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_lowercase();
    fields
        .iter()
        .map(|field| {
            // The right name in the wrong section is the other common mistake.
            let whole = distance(&field.path.to_lowercase(), &path.to_lowercase());
            let name = distance(&last(field.path), &last(path));
            (if name == 0 { whole.min(1) } else { whole }, field.path)
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, path)| path)
}

/// Levenshtein's.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}
