//! One round after another: take in changes, lower what is dirty, apply the difference,
//! fold the results back.

mod resync;
mod standing;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::node_ports::{NodePortAddresses, node_port_addresses, usable_for_node_ports};
use super::queue::{Queue, Taken, Urgency};
use super::reading::{Background, Reading, Threads};
use super::report::{HealthCheck, Observer, SyncKind, SyncReport, Totals, Work};
use super::retry::{Retry, backoff};
use super::runner::Input;
use crate::dataplane::{Dataplane, OpError, Surroundings, WorkDone};
use crate::model::{Event, Family, NodeName, ObjectName};
use crate::plan::{Claims, Conflict, Drain, Ledger, ObjectKey, Op};
use crate::policy::{Frontend, FrontendKey, Lowered, NoLocal, NodeView, PortName, lower};
use crate::state::State;

use resync::Comparison;
use standing::Standings;

/// Services lowered in one round. Large enough that requests are pipelined well, small
/// enough that a change waits for a few milliseconds of a full resync at most.
const ROUND: usize = 512;

/// Objects compared in one round of a full comparison, for the same reason.
const SLICE: usize = 4096;

/// How often it is seen what a readback under way has brought.
const READING_POLL: Duration = Duration::from_millis(5);

/// How often retired backends are asked for their connections.
const DRAIN_POLL: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub node_name: NodeName,
    pub families: Vec<Family>,
    pub node_port_addresses: NodePortAddresses,
    /// Node ports answer on 127.0.0.1 too.
    pub localhost_node_ports: bool,
    pub masquerade_all: bool,
    /// How often everything is compared with the kernel; zero: only at start and after
    /// an error.
    pub sync_period: Duration,
    /// Longest time that a removed endpoint keeps its connections: one that is in no slice.
    pub drain_timeout: Duration,
}

/// What one Service adds to the totals.
#[derive(Debug, Clone, Default)]
struct Summary {
    backends: usize,
    /// Few have it.
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rare {
    no_local: NoLocal,
    health_check: Option<HealthCheck>,
}

impl Summary {
    fn rare(&self) -> Rare {
        self.rare.as_deref().copied().unwrap_or_default()
    }
}

/// What became of operations.
#[derive(Debug, Clone, Copy, Default)]
struct Outcome {
    applied: usize,
    failed: usize,
}

impl std::ops::Add for Outcome {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { applied: self.applied + other.applied, failed: self.failed + other.failed }
    }
}

type Picture<K> = HashMap<K, <K as ObjectKey>::Value>;

pub struct Engine<D: Dataplane, O> {
    plane: D,
    observer: O,
    config: EngineConfig,
    state: State,
    node: NodeView,
    local_addresses: Option<Vec<IpAddr>>,
    queue: Queue,
    claims: Claims,
    ledger: Ledger<D::Key>,
    /// In the kernel, but not of our making; touched only when wanted, or when left by
    /// an earlier proxy.
    foreign: Picture<D::Key>,
    /// Those that the readback under way has found so far.
    foreign_found: Picture<D::Key>,
    retry: Retry<D::Key>,
    drain: Drain<D::Key>,
    summaries: HashMap<ObjectName, Summary>,
    totals: Totals,
    background: Box<dyn Background>,
    readback_due: Option<Instant>,
    readback_attempts: u32,
    reading: Option<Reading<D::Key>>,
    /// What has to be seen once before anything is programmed, as last told.
    awaited: Option<Vec<&'static str>>,
    /// The kernel has been read back once.
    was_read: bool,
    /// Every object is being compared with what was read back.
    sweep: Option<Comparison<D::Key>>,
    reported_work: WorkDone,
    next_resync: Option<Instant>,
    next_drain_poll: Option<Instant>,
    /// Comparisons in a row after which a few objects were refused still.
    held_back: u32,
    /// A list or a readback, as large as everything, came and went.
    shed: bool,
    /// The ledger was packed, after the first comparison.
    compacted: bool,
}

impl<D: Dataplane, O> std::fmt::Debug for Engine<D, O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("totals", &self.totals).finish_non_exhaustive()
    }
}

