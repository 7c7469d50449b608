//! Each test is a line of the contract: kube-proxy's `CategorizeEndpoints` and what a
//! Service's addresses mean.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use super::*;
use crate::model::{
    Endpoint, EndpointSlice, Family, NodeName, ObjectName, Placement, Protocol, Service,
    ServicePort, SlicePort, TrafficPolicy, Zone, sample,
};

fn port(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

fn endpoint(last: u8, node: &str) -> Endpoint {
    Endpoint {
        address: [10, 244, 0, last].into(),
        ready: true,
        serving: true,
        terminating: false,
        placement: Placement { node: Some(NodeName::new(node)), ..Placement::default() }.into(),
    }
}

fn here(last: u8) -> Endpoint {
    endpoint(last, "node-a")
}

fn there(last: u8) -> Endpoint {
    endpoint(last, "node-b")
}

fn terminating(endpoint: Endpoint) -> Endpoint {
    Endpoint { ready: false, serving: true, terminating: true, ..endpoint }
}

fn dead(endpoint: Endpoint) -> Endpoint {
    Endpoint { ready: false, serving: false, ..endpoint }
}

fn zone_hint(endpoint: Endpoint, zone: &str) -> Endpoint {
    let placement =
        Placement { hint_zones: [Zone::new(zone)].into(), ..Placement::clone(&endpoint.placement) };
    Endpoint { placement: placement.into(), ..endpoint }
}

fn node_hint(endpoint: Endpoint, node: &str) -> Endpoint {
    let placement = Placement {
        hint_nodes: [NodeName::new(node)].into(),
        ..Placement::clone(&endpoint.placement)
    };
    Endpoint { placement: placement.into(), ..endpoint }
}

fn slice(name: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new("ns", name),
        service: ObjectName::new("ns", "web"),
        family: Family::V4,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
        triggered: None,
    }
}

fn service() -> Service {
    let (name, protocol) = ("http".into(), Protocol::Tcp);
    let port = ServicePort { name, protocol, port: port(80), node_port: None };
    sample::service(ObjectName::new("ns", "web"), [10, 96, 0, 1], port)
}

fn node() -> NodeView {
    NodeView {
        name: NodeName::new("node-a"),
        zone: Some(Zone::new("z1")),
        node_port_addresses: vec![[10, 99, 0, 2].into(), "fd00:99::2".parse().unwrap()],
        own_addresses: vec![[10, 99, 0, 2].into(), [198, 51, 100, 1].into()],
        families: vec![Family::V4, Family::V6],
        masquerade_all: false,
    }
}

fn lowered(service: &Service, slices: &[EndpointSlice]) -> Lowered {
    lower(service, || slices.iter(), &node(), &|_| false)
}

fn at(lowered: &Lowered, address: [u8; 4], number: u16) -> Frontend {
    let key =
        FrontendKey { address: IpAddr::from(address), protocol: Protocol::Tcp, port: port(number) };
    lowered.frontends.get(&key).cloned().unwrap_or_else(|| panic!("no {key}: {lowered:?}"))
}

/// Last octets of the backends behind the ClusterIP.
fn cluster_ip_reaches(service: &Service, slices: &[EndpointSlice]) -> Vec<u8> {
    last_octets(&at(&lowered(service, slices), [10, 96, 0, 1], 80).backends)
}

fn last_octets(backends: &[Backend]) -> Vec<u8> {
    backends
        .iter()
        .map(|b| match b.address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        })
        .collect()
}

#[test]
fn usable_is_ready() {
    let slices = [slice("a", vec![here(1), there(2), dead(here(3)), terminating(here(4))])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [1, 2]);
}

#[test]
fn serving_and_terminating_only_when_none_is_ready_anywhere() {
    let slices = [slice("a", vec![terminating(here(1)), dead(there(2)), terminating(there(3))])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [1, 3]);
}

#[test]
fn the_fallback_is_decided_separately_for_the_local_set() {
    let mut external = service();
    external.external_policy = TrafficPolicy::Local;
    external.external_ips = vec![[198, 51, 100, 7].into()];
    let lowered = lowered(&external, &[slice("a", vec![terminating(here(1)), there(2)])]);
    assert_eq!(last_octets(&at(&lowered, [10, 96, 0, 1], 80).backends), [2]);
    assert_eq!(last_octets(&at(&lowered, [198, 51, 100, 7], 80).backends), [1]);
}

