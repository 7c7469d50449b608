//! All objects as last seen, and which Services a batch of changes touches.
//!
//! Slices are kept apart per slice, under the Service they belong to, because each
//! one is replaced as a whole and two may carry the same endpoint. The only index,
//! slice name to Service, goes through [`State::replace_slice`].

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnetwork::IpNetwork;

use crate::model::{Change, EndpointSlice, Event, Family, Node, ObjectName, Service, ServiceCidr};

mod filed;
#[cfg(test)]
mod prop_tests;

use filed::Filed;

/// `last-change-trigger-time` of a slice, and its family.
pub type Trigger = (Family, SystemTime);

/// What a batch of events touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirtySet {
    pub services: BTreeSet<ObjectName>,
    pub service_changes: usize,
    pub slice_changes: usize,
    /// Of the changed slices, with their Service.
    pub triggers: Vec<(ObjectName, Trigger)>,
    /// The Node changed in a way that can change what every Service means.
    pub node_changed: bool,
    /// The Node came or went.
    pub node_presence_changed: bool,
    pub service_cidrs_changed: bool,
}

impl DirtySet {
    fn slice(&mut self, slice: &EndpointSlice) {
        self.services.insert(slice.service.clone());
        if let Some(at) = slice.triggered {
            self.triggers.push((slice.service.clone(), (slice.family, at)));
        }
    }
}

#[derive(Debug)]
pub struct State {
    services: HashMap<ObjectName, Arc<Service>>,
    /// In the order of their names. Nearly always there is one, for which a map would keep
    /// room for eleven.
    slices: HashMap<ObjectName, Vec<Filed>>,
    /// Slice name to the Service it was last filed under.
    filed_under: HashMap<ObjectName, ObjectName>,
    /// As last seen: it stays when the object goes.
    node: Option<Node>,
    node_is_there: bool,
    service_cidrs: BTreeMap<ObjectName, Vec<IpNetwork>>,
    services_listed: bool,
    slices_listed: bool,
    node_seen: bool,
    /// `default/kubernetes`
    api_server: ObjectName,
}

impl Default for State {
    fn default() -> Self {
        Self {
            services: HashMap::new(),
            slices: HashMap::new(),
            filed_under: HashMap::new(),
            node: None,
            node_is_there: false,
            service_cidrs: BTreeMap::new(),
            services_listed: false,
            slices_listed: false,
            node_seen: false,
            api_server: ObjectName::new("default", "kubernetes"),
        }
    }
}

