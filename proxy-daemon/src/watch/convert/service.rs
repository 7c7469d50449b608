//! Services.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::{
    Complaints, Converted, LABEL_HEADLESS, LABEL_PROXY_NAME, Part, cidr, has_label, ip,
    object_name, port, protocol, unusable, unusable_anywhere,
};
use crate::model::{
    DEFAULT_AFFINITY_TIMEOUT, Family, Rejected, Service, ServicePort, TrafficPolicy, intern,
};
use crate::watch::wire as api;

const KIND: &str = "Service";

/// Converts a Service; the selectors of the watch are applied again here, since a
/// manifest never went through them and a label may appear on a live object.
#[must_use]
pub fn service(object: &api::Service) -> Converted<Service> {
    let name = match object_name(KIND, &object.metadata) {
        Ok(name) => name,
        Err(rejected) => return Converted::Rejected(rejected),
    };
    let default = api::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&default);
    if let Some(why) = not_ours(object, spec) {
        return Converted::NotOurs(why);
    }

    let mut complaints = Complaints::default();
    let cluster_ips = cluster_ips(spec, &mut complaints);
    if cluster_ips.is_empty() {
        let reason = complaints
            .0
            .first()
            .map_or_else(|| "spec.clusterIP is missing".into(), ToString::to_string);
        return Converted::Rejected(Rejected { kind: KIND, name, reason });
    }
    let families: HashSet<Family> = cluster_ips.iter().copied().map(Family::of).collect();
    let external_ips = external_ips(spec, &families, &mut complaints);
    let external_policy = external_policy(spec, &mut complaints);
    let mut service = Service {
        created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        load_balancer_ips: load_balancer_ips(object, &families, &mut complaints),
        ports: ports(spec, &mut complaints),
        internal_policy: policy(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
            &mut complaints,
        ),
        affinity: affinity(spec, &mut complaints),
        source_ranges: source_ranges(spec, &mut complaints),
        scheduling: super::scheduling::scheduling(&object.metadata, &mut complaints),
        health_check_node_port: health_check_node_port(spec, external_policy, &mut complaints),
        name,
        cluster_ips,
        external_ips,
        external_policy,
    };
    // Kept for as long as the object lives, and there are many.
    service.cluster_ips.shrink_to_fit();
    service.ports.shrink_to_fit();
    Converted::Ours(service, complaints.0)
}

fn not_ours(object: &api::Service, spec: &api::ServiceSpec) -> Option<&'static str> {
    if has_label(&object.metadata, LABEL_HEADLESS) {
        return Some("it carries the label service.kubernetes.io/headless");
    }
    if has_label(&object.metadata, LABEL_PROXY_NAME) {
        return Some("it belongs to the proxy named by service.kubernetes.io/service-proxy-name");
    }
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some("its type is ExternalName");
    }
    match stated_cluster_ips(spec).first() {
        None => Some("it has no cluster IP"),
        Some(first) if first == "None" => Some("its cluster IP is None"),
        Some(_) => None,
    }
}

/// `clusterIPs`, or `clusterIP` alone where only that is given (manifests, and objects
/// stored before dual-stack).
fn stated_cluster_ips(spec: &api::ServiceSpec) -> &[String] {
    let single = spec.cluster_ip.as_slice();
    let all = spec.cluster_ips.as_deref().filter(|ips| !ips.is_empty()).unwrap_or(single);
    match all.first() {
        Some(first) if !first.is_empty() => all,
        _ => &[],
    }
}

/// One per family, as the API has it.
fn cluster_ips(spec: &api::ServiceSpec, complaints: &mut Complaints) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    for (index, text) in stated_cluster_ips(spec).iter().enumerate() {
        let field = || format!("spec.clusterIPs[{index}]");
        let Some(address) = complaints.keep(Part::Address, field(), frontend(text)) else {
            continue;
        };
        if found.iter().any(|other| Family::of(*other) == Family::of(address)) {
            let reason = format!("{address} is a second address of its family");
            complaints.add(Part::Address, field(), reason);
        } else {
            found.push(address);
        }
    }
    found
}

/// An address that a frontend can have.
fn frontend(text: &str) -> Result<IpAddr, String> {
    let address = ip(text)?;
    match unusable_anywhere(address) {
        Some(what) => Err(format!("{address} is {what}")),
        None => Ok(address),
    }
}

