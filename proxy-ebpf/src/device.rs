//! Packets at a device: which become something else, and what.

use crate::direct;
use crate::flow::{self, Opening};
use crate::layout::config::client;
use crate::layout::{
    AffinityKey, Backend, BackendCounters, BackendId, Config, Device, Flow, FragmentKey,
    FragmentPorts, Frontend, FrontendCounters, FrontendId, FrontendKey, LocalKey, Traffic, Tuple,
};
use crate::order::Address;
use crate::packet::Bytes;
use crate::parse::{Headers, Kind, SCTP, TCP, UDP, tcp};
use crate::select::{Client, Hash, SECOND, select};
use crate::tables::{Network, Tables};
use crate::unmatched::{Unmatched, unmatched};
use crate::verdict::{Reason, Verdict};

/// Where a packet is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// tcx or clsact, on the way in.
    Ingress,
    /// On the way out: from the node itself, or routed.
    Egress,
    /// Before the stack has seen it. What XDP does not carry out itself comes by at
    /// [`Hook::Ingress`] again, and is counted there; what it does, by [`count_sent`].
    Xdp,
}

/// What is known of a packet besides its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub hook: Hook,
    /// `Device::PODS | ..`
    pub device: u32,
    /// It came inside another one, which `Work` knows: this node is to give it to a backend of its.
    pub wrapped: bool,
    pub now: u64,
    pub random: u32,
    /// Segments that it stands for, and its length.
    pub traffic: Traffic,
}

/// What is known of one packet, and what becomes of it.
///
/// The programs keep it in a map: their stack has 512 bytes, over all functions that call
/// each other. And what comes out of a map is unknown to the verifier, which then does not
/// go through all that follows once for each way a packet can be parsed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    pub headers: Headers,
    /// What the packet is to look like ([`Verdict::Translate`]).
    pub to: Tuple,
    pub known: Flow,
    pub frontend: Frontend,
    pub opening: Opening,
    /// Where the packet that it came inside of came from, and whom it was for; of no meaning
    /// unless `Arrival::wrapped`.
    pub sender: Address,
    pub via: Address,
}

/// Whether a packet on its way in has one inside that is for a backend of this node. Nodes send
/// such packets from their own addresses; from a pod's they would let that pod speak for any client.
#[inline(always)]
pub fn has_one_inside(
    tables: &impl Tables,
    packet: &impl Bytes,
    headers: &Headers,
    device: u32,
) -> bool {
    let Some(config) = tables.config() else {
        return false;
    };
    let Tuple { source, destination, .. } = headers.tuple;
    config.features & Config::DIRECT_ACCEPT != 0
        && direct::is_wrapped(packet, headers, config.direct_port)
        && device & Device::PODS == 0
        && tables.local(&LocalKey { service: LocalKey::ANY, address: destination }).is_some()
        && tables.client(&source) & client::CLUSTER == 0
}

/// Decides on a packet, enters a flow for a new one, and counts.
#[inline(always)]
pub fn decide(
    tables: &impl Tables,
    network: &impl Network,
    arrival: &Arrival,
    work: &mut Work,
) -> Verdict {
    let Some(config) = tables.config() else {
        return Verdict::Pass;
    };
    if work.headers.kind == Kind::IcmpError {
        return error(tables, arrival, work);
    }
    if !resolve(tables, &mut work.headers) {
        return Verdict::Pass;
    }
    if follow(tables, arrival, work) {
        work.to = work.known.to;
        return carry_on(tables, arrival, work);
    }
    // What is nobody's comes by at tc again, which does that.
    if arrival.hook != Hook::Xdp {
        make_way(tables, &work.headers, arrival);
    }
    if arrival.device & Device::PORT != 0 {
        return Verdict::Pass;
    }
    begin(tables, network, config, arrival, work)
}