impl State {
    /// What of both lists and the Node (or its absence) was not seen once yet: nothing may be
    /// written to the kernel before, or Services would be deleted that merely were not listed yet,
    /// and endpoints drained whose zone hints could not be read.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let seen = [
            ("the Node", self.node_seen),
            ("the list of Services", self.services_listed),
            ("the list of EndpointSlices", self.slices_listed),
        ];
        seen.into_iter().filter_map(|(what, seen)| (!seen).then_some(what)).collect()
    }

    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// In the order of the slice names, so that merging is deterministic.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = EndpointSlice> {
        self.slices.get(service).into_iter().flatten().map(Filed::slice)
    }

    pub fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// The Node as last seen, also when it is gone: nothing that works stops with it (kube-proxy
    /// ends then, and its rules stay).
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    #[must_use]
    pub const fn node_is_there(&self) -> bool {
        self.node_is_there
    }

    /// The ranges of all ServiceCIDRs, each once, in which nothing but Services lives as
    /// far as can be seen. Empty also as long as none were listed.
    #[must_use]
    pub fn service_cidrs(&self) -> Vec<IpNetwork> {
        let mut ranges = self.listed_cidrs();
        ranges.retain(|range| !self.hosts().any(|host| range.contains(host)));
        ranges.into_iter().collect()
    }

    /// Ranges of ServiceCIDRs with an address of a host that is in them: what no Service
    /// holds of these may be another host's.
    pub fn shared_cidrs(&self) -> impl Iterator<Item = (IpNetwork, IpAddr)> {
        self.listed_cidrs().into_iter().filter_map(|range| {
            self.hosts().find(|host| range.contains(*host)).map(|host| (range, host))
        })
    }

    fn listed_cidrs(&self) -> BTreeSet<IpNetwork> {
        self.service_cidrs.values().flatten().copied().collect()
    }

    /// This node and the API servers.
    fn hosts(&self) -> impl Iterator<Item = IpAddr> {
        let node = self.node.iter().flat_map(|node| node.addresses.iter().copied());
        let api = self.slices(&self.api_server).flat_map(|slice| slice.endpoints);
        node.chain(api.map(|endpoint| endpoint.address))
    }

    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.filed_under.len())
    }

    /// Takes in a batch. An event that changes nothing touches nothing.
    pub fn apply(&mut self, batch: impl IntoIterator<Item = Event>) -> DirtySet {
        let mut dirty = DirtySet::default();
        let cidrs = (self.listed_cidrs(), self.service_cidrs());
        for event in batch {
            match event {
                Event::Services(change) => self.apply_services(change, &mut dirty),
                Event::Slices(change) => self.apply_slices(change, &mut dirty),
                Event::Node(node) => {
                    let was_there = std::mem::replace(&mut self.node_is_there, node.is_some());
                    // That there is none is news at first, too.
                    dirty.node_presence_changed |= !self.node_seen || was_there != node.is_some();
                    self.node_seen = true;
                    if node.is_some() && self.node != node {
                        self.node = node;
                        dirty.node_changed = true;
                    }
                }
                Event::ServiceCidrs(change) => self.apply_service_cidrs(change),
                Event::Rejected(_) => {}
            }
        }
        dirty.service_cidrs_changed = (self.listed_cidrs(), self.service_cidrs()) != cidrs;
        dirty
    }

    fn apply_services(&mut self, change: Change<Service>, dirty: &mut DirtySet) {
        match change {
            Change::Applied(service) => self.replace_service(service, dirty),
            Change::Gone(name) => self.remove_service(&name, dirty),
            Change::Reset { objects, rejected } => {
                let keep: HashSet<ObjectName> =
                    objects.iter().map(|s| s.name.clone()).chain(rejected).collect();
                let gone: Vec<_> =
                    self.services.keys().filter(|name| !keep.contains(name)).cloned().collect();
                for name in gone {
                    self.remove_service(&name, dirty);
                }
                for service in objects {
                    self.replace_service(service, dirty);
                }
                self.services_listed = true;
            }
        }
    }

    fn replace_service(&mut self, mut service: Service, dirty: &mut DirtySet) {
        if self.services.get(&service.name).is_some_and(|held| **held == service) {
            return;
        }
        // One copy of the name for both.
        if let Some((known, _)) = self.slices.get_key_value(&service.name) {
            service.name = known.clone();
        }
        dirty.services.insert(service.name.clone());
        dirty.service_changes += 1;
        self.services.insert(service.name.clone(), Arc::new(service));
    }

    fn remove_service(&mut self, name: &ObjectName, dirty: &mut DirtySet) {
        if self.services.remove(name).is_some() {
            dirty.services.insert(name.clone());
            dirty.service_changes += 1;
        }
    }

    fn apply_service_cidrs(&mut self, change: Change<ServiceCidr>) {
        match change {
            Change::Applied(ServiceCidr { name, ranges }) => {
                self.service_cidrs.insert(name, ranges);
            }
            Change::Gone(name) => {
                self.service_cidrs.remove(&name);
            }
            Change::Reset { objects, rejected } => {
                self.service_cidrs.retain(|name, _| rejected.contains(name));
                let listed = objects.into_iter().map(|object| (object.name, object.ranges));
                self.service_cidrs.extend(listed);
            }
        }
    }

    fn apply_slices(&mut self, change: Change<EndpointSlice>, dirty: &mut DirtySet) {
        match change {
            Change::Applied(slice) => {
                let name = slice.name.clone();
                self.replace_slice(&name, Some(slice), dirty);
            }
            Change::Gone(name) => self.replace_slice(&name, None, dirty),
            Change::Reset { objects, rejected } => {
                let keep: HashSet<ObjectName> =
                    objects.iter().map(|s| s.name.clone()).chain(rejected).collect();
                let gone: Vec<_> =
                    self.filed_under.keys().filter(|name| !keep.contains(name)).cloned().collect();
                for name in gone {
                    self.replace_slice(&name, None, dirty);
                }
                for slice in objects {
                    let name = slice.name.clone();
                    self.replace_slice(&name, Some(slice), dirty);
                }
                self.slices_listed = true;
            }
        }
    }

    /// The one place that touches `slices` and `filed_under`, so that they agree. A
    /// slice may move to another Service when its label is edited.
    fn replace_slice(
        &mut self,
        name: &ObjectName,
        new: Option<EndpointSlice>,
        dirty: &mut DirtySet,
    ) {
        let old = self
            .filed_under
            .get(name)
            .and_then(|service| self.slices.get(service))
            .and_then(|slices| slices.iter().find(|slice| slice.name == *name));
        if old.map(Filed::slice) == new {
            return;
        }
        dirty.slice_changes += 1;
        if let Some(service) = self.filed_under.remove(name) {
            if let Some(slices) = self.slices.get_mut(&service) {
                slices.retain(|slice| slice.name != *name);
                if slices.is_empty() {
                    self.slices.remove(&service);
                }
            }
            dirty.services.insert(service);
        }
        if let Some(mut new) = new {
            if let Some((known, _)) = self.services.get_key_value(&new.service) {
                new.service = known.clone();
            }
            dirty.slice(&new);
            self.filed_under.insert(name.clone(), new.service.clone());
            let slices = self.slices.entry(new.service.clone()).or_default();
            let place = slices.partition_point(|slice| slice.name < new.name);
            slices.reserve_exact(1);
            slices.insert(place, new.into());
        }
    }
}