impl<D: Dataplane, O: Observer> Engine<D, O> {
    pub fn new(plane: D, observer: O, config: EngineConfig, now: Instant) -> Self {
        let node = NodeView {
            name: config.node_name.clone(),
            zone: None,
            node_port_addresses: Vec::new(),
            own_addresses: Vec::new(),
            families: config.families.clone(),
            masquerade_all: config.masquerade_all,
        };
        Self {
            plane,
            observer,
            drain: Drain::new(config.drain_timeout),
            config,
            state: State::default(),
            node,
            local_addresses: None,
            queue: Queue::default(),
            claims: Claims::default(),
            ledger: Ledger::default(),
            foreign: HashMap::new(),
            foreign_found: HashMap::new(),
            retry: Retry::default(),
            summaries: HashMap::new(),
            totals: Totals::default(),
            readback_due: Some(now),
            background: Box::new(Threads),
            readback_attempts: 0,
            reading: None,
            awaited: None,
            was_read: false,
            sweep: None,
            reported_work: WorkDone::default(),
            next_resync: None,
            next_drain_poll: None,
            held_back: 0,
            shed: false,
            compacted: false,
        }
    }

    /// Reads the kernel back elsewhere than on threads of its own.
    #[must_use]
    pub fn with_background(mut self, background: Box<dyn Background>) -> Self {
        self.background = background;
        self
    }

    /// Takes in a batch and does one round. Returns when to be called next if nothing
    /// arrives before; `None` when only an input can give it work.
    pub fn step(&mut self, now: Instant, inputs: Vec<Input>) -> Option<Instant> {
        self.observer.busy(Some(now));
        let next = self.advance(now, inputs);
        self.observer.busy(None);
        next
    }

    fn advance(&mut self, now: Instant, inputs: Vec<Input>) -> Option<Instant> {
        self.take_in(inputs, now);
        if !self.has_seen_all(now) {
            return None;
        }
        self.start_readback(now);
        self.fold_readback(now);
        if self.was_read {
            self.round(now);
        }
        self.next_wake(now)
    }

    /// What it needs before it may write was seen once.
    fn has_seen_all(&mut self, now: Instant) -> bool {
        if self.awaited.as_ref().is_some_and(Vec::is_empty) {
            return true;
        }
        let mut missing = self.state.missing();
        if self.local_addresses.is_none() {
            missing.push("the node's addresses");
        }
        let all = missing.is_empty();
        if self.awaited.as_ref() != Some(&missing) {
            self.observer.awaiting(&missing, now);
            self.awaited = Some(missing);
        }
        all
    }

    /// Much memory was freed since the last call of this.
    pub fn take_shed(&mut self) -> bool {
        std::mem::take(&mut self.shed)
    }

    fn take_in(&mut self, inputs: Vec<Input>, now: Instant) {
        let mut events = Vec::with_capacity(inputs.len());
        let mut node_changed = false;
        for input in inputs {
            match input {
                Input::Object(Event::Rejected(rejected)) => self.observer.rejected(&rejected),
                Input::Object(event) => {
                    self.shed |= event.is_list();
                    events.push(event);
                }
                Input::Addresses(addresses) => {
                    node_changed |= self.local_addresses.as_ref() != Some(&addresses);
                    self.plane.addresses_changed(&addresses);
                    self.local_addresses = Some(addresses);
                }
                Input::Stop => {}
            }
        }
        let dirty = self.state.apply(events);
        if dirty.service_changes + dirty.slice_changes > 0 {
            self.observer.queued(now, dirty.service_changes, dirty.slice_changes);
        }
        if dirty.node_changed || dirty.node_presence_changed {
            let node = self.state.node().filter(|_| self.state.node_is_there());
            self.observer.node(node.map(|node| !node.deleting && !node.scaling_down));
        }
        node_changed |= dirty.node_changed;
        if dirty.node_changed || dirty.service_cidrs_changed {
            for (range, host) in self.state.shared_cidrs().filter(|_| dirty.service_cidrs_changed) {
                warn!(
                    %range, %host,
                    "a host has an address in a range of Services: addresses of the range that no \
                     Service holds are not dropped"
                );
            }
            let service_cidrs = self.state.service_cidrs();
            let now_are = Surroundings { node: self.state.node(), service_cidrs: &service_cidrs };
            if self.plane.surroundings_changed(now_are) {
                self.readback_due.get_or_insert(now);
                self.compare_all();
            }
        }
        self.queue.changed(dirty, now);
        if node_changed {
            self.look_at_node();
        }
    }

