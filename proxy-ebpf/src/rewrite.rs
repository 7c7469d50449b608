//! A packet made to look like another tuple, with every checksum that covers it.

use crate::checksum::{self, Delta};
use crate::crc32c;
use crate::layout::Tuple;
use crate::order::{Address, Be16};
use crate::packet::{Bytes, Packet, Sum};
use crate::parse::{ETHERNET, Headers, Kind, MAX_TRANSPORT, TCP, UDP, Version};

const ETHERNET_LENGTH: u16 = 14;

/// Makes the packet, or what an ICMP error is about, look like `to`. Both tuples are of the
/// packet's IP version.
///
/// `None`: the packet is half changed and must not go on.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn translate(packet: &mut impl Packet, headers: &Headers, to: &Tuple) -> Option<()> {
    let from = &headers.tuple;
    let addresses = delta([headers.source, from.destination], [to.source, to.destination]);
    match headers.version {
        Version::V4 => {
            store_v4(packet, ETHERNET, to.source, to.destination)?;
            packet.adjust_header_sum(ETHERNET + 10, addresses.folded())?;
        }
        Version::V6 => {
            store_v6(packet, ETHERNET + 8, to.source)?;
            store_v6(packet, ETHERNET + 24, to.destination)?;
        }
    }
    let transport = usize::from(headers.transport) & MAX_TRANSPORT;
    match headers.kind {
        Kind::LaterFragment => Some(()),
        Kind::IcmpError => translate_error(packet, headers, to, transport, addresses),
        Kind::Whole | Kind::FirstFragment => {
            translate_transport(packet, headers, to, transport, addresses)
        }
    }
}

#[inline(always)]
fn translate_transport(
    packet: &mut impl Packet,
    headers: &Headers,
    to: &Tuple,
    transport: usize,
    addresses: Delta,
) -> Option<()> {
    let from = &headers.tuple;
    let optional = from.protocol == UDP;
    let v6 = headers.version == Version::V6;
    let place = match from.protocol {
        TCP => 16,
        UDP => 6,
        _ => return translate_sctp(packet, headers, to, transport),
    };
    let ports = ports(from, to);
    packet.adjust_sum(transport + place, addresses.folded(), Sum { pseudo: true, optional, v6 })?;
    if from.source_port != to.source_port || from.destination_port != to.destination_port {
        packet.adjust_sum(
            transport + place,
            ports.folded(),
            Sum { pseudo: false, optional, v6 },
        )?;
        store_ports(packet, transport, to)?;
    }
    Some(())
}

/// CRC32c covers the ports and no addresses.
#[inline(always)]
fn translate_sctp(
    packet: &mut impl Packet,
    headers: &Headers,
    to: &Tuple,
    transport: usize,
) -> Option<()> {
    let from = &headers.tuple;
    let delta =
        both(from.source_port, from.destination_port) ^ both(to.source_port, to.destination_port);
    if delta == 0 {
        return Some(());
    }
    let field: [u8; 4] = packet.load(transport + 8)?;
    // Zeros: the hardware is to sum up the packet, with this field as it is.
    if field != [0; 4] {
        let change = crc32c::change(u32::from_le_bytes(delta.to_ne_bytes()), length(headers));
        let sum = u32::from_le_bytes(field) ^ change;
        packet.store(transport + 8, sum.to_le_bytes())?;
    }
    store_ports(packet, transport, to)
}

/// Of the transport header and what follows it.
#[inline(always)]
const fn length(headers: &Headers) -> u16 {
    headers.length.wrapping_sub(headers.transport.wrapping_sub(ETHERNET_LENGTH))
}

/// The quoted packet went the other way: it becomes the inverse of `to`, as the receiver
/// of the error sent it.
#[inline(always)]
fn translate_error(
    packet: &mut impl Packet,
    headers: &Headers,
    to: &Tuple,
    transport: usize,
    addresses: Delta,
) -> Option<()> {
    let (from, to) = (headers.tuple.inverse(), to.inverse());
    let v6 = headers.version == Version::V6;
    let quoted = usize::from(headers.quoted) & (MAX_TRANSPORT | (MAX_TRANSPORT + 1));
    let quoted_transport =
        usize::from(headers.quoted_transport) & (MAX_TRANSPORT | (MAX_TRANSPORT + 1));
    let mut change = delta([from.source, from.destination], [to.source, to.destination]);
    let quoted_addresses = change;
    if v6 {
        store_v6(packet, quoted + 8, to.source)?;
        store_v6(packet, quoted + 24, to.destination)?;
    } else {
        store_v4(packet, quoted, to.source, to.destination)?;
        replace_sum(packet, quoted + 10, change, &mut change)?;
    }
    let mut transport_change = quoted_addresses;
    transport_change.add(ports(&from, &to));
    change.add(ports(&from, &to));
    match from.protocol {
        UDP => {
            let field = u16::from_ne_bytes(packet.load(quoted_transport + 6)?);
            if field != 0 {
                replace_sum(packet, quoted_transport + 6, transport_change, &mut change)?;
            }
        }
        // Often not among what is quoted, and then nobody can check it.
        TCP if packet.load::<2>(quoted_transport + 16).is_some() => {
            replace_sum(packet, quoted_transport + 16, transport_change, &mut change)?;
        }
        _ => {}
    }
    store_ports(packet, quoted_transport, &to)?;
    // ICMPv6 covers the addresses of its own packet (RFC 4443 section 2.3), ICMP does not.
    if v6 {
        let kind = Sum { pseudo: true, optional: false, v6 };
        packet.adjust_sum(transport + 2, addresses.folded(), kind)?;
    }
    let kind = Sum { pseudo: false, optional: false, v6 };
    packet.adjust_sum(transport + 2, change.folded(), kind)
}

