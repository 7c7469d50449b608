//! The engine against a pretended kernel, with the clock in the test's hand.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::dataplane::fake::{Fake, Key};
use crate::model::{
    Change, Endpoint, EndpointSlice, Event, Family, NodeName, ObjectName, Placement, Protocol,
    Rejected, Service, ServicePort, SlicePort, TrafficPolicy, Zone,
};
use crate::plan::Op;
use crate::policy::FrontendKey;

#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub reports: Arc<Mutex<Vec<SyncReport>>>,
    conflicts: Arc<Mutex<Vec<String>>>,
    awaited: Arc<Mutex<Vec<String>>>,
    busy: Arc<Mutex<Vec<bool>>>,
    nodes: Arc<Mutex<Vec<Option<bool>>>>,
    node_port_addresses: Arc<Mutex<Vec<Vec<IpAddr>>>>,
}

impl Observer for Seen {
    fn awaiting(&mut self, missing: &[&'static str], _: Instant) {
        self.awaited.lock().unwrap().push(missing.join(", "));
    }
    fn busy(&mut self, since: Option<Instant>) {
        self.busy.lock().unwrap().push(since.is_some());
    }
    fn queued(&mut self, _: Instant, _: usize, _: usize) {}
    fn synced(&mut self, report: &SyncReport) {
        self.reports.lock().unwrap().push(report.clone());
    }
    fn rejected(&mut self, _: &Rejected) {}
    fn conflict(&mut self, loser: &ObjectName, holder: &ObjectName, frontend: &FrontendKey) {
        self.conflicts.lock().unwrap().push(format!("{loser} {holder} {frontend}"));
    }
    fn node_port_addresses(&mut self, addresses: &[IpAddr]) {
        self.node_port_addresses.lock().unwrap().push(addresses.to_vec());
    }
    fn node(&mut self, eligible: Option<bool>) {
        self.nodes.lock().unwrap().push(eligible);
    }
    fn health_check(&mut self, _: &ObjectName, _: Option<HealthCheck>) {}
}

impl Seen {
    pub fn last(&self) -> SyncReport {
        self.reports.lock().unwrap().last().cloned().expect("a round was reported")
    }
}

pub fn config() -> EngineConfig {
    EngineConfig {
        localhost_node_ports: false,
        node_name: NodeName::new("node-a"),
        families: vec![Family::V4, Family::V6],
        node_port_addresses: NodePortAddresses::All,
        masquerade_all: false,
        sync_period: Duration::from_secs(30),
        drain_timeout: Duration::from_secs(60),
    }
}

pub fn service(name: &str, ip: u8) -> Service {
    Service {
        name: ObjectName::new("ns", name),
        created: 1,
        cluster_ips: vec![[10, 96, 0, ip].into()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::new(80).unwrap(),
            node_port: None,
        }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        source_ranges: vec![],
        health_check_node_port: None,
        scheduling: None,
    }
}

pub fn slice(of: &str, addresses: &[u8]) -> EndpointSlice {
    let node = Some(NodeName::new("node-a"));
    let here = Arc::new(Placement { node, ..Placement::default() });
    EndpointSlice {
        name: ObjectName::new("ns", &format!("{of}-1")),
        service: ObjectName::new("ns", of),
        family: Family::V4,
        ports: vec![SlicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::new(8080).unwrap(),
        }],
        endpoints: addresses
            .iter()
            .map(|a| Endpoint {
                address: [10, 244, 0, *a].into(),
                ready: true,
                serving: true,
                terminating: false,
                placement: here.clone(),
            })
            .collect(),
        triggered: None,
    }
}

pub fn lists(services: Vec<Service>, slices: Vec<EndpointSlice>) -> Vec<Input> {
    vec![
        Input::Addresses(vec![[10, 99, 0, 2].into()]),
        Input::Object(Event::Node(None)),
        Input::Object(Event::Services(Change::Reset { objects: services, rejected: vec![] })),
        Input::Object(Event::Slices(Change::Reset { objects: slices, rejected: vec![] })),
    ]
}

/// Readbacks run when they are started; what they found is folded in over many steps.
struct AtOnce;

