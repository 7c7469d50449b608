//! The short way: a packet of a flow whose packets were sent on a moment ago goes where they
//! went, without asking the kernel for the route again.
//!
//! What a packet becomes is looked up for each one, in the table of flows. What is remembered is
//! the way of what it becomes: device and Ethernet addresses, for [`TICKS`] and no longer, so that
//! a change of routes, neighbours, lengths or devices is followed after that time at the latest.
//! It is remembered by the program itself, each CPU for itself.
//!
//! Only the usual packet is taken: TCP or UDP right behind an IP header without options, not
//! one that begins or ends a connection, with a finished checksum. All others go the long way,
//! [`crate::device`], which also sees one packet of a flow in [`TICKS`] and renews what is
//! remembered and the time at which the flow was seen.

use crate::checksum::{self, Delta};
use crate::device::{self, Hook};
use crate::flow;
use crate::layout::{Config, Flow, FrontendKey, Tuple};
use crate::order::{Address, Be16, Be32};
use crate::packet::{Packet, Sum};
use crate::parse::{TCP, UDP, Version, tcp};
use crate::tables::Tables;
use crate::unmatched::{Unmatched, unmatched};
use crate::verdict::Verdict;

/// How long a way is good: in the kernel's timer interrupts, the only clock that costs nothing. 25
/// to 250 ms, as the kernel was built (`CONFIG_HZ` 1000 to 100; Debian: 100 ms).
pub const TICKS: u64 = 25;

/// Ways remembered by a CPU. Flows that fall on the same place take it from each other.
pub const WAYS: u32 = 2048;

/// The beginning of a frame. [`Self::has`] comes before whatever reads or writes that far.
pub trait Fields {
    fn has(&self, length: usize) -> bool;
    /// As it lies in memory.
    fn get16(&self, at: usize) -> u16;
    fn get32(&self, at: usize) -> u32;
    fn put16(&mut self, at: usize, value: u16);
    fn put32(&mut self, at: usize, value: u32);
}

/// Where the transport header is.
const AFTER_V4: usize = 34;
const AFTER_V6: usize = 54;
/// As they lie in memory.
const IPV4: u16 = 0x0800_u16.to_be();
const IPV6: u16 = 0x86dd_u16.to_be();
/// Fields of TCP and UDP.
const UDP_LENGTH: usize = 8;
const UDP_SUM: usize = 6;
const TCP_FLAGS: usize = 12;
const TCP_SUM: usize = 16;
const TCP_LENGTH: usize = 18;

/// A packet of the usual kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub tuple: Tuple,
    pub ttl: u8,
    /// Of the IP packet, and of its transport header.
    pub length: u16,
    pub transport: u8,
}

impl Head {
    /// Of the longest packet that will be on the wire, when this one stands for several with
    /// `payload` bytes each.
    #[must_use]
    #[inline(always)]
    pub const fn segment_length<const V6: bool>(&self, payload: u16) -> u16 {
        (if V6 { 40 } else { 20 } + self.transport as u16).wrapping_add(payload)
    }

    /// Whether it may be one of another node's, with the client's inside.
    #[must_use]
    #[inline(always)]
    pub fn may_have_one_inside(&self, config: &Config) -> bool {
        self.tuple.protocol == UDP
            && config.features & Config::DIRECT_ACCEPT != 0
            && self.tuple.destination_port == config.direct_port
    }
}

/// What a frame says that it is. All that follows here is made once for each version: nearly
/// everything about a packet is a constant then.
#[inline(always)]
pub fn version(frame: &impl Fields) -> Option<Version> {
    if !frame.has(AFTER_V4 + UDP_LENGTH) {
        return None;
    }
    match frame.get16(12) {
        IPV4 => Some(Version::V4),
        IPV6 => Some(Version::V6),
        _ => None,
    }
}

