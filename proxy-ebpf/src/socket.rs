//! `connect(2)`, `sendmsg(2)` and what undoes them, in the socket layer of this node.

use crate::layout::config::client;
use crate::layout::{
    AffinityKey, Backend, BackendId, Config, Frontend, FrontendKey, OptOut, SocketKey, SocketPeer,
};
use crate::order::{Address, Be16, Be32};
use crate::parse::{SCTP, TCP, UDP};
use crate::select::{Client, Hash, select};
use crate::tables::Tables;
use crate::unmatched::{Unmatched, unmatched};
use crate::verdict::{Reason, SocketVerdict};

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Of the socket.
    pub cookie: u64,
    /// Of its network namespace: what stands for the client while it has no address.
    pub namespace: u64,
    /// Inode of its cgroup, and of that one's ancestor at the level of pods.
    pub cgroup: u64,
    pub pod: u64,
    pub now: u64,
}

/// `connect(2)`. The socket keeps its backend, so `random` picks it; but a UDP socket may still send
/// to the same frontend by address, and must find the same one then.
#[inline(always)]
pub fn connect(
    tables: &impl Tables,
    caller: &Caller,
    key: &FrontendKey,
    random: u32,
) -> SocketVerdict {
    decide(tables, caller, key, true, |config| {
        if key.protocol() == UDP { flow_of_socket(config, caller.cookie, key) } else { random }
    })
}

