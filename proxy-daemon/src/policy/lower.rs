//! One Service, lowered to its frontends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::endpoints::{Candidate, Categories, candidates, categorize};
use super::frontend::{
    BackendSet, Frontend, FrontendKey, FrontendKind, KnownSet, Masquerade, PortName, WhenEmpty,
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
    pub no_local: NoLocal,
    /// For the health-check node port.
    pub local_ready: LocalReady,
}

/// Service ports with endpoints, of which none is here although the policy is Local: a port
/// counts in each family that it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoLocal {
    pub internal: FamilyCounts,
    pub external: FamilyCounts,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FamilyCounts {
    pub v4: usize,
    pub v6: usize,
}

impl FamilyCounts {
    #[must_use]
    pub const fn of(self, family: Family) -> usize {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    const fn add(&mut self, family: Family) {
        match family {
            Family::V4 => self.v4 += 1,
            Family::V6 => self.v6 += 1,
        }
    }

    /// `old` is a part of it.
    #[must_use]
    pub const fn replace(self, old: Self, new: Self) -> Self {
        Self { v4: self.v4 + new.v4 - old.v4, v6: self.v6 + new.v6 - old.v6 }
    }
}

/// Ready endpoints on this node, by family; `None` for one that the Service does not have.
/// An address counts once, however many ports the Service has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LocalReady {
    pub v4: Option<usize>,
    pub v6: Option<usize>,
}

impl LocalReady {
    /// What a balancer is told that asks over `family`: kube-proxy has a proxy for each.
    #[must_use]
    pub fn seen_over(self, family: Family) -> usize {
        let (first, second) = match family {
            Family::V4 => (self.v4, self.v6),
            Family::V6 => (self.v6, self.v4),
        };
        first.or(second).unwrap_or_default()
    }

    fn add(&mut self, family: Family, count: usize) {
        let side = match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        };
        *side = Some(side.unwrap_or_default() + count);
    }
}

/// Lowers a Service to its frontends. Pure: the same input gives the same output. `connected`
/// tells whether there may be connections at a frontend: a hidden one that no frontend leads to
/// any more stays for them, without backends.
#[must_use]
pub fn lower<'a, I>(
    service: &Service,
    slices: impl Fn() -> I,
    node: &NodeView,
    connected: &dyn Fn(&FrontendKey) -> bool,
) -> Lowered
where
    I: Iterator<Item = &'a EndpointSlice>,
{
    let mut lowered = Lowered::default();
    let mut local_ready = std::collections::BTreeSet::new();
    for port in &service.ports {
        for family in families(service, node) {
            let endpoints = candidates(slices(), port, family);
            let categories = categorize(service, &endpoints, &node.name, node.zone.as_ref());
            count_local(service, family, &categories, &mut lowered.no_local);
            collect_local_ready(&endpoints, &node.name, &mut local_ready);
            let sets = Sets::of(service, port, family, &categories, connected);
            lower_port((service, port, family), &categories, node, sets, &mut lowered.frontends);
        }
    }
    for family in families(service, node) {
        let count = local_ready.iter().filter(|address| Family::of(**address) == family).count();
        lowered.local_ready.add(family, count);
    }
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
    let here =
        |c: &&Candidate<'_>| c.endpoint.ready && c.endpoint.placement.node.as_ref() == Some(node);
    into.extend(endpoints.iter().filter(here).map(|c| c.endpoint.address));
}

fn count_local(service: &Service, family: Family, categories: &Categories, no_local: &mut NoLocal) {
    if !categories.any || !categories.local.is_empty() {
        return;
    }
    if service.internal_policy == TrafficPolicy::Local {
        no_local.internal.add(family);
    }
    if super::endpoints::is_external(service) && service.external_policy == TrafficPolicy::Local {
        no_local.external.add(family);
    }
}