#[test]
fn zone_hints_count_when_every_ready_endpoint_has_one_and_one_is_ours() {
    let ours = zone_hint(here(1), "z1");
    let other = zone_hint(there(2), "z2");
    let slices = [slice("a", vec![ours.clone(), other.clone()])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [1]);
    let one_without = [slice("a", vec![ours.clone(), other.clone(), there(3)])];
    assert_eq!(cluster_ip_reaches(&service(), &one_without), [1, 2, 3]);
    let none_for_us = [slice("a", vec![other.clone()])];
    assert_eq!(cluster_ip_reaches(&service(), &none_for_us), [2]);
    let unready_without = [slice("a", vec![ours, other, dead(there(3))])];
    assert_eq!(cluster_ip_reaches(&service(), &unready_without), [1], "only ready ones are asked");
}

#[test]
fn node_hints_come_before_zone_hints() {
    let both = |e: Endpoint, node: &str| node_hint(zone_hint(e, "z1"), node);
    let slices = [slice("a", vec![both(here(1), "node-a"), both(there(2), "node-b")])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [1]);
    let elsewhere = [slice("a", vec![both(there(1), "node-b"), both(there(2), "node-c")])];
    assert_eq!(cluster_ip_reaches(&service(), &elsewhere), [1, 2], "then the zone decides");
}

#[test]
fn an_endpoint_in_two_slices_counts_once_and_the_living_copy_wins() {
    let slices =
        [slice("a", vec![terminating(here(1)), here(2)]), slice("b", vec![here(1), here(2)])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [1, 2]);
    let swapped = [slice("a", vec![here(1)]), slice("b", vec![terminating(here(1))])];
    assert_eq!(cluster_ip_reaches(&service(), &swapped), [1]);
}

#[test]
fn slices_serve_ports_of_their_name_protocol_and_family_only() {
    let mut other_name = slice("a", vec![here(1)]);
    other_name.ports[0].name = "https".into();
    let mut other_protocol = slice("b", vec![here(2)]);
    other_protocol.ports[0].protocol = Protocol::Udp;
    let mut other_family = slice("c", vec![here(3)]);
    other_family.family = Family::V6;
    let slices = [other_name, other_protocol, other_family, slice("d", vec![here(4)])];
    assert_eq!(cluster_ip_reaches(&service(), &slices), [4]);
}

#[test]
fn two_slices_may_give_one_port_name_different_numbers() {
    let mut second = slice("b", vec![there(2)]);
    second.ports[0].port = port(9090);
    let lowered = lowered(&service(), &[slice("a", vec![here(1)]), second]);
    let frontend = at(&lowered, [10, 96, 0, 1], 80);
    let ports: Vec<u16> = frontend.backends.iter().map(|b| b.port.get()).collect();
    assert_eq!(ports, [8080, 9090]);
}

#[test]
fn no_endpoint_anywhere_is_rejected() {
    let frontend = at(&lowered(&service(), &[]), [10, 96, 0, 1], 80);
    assert_eq!((frontend.when_empty, frontend.backends.len()), (WhenEmpty::Reject, 0));
    let mut local = service();
    local.internal_policy = TrafficPolicy::Local;
    let frontend = at(&lowered(&local, &[]), [10, 96, 0, 1], 80);
    assert_eq!(frontend.when_empty, WhenEmpty::Reject);
}

#[test]
fn local_with_endpoints_only_elsewhere_is_dropped() {
    let mut both = service();
    both.internal_policy = TrafficPolicy::Local;
    both.external_policy = TrafficPolicy::Local;
    both.external_ips = vec![[198, 51, 100, 7].into()];
    let lowered = lowered(&both, &[slice("a", vec![there(1)])]);
    for (address, internal) in [([10, 96, 0, 1], true), ([198, 51, 100, 7], false)] {
        let frontend = at(&lowered, address, 80);
        assert_eq!(frontend.when_empty, WhenEmpty::Drop, "internal: {internal}");
        assert!(frontend.backends.is_empty());
    }
    let one = FamilyCounts { v4: 1, v6: 0 };
    assert_eq!(lowered.no_local, NoLocal { internal: one, external: one });
}

