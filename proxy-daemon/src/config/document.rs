//! The configuration as a document: for `/configz`, in the shape that tools which read
//! kube-proxy's expect, and as a file for `--write-config-to`, which kube-proxy takes too.

use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use super::file::{API_VERSION, KIND, OWN_API_VERSION, OWN_KIND};
use super::value::format_duration;
use super::{Config, DetectLocal, LogFormat, NodePortAddresses, Source};

/// Both kinds beside each other, as JSON.
#[must_use]
pub fn document(config: &Config) -> Value {
    json!({ "kubeproxy.config.k8s.io": kube_proxy(config), "nodeDataplane": own(config) })
}

/// As a file for `--config`. The node's name is left out: the file may serve every node.
///
/// # Errors
/// What the library says, which no configuration is known to cause.
pub fn yaml(config: &Config) -> Result<String, String> {
    let mut first = kube_proxy(config);
    if let Some(fields) = first.as_object_mut() {
        fields.insert("hostnameOverride".to_owned(), Value::from(""));
    }
    let mut second = own(config);
    if let Some(fields) = second.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
        fields.insert("apiVersion".to_owned(), OWN_API_VERSION.into());
        fields.insert("kind".to_owned(), OWN_KIND.into());
    }
    let text = |value| serde_yaml_ng::to_string(value).map_err(|error| error.to_string());
    Ok(format!("{}---\n{}", text(&first)?, text(&second)?))
}

fn own(config: &Config) -> Value {
    let manifests = match &config.source {
        Source::Api { .. } => None,
        Source::Manifests(directory) => Some(directory),
    };
    json!({
        "manifests": manifests,
        "drainTimeout": format_duration(config.drain_timeout),
        "cgroupRoot": config.cgroup_root,
        "sysctlRoot": config.sysctl_root,
        "metrics": {
            "serviceLimit": config.series.service_ports,
            "endpoints": config.series.endpoints,
            "endpointLimit": config.series.endpoint_limit,
        },
    })
}

/// With kube-proxy's defaults where this daemon has no use for a field.
fn kube_proxy(config: &Config) -> Value {
    let kubeconfig = match &config.source {
        Source::Api { kubeconfig, .. } => kubeconfig.as_deref(),
        Source::Manifests(_) => None,
    };
    let format = match config.logging.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    let bind_address = config.bind_address.map_or("0.0.0.0".to_owned(), |ip| ip.to_string());
    json!({
            "kind": KIND,
            "apiVersion": API_VERSION,
            "clientConnection": {
                "kubeconfig": kubeconfig.unwrap_or("".as_ref()),
                "acceptContentTypes": "",
                "contentType": "application/vnd.kubernetes.protobuf",
                "qps": 5,
                "burst": 10,
            },
            "logging": {
                "format": format,
                "flushFrequency": "5s",
                "verbosity": config.logging.verbosity,
            },
            "hostnameOverride": config.node_name.to_string(),
            "bindAddress": bind_address,
            "enableProfiling": config.serving.profiling,
            "showHiddenMetricsForVersion": "",
            "oomScoreAdj": config.oom_score_adj,
            "configSyncPeriod": "15m0s",
            "portRange": "",
            "healthzBindAddress": address(config.serving.healthz),
            "metricsBindAddress": address(config.serving.metrics),
            "bindAddressHardFail": config.serving.hard_fail,
            "mode": config.proxy_mode.to_string(),
            "iptables": {
                "masqueradeBit": config.masquerade.bit,
                "masqueradeAll": config.masquerade.all,
                "localhostNodePorts": config.localhost_node_ports,
            },
            "ipvs": ipvs(config),
            "detectLocalMode": config.detect_local.name(),
            "detectLocal": detect_local(&config.detect_local),
            "clusterCIDR": cidrs(&config.cluster_cidrs).join(","),
            "nodePortAddresses": node_port_addresses(&config.node_port_addresses),
            "conntrack": conntrack(config),
    })
}

fn ipvs(config: &Config) -> Value {
    let ipvs = &config.ipvs;
    json!({
        "syncPeriod": format_duration(ipvs.sync_period),
        "minSyncPeriod": format_duration(ipvs.min_sync_period),
        "scheduler": ipvs.scheduler,
        "excludeCIDRs": cidrs(&ipvs.exclude_cidrs),
        "strictARP": ipvs.strict_arp,
        "tcpTimeout": timeout(ipvs.tcp_timeout),
        "tcpFinTimeout": timeout(ipvs.tcp_fin_timeout),
        "udpTimeout": timeout(ipvs.udp_timeout),
    })
}

fn conntrack(config: &Config) -> Value {
    let conntrack = &config.conntrack;
    json!({
        "maxPerCore": conntrack.max_per_core.map_or(0, std::num::NonZeroU32::get),
        "min": conntrack.min,
        "tcpEstablishedTimeout": timeout(conntrack.tcp_established_timeout),
        "tcpCloseWaitTimeout": timeout(conntrack.tcp_close_wait_timeout),
        "tcpBeLiberal": conntrack.tcp_be_liberal,
        "udpTimeout": timeout(conntrack.udp_timeout),
        "udpStreamTimeout": timeout(conntrack.udp_stream_timeout),
    })
}

fn detect_local(detect: &DetectLocal) -> Value {
    let (bridge, prefix) = match detect {
        DetectLocal::BridgeInterface(bridge) => (bridge.as_str(), ""),
        DetectLocal::InterfaceNamePrefix(prefix) => ("", prefix.as_str()),
        DetectLocal::ClusterCidr | DetectLocal::NodeCidr => ("", ""),
    };
    json!({ "bridgeInterface": bridge, "interfaceNamePrefix": prefix })
}

fn node_port_addresses(addresses: &NodePortAddresses) -> Value {
    match addresses {
        NodePortAddresses::All => Value::Null,
        NodePortAddresses::Primary => json!(["primary"]),
        NodePortAddresses::Cidrs(blocks) => json!(cidrs(blocks)),
    }
}

fn cidrs(blocks: &[IpNetwork]) -> Vec<String> {
    blocks.iter().map(ToString::to_string).collect()
}

/// `0s` stands for "the kernel's".
fn timeout(timeout: Option<Duration>) -> String {
    format_duration(timeout.unwrap_or_default())
}

fn address(address: Option<std::net::SocketAddr>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}