/// After [`version`]. `None`: another kind of packet, or none of ours.
#[inline(always)]
pub fn parse<const V6: bool>(frame: &impl Fields) -> Option<Head> {
    let [first, _] = frame.get16(14).to_ne_bytes();
    if !V6 {
        // A header of five words; no fragment.
        if first != 0x45 || u16::from_be(frame.get16(20)) & 0x3fff != 0 {
            return None;
        }
        let [ttl, protocol] = frame.get16(22).to_ne_bytes();
        let transport = transport(frame, protocol, AFTER_V4)?;
        let source = Address::v4(Be32::from_kernel(frame.get32(26)));
        let destination = Address::v4(Be32::from_kernel(frame.get32(30)));
        let tuple = tuple(frame, source, destination, protocol, AFTER_V4);
        return Some(Head { tuple, ttl, length: u16::from_be(frame.get16(16)), transport });
    }
    if first >> 4 != 6 || !frame.has(AFTER_V6 + UDP_LENGTH) {
        return None;
    }
    let [protocol, ttl] = frame.get16(20).to_ne_bytes();
    let transport = transport(frame, protocol, AFTER_V6)?;
    let (source, destination) = (address(frame, 22), address(frame, 38));
    // On a wire there are none of these.
    if source.to_v4().is_some() || destination.to_v4().is_some() {
        return None;
    }
    let tuple = tuple(frame, source, destination, protocol, AFTER_V6);
    let length = u16::from_be(frame.get16(18)).saturating_add(40);
    Some(Head { tuple, ttl, length, transport })
}

#[inline(always)]
fn address(frame: &impl Fields, at: usize) -> Address {
    let word = |i: usize| Be32::from_kernel(frame.get32(at + i * 4));
    Address::v6([word(0), word(1), word(2), word(3)])
}

/// The length of what follows the IP header, if it is what there is a short way for.
#[inline(always)]
fn transport(frame: &impl Fields, protocol: u8, at: usize) -> Option<u8> {
    match protocol {
        TCP => {
            if !frame.has(at + TCP_LENGTH) {
                return None;
            }
            let [words, flags] = frame.get16(at + TCP_FLAGS).to_ne_bytes();
            (flags & (tcp::SYN | tcp::FIN | tcp::RST) == 0).then_some((words >> 4) * 4)
        }
        UDP => Some(8),
        _ => None,
    }
}

#[inline(always)]
fn tuple(
    frame: &impl Fields,
    source: Address,
    destination: Address,
    protocol: u8,
    at: usize,
) -> Tuple {
    Tuple {
        source,
        destination,
        source_port: Be16::from_kernel(frame.get16(at).into()),
        destination_port: Be16::from_kernel(frame.get16(at + 2).into()),
        protocol,
        pad: [0; 3],
    }
}

/// What the route was asked for, and what it was.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Way {
    /// What the packets look like that leave by it.
    pub to: Tuple,
    /// When the route was asked for, in ticks.
    pub since: u64,
    /// The device at which they come in, and the Ethernet address that they have there.
    pub came_in: u32,
    pub receiver: Receiver,
    /// No longer packet is known to fit.
    pub longest: u16,
    pub ethernet: [u32; 3],
    pub out: u32,
    /// A number that tells the hooks apart and is not 0; what else it means is the hook's.
    pub how: u32,
    /// 0 for IPv4, 1 for IPv6.
    pub v6: u32,
}

/// The Ethernet address that a frame is for, in the two pieces in which it is read.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Receiver {
    first: u32,
    last: u16,
}

impl Receiver {
    /// After [`version`], or another look at the length.
    #[must_use]
    #[inline(always)]
    pub fn of(frame: &impl Fields) -> Self {
        Self { first: frame.get32(0), last: frame.get16(4) }
    }
}

impl Way {
    /// Where in the table that of such packets is.
    #[must_use]
    #[inline(always)]
    pub const fn place<const V6: bool>(to: &Tuple, came_in: u32) -> u32 {
        let (source, destination) = (to.source.words(), to.destination.words());
        let mut words = source[3].to_kernel() ^ destination[3].to_kernel().rotate_left(16);
        if V6 {
            words ^= source[2].to_kernel() ^ destination[2].to_kernel();
        }
        let mixed =
            (words ^ came_in).wrapping_mul(0x9e37_79b1) ^ both(to).wrapping_mul(0x85eb_ca77);
        // A port may differ in the highest byte alone.
        (mixed ^ mixed >> 16).wrapping_mul(0x7feb_352d) >> (u32::BITS - WAYS.ilog2())
    }

    /// Whether it is still good for a packet of that length that is to become `to`.
    #[must_use]
    #[inline(always)]
    pub const fn is_for<const V6: bool>(
        &self,
        to: &Tuple,
        came_in: u32,
        length: u16,
        now: u64,
    ) -> bool {
        let (own, other) = (
            [self.to.source.words(), self.to.destination.words()],
            [to.source.words(), to.destination.words()],
        );
        let mut differs = both(&self.to) ^ both(to);
        // No word of these is another in two IPv4 tuples.
        let mut i = if V6 { 0 } else { 3 };
        while i < 4 {
            differs |= own[0][i].to_kernel() ^ other[0][i].to_kernel();
            differs |= own[1][i].to_kernel() ^ other[1][i].to_kernel();
            i += 1;
        }
        differs |= (self.to.protocol ^ to.protocol) as u32;
        differs |= (self.v6 ^ V6 as u32) | (self.came_in ^ came_in);
        self.how != 0
            && differs == 0
            && length <= self.longest
            && now.wrapping_sub(self.since) < TICKS
    }
}