    /// What a Service means depends on the node: all are compared again when it changed.
    fn look_at_node(&mut self) {
        let node = self.state.node();
        let primary = node.map_or(&[][..], |node| &node.addresses);
        let local = self.local_addresses.as_deref().unwrap_or_default();
        let view = NodeView {
            zone: node.and_then(|node| node.zone.clone()),
            node_port_addresses: node_port_addresses(
                &self.config.node_port_addresses,
                local,
                primary,
                self.config.localhost_node_ports,
            ),
            // Every pod's interface comes with a link-local address: if those counted, each
            // pod would have all Services compared again.
            own_addresses: local.iter().copied().filter(usable_for_node_ports).collect(),
            ..self.node.clone()
        };
        if view == self.node {
            return;
        }
        debug!(?view, "the node changed");
        if view.node_port_addresses != self.node.node_port_addresses {
            self.observer.node_port_addresses(&view.node_port_addresses);
        }
        self.node = view;
        self.compare_all();
    }

    fn compare_all(&mut self) {
        for name in self.state.service_names() {
            self.queue.push(name.clone(), Urgency::Compared);
        }
    }

    fn round(&mut self, now: Instant) {
        let started = Instant::now();
        let taken = self.queue.take(ROUND);
        let mut touched: BTreeSet<D::Key> = BTreeSet::new();
        for name in &taken.services {
            self.lower_service(name, &mut touched);
        }
        self.review_drains(&taken.services, &mut touched, now);
        let due: BTreeSet<D::Key> = self.retry.due(now).into_iter().collect();
        // A retirement whose answer was lost may have been carried out.
        self.resume_drains(&due, now);
        touched.extend(due);
        // What changed goes first; then the comparison goes on.
        let comparing = self.sweep.is_some() && self.queue.is_empty();
        if comparing && let Some(comparison) = &mut self.sweep {
            let mut diverged = self.ledger.sweep(&mut comparison.sweep, SLICE);
            diverged.retain(|key| !touched.contains(key));
            comparison.diverged.extend(diverged.iter().cloned());
            touched.extend(diverged);
        }
        self.adopt(&touched);
        let mut ops = self.differences(&touched);
        ops.extend(self.drained(now));
        let nothing = ops.is_empty() && taken.services.is_empty();
        let outcome = self.apply(&ops, now);
        self.settle_retries();
        match self.sweep.take_if(|comparison| comparing && comparison.sweep.over) {
            Some(comparison) => {
                let started = comparison.started;
                let outcome = outcome + self.finish_comparison(comparison, now);
                self.report(SyncKind::Full, started, taken, outcome);
            }
            None if !nothing => self.report(SyncKind::Partial, started, taken, outcome),
            None => {}
        }
    }

    fn settle_retries(&mut self) {
        let (ledger, drain) = (&self.ledger, &self.drain);
        self.retry.retain(|key| !ledger.agrees(key) && !drain.contains(key));
    }

