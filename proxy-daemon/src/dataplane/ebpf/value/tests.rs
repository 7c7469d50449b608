//! What becomes of a frontend.

use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::*;
use crate::model::{ObjectName, Scheduling};
use crate::policy::{BackendSet, sample};

fn backend(last: u8) -> Backend {
    let port = NonZeroU16::MIN;
    Backend { address: [10, 244, 0, last].into(), port, local: false, weight: 1 }
}

const KEY: FrontendKey = FrontendKey {
    address: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
    protocol: Protocol::Tcp,
    port: NonZeroU16::MIN,
};

fn frontend(backends: Vec<Backend>) -> Frontend {
    sample::frontend(ObjectName::new("ns", "a"), BackendSet::from(backends))
}

fn programmed(lowering: &Lowering, key: &FrontendKey, frontend: &Frontend) -> Arc<Programmed> {
    match &lowering.lower(key, frontend)[0].1 {
        Value::Frontend(value) => Arc::clone(value),
        Value::Address => panic!("an address"),
    }
}

/// kube-proxy has no rule that masquerades where its detector says nothing of the family.
#[test]
fn clients_are_outside_only_where_something_tells_who_is_not() {
    use layout::Frontend as F;
    let frontend = Frontend {
        masquerade: Masquerade::FromOutside,
        kind: FrontendKind::ClusterIp,
        ..frontend(vec![backend(1)])
    };
    let v6 = FrontendKey { address: "fd00:96::1".parse().unwrap(), ..KEY };
    let masquerades = |detect: LocalDetect| {
        let lowering = Lowering { detect, ..Lowering::default() };
        [KEY, v6]
            .map(|key| programmed(&lowering, &key, &frontend).flags & F::MASQUERADE_OUTSIDE != 0)
    };
    let cidrs = |cidrs: &[&str]| {
        LocalDetect::Cidrs(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect())
    };
    assert_eq!(masquerades(LocalDetect::Unknown), [false, false]);
    assert_eq!(masquerades(cidrs(&[])), [false, false]);
    assert_eq!(masquerades(cidrs(&["10.244.0.0/16"])), [true, false]);
    assert_eq!(masquerades(cidrs(&["fd00::/48"])), [false, true]);
    assert_eq!(masquerades(LocalDetect::Bridge("cni0".into())), [true, true]);
    // With --masquerade-all nobody asks who is outside.
    let all = Lowering { masquerade_all: true, ..Lowering::default() };
    assert_eq!(programmed(&all, &v6, &frontend).flags & F::MASQUERADE_ALL, F::MASQUERADE_ALL);
}

/// An external address may be another node's, a ClusterIP is nobody's.
#[test]
fn whose_other_ports_an_address_has() {
    let far = Lowering { near: vec!["10.97.0.0/16".parse().unwrap()], ..Lowering::default() };
    let near = Lowering { near: vec!["10.96.0.9/16".parse().unwrap()], ..Lowering::default() };
    let besides = |lowering: &Lowering, kind, [on_node_address, among_nodes]: [bool; 2]| {
        let frontend =
            Frontend { kind, on_node_address, among_nodes, ..frontend(vec![backend(1)]) };
        let objects = lowering.lower(&KEY, &frontend);
        objects.into_iter().skip(1).map(|(key, _)| key).collect::<Vec<_>>()
    };
    let address = KEY.address;
    for lowering in [&far, &near] {
        let cluster_ip = besides(lowering, FrontendKind::ClusterIp, [false, false]);
        assert_eq!(cluster_ip, [Key::Address(address)]);
        assert_eq!(besides(lowering, FrontendKind::NodePort, [true, false]), []);
    }
    for kind in [FrontendKind::ExternalIp, FrontendKind::LoadBalancer] {
        assert_eq!(besides(&far, kind, [false, false]), [Key::Address(address)]);
        assert_eq!(besides(&far, kind, [false, true]), [Key::External(address)]);
        assert_eq!(besides(&near, kind, [false, false]), [Key::External(address)]);
        assert_eq!(besides(&near, kind, [true, true]), []);
    }
    for key in [Key::Address(address), Key::External(address), Key::Frontend(KEY)] {
        assert_eq!(from_map_key(&map_key(&key)), Some(key));
    }
}

/// Slices that somebody keeps by hand, `default/kubernetes` among them, name no node.
#[test]
fn an_endpoint_at_the_nodes_own_address_is_the_nodes() {
    let own = backend(1);
    let lowering = Lowering { own: [own.address].into(), ..Lowering::default() };
    let value = programmed(&lowering, &KEY, &frontend(vec![own, backend(2)]));
    let hosts: Vec<bool> = value.node.members.iter().map(|member| member.host).collect();
    assert_eq!(hosts, [true, false]);
}

#[test]
fn a_service_may_say_how_its_endpoints_are_selected() {
    use layout::Frontend as F;
    let selected = |selection, scheduler: Option<&str>| {
        let scheduling = scheduler.map(|name| {
            Arc::new(Scheduling { scheduler: Some(name.into()), ..Scheduling::default() })
        });
        let frontend = Frontend { scheduling, ..frontend(vec![backend(1), backend(2)]) };
        let lowering = Lowering { selection, ..Lowering::default() };
        let value = programmed(&lowering, &KEY, &frontend);
        (value.node.slots().len() > 2, value.flags & F::RANDOM != 0)
    };
    let (plain, maglev, random) = ((false, false), (true, false), (false, true));
    for (selection, scheduler, expected) in [
        (Selection::Hash, None, plain),
        (Selection::Hash, Some("mh"), maglev),
        (Selection::Hash, Some("rr"), plain),
        (Selection::Maglev, None, maglev),
        (Selection::Maglev, Some("rr"), plain),
        (Selection::Random, None, random),
        (Selection::Random, Some("mh"), maglev),
        (Selection::Random, Some("rr"), random),
    ] {
        assert_eq!(selected(selection, scheduler), expected, "{selection}, {scheduler:?}");
    }
}
