//! Any order of events gives the same state as starting from the last version of each
//! object.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::sync::Arc;

use proptest::prelude::*;

use ipnetwork::IpNetwork;

use super::State;
use crate::model::{
    Change, Endpoint, EndpointSlice, Event, Family, Node, NodeName, ObjectName, Protocol, Service,
    ServiceCidr, ServicePort, SlicePort, Zone, sample,
};

#[derive(Debug, Clone)]
enum Step {
    Service(u8, i64),
    ServiceGone(u8),
    Slice {
        name: u8,
        service: u8,
        address: u8,
    },
    SliceGone(u8),
    /// A re-list at this moment, from the model of what the API holds.
    Relist,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4u8, 0..3i64).prop_map(|(n, c)| Step::Service(n, c)),
        (0..4u8).prop_map(Step::ServiceGone),
        (0..5u8, 0..4u8, 1..4u8).prop_map(|(name, service, address)| Step::Slice {
            name,
            service,
            address
        }),
        (0..5u8).prop_map(Step::SliceGone),
        Just(Step::Relist),
    ]
}

fn name(prefix: &str, n: u8) -> ObjectName {
    ObjectName::new("ns", &format!("{prefix}{n}"))
}

fn service(n: u8, created: i64) -> Service {
    let (port, protocol) = (NonZeroU16::MIN, Protocol::Tcp);
    let port = ServicePort { name: "".into(), protocol, port, node_port: None };
    Service { created, ..sample::service(name("svc", n), [10, 96, 0, n], port) }
}

fn slice(n: u8, of: u8, address: u8) -> EndpointSlice {
    EndpointSlice {
        name: name("slice", n),
        service: name("svc", of),
        family: Family::V4,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: NonZeroU16::MIN }],
        endpoints: vec![Endpoint {
            address: [10, 244, 0, address].into(),
            ready: true,
            serving: true,
            terminating: false,
            placement: Arc::default(),
        }],
        triggered: None,
    }
}

#[derive(Debug, Clone, Default)]
struct Api {
    services: BTreeMap<u8, i64>,
    slices: BTreeMap<u8, (u8, u8)>,
}

impl Api {
    fn events(&mut self, step: &Step) -> Vec<Event> {
        match *step {
            Step::Service(n, created) => {
                self.services.insert(n, created);
                vec![Event::Services(Change::Applied(service(n, created)))]
            }
            Step::ServiceGone(n) => {
                self.services.remove(&n);
                vec![Event::Services(Change::Gone(name("svc", n)))]
            }
            Step::Slice { name, service, address } => {
                self.slices.insert(name, (service, address));
                vec![Event::Slices(Change::Applied(slice(name, service, address)))]
            }
            Step::SliceGone(n) => {
                self.slices.remove(&n);
                vec![Event::Slices(Change::Gone(name("slice", n)))]
            }
            Step::Relist => self.relist(),
        }
    }

    fn relist(&self) -> Vec<Event> {
        vec![
            Event::Services(Change::Reset {
                objects: self.services.iter().map(|(n, c)| service(*n, *c)).collect(),
                rejected: vec![],
            }),
            Event::Slices(Change::Reset {
                objects: self.slices.iter().map(|(n, (s, a))| slice(*n, *s, *a)).collect(),
                rejected: vec![],
            }),
        ]
    }
}

type View = (BTreeMap<ObjectName, Service>, BTreeMap<ObjectName, Vec<EndpointSlice>>);

fn view(state: &State) -> View {
    let services: BTreeMap<_, _> = state
        .service_names()
        .filter_map(|n| state.service(n).map(|s| (n.clone(), (**s).clone())))
        .collect();
    let slices =
        (0..4).map(|n| name("svc", n)).map(|n| (n.clone(), state.slices(&n).collect())).collect();
    (services, slices)
}

proptest! {
    #[test]
    fn any_order_of_events_gives_the_state_from_scratch(
        steps in proptest::collection::vec(step(), 0..40),
        batch in 1usize..5,
    ) {
        let mut api = Api::default();
        let mut state = State::default();
        let events: Vec<Event> = steps.iter().flat_map(|step| api.events(step)).collect();
        for chunk in events.chunks(batch) {
            state.apply(chunk.to_vec());
        }
        let mut fresh = State::default();
        fresh.apply(api.relist());
        prop_assert_eq!(view(&state), view(&fresh));
        // The index agrees with the slices it indexes.
        prop_assert_eq!(state.counts(), fresh.counts());
    }

    #[test]
    fn dirty_names_exactly_the_services_whose_view_changed(
        steps in proptest::collection::vec(step(), 0..30),
        last in step(),
    ) {
        let mut api = Api::default();
        let mut state = State::default();
        for step in &steps {
            state.apply(api.events(step));
        }
        let before = view(&state);
        let dirty = state.apply(api.events(&last));
        let after = view(&state);
        let changed: BTreeSet<ObjectName> = (0..4)
            .map(|n| name("svc", n))
            .filter(|n| before.0.get(n) != after.0.get(n) || before.1.get(n) != after.1.get(n))
            .collect();
        prop_assert_eq!(dirty.services, changed);
    }

    #[test]
    fn a_rejected_object_of_a_relist_keeps_its_last_good_version(n in 0..4u8) {
        let mut state = State::default();
        state.apply([Event::Services(Change::Applied(service(n, 1)))]);
        let dirty = state.apply([Event::Services(Change::Reset {
            objects: vec![],
            rejected: vec![name("svc", n)],
        })]);
        prop_assert!(dirty.services.is_empty());
        prop_assert!(state.service(&name("svc", n)).is_some());
    }
}