/// Gives a fragment the ports of its datagram. False when they are not known: one that
/// overtook the first is the stack's to keep; if it was ours, the sender sends again.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn resolve(tables: &impl Tables, headers: &mut Headers) -> bool {
    match headers.kind {
        Kind::FirstFragment => {
            let Tuple { source_port, destination_port, .. } = headers.tuple;
            let ports = FragmentPorts { source_port, destination_port };
            tables.set_fragment(&fragment_key(headers), &ports);
            true
        }
        Kind::LaterFragment => {
            let Some(ports) = tables.fragment(&fragment_key(headers)) else {
                return false;
            };
            headers.tuple.source_port = ports.source_port;
            headers.tuple.destination_port = ports.destination_port;
            headers.tcp_flags = 0;
            true
        }
        Kind::Whole | Kind::IcmpError => true,
    }
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn follow(tables: &impl Tables, arrival: &Arrival, work: &mut Work) -> bool {
    let headers = &work.headers;
    let Headers { tuple, tcp_flags, .. } = headers;
    if !flow::advance(tables, tuple, *tcp_flags, arrival.now, &mut work.known) {
        return false;
    }
    // Two nodes must not send a packet to each other: what the other has chosen is newer.
    if arrival.wrapped && Flow::is_direct(work.known.flags) {
        tables.remove_flow(tuple);
        return false;
    }
    true
}

/// Nanoseconds that a translated packet may wait in the stack before it leaves: for three
/// questions about its neighbour's address, a second apart (`mcast_probes`, `retrans_time_ms`).
const IN_THE_STACK: u64 = 3 * SECOND;

/// A client may speak to a backend itself (or its socket was translated) from a port that was
/// used for a flow to that backend, by a frontend: the replies are not that flow's any more.
///
/// A connection says where it begins and ends. Datagrams do not, and where they leave, those of
/// the flow come by as well, translated where they came in; but then it was seen just now.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn make_way(tables: &impl Tables, headers: &Headers, arrival: &Arrival) {
    let first = &headers.tuple;
    match first.protocol {
        TCP if headers.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN => {}
        UDP => {}
        _ => return,
    }
    let reply = first.inverse();
    let Some((flags, to)) = tables.flow(&reply, |flow| (flow.flags, flow.to)) else {
        return;
    };
    if flags & Flow::REPLY == 0 {
        return;
    }
    let request = to.inverse();
    let over = match (first.protocol, arrival.hook) {
        (TCP, _) => Flow::is_closing(flags),
        (_, Hook::Egress) => {
            let seen = tables.flow(&request, |flow| flow.seen).unwrap_or(0);
            arrival.now.saturating_sub(seen) > IN_THE_STACK
        }
        _ => true,
    };
    if over {
        tables.remove_flow(&request);
        tables.remove_flow(&reply);
    }
}

#[inline(always)]
const fn fragment_key(headers: &Headers) -> FragmentKey {
    FragmentKey {
        source: headers.tuple.source,
        destination: headers.tuple.destination,
        id: headers.fragment,
        protocol: headers.tuple.protocol,
        pad: [0; 3],
    }
}

#[inline(always)]
fn carry_on(tables: &impl Tables, arrival: &Arrival, work: &Work) -> Verdict {
    let flow = &work.known;
    let Some(verdict) = way(arrival.hook, flow.flags) else {
        return Verdict::Pass;
    };
    if arrival.device & Device::PORT != 0 && flow.flags & Flow::REPLY == 0 {
        return Verdict::Pass;
    }
    if !can_become(&work.headers, flow) {
        return refuse(tables, arrival, Some(flow.frontend), Reason::SctpPort);
    }
    if arrival.hook != Hook::Xdp {
        count_known(tables, flow, arrival.traffic);
    }
    verdict
}

/// The checksum of SCTP covers the whole packet. How it changes with a port depends on the
/// packet's length, which no fragment tells.
#[inline(always)]
fn can_become(headers: &Headers, flow: &Flow) -> bool {
    let (from, to) = (&headers.tuple, &flow.to);
    from.protocol != SCTP
        || Flow::is_direct(flow.flags)
        || matches!(headers.kind, Kind::Whole | Kind::IcmpError)
        || from.source_port == to.source_port && from.destination_port == to.destination_port
}

/// XDP counts what it has sent on; what it could not comes by at tc.
#[inline(always)]
pub fn count_sent(tables: &impl Tables, work: &Work, traffic: Traffic) {
    count_known(tables, &work.known, traffic);
}