fn lower_port(
    (service, port, family): (&Service, &ServicePort, Family),
    categories: &Categories,
    node: &NodeView,
    sets: Sets,
    frontends: &mut BTreeMap<FrontendKey, Frontend>,
) {
    let name = PortName { service: service.name.clone(), port: port.name.clone() };
    let internal = internal_frontend(service, &name, categories, node);
    let external = external_frontend(service, &name, categories, node, &sets);
    let no_ranges: Arc<[_]> = Arc::default();
    let ranges = source_ranges(service, family);

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
    let mut external_addresses = service.external_ips.iter().chain(&service.load_balancer_ips);
    let among_nodes = external_addresses.any(|address| node.own_addresses.contains(address));
    let external = Frontend { among_nodes, ..external };
    for (addresses, kind, ranges) in [
        (&service.external_ips, FrontendKind::ExternalIp, &no_ranges),
        (&service.load_balancer_ips, FrontendKind::LoadBalancer, &ranges),
    ] {
        for &address in addresses {
            let source_ranges = with_own_source(ranges, address, node);
            claim(address, port.port, Frontend { kind, source_ranges, ..external.clone() });
        }
    }
    if let Some(number) = port.node_port {
        for &address in &node.node_port_addresses {
            let frontend = Frontend { kind: FrontendKind::NodePort, ..external.clone() };
            claim(address, number, frontend);
        }
    }
    if let Some((key, holds)) = sets.hidden {
        let mut hidden = Frontend {
            kind: FrontendKind::Hidden,
            ..set_frontend(service, &name, categories, holds == Holds::Local)
        };
        if holds == Holds::Nothing {
            hidden.backends = BackendSet::default();
        }
        claim(key.address, key.port, hidden);
    }
}

fn internal_frontend(
    service: &Service,
    name: &PortName,
    categories: &Categories,
    node: &NodeView,
) -> Frontend {
    let local = service.internal_policy == TrafficPolicy::Local;
    Frontend {
        kind: FrontendKind::ClusterIp,
        masquerade: if node.masquerade_all { Masquerade::Always } else { Masquerade::FromOutside },
        ..set_frontend(service, name, categories, local)
    }
}

fn external_frontend(
    service: &Service,
    name: &PortName,
    categories: &Categories,
    node: &NodeView,
    sets: &Sets,
) -> Frontend {
    let local = service.external_policy == TrafficPolicy::Local;
    Frontend {
        kind: FrontendKind::ExternalIp,
        short_circuit: sets.short_circuit,
        short_circuit_set: sets.short_circuit.map(|_| BackendSet::clone(&categories.cluster)),
        shared: sets.shared,
        masquerade: if local && !node.masquerade_all {
            Masquerade::Never
        } else {
            Masquerade::Always
        },
        ..set_frontend(service, name, categories, local)
    }
}

/// What a frontend with the Local or the Cluster set has anyhow.
fn set_frontend(
    service: &Service,
    name: &PortName,
    categories: &Categories,
    local: bool,
) -> Frontend {
    let backends = if local { &categories.local } else { &categories.cluster };
    Frontend {
        port: name.clone(),
        kind: FrontendKind::ClusterIp,
        backends: BackendSet::clone(backends),
        endpoints: KnownSet::clone(&categories.known),
        local_only: local,
        short_circuit_set: None,
        short_circuit: None,
        shared: None,
        when_empty: when_empty(local, categories),
        masquerade: Masquerade::Never,
        on_node_address: false,
        among_nodes: false,
        affinity: service.affinity,
        source_ranges: Arc::default(),
        scheduling: service.scheduling.clone(),
    }
}

/// Which frontends of one Service port hold which set of endpoints. The ClusterIP has the
/// one of the internal policy; a set that it does not have, and that is needed in one
/// place, is held by a hidden frontend. One is enough: what the external frontends have
/// themselves and what they short-circuit to are never both missing.
#[derive(Default)]
struct Sets {
    short_circuit: Option<FrontendKey>,
    shared: Option<FrontendKey>,
    hidden: Option<(FrontendKey, Holds)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Local,
    Cluster,
    /// Connections of earlier.
    Nothing,
}

