//! What the logic needs of the world, so that it runs in the kernel and in tests alike.

use crate::layout::{
    Affinity, AffinityKey, Backend, BackendCounters, BackendId, Config, Flow, FragmentKey,
    FragmentPorts, Frontend, FrontendCounters, FrontendId, FrontendKey, LocalKey, OptOut,
    ServiceId, SocketKey, SocketPeer, Tuple,
};
use crate::order::Address;
use crate::verdict::Reason;

/// The maps.
pub trait Tables {
    fn config(&self) -> Option<&Config>;
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    fn slot(&self, index: u32) -> Option<BackendId>;
    fn backend(&self, id: BackendId) -> Option<Backend>;
    fn local(&self, key: &LocalKey) -> Option<BackendId>;

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity);

    /// `client::NODE | ..` of the longest prefix; 0 of an address in none.
    fn client(&self, address: &Address) -> u32;
    fn in_source_ranges(&self, service: ServiceId, address: &Address) -> bool;
    fn is_opted_out(&self, who: &OptOut) -> bool;

    /// Reads or changes an entry in place.
    fn flow<R>(&self, key: &Tuple, access: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// False when there is one already, or no room.
    fn add_flow(&self, key: &Tuple, flow: &Flow) -> bool;
    /// False when there is none: somebody else was first.
    fn remove_flow(&self, key: &Tuple) -> bool;

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    fn set_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);

    fn peer(&self, key: &SocketKey) -> Option<SocketPeer>;
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer);

    /// The same of connected UDP sockets, which are ended when their backend goes.
    fn udp_peer(&self, key: &SocketKey) -> Option<SocketPeer>;
    fn set_udp_peer(&self, key: &SocketKey, peer: &SocketPeer);
    fn remove_udp_peer(&self, key: &SocketKey);

    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters));
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters));
    fn count_drop(&self, reason: Reason);
}

/// What depends on the packet's hook and network namespace.
pub trait Network {
    /// The source of packets to `destination` that are masqueraded; unset when the node has
    /// none.
    fn source_for(&self, destination: &Address) -> Address;
    /// A socket of the node would take packets that look like this.
    fn has_socket(&self, incoming: &Tuple) -> bool;
    /// One that is connected to where they come from, or is about to be; not one that listens.
    fn has_connection(&self, incoming: &Tuple) -> bool;
}
