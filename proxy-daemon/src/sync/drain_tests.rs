//! What becomes of connections to endpoints that clients are not led to any more.

use std::net::IpAddr;
use std::time::Duration;

use super::Input;
use super::tests::{Bed, lists, service, slice};
use crate::dataplane::fake::Key;
use crate::model::{
    Change, Endpoint, EndpointSlice, Event, NodeName, Protocol, Service, TrafficPolicy,
};
use crate::plan::Op;

const LEFT: u8 = 2;

fn changed(slice: EndpointSlice) -> Vec<Input> {
    vec![Input::Object(Event::Slices(Change::Applied(slice)))]
}

/// Endpoints 1 and [`LEFT`]; the second is as `change` has it.
fn slice_with(change: impl Fn(&mut Endpoint)) -> EndpointSlice {
    let mut slice = slice("web", &[1, LEFT]);
    change(&mut slice.endpoints[1]);
    slice
}

fn terminating(endpoint: &mut Endpoint) {
    endpoint.ready = false;
    endpoint.terminating = true;
}

fn ending(endpoint: &mut Endpoint) {
    terminating(endpoint);
    endpoint.serving = false;
}

fn over_udp(mut slice: EndpointSlice) -> EndpointSlice {
    slice.ports[0].protocol = Protocol::Udp;
    slice
}

fn is_left(key: &Key) -> bool {
    matches!(key, Key::Backend(_, backend) if backend.address == IpAddr::from([10, 244, 0, LEFT]))
}

impl Bed {
    fn weights_of_left(&self) -> Vec<u32> {
        let kernel = self.plane.kernel();
        kernel.objects.iter().filter(|(key, _)| is_left(key)).map(|(_, weight)| *weight).collect()
    }

    /// Both endpoints, of which the second has connections that never end.
    fn with_busy(service: Service, slice: EndpointSlice) -> Self {
        let mut bed = Self::new();
        bed.settle(lists(vec![service], vec![slice]));
        bed.plane.kernel().busy = bed.keys();
        bed
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.settle(vec![]);
    }
}

#[test]
fn the_deadline_is_for_endpoints_that_are_in_no_slice() {
    let mut bed = Bed::with_busy(service("web", 1), slice("web", &[1, LEFT]));
    for change in [terminating, ending] {
        bed.settle(changed(slice_with(change)));
        bed.wait(1000);
        assert_eq!(bed.weights_of_left(), [0], "no new connections, the old ones live");
    }
    bed.settle(changed(slice("web", &[1])));
    bed.wait(55);
    assert_eq!(bed.weights_of_left(), [0], "the deadline began when it was removed");
    bed.wait(10);
    assert_eq!(bed.weights_of_left(), [] as [u32; 0]);
}

#[test]
fn an_endpoint_that_is_in_a_slice_again_has_no_deadline() {
    let mut bed = Bed::with_busy(service("web", 1), slice("web", &[1, LEFT]));
    bed.settle(changed(slice("web", &[1])));
    bed.wait(30);
    bed.settle(changed(slice_with(terminating)));
    bed.wait(1000);
    assert_eq!(bed.weights_of_left(), [0]);
}

#[test]
fn an_endpoint_out_of_this_nodes_set_keeps_its_connections() {
    let elsewhere = |endpoint: &mut Endpoint| {
        let mut placement = (*endpoint.placement).clone();
        placement.node = Some(NodeName::new("node-b"));
        endpoint.placement = placement.into();
    };
    let mut bed = Bed::with_busy(service("web", 1), slice_with(elsewhere));
    let local = Service { internal_policy: TrafficPolicy::Local, ..service("web", 1) };
    bed.settle(vec![Input::Object(Event::Services(Change::Applied(local)))]);
    bed.wait(1000);
    assert_eq!(bed.weights_of_left(), [0]);
    bed.plane.kernel().busy.clear();
    bed.wait(10);
    assert_eq!(bed.weights_of_left(), [] as [u32; 0], "idle: nothing is lost");
}