impl Background for AtOnce {
    fn start(&mut self, job: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
        job();
        Ok(())
    }

    fn read_ahead(&self) -> usize {
        4096
    }
}

pub struct Bed {
    pub plane: Fake,
    pub seen: Seen,
    pub engine: Engine<Fake, Seen>,
    pub now: Instant,
}

impl Bed {
    pub fn new() -> Self {
        Self::on(Fake::default())
    }

    /// A new engine on a kernel that may hold something already.
    pub fn on(plane: Fake) -> Self {
        Self::with(plane, config())
    }

    fn configured(config: EngineConfig) -> Self {
        Self::with(Fake::default(), config)
    }

    fn with(plane: Fake, config: EngineConfig) -> Self {
        let seen = Seen::default();
        let now = Instant::now();
        let engine =
            Engine::new(plane.clone(), seen.clone(), config, now).with_background(Box::new(AtOnce));
        Self { plane, seen, engine, now }
    }

    pub fn step(&mut self, inputs: Vec<Input>) -> Option<Instant> {
        self.engine.step(self.now, inputs)
    }

    /// Follows the engine's own wake-ups until it only waits for the next resync.
    pub fn settle(&mut self, inputs: Vec<Input>) {
        let mut next = self.step(inputs);
        for _ in 0..1000 {
            match next {
                Some(at) if at <= self.now + Duration::from_secs(2) => {
                    self.now = at.max(self.now);
                    next = self.step(vec![]);
                }
                _ => return,
            }
        }
        panic!("at {:?} the engine does not rest: {}", self.now, self.engine.unrest());
    }

    pub fn log(&self) -> Vec<Op<Key>> {
        std::mem::take(&mut self.plane.kernel().log)
    }

    pub fn keys(&self) -> BTreeSet<Key> {
        self.plane.kernel().objects.keys().cloned().collect()
    }
}

fn web() -> Vec<Input> {
    lists(vec![service("web", 1)], vec![slice("web", &[1, 2])])
}

#[test]
fn nothing_is_written_before_all_lists_are_in() {
    let mut bed = Bed::new();
    let mut inputs = web();
    while let Some(last) = inputs.pop() {
        let mut partial = Bed::new();
        let rest: Vec<Input> = web().into_iter().take(inputs.len()).collect();
        partial.settle(rest);
        assert_eq!(partial.log(), vec![], "without {last:?}");
        assert_eq!(partial.plane.kernel().readbacks, 0);
    }
    bed.settle(web());
    assert_eq!(bed.keys().len(), 4, "address, server, two backends: {:?}", bed.keys());
}

#[test]
fn it_tells_what_it_waits_for_and_that_it_works() {
    let mut bed = Bed::new();
    bed.step(vec![]);
    for input in web() {
        bed.step(vec![input]);
    }
    let awaited = std::mem::take(&mut *bed.seen.awaited.lock().unwrap());
    let [all, no_addresses, no_node, slices, nothing] = &awaited[..] else { panic!("{awaited:?}") };
    let both = "the list of Services, the list of EndpointSlices";
    assert_eq!(*all, format!("the Node, {both}, the node's addresses"));
    assert_eq!((no_addresses, &**no_node), (&format!("the Node, {both}"), both));
    assert_eq!((&**slices, &**nothing), ("the list of EndpointSlices", ""));
    assert_eq!(*bed.seen.nodes.lock().unwrap(), [None], "there is no such Node");
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().kind, SyncKind::Full);
    bed.settle(web());
    assert!(bed.seen.awaited.lock().unwrap().is_empty(), "told once");
    assert_eq!(bed.seen.nodes.lock().unwrap().len(), 1, "no news");
    let busy = bed.seen.busy.lock().unwrap();
    assert!(busy.len() > 10 && busy.chunks(2).all(|step| step == [true, false]), "{busy:?}");
}

#[test]
fn a_restart_writes_nothing() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.log();
    let mut again = Bed::on(bed.plane.clone());
    again.settle(web());
    assert_eq!(again.log(), vec![]);
    assert_eq!(again.seen.last().kind, SyncKind::Full);
}