#[test]
fn internal_local_stays_local_also_when_the_service_is_external() {
    let mut api = service();
    api.internal_policy = TrafficPolicy::Local;
    api.external_ips = vec![[198, 51, 100, 7].into()];
    let lowered = lowered(&api, &[slice("a", vec![here(1), there(2)])]);
    assert_eq!(last_octets(&at(&lowered, [10, 96, 0, 1], 80).backends), [1]);
    assert_eq!(last_octets(&at(&lowered, [198, 51, 100, 7], 80).backends), [1, 2]);
}

#[test]
fn external_local_carries_the_cluster_set_for_clients_inside() {
    let mut local = service();
    local.external_policy = TrafficPolicy::Local;
    local.load_balancer_ips = vec![[203, 0, 113, 80].into()];
    let slices = [slice("a", vec![here(1), there(2)])];
    let frontend = at(&lowered(&local, &slices), [203, 0, 113, 80], 80);
    assert_eq!(last_octets(&frontend.backends), [1]);
    assert_eq!(frontend.short_circuit, Some(cluster_ip(80)), "which has them all");
    assert_eq!(frontend.masquerade, Masquerade::Never, "the endpoint sees the client");

    let all_here = [slice("a", vec![here(1), here(2)])];
    let frontend = at(&lowered(&local, &all_here), [203, 0, 113, 80], 80);
    assert_eq!(frontend.short_circuit, None, "it would change nothing");
}

fn cluster_ip(number: u16) -> FrontendKey {
    FrontendKey { address: [10, 96, 0, 1].into(), protocol: Protocol::Tcp, port: port(number) }
}

/// For each pair of policies: where the set is that the external frontend short-circuits
/// to, and the one it shares its affinity with.
#[test]
fn a_set_that_the_cluster_ip_lacks_is_held_by_a_hidden_frontend() {
    use TrafficPolicy::{Cluster, Local};
    let hidden = cluster_ip(80 ^ 0x8000);
    let visible = cluster_ip(80);
    for (internal, external, short_circuit, shared, held) in [
        (Cluster, Cluster, None, visible, None),
        (Cluster, Local, Some(visible), hidden, Some(vec![1])),
        (Local, Cluster, None, hidden, Some(vec![1, 2])),
        (Local, Local, Some(hidden), visible, Some(vec![1, 2])),
    ] {
        let mut api = service();
        api.internal_policy = internal;
        api.external_policy = external;
        api.affinity = Some(Duration::from_secs(60));
        api.external_ips = vec![[198, 51, 100, 7].into()];
        let lowered = lowered(&api, &[slice("a", vec![here(1), there(2)])]);
        let frontend = at(&lowered, [198, 51, 100, 7], 80);
        let case = format!("{internal:?} {external:?}");
        assert_eq!(frontend.short_circuit, short_circuit, "{case}");
        assert_eq!(frontend.shared, Some(shared), "{case}");
        let second = lowered.frontends.get(&hidden);
        assert_eq!(second.map(|f| last_octets(&f.backends)), held, "{case}");
        assert!(second.is_none_or(|f| f.kind == FrontendKind::Hidden));
        let set_at = |key: FrontendKey| lowered.frontends[&key].backends.clone();
        assert_eq!(set_at(shared), frontend.backends, "{case}: affinity over one set");
    }
}

#[test]
fn a_frontend_with_nobody_behind_it_leads_nowhere_else() {
    let mut api = service();
    api.affinity = Some(Duration::from_secs(60));
    api.external_ips = vec![[198, 51, 100, 7].into()];
    for (external, endpoints) in [
        (TrafficPolicy::Cluster, vec![]),
        (TrafficPolicy::Local, vec![]),
        (TrafficPolicy::Local, vec![there(2)]),
    ] {
        api.external_policy = external;
        let lowered = lowered(&api, &[slice("a", endpoints)]);
        let frontend = at(&lowered, [198, 51, 100, 7], 80);
        assert_eq!(frontend.shared, None, "{external:?}");
        assert!(lowered.frontends.values().all(|f| f.kind != FrontendKind::Hidden));
    }
}