    fn lower_service(&mut self, name: &ObjectName, touched: &mut BTreeSet<D::Key>) {
        let service = self.state.service(name).cloned();
        let mut lowered = self.lowered(name);
        let check_port = service.as_deref().and_then(|service| service.health_check_node_port);
        let rare = Rare {
            no_local: lowered.no_local,
            health_check: check_port
                .map(|port| HealthCheck { port: port.get(), local_endpoints: lowered.local_ready }),
        };
        let summary = Summary {
            backends: lowered.frontends.values().map(|f| f.backends.len()).sum(),
            rare: (rare != Rare::default()).then(|| Box::new(rare)),
        };
        self.replace_summary(name, service.is_some().then_some(summary));
        let created = service.as_deref().map_or(0, |service| service.created);
        let claimed = lowered.frontends.keys().copied().collect();
        let replaced = self.claims.replace(name, created, &claimed);
        for Conflict { key, loser, holder } in &replaced.conflicts {
            warn!(
                frontend = %key, %loser, %holder,
                "two Services claim this frontend; the older keeps it"
            );
            self.observer.conflict(loser, holder, key);
        }
        for (key, holder) in replaced.changed {
            let frontend = match &holder {
                Some(holder) if holder != name => self.lowered(holder).frontends.remove(&key),
                _ => lowered.frontends.remove(&key),
            };
            self.tell_holder(&key, frontend.as_ref());
            let objects = frontend.map(|frontend| self.plane.lower(&key, &frontend));
            self.ledger.replace(key, objects.unwrap_or_default(), touched);
        }
    }

    /// What the Service means, as things are now.
    fn lowered(&self, name: &ObjectName) -> Lowered {
        let service = self.state.service(name);
        service
            .map(|service| {
                let slices: Vec<_> = self.state.slices(name).collect();
                lower(service, || slices.iter(), &self.node, &|key| self.connects(key))
            })
            .unwrap_or_default()
    }

    /// Whose the frontend is: the winner's of all that claim it.
    fn tell_holder(&mut self, key: &FrontendKey, held: Option<&Frontend>) {
        let holder = held.map(|frontend| {
            let PortName { service, port } = &frontend.port;
            let ports = self.state.service(service).map(|service| &service.ports);
            let named = ports
                .into_iter()
                .flatten()
                .find(|candidate| candidate.name == *port && candidate.protocol == key.protocol);
            (&frontend.port, named.map(|port| port.port))
        });
        self.observer.serves(key, holder);
    }

    fn replace_summary(&mut self, name: &ObjectName, new: Option<Summary>) {
        let old = self.summaries.remove(name).unwrap_or_default();
        let is_there = new.is_some();
        let new = new.unwrap_or_default();
        let totals = &mut self.totals;
        totals.backends = totals.backends + new.backends - old.backends;
        let (old, now) = (old.rare(), new.rare());
        totals.no_local = NoLocal {
            internal: totals
                .no_local
                .internal
                .replace(old.no_local.internal, now.no_local.internal),
            external: totals
                .no_local
                .external
                .replace(old.no_local.external, now.no_local.external),
        };
        if now.health_check != old.health_check {
            self.observer.health_check(name, now.health_check);
        }
        if is_there {
            self.summaries.insert(name.clone(), new);
        }
    }

    /// Deletions of retired objects whose wait is over.
    fn drained(&mut self, now: Instant) -> Vec<Op<D::Key>> {
        let mut over: BTreeSet<D::Key> = self.drain.expired(now).cloned().collect();
        if !over.is_empty() {
            info!(count = over.len(), "the drain timeout ended connections of removed endpoints");
        }
        if self.next_drain_poll.is_some_and(|at| at <= now) {
            self.next_drain_poll = Some(now + DRAIN_POLL);
            let waiting: Vec<_> = self.drain.waiting(now).cloned().collect();
            match self.plane.unused(&waiting) {
                Ok(unused) => over.extend(unused),
                Err(error) => warn!(%error, "cannot see whether removed endpoints are idle"),
            }
        }
        // Some went otherwise: deleted with their parent, or by somebody else.
        let (there, gone): (Vec<_>, Vec<_>) =
            over.into_iter().partition(|key| self.ledger.held(key).is_some());
        for key in &gone {
            self.drain.end(key);
        }
        there.into_iter().map(Op::Delete).collect()
    }

