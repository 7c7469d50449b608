//! The configuration as a document: for `/configz`, in the shape that tools which read
//! kube-proxy's expect, and as a file for `--write-config-to`, which kube-proxy takes too.

use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use super::fields::Shape;
use super::file::{API_VERSION, KIND, OWN_API_VERSION, OWN_KIND};
use super::value::{self, format_duration};
use super::{Config, DetectLocal, LogFormat, MapSizes, NodePortAddresses, Source};

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
        "mode": config.proxy_mode.to_string(),
        "manifests": manifests,
        "drainTimeout": format_duration(config.drain_timeout),
        "cgroupRoot": config.cgroup_root,
        "sysctlRoot": config.sysctl_root,
        "metrics": {
            "serviceLimit": config.series.service_ports,
            "endpoints": config.series.endpoints,
            "endpointLimit": config.series.endpoint_limit,
        },
        "ebpf": {
            "bpfRoot": config.bpf_root,
            "devices": config.devices,
            "socketOptOut": config.socket_opt_outs,
            "xdp": config.xdp.to_string(),
            "selection": config.selection.to_string(),
            "directServerReturn": config.direct_server_return.to_string(),
            "directServerReturnPort": config.direct_server_return_port,
            "mapSizes": map_sizes(config.map_sizes),
            "mapLimits": map_sizes(config.map_limits),
        },
    })
}

fn map_sizes(sizes: MapSizes) -> Value {
    let MapSizes { frontends, backends, slots, flows, sockets } = sizes;
    let mut document = json!({ "frontends": frontends, "backends": backends, "slots": slots });
    // Derived from the node's size unless they are set.
    for (key, size) in [("flows", flows), ("sockets", sockets)] {
        if let Some(size) = size {
            document[key] = size.into();
        }
    }
    document
}

/// With what was set that has no effect here, and kube-proxy's defaults for the rest of that.
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
    let mut document = json!({
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
            "options": { "text": { "infoBufferSize": "0" }, "json": { "infoBufferSize": "0" } },
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
        "mode": config.kube_proxy_mode,
        "iptables": {
            "masqueradeBit": config.masquerade.bit,
            "masqueradeAll": config.masquerade.all,
            "localhostNodePorts": config.localhost_node_ports,
            "syncPeriod": "30s",
            "minSyncPeriod": "1s",
        },
        "ipvs": ipvs(config),
        "nftables": nftables(config),
        "winkernel": {
            "networkName": "",
            "sourceVip": "",
            "enableDSR": false,
            "rootHnsEndpointName": "",
            "forwardHealthCheckVip": false,
        },
        "detectLocalMode": config.detect_local.name(),
        "detectLocal": detect_local(&config.detect_local),
        "clusterCIDR": cidrs(&config.cluster_cidrs).join(","),
        "nodePortAddresses": node_port_addresses(&config.node_port_addresses),
        "conntrack": conntrack(config),
    });
    for (path, value) in &config.inert {
        put(&mut document, path, value.clone());
    }
    document
}

/// Sets what is below keys joined by dots.
fn put(mut document: &mut Value, path: &str, value: Value) {
    for key in path.split('.') {
        // It is an object, or becomes one: `Null` does when it is indexed.
        document = &mut document[key];
    }
    *document = value;
}

/// A setting as a flag writes it, as JSON writes the field. What does not fit was refused before.
pub(super) fn value(shape: Shape, raw: &str) -> Value {
    let text = || Value::from(raw);
    match shape {
        Shape::Bool => value::boolean(raw).map_or_else(|_| text(), Value::from),
        Shape::Integer | Shape::Float => number(raw).unwrap_or_else(text),
        Shape::Duration | Shape::Flush => {
            value::duration(raw).map_or_else(|_| text(), |time| format_duration(time).into())
        }
        Shape::Text | Shape::Word | Shape::Quantity => text(),
        Shape::TextList => value::items(raw).collect(),
        Shape::Gates | Shape::Numbers => pairs(raw)
            .map(|(name, to)| {
                let to = value::boolean(to).map_or_else(|_| to.into(), Value::from);
                (name.to_owned(), to)
            })
            .collect(),
        Shape::Vmodule => pairs(raw)
            .map(|(pattern, level)| json!({ "filePattern": pattern, "verbosity": number(level) }))
            .collect(),
    }
}

/// As Go does: whole ones without a point.
fn number(raw: &str) -> Option<Value> {
    match raw.parse::<i64>() {
        Ok(whole) => Some(whole.into()),
        Err(_) => raw.parse::<f64>().ok().map(Value::from),
    }
}

fn pairs(raw: &str) -> impl Iterator<Item = (&str, &str)> {
    value::items(raw)
        .filter_map(|item| item.split_once('='))
        .map(|(name, to)| (name.trim(), to.trim()))
}

/// In a file for that mode this section is in force.
fn nftables(config: &Config) -> Value {
    let (bit, all) = match config.kube_proxy_mode.as_str() {
        "nftables" => (config.masquerade.bit, config.masquerade.all),
        _ => (14, false),
    };
    json!({
        "masqueradeBit": bit, "masqueradeAll": all, "syncPeriod": "30s", "minSyncPeriod": "1s",
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