#[test]
fn what_went_while_the_proxy_was_down_is_removed_after_the_lists() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.log();
    let mut again = Bed::on(bed.plane.clone());
    again.settle(lists(vec![], vec![]));
    assert_eq!(again.keys(), BTreeSet::new());
}

#[test]
fn one_endpoint_change_is_two_operations_among_a_thousand_services() {
    let mut bed = Bed::new();
    let names: Vec<String> = (0..1000).map(|n| format!("s{n}")).collect();
    let services = names
        .iter()
        .zip(0u16..)
        .map(|(name, n)| Service {
            cluster_ips: vec![IpAddr::from([10, 97, n.to_be_bytes()[0], n.to_be_bytes()[1]])],
            ..service(name, 0)
        })
        .collect();
    let slices = names.iter().map(|name| slice(name, &[1, 2])).collect();
    bed.settle(lists(services, slices));
    bed.log();
    let changed = Event::Slices(Change::Applied(slice("s500", &[1, 3])));
    bed.step(vec![Input::Object(changed)]);
    let log = bed.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(matches!(log[0], Op::Create(Key::Backend(..), _)), "the new one first");
    assert!(matches!(log[1], Op::Retire(Key::Backend(..), 0)));
    assert_eq!(bed.seen.last().kind, SyncKind::Partial);
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
fn foreign_objects_are_left_alone_unless_wanted() {
    let mut bed = Bed::new();
    let key = |ip: u8| crate::policy::FrontendKey {
        address: [10, 96, 0, ip].into(),
        protocol: Protocol::Tcp,
        port: NonZeroU16::new(80).unwrap(),
    };
    let stale = crate::policy::Backend {
        address: [10, 244, 0, 9].into(),
        port: NonZeroU16::new(8080).unwrap(),
        local: true,
        weight: 1,
    };
    {
        let mut kernel = bed.plane.kernel();
        for (foreign, value) in
            [(Key::Server(key(1)), 7), (Key::Backend(key(1), stale), 1), (Key::Server(key(9)), 7)]
        {
            kernel.foreign.insert(foreign.clone(), value);
            kernel.objects.insert(foreign, value);
        }
    }
    // The fake reports them as foreign only.
    let ours = std::mem::take(&mut bed.plane.kernel().objects);
    bed.settle(web());
    let log = bed.log();
    assert!(log.contains(&Op::Update(Key::Server(key(1)), 1)), "adopted: {log:?}");
    assert!(log.contains(&Op::Retire(Key::Backend(key(1), stale), 0)), "its leftovers drain");
    assert!(!log.iter().any(|op| *op.key() == Key::Server(key(9))), "not wanted, not touched");
    drop(ours);
}

#[test]
fn what_an_earlier_proxy_left_goes_when_all_that_is_wanted_is_there() {
    let key = |ip: u8| crate::policy::FrontendKey {
        address: [10, 96, 0, ip].into(),
        protocol: Protocol::Tcp,
        port: NonZeroU16::new(80).unwrap(),
    };
    let (left, foreign) = (Key::Server(key(8)), Key::Server(key(9)));
    let backend = Key::Backend(
        key(8),
        crate::policy::Backend {
            address: [10, 244, 0, 9].into(),
            port: NonZeroU16::new(8080).unwrap(),
            local: true,
            weight: 1,
        },
    );
    let mut bed = Bed::new();
    {
        let mut kernel = bed.plane.kernel();
        kernel.foreign.extend([(left.clone(), 7), (foreign, 7), (backend.clone(), 1)]);
        kernel.left.extend([left.clone(), backend.clone()]);
        // The first operation is refused: until it is repaired nothing is taken away.
        kernel.refuse = Some((0, 1));
    }
    bed.step(web());
    assert_eq!(bed.plane.kernel().takeovers, 0);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().failing_total, 0);
    assert_eq!(bed.plane.kernel().takeovers, 0, "only a full comparison says what is left");
    bed.log();
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    // What is in an unwanted server goes with it: nobody could reach it.
    assert_eq!(bed.log(), [Op::Delete(backend), Op::Delete(left)]);
    assert_eq!(bed.plane.kernel().foreign.len(), 1, "what is not kube-proxy's stays");
}