#[test]
fn after_a_restart_an_endpoint_that_is_there_has_no_deadline_either() {
    let mut bed = Bed::with_busy(service("web", 1), slice("web", &[1, LEFT]));
    bed.settle(changed(slice_with(terminating)));
    let mut again = Bed::on(bed.plane.clone());
    again.settle(lists(vec![service("web", 1)], vec![slice_with(terminating)]));
    again.wait(1000);
    assert_eq!(again.weights_of_left(), [0]);
    again.settle(changed(slice("web", &[1])));
    again.wait(61);
    assert_eq!(again.weights_of_left(), [] as [u32; 0]);
}

#[test]
fn udp_keeps_its_endpoint_while_that_serves() {
    let mut web = service("web", 1);
    web.ports[0].protocol = Protocol::Udp;
    let mut bed = Bed::with_busy(web.clone(), over_udp(slice("web", &[1, LEFT])));
    bed.settle(changed(over_udp(slice_with(terminating))));
    bed.wait(1000);
    assert_eq!(bed.weights_of_left(), [0]);
    let mut bed = Bed::on(bed.plane.clone());
    bed.settle(lists(vec![web], vec![over_udp(slice_with(terminating))]));
    bed.wait(1000);
    assert_eq!(bed.weights_of_left(), [0], "after a restart");
    bed.log();
    bed.step(changed(over_udp(slice_with(ending))));
    let log = bed.log();
    assert!(matches!(&log[..], [Op::Delete(key)] if is_left(key)), "at once: {log:?}");
}

fn hidden_objects(bed: &Bed) -> Vec<Key> {
    let is_hidden = |key: &Key| match key {
        Key::Server(frontend) | Key::Backend(frontend, _) => frontend.port.get() == 80 ^ 0x8000,
        Key::Address(_) => false,
    };
    let mut keys: Vec<Key> = bed.keys().into_iter().filter(is_hidden).collect();
    keys.sort();
    keys
}

/// Outside clients of a Service with affinity share the Local set at a hidden frontend.
#[test]
fn a_hidden_frontend_goes_when_its_last_connection_has() {
    let without = Service {
        external_policy: TrafficPolicy::Local,
        load_balancer_ips: vec![[203, 0, 113, 80].into()],
        ..service("web", 1)
    };
    let sticky = Service { affinity: Some(Duration::from_secs(60)), ..without.clone() };
    let change =
        |service: &Service| vec![Input::Object(Event::Services(Change::Applied(service.clone())))];
    let mut bed = Bed::with_busy(sticky.clone(), slice("web", &[1, LEFT]));
    let all = hidden_objects(&bed);
    assert_eq!(all.len(), 3, "a server, two backends: {all:?}");
    bed.settle(change(&without));
    bed.wait(1000);
    assert_eq!(hidden_objects(&bed), all, "its connections live");
    let backends = |key: &&Key| matches!(key, Key::Backend(..));
    let hidden: Vec<Key> = all.iter().filter(backends).cloned().collect();
    let weights = |bed: &Bed| -> Vec<u32> {
        hidden.iter().map(|key| bed.plane.kernel().objects[key]).collect()
    };
    assert_eq!(weights(&bed), [0, 0], "no new ones");
    let mut bed = Bed::on(bed.plane.clone());
    bed.settle(lists(vec![without.clone()], vec![slice("web", &[1, LEFT])]));
    bed.wait(1000);
    assert_eq!(hidden_objects(&bed), all, "over a restart too");
    bed.settle(change(&sticky));
    assert_eq!(weights(&bed), [1, 1], "wanted again");
    bed.settle(change(&without));
    bed.plane.kernel().busy.remove(&hidden[0]);
    bed.wait(10);
    assert_eq!(hidden_objects(&bed).len(), 2, "one is idle");
    bed.plane.kernel().busy.clear();
    bed.wait(10);
    assert_eq!(hidden_objects(&bed), [], "all are");
    bed.settle(vec![Input::Object(Event::Services(Change::Gone(without.name.clone())))]);
    assert!(bed.keys().is_empty());
}