    fn apply(&mut self, ops: &[Op<D::Key>], now: Instant) -> Outcome {
        if ops.is_empty() {
            return Outcome::default();
        }
        let results = self.plane.apply(ops);
        debug_assert_eq!(results.len(), ops.len());
        let mut failed = 0;
        let mut standings = Standings::default();
        for (op, result) in ops.iter().zip(results) {
            match result {
                Ok(()) => self.fold(op, &mut standings, now),
                Err(error) => {
                    failed += 1;
                    if self.retry.failed(op.key(), &error, now) {
                        warn!(object = %op.key(), %error, "the kernel refused an operation");
                    }
                    if matches!(error, OpError::Unknown(_)) {
                        self.readback_due.get_or_insert(now + backoff(1));
                    }
                }
            }
        }
        Outcome { applied: ops.len() - failed, failed }
    }

    /// Only what the kernel confirmed becomes part of the picture.
    fn fold(&mut self, op: &Op<D::Key>, standings: &mut Standings, now: Instant) {
        let key = op.key();
        self.retry.succeeded(key);
        self.ledger.applied(op);
        match op {
            Op::Create(..) | Op::Update(..) => self.drain.end(key),
            Op::Delete(_) => {
                self.drain.end(key);
                self.look_at_holder(key);
            }
            Op::Retire(..) => {
                let standing = self.standing(key, standings);
                self.drain.begin(key.clone(), standing, now);
                self.next_drain_poll.get_or_insert(now + DRAIN_POLL);
            }
        }
        if self.drain.is_empty() {
            self.next_drain_poll = None;
        }
    }

    fn report(
        &mut self,
        kind: SyncKind,
        started: Instant,
        taken: Taken,
        Outcome { applied: ops_applied, failed: ops_failed }: Outcome,
    ) {
        // Since the last report, so that a readback counts to the round it made possible.
        let after = self.plane.work();
        let before = std::mem::replace(&mut self.reported_work, after);
        let (services, slices) = self.state.counts();
        self.totals = Totals {
            services,
            slices,
            frontends: self.claims.len(),
            conflicts: self.claims.conflicts(),
            draining: self.drain.len(),
            ..self.totals
        };
        let (service_changes, slice_changes) = self.queue.pending_changes();
        let report = SyncReport {
            kind,
            started,
            duration: started.elapsed(),
            service_changes: taken.service_changes,
            slice_changes: taken.slice_changes,
            triggers: taken.triggers,
            ops_applied,
            ops_failed,
            work: Work {
                requests: after.requests - before.requests,
                dumps: after.dumps - before.dumps,
                sends: after.sends - before.sends,
            },
            releases: self.plane.take_releases(),
            fills: self.plane.fill(),
            pending: service_changes + slice_changes,
            totals: self.totals,
            failing: self.retry.report(),
            failing_total: self.retry.len(),
        };
        debug!(
            ?kind,
            services = taken.services.len(),
            ops = ops_applied,
            failed = ops_failed,
            requests = report.work.requests,
            dumps = report.work.dumps,
            duration = ?report.duration,
            "round"
        );
        self.observer.synced(&report);
    }

    fn next_wake(&self, now: Instant) -> Option<Instant> {
        if self.was_read && (!self.queue.is_empty() || self.sweep.is_some()) {
            return Some(now);
        }
        [
            self.reading.as_ref().map(|_| now + READING_POLL),
            self.readback_due.filter(|_| self.reading.is_none()),
            self.retry.next().filter(|_| self.was_read),
            self.next_resync,
            self.next_drain_poll,
            self.drain.next_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What it still has to do, for the message of a test.
    #[cfg(test)]
    pub fn unrest(&self) -> String {
        let differing: Vec<_> =
            self.ledger.iter().filter(|(key, ..)| !self.ledger.agrees(key)).collect();
        format!(
            "differing {differing:?}, retry {:?}, drain {:?}, queue empty {}, sweep {}, reading \
             {}, readback due {:?}, drain poll {:?}",
            self.retry,
            self.drain,
            self.queue.is_empty(),
            self.sweep.is_some(),
            self.reading.is_some(),
            self.readback_due,
            self.next_drain_poll,
        )
    }

    /// The data plane, when the engine is done with it.
    pub fn into_plane(self) -> D {
        self.plane
    }
}
