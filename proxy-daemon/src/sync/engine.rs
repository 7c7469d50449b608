//! One round after another: take in changes, lower what is dirty, apply the difference,
//! fold the results back.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use tracing::{debug, info, warn};

use super::queue::{Queue, Taken, Urgency};
use super::report::{HealthCheck, Observer, SyncKind, SyncReport, Totals, Work};
use super::retry::{Retry, backoff};
use super::runner::Input;
use crate::dataplane::{Dataplane, OpError, Readback, WorkDone};
use crate::model::{Event, Family, NodeName, ObjectName};
use crate::plan::{Claims, Conflict, Drain, ObjectKey, Objects, Op, diff};
use crate::policy::{NodeView, lower};
use crate::state::State;

/// Services lowered in one round. Large enough that requests are pipelined well, small
/// enough that a change waits for a few milliseconds of a full resync at most.
const ROUND: usize = 512;

/// How often retired backends are asked for their connections.
const DRAIN_POLL: Duration = Duration::from_secs(5);

/// `--nodeport-addresses`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NodePortAddresses {
    /// Every address of the node except loopback and link-local ones.
    #[default]
    All,
    /// The addresses of the Node object.
    Primary,
    Cidrs(Vec<IpNetwork>),
}

#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub node_name: NodeName,
    pub families: Vec<Family>,
    pub node_port_addresses: NodePortAddresses,
    pub masquerade_all: bool,
    /// How often everything is compared with the kernel; zero: only at start and after
    /// an error.
    pub sync_period: Duration,
    /// Longest time that a removed endpoint keeps its connections.
    pub drain_timeout: Duration,
}

