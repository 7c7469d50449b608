//! `/configz`: the configuration in the shape of a `KubeProxyConfiguration`, for tools
//! that read kube-proxy's, and what only this daemon has beside it.

use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use crate::config::value::format_duration;
use crate::config::{Config, DetectLocal, LogFormat, NodePortAddresses, Source};

pub(super) fn document(config: &Config) -> Value {
    let (kubeconfig, manifests) = match &config.source {
        Source::Api { kubeconfig, .. } => (kubeconfig.as_deref(), None),
        Source::Manifests(directory) => (None, Some(directory)),
    };
    let format = match config.logging.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    json!({
        "kubeproxy.config.k8s.io": {
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "clientConnection": { "kubeconfig": kubeconfig.unwrap_or("".as_ref()) },
            "logging": { "format": format, "verbosity": config.logging.verbosity },
            "hostnameOverride": config.node_name.to_string(),
            "healthzBindAddress": address(config.serving.healthz),
            "metricsBindAddress": address(config.serving.metrics),
            "bindAddressHardFail": config.serving.hard_fail,
            "mode": config.proxy_mode.to_string(),
            "iptables": {
                "masqueradeBit": config.masquerade.bit,
                "masqueradeAll": config.masquerade.all,
            },
            "ipvs": ipvs(config),
            "detectLocalMode": detect_local_mode(&config.detect_local),
            "detectLocal": detect_local(&config.detect_local),
            "clusterCIDR": cidrs(&config.cluster_cidrs).join(","),
            "nodePortAddresses": node_port_addresses(&config.node_port_addresses),
            "conntrack": conntrack(config),
        },
        "nodeDataplane": {
            "manifests": manifests,
            "drainTimeout": format_duration(config.drain_timeout),
            "cgroupRoot": config.cgroup_root,
            "sysctlRoot": config.sysctl_root,
        },
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

const fn detect_local_mode(detect: &DetectLocal) -> &'static str {
    match detect {
        DetectLocal::ClusterCidr => "ClusterCIDR",
        DetectLocal::NodeCidr => "NodeCIDR",
        DetectLocal::BridgeInterface(_) => "BridgeInterface",
        DetectLocal::InterfaceNamePrefix(_) => "InterfaceNamePrefix",
    }
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
