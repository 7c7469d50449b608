//! What becomes of connections to endpoints that clients are not led to any more.

use super::*;

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
fn a_removed_endpoint_drains_and_goes_when_idle() {
    let mut bed = Bed::new();
    bed.settle(web());
    let two = bed.keys().into_iter().filter(|k| matches!(k, Key::Backend(..))).nth(1).unwrap();
    bed.plane.kernel().busy.insert(two.clone());
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
    assert_eq!(bed.plane.kernel().objects.get(&two), Some(&0), "weight 0 while it is busy");
    bed.plane.kernel().busy.clear();
    bed.now += Duration::from_secs(10);
    bed.step(vec![]);
    assert!(!bed.keys().contains(&two));
    assert_eq!(bed.seen.last().totals.draining, 0);
}

#[test]
fn draining_ends_at_the_deadline_whoever_holds_on() {
    let mut bed = Bed::new();
    bed.settle(web());
    let all: BTreeSet<Key> = bed.keys();
    bed.plane.kernel().busy = all;
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
    bed.now += Duration::from_secs(59);
    bed.step(vec![]);
    assert_eq!(bed.keys().len(), 4);
    bed.now += Duration::from_secs(2);
    bed.step(vec![]);
    assert_eq!(bed.keys().len(), 3);
}

#[test]
fn an_endpoint_that_comes_back_while_draining_gets_its_weight_back() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1, 2]))))]);
    assert!(bed.plane.kernel().objects.values().all(|v| *v == 1));
    bed.now += Duration::from_secs(100);
    bed.settle(vec![]);
    assert_eq!(bed.keys().len(), 4, "the old deadline is forgotten");
}

#[test]
fn a_backend_left_at_weight_zero_by_a_crash_is_repaired_or_drained() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
    // Killed in mid-drain; meanwhile the endpoint is back.
    let mut again = Bed::on(bed.plane.clone());
    again.settle(web());
    assert!(again.plane.kernel().objects.values().all(|v| *v == 1));
    // Killed in mid-drain; the endpoint stays away.
    bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
    let mut third = Bed::on(bed.plane.clone());
    third.settle(lists(vec![service("web", 1)], vec![slice("web", &[1])]));
    assert_eq!(third.seen.last().totals.draining, 1);
    let left = third.keys().into_iter().filter(|k| matches!(k, Key::Backend(..))).nth(1).unwrap();
    third.plane.kernel().busy.insert(left.clone());
    third.now += Duration::from_secs(10);
    third.step(vec![]);
    assert!(third.keys().contains(&left), "it is asked for its connections, and has some");
    third.plane.kernel().busy.clear();
    third.now += Duration::from_secs(10);
    third.step(vec![]);
    assert_eq!(third.keys().len(), 3, "idle: it goes before the deadline");
    // Killed once more, with a connection that never ends.
    let mut fourth = Bed::on(third.plane.clone());
    fourth.plane.kernel().objects.insert(left.clone(), 0);
    fourth.plane.kernel().busy.insert(left);
    fourth.settle(lists(vec![service("web", 1)], vec![slice("web", &[1])]));
    fourth.now += Duration::from_secs(61);
    fourth.step(vec![]);
    assert_eq!(fourth.keys().len(), 3, "at the deadline it goes all the same");
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