/// A family without a cluster IP is not programmed at all (kube-proxy skips the
/// Service in that family), external addresses included.
fn external_ips(
    spec: &api::ServiceSpec,
    families: &HashSet<Family>,
    complaints: &mut Complaints,
) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for (index, text) in spec.external_ips.iter().flatten().enumerate() {
        let checked = frontend(text).and_then(|address| match unusable(address) {
            Some(what) => Err(format!("{address} is {what}")),
            None if families.contains(&Family::of(address)) => Ok(address),
            None => Err(format!(
                "{address} is {}, and the Service has no cluster IP of that family",
                Family::of(address)
            )),
        });
        let field = format!("spec.externalIPs[{index}]");
        if let Some(address) = complaints.keep(Part::Address, field, checked)
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// `ipMode: Proxy` means that the balancer must see the traffic: not programmed. An
/// address of a family the Service has no cluster IP of is common (balancers answer in
/// both) and no ground for complaint.
fn load_balancer_ips(
    object: &api::Service,
    families: &HashSet<Family>,
    complaints: &mut Complaints,
) -> Vec<IpAddr> {
    let ingress = object
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_deref())
        .unwrap_or_default();
    let mut found = Vec::new();
    for (index, entry) in ingress.iter().enumerate() {
        let Some(text) = entry.ip.as_deref().filter(|text| !text.is_empty()) else {
            continue;
        };
        let field = format!("status.loadBalancer.ingress[{index}]");
        match entry.ip_mode.as_deref() {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(other) => {
                let reason = format!("{other:?} is not VIP or Proxy");
                complaints.add(Part::Address, format!("{field}.ipMode"), reason);
                continue;
            }
        }
        if let Some(address) = complaints.keep(Part::Address, format!("{field}.ip"), frontend(text))
            && families.contains(&Family::of(address))
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

fn ports(spec: &api::ServiceSpec, complaints: &mut Complaints) -> Vec<ServicePort> {
    let has_node_ports = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
    let mut found: Vec<ServicePort> = Vec::new();
    for (index, entry) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let protocol = protocol(entry.protocol.as_deref());
        let Some(protocol) = complaints.keep(Part::Port, field("protocol"), protocol) else {
            continue;
        };
        let Some(number) = complaints.keep(Part::Port, field("port"), port(entry.port)) else {
            continue;
        };
        let name = entry.name.as_deref().unwrap_or_default();
        let twin = |other: &&ServicePort| {
            other.protocol == protocol && (other.port == number || *other.name == *name)
        };
        if let Some(other) = found.iter().find(twin) {
            let reason = format!(
                "{number}/{protocol} named {name:?} repeats {}/{protocol} named {:?}",
                other.port, other.name
            );
            complaints.add(Part::Port, field("port"), reason);
            continue;
        }
        let node_port = entry
            .node_port
            .filter(|number| has_node_ports && *number != 0)
            .and_then(|number| complaints.keep(Part::Port, field("nodePort"), port(number)));
        found.push(ServicePort { name: intern(name), protocol, port: number, node_port });
    }
    found
}

fn policy(field: &str, value: Option<&str>, complaints: &mut Complaints) -> TrafficPolicy {
    match value {
        Some("Local") => TrafficPolicy::Local,
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some(other) => {
            let reason = format!("{other:?} is not Cluster or Local; Cluster is used");
            complaints.add(Part::Setting, field, reason);
            TrafficPolicy::Cluster
        }
    }
}

/// Only where the Service can be reached from outside at all (Kubernetes'
/// `ExternallyAccessible`): a ClusterIP Service that once was a load balancer may have
/// kept the field.
fn external_policy(spec: &api::ServiceSpec, complaints: &mut Complaints) -> TrafficPolicy {
    let reachable = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"))
        || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    if !reachable {
        return TrafficPolicy::Cluster;
    }
    policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref(), complaints)
}

fn affinity(spec: &api::ServiceSpec, complaints: &mut Complaints) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {}
        None | Some("" | "None") => return None,
        Some(other) => {
            let reason = format!("{other:?} is not None or ClientIP; None is used");
            complaints.add(Part::Setting, "spec.sessionAffinity", reason);
            return None;
        }
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds);
    let Some(seconds) = seconds else {
        return Some(DEFAULT_AFFINITY_TIMEOUT);
    };
    match u64::try_from(seconds) {
        Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
        _ => {
            complaints.add(
                Part::Setting,
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} is not above 0; the default is used"),
            );
            Some(DEFAULT_AFFINITY_TIMEOUT)
        }
    }
}

/// A range that does not parse is left out, as kube-proxy does (with no other range
/// left the address is open to everyone, there as here; hence the complaint). A range
/// with prefix 0 opens its family, so that family gets no ranges at all.
fn source_ranges(spec: &api::ServiceSpec, complaints: &mut Complaints) -> Vec<IpNetwork> {
    let mut found: Vec<IpNetwork> = Vec::new();
    for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        // API validation lets blanks around the range pass.
        let range =
            cidr(text.trim()).map_err(|reason| format!("{reason}; the other ranges guard alone"));
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        if let Some(range) = complaints.keep(Part::Setting, field, range)
            && !found.contains(&range)
        {
            found.push(range);
        }
    }
    for all in Family::ALL {
        if found.iter().any(|range| Family::of(range.ip()) == all && range.prefix() == 0) {
            found.retain(|range| Family::of(range.ip()) != all);
        }
    }
    found
}

/// Kubernetes' `NeedsHealthCheck`: load balancers that keep clients' addresses.
fn health_check_node_port(
    spec: &api::ServiceSpec,
    external: TrafficPolicy,
    complaints: &mut Complaints,
) -> Option<std::num::NonZeroU16> {
    if spec.type_.as_deref() != Some("LoadBalancer") || external != TrafficPolicy::Local {
        return None;
    }
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    complaints.keep(Part::Port, "spec.healthCheckNodePort", port(number))
}
