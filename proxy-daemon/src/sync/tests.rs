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
    Rejected, Service, ServicePort, SlicePort, TrafficPolicy, Zone, sample,
};
use crate::plan::Op;
use crate::policy::FrontendKey;

mod drain;
mod node;
mod repair;
mod takeover;

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
    let (port, protocol) = (NonZeroU16::new(80).unwrap(), Protocol::Tcp);
    let port = ServicePort { name: "".into(), protocol, port, node_port: None };
    sample::service(ObjectName::new("ns", name), [10, 96, 0, ip], port)
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
    for _ in 0..2 {
        bed.step(vec![]);
    }
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
fn each_familys_local_endpoints_and_triggers_are_its_own() {
    let mut dual = service("web", 1);
    dual.cluster_ips.push([0xfd00_u16, 0, 0, 0, 0, 0, 0, 1].into());
    dual.internal_policy = TrafficPolicy::Local;
    dual.external_policy = TrafficPolicy::Local;
    dual.ports[0].node_port = NonZeroU16::new(30080);
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
    for counts in [no_local.internal, no_local.external] {
        assert_eq!((counts.v4, counts.v6), (0, 1));
    }
    let reports = bed.seen.reports.lock().unwrap();
    let triggers: Vec<_> = reports.iter().flat_map(|report| report.triggers.clone()).collect();
    assert_eq!(triggers, [(Family::V6, at)]);
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
