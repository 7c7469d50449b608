//! The tables in memory: for tests here, and to compare the loaded programs with.

extern crate std;

pub mod frames;
pub mod program;
#[cfg(test)]
pub mod strategy;

use core::cell::RefCell;
use core::hash::Hash;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::vec::Vec;

use crate::layout::{
    Affinity, AffinityKey, Backend, BackendCounters, BackendId, Config, Flow, FragmentKey,
    FragmentPorts, Frontend, FrontendCounters, FrontendId, FrontendKey, LocalKey, OptOut,
    ServiceId, SocketKey, SocketPeer, Tuple,
};
use crate::order::Address;
use crate::tables::{Network, Tables};
use crate::verdict::Reason;

/// Everything a program reads and writes. Maps grow without limit.
#[derive(Debug, Default)]
pub struct Fake {
    pub config: Config,
    pub frontends: HashMap<FrontendKey, Frontend>,
    pub slots: Vec<BackendId>,
    pub backends: Vec<Backend>,
    pub locals: HashMap<LocalKey, BackendId>,
    pub clients: HashMap<Address, u32>,
    pub source_ranges: HashMap<(ServiceId, Address), u32>,
    pub opt_outs: Vec<OptOut>,
    /// Ports on which the node listens.
    pub sockets_of_node: Vec<u16>,
    /// What its connected sockets receive.
    pub connections_of_node: Vec<Tuple>,
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub flows: RefCell<HashMap<Tuple, Flow>>,
    /// No flow is entered beyond this many entries.
    pub room: Option<usize>,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    pub peers: RefCell<HashMap<SocketKey, SocketPeer>>,
    pub udp_peers: RefCell<HashMap<SocketKey, SocketPeer>>,
    pub frontend_counters: RefCell<HashMap<FrontendId, FrontendCounters>>,
    pub backend_counters: RefCell<HashMap<BackendId, BackendCounters>>,
    pub drops: RefCell<Vec<Reason>>,
}

fn get<K: Eq + Hash, V: Copy>(map: &RefCell<HashMap<K, V>>, key: &K) -> Option<V> {
    map.borrow().get(key).copied()
}

impl Tables for Fake {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<BackendId> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: BackendId) -> Option<Backend> {
        self.backends.get(id.0 as usize).copied()
    }
    fn local(&self, key: &LocalKey) -> Option<BackendId> {
        self.locals.get(key).copied()
    }
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        get(&self.affinity, key)
    }
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *value);
    }
    fn client(&self, address: &Address) -> u32 {
        self.clients.get(address).copied().unwrap_or_default()
    }
    fn in_source_ranges(&self, service: ServiceId, address: &Address) -> bool {
        self.source_ranges.contains_key(&(service, *address))
    }
    fn is_opted_out(&self, who: &OptOut) -> bool {
        self.opt_outs.contains(who)
    }
    fn flow<R>(&self, key: &Tuple, access: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.flows.borrow_mut().get_mut(key).map(access)
    }
    fn add_flow(&self, key: &Tuple, flow: &Flow) -> bool {
        let mut flows = self.flows.borrow_mut();
        if self.room.is_some_and(|room| flows.len() >= room) {
            return false;
        }
        match flows.entry(*key) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(*flow);
                true
            }
        }
    }
    fn remove_flow(&self, key: &Tuple) -> bool {
        self.flows.borrow_mut().remove(key).is_some()
    }
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        get(&self.fragments, key)
    }
    fn set_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }
    fn peer(&self, key: &SocketKey) -> Option<SocketPeer> {
        get(&self.peers, key)
    }
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        self.peers.borrow_mut().insert(*key, *peer);
    }
    fn udp_peer(&self, key: &SocketKey) -> Option<SocketPeer> {
        get(&self.udp_peers, key)
    }
    fn set_udp_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        self.udp_peers.borrow_mut().insert(*key, *peer);
    }
    fn remove_udp_peer(&self, key: &SocketKey) {
        self.udp_peers.borrow_mut().remove(key);
    }
    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters)) {
        update(self.frontend_counters.borrow_mut().entry(id).or_default());
    }
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters)) {
        update(self.backend_counters.borrow_mut().entry(id).or_default());
    }
    fn count_drop(&self, reason: Reason) {
        self.drops.borrow_mut().push(reason);
    }
}

impl Network for Fake {
    fn source_for(&self, destination: &Address) -> Address {
        if destination.to_v4().is_some() { self.config.source4 } else { self.config.source6 }
    }
    fn has_socket(&self, incoming: &Tuple) -> bool {
        self.sockets_of_node.contains(&incoming.destination_port.to_host())
    }
    fn has_connection(&self, incoming: &Tuple) -> bool {
        self.connections_of_node.contains(incoming)
    }
}
