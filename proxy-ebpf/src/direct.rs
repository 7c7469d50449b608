//! Direct server return: a client's packet to a backend of another node, whole and as it came,
//! inside a packet of this node's to that backend's address.
//!
//! ```text
//! IP    this node -> the backend's address, which the pod network routes to its node
//! UDP   port by the flow's hash -> `Config::direct_port`; checksum 0
//! Geneve (RFC 8926), without options, with a network identifier of our own
//! IP    client -> frontend ...
//! ```
//!
//! That node takes the packet out again and translates it as if it had come there, for the backend
//! whose address it was sent to; so the backend sees the client, and the reply goes to the client
//! from there, with the frontend's address. This node has one entry in `FLOWS` for it
//! ([`Flow::DIRECT`](crate::layout::Flow::DIRECT)) and takes no port for it.

#![allow(clippy::cast_possible_truncation, reason = "lengths of headers, and a hash")]

use crate::answer::store_ip;
use crate::layout::Tuple;
use crate::order::Be16;
use crate::packet::{Bytes, Packet};
use crate::parse::{ETHERNET, Headers, IPV4_HEADER, IPV6_HEADER, Kind, UDP, Version};

/// Tells ours from what others send by Geneve to the same port.
const NETWORK: [u8; 3] = [0xd5, 0x7e, 0x51];

const UDP_HEADER: usize = 8;
const GENEVE_HEADER: usize = 8;
const HEADERS: usize = UDP_HEADER + GENEVE_HEADER;

const IN_V4: usize = IPV4_HEADER + HEADERS;
const IN_V6: usize = IPV6_HEADER + HEADERS;

/// Bytes by which a packet grows. Both packets are of one IP version.
#[must_use]
#[inline(always)]
pub const fn overhead(version: Version) -> usize {
    match version {
        Version::V4 => IN_V4,
        Version::V6 => IN_V6,
    }
}

/// Source port of the outer packet: one for a flow, so that its packets keep their order, and many
/// for many, so that networks and machines spread them. Of those that are nobody's by name
/// (RFC 6335 section 6).
#[must_use]
#[inline(always)]
pub const fn source_port(hash: u32) -> Be16 {
    Be16::from_host(0xc000 | (hash >> 18) as u16)
}

/// Fills [`overhead`] bytes that were made room for between the Ethernet header and a packet of
/// this version and length; `outer` has the addresses, and the source port.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn wrap(
    packet: &mut impl Packet,
    outer: &Tuple,
    port: Be16,
    version: Version,
    length: u16,
) -> Option<()> {
    // What stands for many segments may be longer than the field can tell; whoever cuts it writes
    // the right length.
    let payload = length.wrapping_add(HEADERS as u16);
    store_ip(packet, outer, UDP, payload)?;
    let ([a, b], [c, d], [e, f]) =
        (outer.source_port.to_wire(), port.to_wire(), payload.to_be_bytes());
    let ([g, h], [i, j, k]) = (ethertype(version), NETWORK);
    let headers: [u8; HEADERS] = [a, b, c, d, e, f, 0, 0, 0, 0, g, h, i, j, k, 0];
    packet.store(ETHERNET + overhead(version) - HEADERS, headers)
}

/// Of both packets.
#[must_use]
#[inline(always)]
pub const fn ethertype(version: Version) -> [u8; 2] {
    match version {
        Version::V4 => [0x08, 0x00],
        Version::V6 => [0x86, 0xdd],
    }
}

/// Whether a packet has another one inside, by its looks. Whether it is for this node only its
/// destination tells.
#[inline(always)]
#[must_use]
pub fn is_wrapped(packet: &impl Bytes, headers: &Headers, port: Be16) -> bool {
    let Headers { tuple, kind, version, transport, .. } = headers;
    if tuple.protocol != UDP || tuple.destination_port != port || *kind != Kind::Whole {
        return false;
    }
    match version {
        Version::V4 if usize::from(*transport) == ETHERNET + IPV4_HEADER => {
            has_ours::<{ ETHERNET + IPV4_HEADER }>(packet, Version::V4)
        }
        Version::V6 if usize::from(*transport) == ETHERNET + IPV6_HEADER => {
            has_ours::<{ ETHERNET + IPV6_HEADER }>(packet, Version::V6)
        }
        _ => false,
    }
}

#[inline(always)]
fn has_ours<const UDP_AT: usize>(packet: &impl Bytes, version: Version) -> bool {
    let Some(headers) = packet.load::<HEADERS>(UDP_AT) else {
        return false;
    };
    let [_, _, _, _, a, b, _, _, first, second, c, d, e, f, g, _] = headers;
    let ours = [first, second] == [0, 0] && [c, d] == ethertype(version) && [e, f, g] == NETWORK;
    ours && inner_length(packet, UDP_AT + HEADERS, version)
        == Some(u16::from_be_bytes([a, b]).wrapping_sub(HEADERS as u16))
}

/// As the packet inside has it. When that is not all there is, several packets were merged on the
/// way (`rx-udp-gro-forwarding`), and cannot be taken apart here. The kernel takes nothing out that
/// is shorter than an IP header.
#[inline(always)]
fn inner_length(packet: &impl Bytes, at: usize, version: Version) -> Option<u16> {
    match version {
        Version::V4 => {
            let [first, _, a, b, ..]: [u8; IPV4_HEADER] = packet.load(at)?;
            (first >> 4 == 4).then_some(u16::from_be_bytes([a, b]))
        }
        Version::V6 => {
            let [first, _, _, _, a, b, ..]: [u8; IPV6_HEADER] = packet.load(at)?;
            let length = u16::from_be_bytes([a, b]).wrapping_add(IPV6_HEADER as u16);
            (first >> 4 == 6).then_some(length)
        }
    }
}

#[cfg(test)]
mod tests;