#[test]
fn a_hidden_frontend_stays_for_its_connections_and_takes_no_more() {
    let hidden = cluster_ip(80 ^ 0x8000);
    let slices = [slice("a", vec![here(1), there(2)])];
    let lowered_with = |api: &Service, connected: &dyn Fn(&FrontendKey) -> bool| {
        lower(api, || slices.iter(), &node(), connected).frontends.remove(&hidden)
    };
    let mut api = service();
    api.external_policy = TrafficPolicy::Local;
    api.load_balancer_ips = vec![[203, 0, 113, 80].into()];
    assert_eq!(lowered_with(&api, &|_| false), None);
    let left = lowered_with(&api, &|key| *key == hidden).expect("it has connections");
    assert_eq!((left.kind, left.backends.len()), (FrontendKind::Hidden, 0));
    assert_eq!(left.endpoints.len(), 2, "their endpoints are there");
    api.affinity = Some(Duration::from_secs(60));
    let wanted = lowered_with(&api, &|key| *key == hidden).expect("it is needed");
    assert_eq!(last_octets(&wanted.backends), [1]);
}

#[test]
fn a_hidden_port_is_none_of_the_services_whatever_their_order() {
    let mut api = service();
    api.internal_policy = TrafficPolicy::Local;
    api.affinity = Some(Duration::from_secs(60));
    api.external_ips = vec![[198, 51, 100, 7].into()];
    let named = |n: u16| ServicePort {
        name: format!("p{n}").into(),
        protocol: Protocol::Tcp,
        port: port(n),
        node_port: None,
    };
    api.ports = [80, 80 ^ 0x8000, 0x8000, 1].map(named).to_vec();
    let hidden = |api: &Service| -> std::collections::BTreeSet<FrontendKey> {
        let named = |p: &ServicePort| SlicePort {
            name: p.name.clone(),
            protocol: p.protocol,
            port: port(8080),
        };
        let ports = api.ports.iter().map(named).collect();
        let lowered = lowered(api, &[EndpointSlice { ports, ..slice("a", vec![here(1)]) }]);
        let hidden = lowered.frontends.iter().filter(|(_, f)| f.kind == FrontendKind::Hidden);
        hidden.map(|(key, _)| *key).collect()
    };
    let found = hidden(&api);
    assert_eq!(found.len(), 4, "{found:?}");
    api.ports.reverse();
    assert_eq!(hidden(&api), found);
}

#[test]
fn nested_source_ranges_become_disjoint_and_the_node_in_range_gets_through() {
    let mut guarded = service();
    guarded.load_balancer_ips = vec![[203, 0, 113, 80].into()];
    let ranges = |service: &Service| -> Vec<String> {
        let frontend = at(&lowered(service, &[]), [203, 0, 113, 80], 80);
        frontend.source_ranges.iter().map(ToString::to_string).collect()
    };
    guarded.source_ranges = ["192.0.2.0/25", "192.0.2.0/24", "fd00::/8", "192.0.2.7/32"]
        .map(|r| r.parse().unwrap())
        .to_vec();
    assert_eq!(ranges(&guarded), ["192.0.2.0/24"]);
    guarded.source_ranges = vec!["10.99.0.0/24".parse().unwrap()];
    assert_eq!(ranges(&guarded), ["10.99.0.0/24", "203.0.113.80/32"]);
}

#[test]
fn weights_of_the_service_are_those_of_its_backends() {
    let mut weighted = service();
    let weights = crate::model::Weights {
        default: Some(2),
        nodes: vec![(NodeName::new("node-b"), 0)],
        ..Default::default()
    };
    weighted.scheduling =
        Some(std::sync::Arc::new(crate::model::Scheduling { weights, ..Default::default() }));
    let lowered = lowered(&weighted, &[slice("a", vec![here(1), there(2)])]);
    let backends = at(&lowered, [10, 96, 0, 1], 80).backends;
    assert_eq!(backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [2, 0]);
}

#[test]
fn external_cluster_traffic_is_masqueraded_and_internal_only_from_outside() {
    let mut external = service();
    external.external_ips = vec![[198, 51, 100, 7].into()];
    let lowered = lowered(&external, &[slice("a", vec![here(1)])]);
    assert_eq!(at(&lowered, [198, 51, 100, 7], 80).masquerade, Masquerade::Always);
    assert_eq!(at(&lowered, [10, 96, 0, 1], 80).masquerade, Masquerade::FromOutside);
    let all =
        lower(&external, || [].iter(), &NodeView { masquerade_all: true, ..node() }, &|_| false);
    assert_eq!(at(&all, [10, 96, 0, 1], 80).masquerade, Masquerade::Always);
}