#[inline(always)]
pub fn count_known(tables: &impl Tables, flow: &Flow, traffic: Traffic) {
    let reply = flow.flags & Flow::REPLY != 0;
    count(tables, flow.frontend, flow.backend, traffic, reply);
}

/// What becomes of a packet of a flow: whether the program itself sends it on. `None`: it is not
/// to be touched here.
///
/// A reply to a client's own address leaves by a device where the client's packets came in,
/// and is translated there, so that the stack between (its rules, its connection tracking)
/// sees the same two addresses in both directions.
#[inline(always)]
pub(crate) fn way(hook: Hook, flags: u32) -> Option<Verdict> {
    if Flow::is_direct(flags) {
        return if hook == Hook::Egress { None } else { Some(Verdict::Encapsulate) };
    }
    let forward = flags & Flow::FORWARD != 0;
    let forward = match (flags & Flow::REPLY != 0, hook) {
        (true, Hook::Egress) => false,
        (true, _) if forward => true,
        (true, _) => return None,
        (false, Hook::Egress) => true,
        (false, _) => forward,
    };
    Some(Verdict::Translate { forward })
}

/// An ICMP error goes the way of its flow's packets, and is not traffic of it.
#[inline(always)]
fn error(tables: &impl Tables, arrival: &Arrival, work: &mut Work) -> Verdict {
    if arrival.hook == Hook::Xdp {
        return Verdict::Pass;
    }
    let Work { headers, to, .. } = work;
    // A quoted packet may be made up; it must not keep a flow alive.
    let Some(flags) = tables.flow(&headers.tuple, |flow| {
        *to = flow.to;
        flow.flags
    }) else {
        return Verdict::Pass;
    };
    match way(arrival.hook, flags) {
        Some(Verdict::Encapsulate) if arrival.wrapped => Verdict::Pass,
        Some(verdict) => verdict,
        None => Verdict::Pass,
    }
}

#[inline(always)]
fn count(
    tables: &impl Tables,
    frontend: FrontendId,
    backend: BackendId,
    traffic: Traffic,
    reply: bool,
) {
    tables.count_frontend(frontend, |FrontendCounters { requests, replies, .. }| {
        *(if reply { replies } else { requests }) += traffic;
    });
    tables.count_backend(backend, |BackendCounters { requests, replies, .. }| {
        *(if reply { replies } else { requests }) += traffic;
    });
}

/// A packet of no flow: nothing of ours, or the first of one.
#[inline(always)]
fn begin(
    tables: &impl Tables,
    network: &impl Network,
    config: &Config,
    arrival: &Arrival,
    work: &mut Work,
) -> Verdict {
    if !find(tables, config, arrival.wrapped, work) {
        if arrival.wrapped {
            return refuse(tables, arrival, None, Reason::Misdirected);
        }
        return refuse_unmatched(tables, config, arrival, &work.headers.tuple.destination);
    }
    if !arrival.wrapped && is_nodes_own(tables, network, &work.headers, arrival) {
        return Verdict::Pass;
    }
    if arrival.hook == Hook::Xdp {
        make_way(tables, &work.headers, arrival);
    }
    // No other proxy's connection comes inside packets of ours.
    if !arrival.wrapped
        && config.features & Config::OTHERS_CONNECTIONS != 0
        && is_in_the_middle(&work.headers)
    {
        return Verdict::Pass;
    }
    let result = choose(tables, config, arrival, work);
    if let Err(reason) = result.and_then(|()| enter(tables, network, config, work)) {
        return refuse(tables, arrival, Some(work.frontend.id), reason);
    }
    let Flow { to, backend, frontend, flags, .. } = work.opening.request;
    let forward = flags & Flow::FORWARD != 0;
    work.to = to;
    if !can_become(&work.headers, &work.opening.request) {
        return refuse(tables, arrival, Some(frontend), Reason::SctpPort);
    }
    // XDP has entered the flow; the packet is then one of a known flow at tc.
    tables.count_frontend(frontend, |counters| counters.connections += 1);
    tables.count_backend(backend, |counters| counters.connections += 1);
    if arrival.hook == Hook::Xdp {
        work.known = work.opening.request;
    } else {
        count(tables, frontend, backend, arrival.traffic, false);
    }
    if Flow::is_direct(flags) { Verdict::Encapsulate } else { Verdict::Translate { forward } }
}

