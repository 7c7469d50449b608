//! What the Node and its addresses say.

use super::*;
use crate::model::Node;

fn node() -> Node {
    Node {
        name: NodeName::new("node-a"),
        zone: None,
        addresses: vec![],
        pod_cidrs: vec![],
        deleting: false,
        scaling_down: false,
    }
}

#[test]
fn what_frontends_become_besides_their_services_is_followed_by_all() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.log();
    let pod_cidrs = vec!["10.244.0.0/24".parse().unwrap()];
    bed.settle(vec![Input::Object(Event::Node(Some(Node { pod_cidrs, ..node() })))]);
    let log = bed.log();
    assert!(matches!(log[..], [Op::Update(Key::Server(_), 1001)]), "{log:?}");
}

#[test]
fn a_node_that_goes_takes_nothing_with_it() {
    let mut bed = Bed::configured(EngineConfig {
        node_port_addresses: NodePortAddresses::Primary,
        ..config()
    });
    let (zone, addresses) = (Some(Zone::new("zone-a")), vec![[10, 99, 0, 2].into()]);
    let node = Node { zone, addresses, ..node() };
    let mut exposed = service("web", 1);
    exposed.ports[0].node_port = NonZeroU16::new(30080);
    let mut inputs = lists(vec![exposed], vec![slice("web", &[1])]);
    inputs[1] = Input::Object(Event::Node(Some(node.clone())));
    bed.settle(inputs);
    let before = bed.keys();
    assert!(before.contains(&Key::Address([10, 99, 0, 2].into())));
    bed.log();
    for said in [None, Some(node)] {
        let there = said.is_some();
        bed.settle(vec![Input::Object(Event::Node(said))]);
        assert_eq!(bed.log(), []);
        let told = bed.seen.nodes.lock().unwrap().last().copied();
        assert_eq!(told, Some(there.then_some(true)), "health hears of it");
    }
    assert_eq!(bed.keys(), before);
}

#[test]
fn interfaces_of_pods_have_nothing_compared_again() {
    let mut bed = Bed::new();
    bed.settle(web());
    let rounds = bed.seen.reports.lock().unwrap().len();
    let link_local = [0xfe80_u16, 0, 0, 0, 0, 0, 0, 7].into();
    bed.settle(vec![Input::Addresses(vec![[10, 99, 0, 2].into(), link_local])]);
    assert_eq!(bed.seen.reports.lock().unwrap().len(), rounds);
}

#[test]
fn a_new_node_address_gets_the_node_ports() {
    let mut bed = Bed::new();
    let mut exposed = service("web", 1);
    exposed.ports[0].node_port = NonZeroU16::new(30080);
    bed.settle(lists(vec![exposed], vec![slice("web", &[1])]));
    let node_port = |ip: [u8; 4]| {
        Key::Server(FrontendKey {
            address: ip.into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::new(30080).unwrap(),
        })
    };
    assert!(bed.keys().contains(&node_port([10, 99, 0, 2])));
    bed.settle(vec![Input::Addresses(vec![
        [10, 99, 0, 2].into(),
        [192, 0, 2, 1].into(),
        [127, 0, 0, 1].into(),
    ])]);
    assert!(bed.keys().contains(&node_port([192, 0, 2, 1])));
    assert!(!bed.keys().contains(&node_port([127, 0, 0, 1])), "loopback is left out");
    // Where health-check node ports listen, too.
    let [one, other] = [[10, 99, 0, 2], [192, 0, 2, 1]].map(IpAddr::from);
    assert_eq!(*bed.seen.node_port_addresses.lock().unwrap(), [vec![one], vec![one, other]]);
}