impl Sets {
    fn of(
        service: &Service,
        port: &ServicePort,
        family: Family,
        categories: &Categories,
        connected: &dyn Fn(&FrontendKey) -> bool,
    ) -> Self {
        let mut sets = Self::default();
        let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
        let Some(&address) = service.cluster_ips.iter().find(of_family) else { return sets };
        let cluster_ip = FrontendKey { address, protocol: port.protocol, port: port.port };
        let key = FrontendKey { port: hidden_port(service, port), ..cluster_ip };
        if super::endpoints::is_external(service) {
            let internal = service.internal_policy == TrafficPolicy::Local;
            let local = service.external_policy == TrafficPolicy::Local;
            let mut holder = |local: bool| {
                if local == internal {
                    return cluster_ip;
                }
                sets.hidden = Some((key, if local { Holds::Local } else { Holds::Cluster }));
                key
            };
            // Clients inside the cluster must reach the Service by any of its addresses, also
            // from a node without endpoints.
            let short_circuit =
                (local && categories.cluster != categories.local).then(|| holder(false));
            // Who is refused or dropped is so by the address that it asked: a refusal in the name of
            // another one means nothing to it.
            let set = if local { &categories.local } else { &categories.cluster };
            let shared = (service.affinity.is_some() && !set.is_empty()).then(|| holder(local));
            sets = Self { short_circuit, shared, ..sets };
        }
        if sets.hidden.is_none() && connected(&key) {
            sets.hidden = Some((key, Holds::Nothing));
        }
        sets
    }
}

/// A port of the ClusterIP that the Service does not have: the same on every node and at
/// every start, whatever the order of the ports, so that nothing has to be remembered.
fn hidden_port(service: &Service, port: &ServicePort) -> NonZeroU16 {
    const FLIP: u16 = 0x8000;
    let taken = |candidate: NonZeroU16| {
        service.ports.iter().filter(|other| other.protocol == port.protocol).any(|other| {
            other.port == candidate
                || (other.port != port.port && other.port.get() ^ FLIP == candidate.get())
        })
    };
    let mut candidate = port.port.get() ^ FLIP;
    loop {
        match NonZeroU16::new(candidate) {
            Some(free) if !taken(free) => return free,
            // A Service has far fewer ports than there are.
            _ => candidate = candidate.wrapping_add(1),
        }
    }
}

/// Those of one family, without ranges that lie in another.
fn source_ranges(service: &Service, family: Family) -> Arc<[IpNetwork]> {
    let of_family = |range: &&IpNetwork| Family::of(range.ip()) == family;
    let mut ranges: Vec<IpNetwork> =
        service.source_ranges.iter().filter(of_family).copied().collect();
    ranges.sort_by_key(IpNetwork::prefix);
    let mut disjoint: Vec<IpNetwork> = Vec::with_capacity(ranges.len());
    for range in ranges {
        if !disjoint.iter().any(|wider| wider.contains(range.ip())) {
            disjoint.push(range);
        }
    }
    disjoint.into()
}

/// The node's connections to an address that is on its own dummy link have that address
/// as their source: a node that is in the ranges has to be let through with it.
fn with_own_source(
    ranges: &Arc<[IpNetwork]>,
    address: IpAddr,
    node: &NodeView,
) -> Arc<[IpNetwork]> {
    let in_range = |own: &IpAddr| ranges.iter().any(|range| range.contains(*own));
    if ranges.is_empty() || in_range(&address) || !node.own_addresses.iter().any(in_range) {
        return Arc::clone(ranges);
    }
    ranges.iter().copied().chain([IpNetwork::from(address)]).collect()
}

fn when_empty(local: bool, categories: &Categories) -> WhenEmpty {
    if local && categories.any { WhenEmpty::Drop } else { WhenEmpty::Reject }
}
