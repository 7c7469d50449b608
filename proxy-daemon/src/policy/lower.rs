//! One Service, lowered to its frontends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::endpoints::{Candidate, Categories, candidates, categorize};
use super::frontend::{
    BackendSet, Frontend, FrontendKey, FrontendKind, Masquerade, PortName, WhenEmpty,
};
use crate::model::{EndpointSlice, Family, NodeName, Service, ServicePort, TrafficPolicy, Zone};

/// What policy needs to know of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    pub name: NodeName,
    pub zone: Option<Zone>,
    /// Addresses on which node ports listen.
    pub node_port_addresses: Vec<IpAddr>,
    /// Addresses of the node's own links.
    pub own_addresses: Vec<IpAddr>,
    /// Families this node programs; frontends of the other are left out.
    pub families: Vec<Family>,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lowered {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Ports with endpoints, of which none is here although the internal policy is Local.
    pub no_local_internal: usize,
    /// The same for the external policy.
    pub no_local_external: usize,
    /// Ready endpoints on this node, for the health-check node port: the addresses are
    /// counted once however many ports the Service has.
    pub local_ready: usize,
}

/// Lowers a Service to its frontends. Pure: the same input gives the same output.
#[must_use]
pub fn lower<'a, I>(service: &Service, slices: impl Fn() -> I, node: &NodeView) -> Lowered
where
    I: Iterator<Item = &'a EndpointSlice>,
{
    let mut lowered = Lowered::default();
    let mut local_ready = std::collections::BTreeSet::new();
    for port in &service.ports {
        for family in families(service, node) {
            let endpoints = candidates(slices(), port, family);
            let categories = categorize(service, &endpoints, &node.name, node.zone.as_ref());
            count_local(service, &categories, &mut lowered);
            collect_local_ready(&endpoints, &node.name, &mut local_ready);
            lower_port(service, port, family, &categories, node, &mut lowered.frontends);
        }
    }
    lowered.local_ready = local_ready.len();
    lowered
}

/// A Service has the families of its ClusterIPs: without one, its node ports and external
/// addresses of that family are not programmed either (kube-proxy skips the Service).
fn families<'a>(service: &'a Service, node: &'a NodeView) -> impl Iterator<Item = Family> + 'a {
    let has = |family: &Family| service.cluster_ips.iter().any(|ip| Family::of(*ip) == *family);
    node.families.iter().copied().filter(has)
}

fn collect_local_ready(
    endpoints: &[Candidate<'_>],
    node: &NodeName,
    into: &mut std::collections::BTreeSet<IpAddr>,
) {
    let here = |c: &&Candidate<'_>| c.endpoint.node.as_ref() == Some(node) && c.endpoint.ready;
    into.extend(endpoints.iter().filter(here).map(|c| c.endpoint.address));
}

fn count_local(service: &Service, categories: &Categories, lowered: &mut Lowered) {
    if !categories.any || !categories.local.0.is_empty() {
        return;
    }
    if service.internal_policy == TrafficPolicy::Local {
        lowered.no_local_internal += 1;
    }
    if super::endpoints::is_external(service) && service.external_policy == TrafficPolicy::Local {
        lowered.no_local_external += 1;
    }
}

fn lower_port(
    service: &Service,
    port: &ServicePort,
    family: Family,
    categories: &Categories,
    node: &NodeView,
    frontends: &mut BTreeMap<FrontendKey, Frontend>,
) {
    let name = PortName { service: service.name.clone(), port: port.name.clone() };
    let internal = internal_frontend(service, &name, categories, node);
    let external = external_frontend(service, &name, categories, node);
    let no_ranges: Arc<[_]> = Arc::from([]);
    let ranges: Arc<[_]> = service.source_ranges.clone().into();

    let mut claim = |address: IpAddr, number: NonZeroU16, frontend: Frontend| {
        if Family::of(address) != family {
            return;
        }
        let key = FrontendKey { address, protocol: port.protocol, port: number };
        // The first claim wins: a load-balancer address that is also an external IP is
        // one frontend.
        let on_node_address = node.own_addresses.contains(&address);
        frontends.entry(key).or_insert(Frontend { on_node_address, ..frontend });
    };
    for &address in &service.cluster_ips {
        claim(address, port.port, internal.clone());
    }
    for (addresses, kind, ranges) in [
        (&service.external_ips, FrontendKind::ExternalIp, &no_ranges),
        (&service.load_balancer_ips, FrontendKind::LoadBalancer, &ranges),
    ] {
        for &address in addresses {
            let frontend = Frontend { kind, source_ranges: Arc::clone(ranges), ..external.clone() };
            claim(address, port.port, frontend);
        }
    }
    if let Some(number) = port.node_port {
        for &address in &node.node_port_addresses {
            let frontend = Frontend { kind: FrontendKind::NodePort, ..external.clone() };
            claim(address, number, frontend);
        }
    }
}

fn internal_frontend(
    service: &Service,
    name: &PortName,
    categories: &Categories,
    node: &NodeView,
) -> Frontend {
    let local = service.internal_policy == TrafficPolicy::Local;
    let backends = if local { &categories.local.0 } else { &categories.cluster.0 };
    Frontend {
        port: name.clone(),
        kind: FrontendKind::ClusterIp,
        backends: BackendSet::clone(backends),
        short_circuit: None,
        when_empty: when_empty(local, categories),
        masquerade: if node.masquerade_all { Masquerade::Always } else { Masquerade::FromOutside },
        on_node_address: false,
        affinity: service.affinity,
        source_ranges: Arc::from([]),
    }
}

fn external_frontend(
    service: &Service,
    name: &PortName,
    categories: &Categories,
    node: &NodeView,
) -> Frontend {
    let local = service.external_policy == TrafficPolicy::Local;
    let backends = if local { &categories.local.0 } else { &categories.cluster.0 };
    // Clients inside the cluster must reach the Service by any of its addresses, also
    // from a node without endpoints.
    let short_circuit = (local && categories.cluster.0 != categories.local.0)
        .then(|| BackendSet::clone(&categories.cluster.0));
    Frontend {
        port: name.clone(),
        kind: FrontendKind::ExternalIp,
        backends: BackendSet::clone(backends),
        short_circuit,
        when_empty: when_empty(local, categories),
        masquerade: if local && !node.masquerade_all {
            Masquerade::Never
        } else {
            Masquerade::Always
        },
        on_node_address: false,
        affinity: service.affinity,
        source_ranges: Arc::from([]),
    }
}

fn when_empty(local: bool, categories: &Categories) -> WhenEmpty {
    if local && categories.any { WhenEmpty::Drop } else { WhenEmpty::Reject }
}