/// What kube-proxy left, in a kernel that refuses some objects for ever; how often it was asked
/// for after each of so many comparisons.
fn takeovers_beside(impossible: impl IntoIterator<Item = Key>) -> (Bed, [usize; 4]) {
    let left = Key::Server(crate::policy::FrontendKey {
        address: [10, 96, 0, 8].into(),
        protocol: Protocol::Tcp,
        port: NonZeroU16::new(80).unwrap(),
    });
    let mut bed = Bed::new();
    {
        let mut kernel = bed.plane.kernel();
        kernel.foreign.insert(left.clone(), 7);
        kernel.left.insert(left);
        kernel.impossible = impossible.into_iter().collect();
    }
    bed.settle(web());
    let takeovers = std::array::from_fn(|_| {
        let so_far = bed.plane.kernel().takeovers;
        bed.now += Duration::from_secs(31);
        bed.settle(vec![]);
        so_far
    });
    (bed, takeovers)
}

#[test]
fn what_can_never_be_programmed_does_not_keep_what_an_earlier_proxy_left() {
    let (bed, takeovers) = takeovers_beside([Key::Address([10, 96, 0, 1].into())]);
    assert_eq!(takeovers, [0, 0, 1, 2], "from the third comparison on");
    assert_eq!(bed.plane.kernel().foreign.len(), 0);
    assert_eq!(bed.seen.last().failing_total, 1, "it is still named");
}

#[test]
fn where_most_fails_what_an_earlier_proxy_left_stays() {
    let mut all = Bed::new();
    all.settle(web());
    let (bed, takeovers) = takeovers_beside(all.keys());
    assert_eq!(takeovers, [0; 4]);
    assert_eq!(bed.plane.kernel().foreign.len(), 1);
}

#[test]
fn a_node_that_goes_takes_nothing_with_it() {
    let mut bed = Bed::configured(EngineConfig {
        node_port_addresses: NodePortAddresses::Primary,
        ..config()
    });
    let node = crate::model::Node {
        name: NodeName::new("node-a"),
        zone: Some(Zone::new("zone-a")),
        addresses: vec![[10, 99, 0, 2].into()],
        pod_cidrs: vec![],
        deleting: false,
        scaling_down: false,
    };
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
fn each_familys_local_endpoints_and_triggers_are_its_own() {
    let mut dual = service("web", 1);
    dual.cluster_ips.push([0xfd00_u16, 0, 0, 0, 0, 0, 0, 1].into());
    dual.internal_policy = TrafficPolicy::Local;
    let at = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    let elsewhere = Placement { node: Some(NodeName::new("node-b")), ..Placement::default() };
    let mut v6 = slice("web", &[1]);
    v6.name = ObjectName::new("ns", "web-6");
    v6.family = Family::V6;
    v6.triggered = Some(at);
    v6.endpoints[0].address = [0xfd00_u16, 1, 0, 0, 0, 0, 0, 1].into();
    v6.endpoints[0].placement = Arc::new(elsewhere);
    let mut bed = Bed::new();
    bed.step(lists(vec![dual], vec![slice("web", &[1]), v6]));
    bed.settle(vec![]);
    let no_local = bed.seen.last().totals.no_local;
    assert_eq!((no_local.internal.v4, no_local.internal.v6), (0, 1));
    let reports = bed.seen.reports.lock().unwrap();
    let triggers: Vec<_> = reports.iter().flat_map(|report| report.triggers.clone()).collect();
    assert_eq!(triggers, [(Family::V6, at)]);
}

#[test]
fn a_refused_operation_is_retried_and_named() {
    let mut bed = Bed::new();
    bed.plane.kernel().refuse = Some((1, 1));
    bed.step(web());
    let report = bed.seen.last();
    assert_eq!(report.ops_failed, report.failing_total);
    assert!(report.failing_total > 0 && report.failing[0].error.contains("EINVAL"));
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().failing_total, 0);
    assert_eq!(bed.keys().len(), 4);
}