/// What one Service adds to the totals.
#[derive(Debug, Clone, Copy, Default)]
struct Summary {
    backends: usize,
    no_local_internal: usize,
    no_local_external: usize,
    health_check: Option<HealthCheck>,
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
    objects: Objects<D::Key>,
    applied: Picture<D::Key>,
    /// In the kernel, but not of our making; never touched unless wanted.
    foreign: Picture<D::Key>,
    retry: Retry<D::Key>,
    drain: Drain<D::Key>,
    summaries: HashMap<ObjectName, Summary>,
    totals: Totals,
    /// The kernel must be read back before the next operation.
    readback_due: Option<Instant>,
    readback_attempts: u32,
    /// Every object is to be compared once the queue is empty.
    full_diff_due: bool,
    reported_work: WorkDone,
    next_resync: Option<Instant>,
    next_drain_poll: Option<Instant>,
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
            objects: Objects::default(),
            applied: HashMap::new(),
            foreign: HashMap::new(),
            retry: Retry::default(),
            summaries: HashMap::new(),
            totals: Totals::default(),
            readback_due: Some(now),
            readback_attempts: 0,
            full_diff_due: false,
            reported_work: WorkDone::default(),
            next_resync: None,
            next_drain_poll: None,
        }
    }

    /// Takes in a batch and does one round. Returns when to be called next if nothing
    /// arrives before; `None` when only an input can give it work.
    pub fn step(&mut self, now: Instant, inputs: Vec<Input>) -> Option<Instant> {
        self.take_in(inputs, now);
        if !self.state.is_complete() || self.local_addresses.is_none() {
            return None;
        }
        if self.next_resync.is_some_and(|at| at <= now) {
            self.readback_due.get_or_insert(now);
        }
        if self.readback_due.is_some_and(|at| at <= now) {
            self.read_back(now);
        }
        if self.readback_due.is_none() {
            self.round(now);
        }
        self.next_wake(now)
    }

    fn take_in(&mut self, inputs: Vec<Input>, now: Instant) {
        let mut events = Vec::with_capacity(inputs.len());
        let mut node_changed = false;
        for input in inputs {
            match input {
                Input::Object(Event::Rejected(rejected)) => self.observer.rejected(&rejected),
                Input::Object(event) => events.push(event),
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
        if dirty.node_changed {
            let node = self.state.node();
            self.observer.node(node.map(|node| !node.deleting && !node.scaling_down));
            if self.plane.node_changed(node) {
                self.readback_due.get_or_insert(now);
            }
            node_changed = true;
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
            ),
            own_addresses: local.to_vec(),
            ..self.node.clone()
        };
        if view == self.node {
            return;
        }
        debug!(?view, "the node changed");
        self.node = view;
        for name in self.state.service_names() {
            self.queue.push(name.clone(), Urgency::Compared);
        }
    }

    /// Makes the picture of the kernel anew. Until that works nothing is written.
    fn read_back(&mut self, now: Instant) {
        let result = self.plane.prepare().and_then(|()| self.plane.readback());
        match result {
            Ok(readback) => {
                let Readback { ours, foreign } = readback;
                self.applied = ours;
                self.foreign = foreign;
                if self.readback_attempts > 0 {
                    info!("the kernel answers again");
                }
                self.readback_attempts = 0;
                self.readback_due = None;
                self.full_diff_due = true;
                self.next_resync =
                    (!self.config.sync_period.is_zero()).then(|| now + self.config.sync_period);
            }
            Err(error) => {
                self.readback_attempts += 1;
                let delay = backoff(self.readback_attempts);
                warn!(%error, retry_in = ?delay, "cannot prepare or read the kernel");
                self.readback_due = Some(now + delay);
                self.next_resync = None;
            }
        }
    }

    /// Objects that are not ours become ours when they are wanted (what an earlier proxy
    /// left): they are then updated in place instead of made twice.
    fn adopt(&mut self, touched: &BTreeSet<D::Key>) {
        if self.foreign.is_empty() {
            return;
        }
        for key in touched.iter().filter(|key| self.objects.get(key).is_some()) {
            if let Some(value) = self.foreign.remove(key) {
                self.applied.insert(key.clone(), value);
            }
        }
    }

    /// What stands inside an adopted object was made for it, and is ours too.
    fn adopt_children(&mut self) {
        let applied = &self.applied;
        let children: Vec<D::Key> = self
            .foreign
            .keys()
            .filter(|key| key.parent().is_some_and(|parent| applied.contains_key(&parent)))
            .cloned()
            .collect();
        for key in children {
            if let Some(value) = self.foreign.remove(&key) {
                self.applied.insert(key, value);
            }
        }
    }

    fn round(&mut self, now: Instant) {
        let started = Instant::now();
        let taken = self.queue.take(ROUND);
        let mut touched: BTreeSet<D::Key> = BTreeSet::new();
        for name in &taken.services {
            self.lower_service(name, &mut touched);
        }
        let full = self.full_diff_due && self.queue.is_empty();
        touched.extend(self.retry.due(now));
        if full {
            touched.extend(self.divergent());
        }
        self.adopt(&touched);
        if full {
            self.full_diff_due = false;
            self.adopt_children();
            touched.extend(self.unwanted());
            self.resume_drains(now);
        }
        let mut ops = diff(&touched, &self.objects, &self.applied);
        ops.extend(self.drained(now));
        let nothing = ops.is_empty() && taken.services.is_empty() && !full;
        let (applied, failed) = self.apply(&ops, now);
        self.retry.retain(|key| {
            self.objects.get(key) != self.applied.get(key) && !self.drain.contains(key)
        });
        if !nothing {
            let kind = if full { SyncKind::Full } else { SyncKind::Partial };
            self.report(kind, started, taken, applied, failed);
        }
    }

    /// Wanted otherwise than the kernel has it. Sorting everything would take longer than
    /// to compare it.
    fn divergent(&self) -> impl Iterator<Item = D::Key> {
        let differs = |(key, value): &(&D::Key, _)| self.applied.get(*key) != Some(*value);
        self.objects.iter().filter(differs).map(|(key, _)| key.clone())
    }

    fn unwanted(&self) -> impl Iterator<Item = D::Key> {
        self.applied.keys().filter(|key| self.objects.get(key).is_none()).cloned()
    }

    fn lower_service(&mut self, name: &ObjectName, touched: &mut BTreeSet<D::Key>) {
        let service = self.state.service(name).cloned();
        let lowered = service
            .as_deref()
            .map(|service| lower(service, || self.state.slices(name), &self.node))
            .unwrap_or_default();
        let summary = Summary {
            backends: lowered.frontends.values().map(|f| f.backends.len()).sum(),
            no_local_internal: lowered.no_local_internal,
            no_local_external: lowered.no_local_external,
            health_check: service.as_deref().and_then(|service| {
                service.health_check_node_port.map(|port| HealthCheck {
                    port: port.get(),
                    local_endpoints: lowered.local_ready,
                })
            }),
        };
        self.replace_summary(name, service.is_some().then_some(summary));
        let created = service.as_deref().map_or(0, |service| service.created);
        let replaced = self.claims.replace(name, created, lowered.frontends);
        for Conflict { key, loser, holder } in &replaced.conflicts {
            warn!(
                frontend = %key, %loser, %holder,
                "two Services claim this frontend; the older keeps it"
            );
        }
        for key in replaced.changed {
            let objects = self
                .claims
                .get(&key)
                .map(|frontend| self.plane.lower(&key, frontend))
                .unwrap_or_default();
            self.objects.replace(key, objects, touched);
        }
    }

    fn replace_summary(&mut self, name: &ObjectName, new: Option<Summary>) {
        let old = match new {
            Some(summary) => self.summaries.insert(name.clone(), summary),
            None => self.summaries.remove(name),
        }
        .unwrap_or_default();
        let new = new.unwrap_or_default();
        let totals = &mut self.totals;
        totals.backends = totals.backends + new.backends - old.backends;
        totals.no_local_internal =
            totals.no_local_internal + new.no_local_internal - old.no_local_internal;
        totals.no_local_external =
            totals.no_local_external + new.no_local_external - old.no_local_external;
        if new.health_check != old.health_check {
            self.observer.health_check(name, new.health_check);
        }
    }

    /// Retired objects found in the kernel (after a restart) wait like any other.
    fn resume_drains(&mut self, now: Instant) {
        for (key, value) in &self.applied {
            if self.objects.get(key).is_none() && key.retired(value).as_ref() == Some(value) {
                self.drain.begin(key.clone(), now);
            }
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
            over.into_iter().partition(|key| self.applied.contains_key(key));
        for key in &gone {
            self.drain.end(key);
        }
        there.into_iter().map(Op::Delete).collect()
    }

    fn apply(&mut self, ops: &[Op<D::Key>], now: Instant) -> (usize, usize) {
        if ops.is_empty() {
            return (0, 0);
        }
        let results = self.plane.apply(ops);
        debug_assert_eq!(results.len(), ops.len());
        let mut failed = 0;
        for (op, result) in ops.iter().zip(results) {
            match result {
                Ok(()) => self.fold(op, now),
                Err(error) => {
                    failed += 1;
                    if self.retry.failed(op.key(), error.to_string(), now) {
                        warn!(object = ?op.key(), %error, "the kernel refused an operation");
                    }
                    if matches!(error, OpError::Unknown(_)) {
                        self.readback_due.get_or_insert(now + backoff(1));
                    }
                }
            }
        }
        (ops.len() - failed, failed)
    }

    /// Only what the kernel confirmed becomes part of the picture.
    fn fold(&mut self, op: &Op<D::Key>, now: Instant) {
        let key = op.key();
        self.retry.succeeded(key);
        match op {
            Op::Create(_, value) | Op::Update(_, value) => {
                self.applied.insert(key.clone(), value.clone());
                self.drain.end(key);
            }
            Op::Retire(_, value) => {
                self.applied.insert(key.clone(), value.clone());
                self.drain.begin(key.clone(), now);
                self.next_drain_poll.get_or_insert(now + DRAIN_POLL);
            }
            Op::Delete(_) => {
                self.applied.remove(key);
                self.drain.end(key);
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
        ops_applied: usize,
        ops_failed: usize,
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
        if self.readback_due.is_none() && (!self.queue.is_empty() || self.full_diff_due) {
            return Some(now);
        }
        if let Some(at) = self.readback_due {
            return Some(at);
        }
        [self.retry.next(), self.next_resync, self.next_drain_poll, self.drain.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The data plane, when the engine is done with it.
    pub fn into_plane(self) -> D {
        self.plane
    }
}

/// The addresses on which node ports listen: pure, so that every case is a unit test.
fn node_port_addresses(
    choice: &NodePortAddresses,
    local: &[IpAddr],
    primary: &[IpAddr],
) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = match choice {
        NodePortAddresses::All => local.iter().copied().filter(usable_for_node_ports).collect(),
        NodePortAddresses::Primary => [Family::V4, Family::V6]
            .into_iter()
            .filter_map(|family| primary.iter().find(|a| Family::of(**a) == family).copied())
            .collect(),
        NodePortAddresses::Cidrs(cidrs) => local
            .iter()
            .copied()
            .filter(|address| cidrs.iter().any(|cidr| cidr.contains(*address)))
            .collect(),
    };
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Loopback is never a node-port address in IPVS mode: IPVS cannot send a packet with a
/// loopback source to another host. Link-local addresses are not unique on the node.
fn usable_for_node_ports(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}