#[test]
fn source_ranges_guard_the_load_balancer_address_only() {
    let mut guarded = service();
    guarded.source_ranges = vec!["203.0.113.0/24".parse().unwrap()];
    guarded.load_balancer_ips = vec![[203, 0, 113, 80].into()];
    guarded.external_ips = vec![[198, 51, 100, 7].into()];
    guarded.ports[0].node_port = NonZeroU16::new(30080);
    let lowered = lowered(&guarded, &[]);
    assert_eq!(at(&lowered, [203, 0, 113, 80], 80).source_ranges.len(), 1);
    for (address, number) in
        [([198, 51, 100, 7], 80), ([10, 96, 0, 1], 80), ([10, 99, 0, 2], 30080)]
    {
        assert_eq!(at(&lowered, address, number).source_ranges.len(), 0);
    }
}

#[test]
fn node_ports_listen_on_the_node_port_addresses_of_their_family() {
    let mut exposed = service();
    exposed.ports[0].node_port = NonZeroU16::new(30080);
    exposed.affinity = Some(Duration::from_secs(600));
    exposed.cluster_ips.push("fd00:10:96::1".parse().unwrap());
    let mut v6 = slice("b", vec![]);
    v6.family = Family::V6;
    v6.endpoints = vec![Endpoint { address: "fd00:10:244::7".parse().unwrap(), ..here(7) }];
    let lowered = lowered(&exposed, &[slice("a", vec![here(1)]), v6]);
    let v4 = at(&lowered, [10, 99, 0, 2], 30080);
    assert_eq!((v4.kind, v4.affinity), (FrontendKind::NodePort, Some(Duration::from_secs(600))));
    assert_eq!(last_octets(&v4.backends), [1]);
    let v6 = lowered
        .frontends
        .iter()
        .find(|(key, _)| key.family() == Family::V6 && key.port == port(30080))
        .map(|(_, frontend)| last_octets(&frontend.backends));
    assert_eq!(v6, Some(vec![7]));
}

#[test]
fn an_address_of_the_node_itself_is_marked_as_such() {
    let mut external = service();
    external.external_ips = vec![[198, 51, 100, 1].into(), [198, 51, 100, 2].into()];
    let lowered = lowered(&external, &[]);
    assert!(at(&lowered, [198, 51, 100, 1], 80).on_node_address);
    assert!(!at(&lowered, [198, 51, 100, 2], 80).on_node_address);
    assert!(at(&lowered, [198, 51, 100, 2], 80).among_nodes);
    external.external_ips.remove(0);
    let lowered = self::lowered(&external, &[]);
    assert!(!at(&lowered, [198, 51, 100, 2], 80).among_nodes);
}

#[test]
fn one_address_claimed_twice_by_one_service_is_one_frontend() {
    let mut twice = service();
    twice.external_ips = vec![[203, 0, 113, 80].into()];
    twice.load_balancer_ips = vec![[203, 0, 113, 80].into()];
    let lowered = lowered(&twice, &[]);
    assert_eq!(lowered.frontends.len(), 2);
    assert_eq!(at(&lowered, [203, 0, 113, 80], 80).kind, FrontendKind::ExternalIp);
}

#[test]
fn local_ready_endpoints_are_counted_once_for_the_health_check() {
    let mut many = service();
    many.ports.push(ServicePort {
        name: "https".into(),
        protocol: Protocol::Tcp,
        port: port(443),
        node_port: None,
    });
    let mut both = slice("a", vec![here(1), there(2), terminating(here(3))]);
    both.ports.push(SlicePort { name: "https".into(), protocol: Protocol::Tcp, port: port(8443) });
    let ready = lowered(&many, &[both]).local_ready;
    assert_eq!((ready.v4, ready.seen_over(Family::V4)), (Some(1), 1));
}

#[test]
fn a_single_stack_service_has_no_frontend_of_the_other_family() {
    let mut exposed = service();
    exposed.ports[0].node_port = NonZeroU16::new(30080);
    exposed.external_ips = vec!["2001:db8::7".parse().unwrap()];
    let lowered = lowered(&exposed, &[slice("a", vec![here(1)])]);
    assert!(lowered.frontends.keys().all(|key| key.family() == Family::V4), "{lowered:?}");
    assert_eq!(lowered.frontends.len(), 2);
}