/// `sendmsg(2)` with an address: each datagram anew, so the same socket has to get the same
/// backend for the same frontend as long as that one serves.
#[inline(always)]
pub fn send(tables: &impl Tables, caller: &Caller, key: &FrontendKey) -> SocketVerdict {
    decide(tables, caller, key, false, |config| flow_of_socket(config, caller.cookie, key))
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the cookie is split into halves")]
fn flow_of_socket(config: &Config, cookie: u64, key: &FrontendKey) -> u32 {
    let mut hash = Hash::new(config).word(cookie as u32).word((cookie >> 32) as u32);
    let words = key.address().words();
    let mut i = 0;
    while i < 4 {
        hash = hash.word(words[i].to_kernel());
        i += 1;
    }
    hash.word(key.port().to_kernel()).finish()
}

#[inline(always)]
fn decide(
    tables: &impl Tables,
    caller: &Caller,
    key: &FrontendKey,
    connects: bool,
    number: impl FnOnce(&Config) -> u32,
) -> SocketVerdict {
    // Nothing but these is in the table; most connects of other kinds end here without
    // a lookup.
    if !matches!(key.protocol(), TCP | UDP | SCTP) {
        return SocketVerdict::Pass;
    }
    let Some(config) = tables.config() else {
        return SocketVerdict::Pass;
    };
    let key = &reached(key);
    let loopback = key.address().is_loopback_v4();
    let Some(frontend) = tables.frontend(&if loopback { at_loopback(key) } else { *key }) else {
        return refuse_unmatched(tables, config, key);
    };
    // In every other namespace that is somebody else.
    if loopback && caller.namespace != config.namespace {
        return SocketVerdict::Pass;
    }
    if !loopback && needs_packets(tables, config, caller, &frontend, key)
        || is_opted_out(tables, config, caller)
    {
        return SocketVerdict::Pass;
    }
    // No option of a backend: older verifiers refuse that the rest of none is copied.
    let (mut before, mut goes_on) = (NOBODY, false);
    let mut chosen = Backend::default();
    if !connects && let Some((id, backend)) = sent_before(tables, caller, key, &frontend) {
        (before, chosen) = (id, backend);
        // Affinity knows the backend itself, as long as it is one to be chosen, and has an end.
        goes_on = frontend.affinity == 0 || !backend.has(frontend.set(Client::Node));
    }
    let mut id = before;
    if !goes_on {
        let affinity = AffinityKey::of_namespace(caller.namespace, frontend.service);
        let number = number(config);
        match select(tables, &frontend, Client::Node, &affinity, number, caller.now) {
            Ok(selected) => (id, chosen) = selected,
            Err(reason) => return refuse(tables, &frontend, key, reason),
        }
    }
    if before != id {
        tables.count_frontend(frontend.id, |counters| counters.connections += 1);
        tables.count_backend(id, |counters| counters.connections += 1);
        if !connects {
            remember(tables, caller, key, id, &chosen);
        }
    }
    record(tables, config, caller, key, connects, id, &chosen);
    SocketVerdict::Translate { backend: id, address: chosen.address, port: chosen.port }
}

/// What no backend has for its id.
const NOBODY: BackendId = BackendId(u32::MAX);

#[inline(always)]
fn refuse(
    tables: &impl Tables,
    frontend: &Frontend,
    key: &FrontendKey,
    reason: Reason,
) -> SocketVerdict {
    match reason {
        // Silence is the devices' to keep. A datagram that nobody takes is theirs to answer:
        // the socket must work when an endpoint appears, so it must not be sent elsewhere.
        Reason::NoLocalEndpoint => SocketVerdict::Pass,
        _ if key.protocol() == UDP => SocketVerdict::Pass,
        reason => {
            tables.count_frontend(frontend.id, |counters| counters.refused += 1);
            tables.count_drop(reason);
            SocketVerdict::Refuse(reason)
        }
    }
}

/// The backend that the socket's datagrams to this frontend have gone to: as long as it serves,
/// it gets those that follow, whatever else can be chosen by then.
#[inline(always)]
fn sent_before(
    tables: &impl Tables,
    caller: &Caller,
    key: &FrontendKey,
    frontend: &Frontend,
) -> Option<(BackendId, Backend)> {
    let peer = tables.peer(&SocketKey::sent(caller.cookie, key.address(), key.port()))?;
    let backend = tables.backend(peer.backend)?;
    // The id may be another backend's by now.
    let is_it = backend.is_there()
        && backend.service == frontend.service
        && backend.address == peer.address
        && backend.port == peer.port;
    is_it.then_some((peer.backend, backend))
}

#[inline(always)]
fn remember(
    tables: &impl Tables,
    caller: &Caller,
    key: &FrontendKey,
    id: BackendId,
    backend: &Backend,
) {
    let Backend { address, port, .. } = *backend;
    let peer = SocketPeer { address, port, pad: 0, backend: id };
    tables.set_peer(&SocketKey::sent(caller.cookie, key.address(), key.port()), &peer);
}

/// The kernel takes 0.0.0.0 for 127.0.0.1 (`__ip_route_output_key`), after these programs.
#[inline(always)]
fn reached(key: &FrontendKey) -> FrontendKey {
    if key.address().to_v4() == Some(Be32::from_host(0)) { at_loopback(key) } else { *key }
}

/// Node ports are entered at 127.0.0.1 for all of 127.0.0.0/8, which is the node's.
#[inline(always)]
fn at_loopback(key: &FrontendKey) -> FrontendKey {
    FrontendKey::new(Address::v4(Be32::from_host(0x7f00_0001)), key.port(), key.protocol())
}

/// What cannot be decided before there is a packet: whose source ranges count, and what becomes
/// of the source. The node's own address is known.
#[inline(always)]
fn needs_packets(
    tables: &impl Tables,
    config: &Config,
    caller: &Caller,
    frontend: &Frontend,
    key: &FrontendKey,
) -> bool {
    let is_nodes = config.namespace != 0 && caller.namespace == config.namespace;
    if frontend.flags & Frontend::SOURCE_RANGES != 0 {
        let own = if key.address().to_v4().is_some() { config.source4 } else { config.source6 };
        // Who is not in range is dropped where the packet leaves.
        return !(is_nodes && tables.in_source_ranges(frontend.service, &own));
    }
    // What the node sends has its address. To an address of its own it never comes by a device.
    frontend.flags & Frontend::MASQUERADE_ALL != 0
        && !is_nodes
        && tables.client(&key.address()) & client::NODE == 0
}

#[inline(always)]
fn refuse_unmatched(tables: &impl Tables, config: &Config, key: &FrontendKey) -> SocketVerdict {
    match unmatched(tables, config, &key.address(), false) {
        Unmatched::UnusedPort if key.protocol() != UDP => {
            tables.count_drop(Reason::UnusedPort);
            SocketVerdict::Refuse(Reason::UnusedPort)
        }
        _ => SocketVerdict::Pass,
    }
}

#[inline(always)]
fn is_opted_out(tables: &impl Tables, config: &Config, caller: &Caller) -> bool {
    if config.features & Config::OPT_OUTS == 0 {
        return false;
    }
    let is = |id, kind| tables.is_opted_out(&OptOut { id, kind, pad: 0 });
    is(caller.namespace, OptOut::NAMESPACE)
        || is(caller.cgroup, OptOut::CGROUP)
        || is(caller.pod, OptOut::CGROUP)
}

/// Remembers what the socket's owner knows the backend as.
#[inline(always)]
fn record(
    tables: &impl Tables,
    config: &Config,
    caller: &Caller,
    key: &FrontendKey,
    connects: bool,
    id: BackendId,
    backend: &Backend,
) {
    if key.protocol() == TCP && config.features & Config::TCP_PEER_NAMES == 0 {
        return;
    }
    let peer = SocketPeer { address: key.address(), port: key.port(), pad: 0, backend: id };
    // Apart from TCP and single datagrams, of which there are so many that they would push it out.
    let is_udp_peer = connects && key.protocol() == UDP;
    let key = SocketKey::new(caller.cookie, backend.address, backend.port);
    if is_udp_peer {
        tables.set_udp_peer(&key, &peer);
        return;
    }
    // Writing what is there already costs more than looking.
    if tables.peer(&key) != Some(peer) {
        tables.set_peer(&key, &peer);
    }
}

/// The frontend that a backend is known as: for `recvmsg(2)` and `getpeername(2)`.
#[inline(always)]
pub fn known_as(
    tables: &impl Tables,
    cookie: u64,
    address: Address,
    port: Be16,
) -> Option<(Address, Be16)> {
    let key = SocketKey::new(cookie, address, port);
    let peer = tables.udp_peer(&key).or_else(|| tables.peer(&key))?;
    Some((peer.address, peer.port))
}

/// A UDP socket is closed that was connected to this address, a backend's perhaps.
#[inline(always)]
pub fn closed(tables: &impl Tables, cookie: u64, address: Address, port: Be16) {
    tables.remove_udp_peer(&SocketKey::new(cookie, address, port));
}

#[cfg(test)]
mod tests;