#[test]
fn a_service_is_told_whose_frontend_it_wants() {
    let mut bed = Bed::new();
    let younger = Service { created: 2, ..service("copy", 1) };
    bed.settle(lists(vec![younger, service("web", 1)], vec![slice("web", &[1, 2])]));
    assert_eq!(*bed.seen.conflicts.lock().unwrap(), ["ns/copy ns/web TCP 10.96.0.1:80"]);
}

#[test]
fn default_kubernetes_goes_first() {
    let mut bed = Bed::new();
    let mut services: Vec<Service> = (0..3).map(|n| service(&format!("a{n}"), n + 10)).collect();
    services.push(Service { name: ObjectName::new("default", "kubernetes"), ..service("", 1) });
    bed.settle(lists(services, vec![]));
    let order = bed.engine_order();
    assert_eq!(order.first().map(String::as_str), Some("default/kubernetes"));
}

impl Bed {
    /// The order in which a fresh queue would hand out the Services known here.
    fn engine_order(&self) -> Vec<String> {
        let mut queue = super::queue::Queue::default();
        for n in 0..3 {
            queue.push(ObjectName::new("ns", &format!("a{n}")), super::queue::Urgency::Changed);
        }
        queue.push(ObjectName::new("default", "kubernetes"), super::queue::Urgency::Compared);
        queue.take(10).services.iter().map(ToString::to_string).collect()
    }
}

#[test]
fn a_periodic_resync_repairs_drift() {
    let mut bed = Bed::new();
    bed.settle(web());
    let lost = bed.keys().into_iter().next().unwrap();
    bed.plane.kernel().objects.remove(&lost);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert!(bed.keys().contains(&lost));
}

#[test]
fn a_change_does_not_wait_for_a_resync_and_is_not_undone_by_it() {
    let mut bed = Bed::new();
    bed.settle(lists(
        (1..40).map(|n| service(&format!("s{n}"), n)).collect(),
        (1..40).map(|n| slice(&format!("s{n}"), &[1, 2])).collect(),
    ));
    bed.log();
    bed.now += Duration::from_secs(31);
    bed.step(vec![]);
    // The readback has told of a few objects by now, as they were when it began.
    let gone = vec![Input::Object(Event::Services(Change::Gone(ObjectName::new("ns", "s7"))))];
    bed.step(gone);
    let deleted = bed.log().len();
    assert_eq!(deleted, 4, "at once: {deleted}");
    let changed = Event::Slices(Change::Applied(slice("s9", &[1, 2, 3])));
    bed.step(vec![Input::Object(changed)]);
    assert_eq!(bed.log().len(), 1);
    assert_eq!(bed.seen.last().kind, SyncKind::Partial);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().kind, SyncKind::Full);
    assert_eq!(bed.log(), [], "what was read before is older than what was written since");
    assert_eq!(bed.seen.last().totals.repaired, 0);
}

#[test]
fn a_readback_that_fails_is_tried_again_and_changes_go_on() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.log();
    bed.plane.kernel().unreadable = 2;
    let lost = bed.keys().into_iter().next().unwrap();
    bed.plane.kernel().objects.remove(&lost);
    bed.now += Duration::from_secs(31);
    bed.step(vec![]);
    bed.step(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1, 2, 3]))))]);
    assert_eq!(bed.log().len(), 1);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert!(bed.keys().contains(&lost));
    let totals = bed.seen.last().totals;
    assert_eq!((totals.repaired, totals.missing, totals.unwanted), (1, 0, 0));
}

/// The piece that a failing readback does tell may be of the very object; which it is
/// differs from kernel to kernel here.
#[test]
fn a_retirement_whose_answer_was_lost_keeps_nobody_busy() {
    for _ in 0..20 {
        let mut bed = Bed::new();
        bed.settle(web());
        bed.plane.kernel().busy = bed.keys();
        bed.plane.kernel().lose_answer = Some((0, 1));
        bed.plane.kernel().unreadable = 3;
        bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
        bed.plane.kernel().busy.clear();
        bed.now += Duration::from_secs(31);
        bed.settle(vec![]);
        assert_eq!(bed.keys().len(), 3, "{:?}", bed.keys());
        assert_eq!(bed.seen.last().failing_total, 0);
    }
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
        Key::Server(crate::policy::FrontendKey {
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