#[test]
fn service_cidrs_are_the_ranges_of_all_objects_and_change_only_when_these_do() {
    let cidr = |name: &str, ranges: &[&str]| ServiceCidr {
        name: ObjectName::new("", name),
        ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
    };
    let mut state = State::default();
    let mut apply = |change| {
        let dirty = state.apply([Event::ServiceCidrs(change)]);
        let ranges: Vec<String> = state.service_cidrs().iter().map(ToString::to_string).collect();
        (dirty.service_cidrs_changed, ranges.join(" "))
    };
    let reset = |objects, rejected| Change::Reset { objects, rejected };
    let both = cidr("kubernetes", &["10.96.0.0/12", "fd00::/108"]);
    let all = "10.96.0.0/12 fd00::/108".to_owned();
    assert_eq!(apply(reset(vec![both.clone()], vec![])), (true, all.clone()));
    assert_eq!(apply(reset(vec![both.clone()], vec![])), (false, all.clone()));
    assert_eq!(apply(Change::Applied(cidr("same", &["fd00::/108"]))), (false, all.clone()));
    assert_eq!(apply(reset(vec![], vec![both.name.clone()])), (false, all));
    let more = cidr("more", &["192.0.2.0/24"]);
    assert!(apply(Change::Applied(more.clone())).0);
    assert_eq!(apply(Change::Gone(both.name)), (true, "192.0.2.0/24".to_owned()));
    assert_eq!(apply(Change::Gone(more.name)), (true, String::new()));
}

#[test]
fn a_range_with_hosts_in_it_is_not_the_services_alone() {
    let range: IpNetwork = "10.96.0.0/12".parse().unwrap();
    let listed = ServiceCidr { name: ObjectName::new("", "kubernetes"), ranges: vec![range] };
    let node = |address: [u8; 4]| {
        Event::Node(Some(Node {
            name: NodeName::new("node-a"),
            zone: None,
            addresses: vec![address.into()],
            pod_cidrs: vec![],
            deleting: false,
            scaling_down: false,
        }))
    };
    let mut state = State::default();
    state.apply([Event::ServiceCidrs(Change::Applied(listed)), node([192, 0, 2, 2])]);
    assert_eq!(state.service_cidrs(), [range]);
    assert!(state.apply([node([10, 99, 0, 2])]).service_cidrs_changed);
    assert_eq!(state.service_cidrs(), []);
    let shared: Vec<_> = state.shared_cidrs().collect();
    assert_eq!(shared, [(range, [10, 99, 0, 2].into())]);
    state.apply([node([192, 0, 2, 2])]);
    assert_eq!(state.service_cidrs(), [range]);
    // The API server's own address, from the endpoints of default/kubernetes.
    let mut api = slice(1, 1, 1);
    api.name = ObjectName::new("default", "kubernetes");
    api.service = ObjectName::new("default", "kubernetes");
    api.endpoints[0].address = [10, 99, 0, 100].into();
    assert!(state.apply([Event::Slices(Change::Applied(api))]).service_cidrs_changed);
    assert_eq!(state.service_cidrs(), []);
}

#[test]
fn what_the_node_said_holds_when_it_is_gone() {
    let node = |zone: &str| Node {
        name: NodeName::new("node-a"),
        zone: Some(Zone::new(zone)),
        addresses: vec![[192, 0, 2, 2].into()],
        pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
        deleting: false,
        scaling_down: false,
    };
    let mut state = State::default();
    let mut told = |said: Option<Node>| {
        let dirty = state.apply([Event::Node(said)]);
        let (held, there) = (state.node().cloned(), state.node_is_there());
        (dirty.node_changed, dirty.node_presence_changed, held, there)
    };
    assert_eq!(told(None), (false, true, None, false), "that there is none is news");
    assert_eq!(told(None), (false, false, None, false));
    assert_eq!(told(Some(node("a"))), (true, true, Some(node("a")), true));
    assert_eq!(told(None), (false, true, Some(node("a")), false));
    assert_eq!(told(None), (false, false, Some(node("a")), false));
    assert_eq!(told(Some(node("a"))), (false, true, Some(node("a")), true));
    assert_eq!(told(Some(node("b"))), (true, false, Some(node("b")), true));
}