/// A checksum inside a quoted packet: for the error's own it is data.
#[inline(always)]
fn replace_sum(
    packet: &mut impl Packet,
    offset: usize,
    by: Delta,
    change: &mut Delta,
) -> Option<()> {
    let old = u16::from_ne_bytes(packet.load(offset)?);
    let new = checksum::adjust(old, by.folded());
    change.change16(old, new);
    packet.store(offset, new.to_ne_bytes())
}

/// Whether the transport checksum of a whole packet covers the packet.
///
/// A sender on the same machine (a pod; another node, where nodes are containers) leaves it to
/// the hardware and writes the sum of the pseudo-header. That the kernel knows, and XDP is not
/// told: sent on from there, the packet would be one with a wrong checksum. One finished
/// checksum in 65536 has that value too, so `false` means only: leave it to who knows.
#[inline(always)]
pub fn is_finished(packet: &impl Bytes, headers: &Headers) -> Option<bool> {
    let transport = usize::from(headers.transport) & MAX_TRANSPORT;
    let place = match headers.tuple.protocol {
        TCP => 16,
        UDP => 6,
        // SCTP's is zeros then.
        _ => return Some(packet.load::<4>(transport + 8)? != [0; 4]),
    };
    let field = u16::from_ne_bytes(packet.load(transport + place)?);
    let pseudo = checksum::pseudo_sum(&headers.tuple, headers.tuple.protocol, length(headers));
    Some(field != !checksum::finish(pseudo))
}

/// One hop less. The caller has seen that there are some left.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn take_hop(packet: &mut impl Packet, headers: &Headers) -> Option<()> {
    match headers.version {
        Version::V4 => {
            let old: [u8; 2] = packet.load(ETHERNET + 8)?;
            let new = [old[0].wrapping_sub(1), old[1]];
            let mut delta = Delta::default();
            delta.change16(u16::from_ne_bytes(old), u16::from_ne_bytes(new));
            packet.store(ETHERNET + 8, new)?;
            packet.adjust_header_sum(ETHERNET + 10, delta.folded())
        }
        Version::V6 => {
            let [_, hops] = packet.load(ETHERNET + 6)?;
            packet.store(ETHERNET + 7, [hops.wrapping_sub(1)])
        }
    }
}

/// IPv4 addresses differ in their last word alone.
#[inline(always)]
fn delta(from: [Address; 2], to: [Address; 2]) -> Delta {
    let mut delta = Delta::default();
    let mut i = 0;
    while i < 2 {
        let (from, to) = (from[i].words(), to[i].words());
        let mut word = 0;
        while word < 4 {
            delta.change(from[word].to_kernel(), to[word].to_kernel());
            word += 1;
        }
        i += 1;
    }
    delta
}

#[inline(always)]
fn ports(from: &Tuple, to: &Tuple) -> Delta {
    let mut delta = Delta::default();
    delta.change(
        both(from.source_port, from.destination_port),
        both(to.source_port, to.destination_port),
    );
    delta
}

#[inline(always)]
const fn both(source: Be16, destination: Be16) -> u32 {
    let ([a, b], [c, d]) = (source.to_wire(), destination.to_wire());
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn store_ports(packet: &mut impl Packet, transport: usize, to: &Tuple) -> Option<()> {
    packet.store(transport, both(to.source_port, to.destination_port).to_ne_bytes())
}

#[inline(always)]
fn store_v4(
    packet: &mut impl Packet,
    header: usize,
    source: Address,
    destination: Address,
) -> Option<()> {
    let ([a, b, c, d], [e, f, g, h]) =
        (source.words()[3].to_wire(), destination.words()[3].to_wire());
    packet.store(header + 12, [a, b, c, d, e, f, g, h])
}

#[inline(always)]
fn store_v6(packet: &mut impl Packet, offset: usize, address: Address) -> Option<()> {
    let mut bytes = [0; 16];
    let mut word = 0;
    while word < 4 {
        let [a, b, c, d] = address.words()[word].to_wire();
        bytes[word * 4] = a;
        bytes[word * 4 + 1] = b;
        bytes[word * 4 + 2] = c;
        bytes[word * 4 + 3] = d;
        word += 1;
    }
    packet.store(offset, bytes)
}

#[cfg(test)]
mod tests;