/// What there is to do with a packet of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// It is sent on translated, by the program.
    Forward,
    /// It goes on translated, by the stack.
    Translate,
    /// It is not to be touched here.
    Leave,
    /// More than to let it go its way.
    Long,
}

/// Nothing is asked about the device: at a bridge's port only what leaves is looked at, and what the
/// long way does not send there has no way that could be remembered.
#[inline(always)]
pub fn course(tables: &impl Tables, hook: Hook, flow: &Flow) -> Course {
    // The first packet of a direction tells the other one, the client's first answer that it is there.
    if flow.seen == 0 || flow.flags & (Flow::DIRECT | Flow::OPENING) != 0 {
        return Course::Long;
    }
    // As `flow::is_over` says of datagrams.
    let protocol = flow.to.protocol;
    if protocol == UDP && flow.flags & Flow::REPLY == 0 && !flow::still_there(tables, flow) {
        return Course::Long;
    }
    match device::way(hook, flow.flags) {
        Some(Verdict::Translate { forward: true }) => Course::Forward,
        Some(Verdict::Translate { forward: false }) => Course::Translate,
        None => Course::Leave,
        _ => Course::Long,
    }
}

/// Whether a packet of no flow is nothing of ours.
#[inline(always)]
pub fn is_foreign(tables: &impl Tables, config: &Config, hook: Hook, tuple: &Tuple) -> bool {
    let Tuple { destination, destination_port, protocol, .. } = *tuple;
    let key = FrontendKey::new(destination, destination_port, protocol);
    tables.frontend(&key).is_none()
        && unmatched(tables, config, &destination, hook != Hook::Egress) == Unmatched::Foreign
}

/// What [`crate::rewrite::translate`] does, and [`crate::rewrite::take_hop`] when asked to, in
/// fewer steps: for packets of which each step is a call of the kernel.
///
/// `None`: the packet is half changed and must not go on.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn translate<const V6: bool>(
    packet: &mut impl Packet,
    head: &Head,
    to: &Tuple,
    hop: bool,
) -> Option<()> {
    match head.tuple.protocol {
        TCP => translate_as::<V6, TCP>(packet, head, to, hop),
        _ => translate_as::<V6, UDP>(packet, head, to, hop),
    }
}

#[inline(always)]
fn translate_as<const V6: bool, const PROTOCOL: u8>(
    packet: &mut impl Packet,
    head: &Head,
    to: &Tuple,
    hop: bool,
) -> Option<()> {
    let from = &head.tuple;
    let place =
        if V6 { AFTER_V6 } else { AFTER_V4 } + if PROTOCOL == TCP { TCP_SUM } else { UDP_SUM };
    let addresses = addresses::<V6>(from, to);
    let ttl = if hop { head.ttl.wrapping_sub(1) } else { head.ttl };
    let ports = both(to);
    let kind = Sum { pseudo: true, optional: PROTOCOL == UDP, v6: V6 };
    packet.adjust_sum(place, addresses.folded(), kind)?;
    if both(from) != ports {
        let mut delta = Delta::default();
        delta.change(both(from), ports);
        packet.adjust_sum(place, delta.folded(), Sum { pseudo: false, ..kind })?;
    }
    let (source, destination) = (to.source.words(), to.destination.words());
    if V6 {
        let mut words = [0; 10];
        let [a, b] = packet.load(18)?;
        words[0] = u32::from_ne_bytes([a, b, PROTOCOL, ttl]);
        let mut i = 0;
        while i < 4 {
            words[1 + i] = source[i].to_kernel();
            words[5 + i] = destination[i].to_kernel();
            i += 1;
        }
        words[9] = ports;
        return packet.store_words(18, words);
    }
    let mut delta = addresses;
    let old = u16::from_ne_bytes([head.ttl, PROTOCOL]);
    delta.change16(old, u16::from_ne_bytes([ttl, PROTOCOL]));
    let sum = u16::from_ne_bytes(packet.load(24)?);
    let [a, b] = checksum::adjust(sum, delta.folded()).to_ne_bytes();
    let first = u32::from_ne_bytes([ttl, PROTOCOL, a, b]);
    packet.store_words(22, [first, source[3].to_kernel(), destination[3].to_kernel(), ports])
}