/// Of a connection that began elsewhere; other protocols do not say.
#[inline(always)]
const fn is_in_the_middle(headers: &Headers) -> bool {
    headers.tuple.protocol == TCP && headers.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN
}

/// Of a connection of the node itself, whose port is a node port as well: its client was bound to
/// that port, or its server had the connection before there was the Service. What begins a
/// connection is the Service's.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn is_nodes_own(
    tables: &impl Tables,
    network: &impl Network,
    headers: &Headers,
    arrival: &Arrival,
) -> bool {
    let Tuple { destination, protocol, .. } = headers.tuple;
    arrival.hook != Hook::Egress
        && (is_in_the_middle(headers) || protocol == UDP)
        && tables.client(&destination) & client::NODE != 0
        && network.has_connection(&headers.tuple)
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn find(tables: &impl Tables, config: &Config, wrapped: bool, work: &mut Work) -> bool {
    let Tuple { destination, destination_port, protocol, .. } = work.headers.tuple;
    // What listens there is for the node's own sockets only.
    if destination.is_loopback_v4() {
        return false;
    }
    let key = FrontendKey::new(destination, destination_port, protocol);
    if let Some(frontend) = tables.frontend(&key) {
        work.frontend = frontend;
        return true;
    }
    // A node port of the other node, whose address nobody but that node sends from: here the
    // same Service has it at an address of this node.
    if !wrapped || work.sender != destination {
        return false;
    }
    let own = if destination.to_v4().is_some() { config.source4 } else { config.source6 };
    let Some(frontend) = tables.frontend(&FrontendKey::new(own, destination_port, protocol)) else {
        return false;
    };
    work.frontend = frontend;
    true
}

/// Finds the backend for the first packet of a flow, and what becomes of the packet.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn choose(
    tables: &impl Tables,
    config: &Config,
    arrival: &Arrival,
    work: &mut Work,
) -> Result<(), Reason> {
    let Headers { tuple: key, tcp_flags, .. } = &work.headers;
    let frontend = &work.frontend;
    if frontend.flags & Frontend::SOURCE_RANGES != 0
        && !tables.in_source_ranges(frontend.service, &key.source)
    {
        return Err(Reason::SourceRange);
    }
    if key.protocol != UDP && tcp_flags & tcp::RST != 0 {
        return Err(Reason::NoFlow);
    }
    let mut kind = tables.client(&key.source) & client::ANY;
    if arrival.device & Device::PODS != 0 {
        kind |= client::CLUSTER;
    }
    let client = if kind == 0 { Client::Outside } else { Client::Node };
    let hash = Hash::of(config, key);
    let number = if frontend.flags & Frontend::RANDOM == 0 { hash } else { arrival.random };
    let (id, backend) = if arrival.wrapped {
        chosen(tables, frontend, &work.via)?
    } else {
        let affinity = AffinityKey { client: key.source, service: frontend.service };
        select(tables, frontend, client, &affinity, number, arrival.now)?
    };
    if backend.address.to_v4().is_some() != key.destination.to_v4().is_some() {
        return Err(Reason::VacantSlot);
    }
    let masquerade = masquerades(frontend, kind, &key.source, &backend);
    // The stack routes a translated packet, unless it would take its source for forged.
    // On the way out it has routed it already, by the frontend's address.
    let forged = arrival.wrapped && kind & client::NODE != 0;
    let forward =
        if masquerade || forged || arrival.hook == Hook::Egress { Flow::FORWARD } else { 0 };
    let direct = masquerade
        && kind == 0
        && backend.address != key.source
        && is_direct(config, arrival, frontend, &backend);
    let opening = &mut work.opening;
    opening.hash = hash;
    opening.masquerade = masquerade;
    opening.direct = direct;
    opening.request.to.destination = backend.address;
    opening.request.to.destination_port = backend.port;
    opening.request.to.protocol = key.protocol;
    opening.request.seen = arrival.now;
    opening.request.backend = id;
    opening.request.frontend = frontend.id;
    let begins = key.protocol != UDP && tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    opening.request.flags =
        forward | if direct { Flow::DIRECT } else { 0 } | if begins { Flow::OPENING } else { 0 };
    // Not seen yet: its first packet tells the other entry.
    opening.reply.seen = 0;
    opening.reply.backend = id;
    opening.reply.frontend = frontend.id;
    opening.reply.flags = Flow::REPLY | Flow::REPLIED | forward;
    Ok(())
}

