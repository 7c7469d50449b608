//! Which endpoints of a Service port a client may reach.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;

use super::frontend::{Backend, BackendSet, Known, KnownSet};
use crate::model::{
    DEFAULT_WEIGHT, Endpoint, EndpointSlice, Family, HostPort, NodeName, Placement, Service,
    ServicePort, TrafficPolicy, Weights, Zone,
};

/// An endpoint of one Service port, merged over the slices.
#[derive(Debug, Clone)]
pub struct Candidate<'a> {
    pub endpoint: &'a Endpoint,
    pub port: NonZeroU16,
}

/// The endpoints that `port` has in `family`, merged over the slices by address and
/// port. When two slices disagree about one endpoint, a copy that is not terminating
/// wins: the terminating one is a leftover of the slice it moved out of.
pub fn candidates<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
) -> Vec<Candidate<'a>> {
    let mut merged: BTreeMap<(IpAddr, NonZeroU16), Candidate<'a>> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == family) {
        for slice_port in &slice.ports {
            if slice_port.name != port.name || slice_port.protocol != port.protocol {
                continue;
            }
            for endpoint in &slice.endpoints {
                let key = (endpoint.address, slice_port.port);
                let replaces = merged
                    .get(&key)
                    .is_none_or(|held| held.endpoint.terminating && !endpoint.terminating);
                if replaces {
                    merged.insert(key, Candidate { endpoint, port: slice_port.port });
                }
            }
        }
    }
    merged.into_values().collect()
}

/// The sets of kube-proxy's `CategorizeEndpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Categories {
    /// For traffic under the Cluster policy.
    pub cluster: BackendSet,
    /// For traffic under the Local policy.
    pub local: BackendSet,
    /// All there are.
    pub known: KnownSet,
    /// Some endpoint somewhere could take traffic: an empty set then means drop, not
    /// reject.
    pub any: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Everywhere,
    SameNode,
    SameZone,
}

/// Categorises the endpoints of one Service port.
#[must_use]
pub fn categorize(
    service: &Service,
    candidates: &[Candidate<'_>],
    node: &NodeName,
    zone: Option<&Zone>,
) -> Categories {
    let external = is_external(service);
    let uses_local = service.internal_policy == TrafficPolicy::Local
        || (external && service.external_policy == TrafficPolicy::Local);
    let uses_cluster = service.internal_policy == TrafficPolicy::Cluster || external;

    let cluster = if uses_cluster { cluster_set(candidates, node, zone) } else { Vec::new() };
    let local = if uses_local { local_set(candidates, node) } else { Vec::new() };
    let any = candidates.iter().any(|c| usable(c) || fallback(c));
    let weights = service.scheduling.as_deref().map(|scheduling| &scheduling.weights);
    let backends = |set: &[&Candidate<'_>]| backends(set, node, weights);
    let known = known(candidates, node);
    Categories { cluster: backends(&cluster), local: backends(&local), known, any }
}

/// The Service can be reached by an address that is not a ClusterIP.
pub(super) fn is_external(service: &Service) -> bool {
    !service.external_ips.is_empty()
        || !service.load_balancer_ips.is_empty()
        || service.ports.iter().any(|port| port.node_port.is_some())
}

fn usable(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.ready
}

/// Serving while terminating: better than nothing when nothing is ready (KEP-1669).
fn fallback(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.serving && candidate.endpoint.terminating
}

fn is_local(candidate: &Candidate<'_>, node: &NodeName) -> bool {
    candidate.endpoint.placement.node.as_ref() == Some(node)
}

fn cluster_set<'c, 'a>(
    candidates: &'c [Candidate<'a>],
    node: &NodeName,
    zone: Option<&Zone>,
) -> Vec<&'c Candidate<'a>> {
    let topology = topology(candidates, node, zone);
    let ready: Vec<_> = candidates
        .iter()
        .filter(|c| usable(c))
        .filter(|c| match topology {
            Topology::Everywhere => true,
            Topology::SameNode => c.endpoint.placement.hint_nodes.contains(node),
            Topology::SameZone => {
                zone.is_some_and(|zone| c.endpoint.placement.hint_zones.contains(zone))
            }
        })
        .collect();
    if ready.is_empty() { candidates.iter().filter(|c| fallback(c)).collect() } else { ready }
}

fn local_set<'c, 'a>(candidates: &'c [Candidate<'a>], node: &NodeName) -> Vec<&'c Candidate<'a>> {
    let local = || candidates.iter().filter(|c| is_local(c, node));
    let ready: Vec<_> = local().filter(|c| usable(c)).collect();
    if ready.is_empty() { local().filter(|c| fallback(c)).collect() } else { ready }
}

/// Hints count only when every ready endpoint has one and one of them is for us
/// (KEP-2433, KEP-3015): otherwise some would get no traffic at all.
fn topology(candidates: &[Candidate<'_>], node: &NodeName, zone: Option<&Zone>) -> Topology {
    let mut all_nodes = true;
    let mut all_zones = true;
    let mut for_node = false;
    let mut for_zone = false;
    for endpoint in candidates.iter().filter(|c| usable(c)).map(|c| c.endpoint) {
        all_nodes &= !endpoint.placement.hint_nodes.is_empty();
        all_zones &= !endpoint.placement.hint_zones.is_empty();
        for_node |= endpoint.placement.hint_nodes.contains(node);
        for_zone |= zone.is_some_and(|zone| endpoint.placement.hint_zones.contains(zone));
    }
    if all_nodes && for_node {
        Topology::SameNode
    } else if all_zones && for_zone {
        Topology::SameZone
    } else {
        Topology::Everywhere
    }
}

/// Sorted as [`candidates`] are. Not so the traffic policies and hints: `IsServing` is all that
/// counts for flows in kube-proxy (`pkg/proxy/conntrack/cleanup.go`).
fn known(candidates: &[Candidate<'_>], node: &NodeName) -> KnownSet {
    let known = |c: &Candidate<'_>| Known {
        at: HostPort::new(c.endpoint.address, c.port.get()),
        local: is_local(c, node),
        serving: c.endpoint.serving || c.endpoint.ready,
    };
    candidates.iter().map(known).collect()
}

fn backends(set: &[&Candidate<'_>], node: &NodeName, weights: Option<&Weights>) -> BackendSet {
    let weight = |endpoint: &Endpoint| {
        weights.map_or(DEFAULT_WEIGHT, |weights| {
            let Placement { node, zone, .. } = &*endpoint.placement;
            weights.of(endpoint.address, node.as_ref(), zone.as_ref())
        })
    };
    let mut backends: Vec<Backend> = set
        .iter()
        .map(|c| Backend {
            address: c.endpoint.address,
            port: c.port,
            local: is_local(c, node),
            weight: weight(c.endpoint),
        })
        .collect();
    backends.sort_unstable();
    backends.dedup_by_key(|b| (b.address, b.port));
    backends.into()
}