/// Makes a packet look like `to`, takes a hop, and gives it those Ethernet addresses: every byte
/// as [`crate::rewrite`] makes it. False: it is as it was, since its checksum may be unfinished
/// ([`crate::rewrite::is_finished`]).
#[inline(always)]
pub fn rewrite<const V6: bool>(
    frame: &mut impl Fields,
    head: &Head,
    to: &Tuple,
    ethernet: [u32; 3],
) -> bool {
    // The verifier wants to see where in the packet something is.
    match head.tuple.protocol {
        TCP => rewrite_as::<V6, TCP>(frame, head, to, ethernet),
        _ => rewrite_as::<V6, UDP>(frame, head, to, ethernet),
    }
}

#[inline(always)]
fn rewrite_as<const V6: bool, const PROTOCOL: u8>(
    frame: &mut impl Fields,
    head: &Head,
    to: &Tuple,
    ethernet: [u32; 3],
) -> bool {
    let (at, header) = if V6 { (AFTER_V6, 40) } else { (AFTER_V4, 20) };
    let place = at + if PROTOCOL == TCP { TCP_SUM } else { UDP_SUM };
    if !frame.has(place + 2) {
        return false;
    }
    let sum = frame.get16(place);
    let length = head.length.wrapping_sub(header);
    if sum == !checksum::finish(pseudo_sum::<V6>(&head.tuple, PROTOCOL, length)) {
        return false;
    }
    let addresses = addresses::<V6>(&head.tuple, to);
    if PROTOCOL == TCP || sum != 0 {
        let mut delta = addresses;
        delta.change(both(&head.tuple), both(to));
        // None is written as zeros, which stand for no checksum with UDP.
        let new = match checksum::adjust(sum, delta.folded()) {
            0 if PROTOCOL == UDP => 0xffff,
            new => new,
        };
        frame.put16(place, new);
    }
    frame.put32(at, both(to));
    ip::<V6>(frame, head, to, addresses);
    let mut i = 0;
    while i < 3 {
        frame.put32(i * 4, ethernet[i]);
        i += 1;
    }
    true
}

#[inline(always)]
fn ip<const V6: bool>(frame: &mut impl Fields, head: &Head, to: &Tuple, addresses: Delta) {
    let (source, destination) = (to.source.words(), to.destination.words());
    let ttl = head.ttl.wrapping_sub(1);
    if V6 {
        let mut i = 0;
        while i < 4 {
            frame.put32(22 + i * 4, source[i].to_kernel());
            frame.put32(38 + i * 4, destination[i].to_kernel());
            i += 1;
        }
        frame.put16(20, u16::from_ne_bytes([head.tuple.protocol, ttl]));
        return;
    }
    let mut delta = addresses;
    let protocol = head.tuple.protocol;
    let new = u16::from_ne_bytes([ttl, protocol]);
    delta.change16(u16::from_ne_bytes([head.ttl, protocol]), new);
    let sum = checksum::adjust(frame.get16(24), delta.folded());
    frame.put16(22, new);
    frame.put16(24, sum);
    frame.put32(26, source[3].to_kernel());
    frame.put32(30, destination[3].to_kernel());
}

/// [`checksum::pseudo_sum`] of a known family.
#[inline(always)]
fn pseudo_sum<const V6: bool>(tuple: &Tuple, protocol: u8, length: u16) -> u64 {
    let (source, destination) = (tuple.source.words(), tuple.destination.words());
    let mut sum = u64::from(u16::from(protocol).to_be()) + u64::from(length.to_be());
    let mut i = if V6 { 0 } else { 3 };
    while i < 4 {
        sum += u64::from(source[i].to_kernel()) + u64::from(destination[i].to_kernel());
        i += 1;
    }
    sum
}

#[inline(always)]
fn addresses<const V6: bool>(from: &Tuple, to: &Tuple) -> Delta {
    let mut delta = Delta::default();
    let mut i = if V6 { 0 } else { 3 };
    while i < 4 {
        delta.change(from.source.words()[i].to_kernel(), to.source.words()[i].to_kernel());
        let (old, new) = (from.destination.words()[i], to.destination.words()[i]);
        delta.change(old.to_kernel(), new.to_kernel());
        i += 1;
    }
    delta
}

/// Both ports, as they lie in a packet.
#[inline(always)]
const fn both(tuple: &Tuple) -> u32 {
    let ([a, b], [c, d]) = (tuple.source_port.to_wire(), tuple.destination_port.to_wire());
    u32::from_ne_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests;