/// The backend that the node before this one chose, by its address.
#[inline(always)]
fn chosen(
    tables: &impl Tables,
    frontend: &Frontend,
    via: &Address,
) -> Result<(BackendId, Backend), Reason> {
    let service = frontend.service;
    let key = LocalKey { service, address: *via };
    let id = tables.local(&key).ok_or(Reason::Misdirected)?;
    let backend = tables.backend(id).ok_or(Reason::Misdirected)?;
    // The id may be another backend's by now.
    if backend.in_use() && backend.address == *via && backend.service == service {
        Ok((id, backend))
    } else {
        Err(Reason::Misdirected)
    }
}

/// Whether what would be masqueraded goes to the backend's node as it came instead, which then
/// replies to the client itself: not when the reason is another one than where the backend is.
#[inline(always)]
fn is_direct(config: &Config, arrival: &Arrival, frontend: &Frontend, backend: &Backend) -> bool {
    config.features & Config::DIRECT_SEND != 0
        && arrival.hook != Hook::Egress
        && !arrival.wrapped
        && !backend.has(Backend::LOCAL)
        && frontend.flags & Frontend::MASQUERADE_REMOTE != 0
        && frontend.flags & Frontend::MASQUERADE_ALL == 0
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn enter(
    tables: &impl Tables,
    network: &impl Network,
    config: &Config,
    work: &mut Work,
) -> Result<(), Reason> {
    flow::open(tables, network, config, &work.headers.tuple, &mut work.opening)
}

/// Whether the backend sees the node instead of the client.
#[inline(always)]
fn masquerades(frontend: &Frontend, kind: u32, source: &Address, backend: &Backend) -> bool {
    // A process of the node answers by the node's own routes, which lead past us in any
    // case; and a packet from the node's address to itself cannot be sent.
    if backend.has(Backend::HOST) {
        return false;
    }
    // Hairpin: the backend would answer itself.
    if backend.address == *source || frontend.flags & Frontend::MASQUERADE_ALL != 0 {
        return true;
    }
    // The node's own packets have its address already.
    if kind & client::NODE != 0 {
        return false;
    }
    (frontend.flags & Frontend::MASQUERADE_REMOTE != 0 && !backend.has(Backend::LOCAL))
        || (frontend.flags & Frontend::MASQUERADE_OUTSIDE != 0 && kind & client::CLUSTER == 0)
}

#[inline(always)]
fn refuse(
    tables: &impl Tables,
    arrival: &Arrival,
    frontend: Option<FrontendId>,
    reason: Reason,
) -> Verdict {
    let reject = matches!(reason, Reason::NoEndpoint | Reason::UnusedPort);
    // Answers are made at tc only, which then counts.
    if !(reject && arrival.hook == Hook::Xdp) {
        tables.count_drop(reason);
        if let Some(frontend) = frontend {
            tables.count_frontend(frontend, |counters| counters.refused += 1);
        }
    }
    if reject { Verdict::Reject(reason) } else { Verdict::Drop(reason) }
}

#[inline(always)]
fn refuse_unmatched(
    tables: &impl Tables,
    config: &Config,
    arrival: &Arrival,
    destination: &Address,
) -> Verdict {
    // Where packets of other machines come in. Elsewhere the address may be another machine's: an
    // external address may be any node's, whose other ports are that node's own.
    let comes_in = arrival.hook != Hook::Egress && arrival.device & Device::UPLINK != 0;
    match unmatched(tables, config, destination, comes_in) {
        Unmatched::Foreign => Verdict::Pass,
        Unmatched::UnusedPort => refuse(tables, arrival, None, Reason::UnusedPort),
        Unmatched::UnusedAddress => refuse(tables, arrival, None, Reason::UnusedAddress),
    }
}

#[cfg(test)]
pub mod tests;
