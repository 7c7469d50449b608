//! Answers made of the packet that they are about: TCP resets and ICMP errors.
//!
//! The packet goes back by the device it was seen at, so its Ethernet addresses change
//! places and nothing has to be routed.

#![allow(clippy::cast_possible_truncation, reason = "lengths of headers, and offsets within them")]

use crate::checksum::{finish, pseudo_sum};
use crate::layout::Tuple;
use crate::order::Address;
use crate::packet::{Packet, Resize};
use crate::parse::{
    ETHERNET, Headers, ICMP, ICMP_HEADER, ICMPV6, IPV4_HEADER, IPV6_HEADER, Kind, MAX_TRANSPORT,
    TCP, UDP, Version, tcp,
};

const HOPS: u8 = 64;
const TCP_HEADER: usize = 20;
const SCTP_HEADER: usize = 12;

/// What the sender is told by ICMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// Nobody listens.
    PortUnreachable,
    /// The way on takes packets of this length only.
    TooBig(u16),
    TimeExceeded,
}

impl Error {
    /// Type, code, and the second word's upper and lower half (RFC 792, 1191, 4443).
    #[inline(always)]
    const fn fields(self, version: Version) -> (u8, u8, u16) {
        match (version, self) {
            (Version::V4, Self::PortUnreachable) => (3, 3, 0),
            (Version::V4, Self::TooBig(mtu)) => (3, 4, mtu),
            (Version::V4, Self::TimeExceeded) => (11, 0, 0),
            (Version::V6, Self::PortUnreachable) => (1, 4, 0),
            (Version::V6, Self::TooBig(mtu)) => (2, 0, mtu),
            (Version::V6, Self::TimeExceeded) => (3, 0, 0),
        }
    }
}

/// What to tell a sender whose packet of `length` is too long, when the kernel does not say what
/// would not be: the next length in use (RFC 1191 section 7.1, with those of tunnels and of
/// IPv6's least). Where that is too long as well, the sender is told again.
#[inline(always)]
#[must_use]
pub const fn next_shorter(length: u16) -> u16 {
    match length {
        8167.. => 8166,
        2003.. => 2002,
        1493.. => 1492,
        1401.. => 1400,
        1281.. => 1280,
        1007.. => 1006,
        509.. => 508,
        _ => 68,
    }
}

/// Makes the packet its own refusal. `None`: it cannot be answered, and is spoilt.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn refuse(packet: &mut impl Resize, headers: &Headers) -> Option<()> {
    if headers.tuple.protocol == TCP {
        reset(packet, headers)
    } else {
        error(packet, headers, Error::PortUnreachable)
    }
}

/// RFC 1122 section 3.2.2: no answers to broadcasts, nor to fragments without a header.
#[inline(always)]
fn is_answerable(packet: &impl Resize, headers: &Headers) -> Option<()> {
    let group = packet.has_link_header() && packet.load::<2>(0)?[0] & 1 != 0;
    let whole = matches!(headers.kind, Kind::Whole | Kind::FirstFragment);
    (whole && !group).then_some(())
}

/// RFC 9293 section 3.5.2.
#[inline(always)]
fn reset(packet: &mut impl Resize, headers: &Headers) -> Option<()> {
    is_answerable(packet, headers)?;
    let transport = usize::from(headers.transport) & MAX_TRANSPORT;
    let header: [u8; TCP_HEADER] = packet.load(transport)?;
    let flags = header[13];
    if flags & tcp::RST != 0 {
        return None;
    }
    let v6 = headers.version == Version::V6;
    let partial = packet.is_sum_partial(transport + 16)?;
    let (sequence, acknowledged, flags) = if flags & tcp::ACK == 0 {
        (0, end_of(headers, transport, &header), tcp::RST | tcp::ACK)
    } else {
        (word(&header, 8), 0, tcp::RST)
    };
    let ethernet = swapped(packet)?;
    let answer = headers.tuple.inverse();
    let segment = segment(&answer, sequence, acknowledged, flags, partial);
    let start = if v6 { ETHERNET + IPV6_HEADER } else { ETHERNET + IPV4_HEADER };
    packet.truncate(start + TCP_HEADER)?;
    store_ethernet(packet, ethernet)?;
    store_ip(packet, &answer, TCP, TCP_HEADER as u16)?;
    packet.store(start, segment)
}

/// In parts, since the program's stack could not hold both kinds of header whole.
#[inline(always)]
pub(crate) fn store_ip(
    packet: &mut impl Packet,
    answer: &Tuple,
    protocol: u8,
    payload: u16,
) -> Option<()> {
    if answer.source.to_v4().is_some() {
        packet.store(ETHERNET, ipv4(answer, protocol, payload))
    } else {
        packet.store(ETHERNET, ipv6(answer, protocol, payload))
    }
}

/// The sequence number after the segment; SYN and FIN count like a byte.
#[inline(always)]
fn end_of(headers: &Headers, transport: usize, header: &[u8; TCP_HEADER]) -> u32 {
    let data_offset = u32::from(header[12] >> 4) * 4;
    let before = transport.wrapping_sub(ETHERNET) as u32 + data_offset;
    let payload = u32::from(headers.length).saturating_sub(before);
    let marks = u32::from(header[13] & tcp::SYN != 0) + u32::from(header[13] & tcp::FIN != 0);
    word(header, 4).wrapping_add(payload).wrapping_add(marks)
}

#[inline(always)]
const fn word(bytes: &[u8; TCP_HEADER], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline(always)]
fn segment(
    answer: &Tuple,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    partial: bool,
) -> [u8; TCP_HEADER] {
    let mut bytes = [0; TCP_HEADER];
    copy(&mut bytes, 0, &answer.source_port.to_wire());
    copy(&mut bytes, 2, &answer.destination_port.to_wire());
    copy(&mut bytes, 4, &sequence.to_be_bytes());
    copy(&mut bytes, 8, &acknowledged.to_be_bytes());
    bytes[12] = 5 << 4;
    bytes[13] = flags;
    let pseudo = pseudo_sum(answer, TCP, TCP_HEADER as u16);
    // Whoever completes the checksum sums up what stands here already.
    let sum = if partial { !finish(pseudo) } else { finish(pseudo + sum(&bytes)) };
    copy(&mut bytes, 16, &sum.to_ne_bytes());
    bytes
}

/// An ICMP error that quotes the packet: its IP header, and of its transport as much as
/// senders need to find the socket.
#[inline(always)]
#[must_use = "a packet that is half changed has to be dropped"]
pub fn error(packet: &mut impl Resize, headers: &Headers, error: Error) -> Option<()> {
    is_answerable(packet, headers)?;
    let transport = usize::from(headers.transport) & MAX_TRANSPORT;
    let v6 = headers.version == Version::V6;
    // Of IPv6 with extension headers the quote would have to be longer than is useful here.
    if v6 && transport != ETHERNET + IPV6_HEADER || transport > ETHERNET + 60 {
        return None;
    }
    let (place, rest) = match headers.tuple.protocol {
        TCP => (16, TCP_HEADER),
        UDP => (6, 8),
        // The kernel does not cut off a checksum that the hardware is to finish.
        _ => (0, SCTP_HEADER),
    };
    let partial = place != 0 && packet.is_sum_partial(transport + place)?;
    let end = transport + rest;
    packet.truncate(end)?;
    if partial {
        settle(packet, transport, place, end)?;
    }
    let quoted = (end - ETHERNET) as u16;
    let quote = sum_of(packet, ETHERNET, end)?;
    let ethernet = swapped(packet)?;
    let answer = headers.tuple.inverse();
    let length = ICMP_HEADER as u16 + quoted;
    let (version, protocol, header, pseudo) = if v6 {
        (Version::V6, ICMPV6, IPV6_HEADER, pseudo_sum(&answer, ICMPV6, length))
    } else {
        (Version::V4, ICMP, IPV4_HEADER, 0)
    };
    let message = icmp(error, version, quote + pseudo);
    packet.push_front(header + ICMP_HEADER)?;
    store_ethernet(packet, ethernet)?;
    store_ip(packet, &answer, protocol, length)?;
    packet.store(ETHERNET + header, message)
}

/// A checksum that the hardware is still to complete lies in what is quoted, and it will be
/// completed: as the complement of the sum from the transport header to the end, itself
/// included. So that this does not spoil the error's own checksum, it gets the value that
/// completing leaves as it is: `x` with `x + x + others = 0`, which is half of their
/// complement; and half, in this arithmetic, is one bit to the right, round the end.
#[inline(always)]
fn settle(packet: &mut impl Resize, transport: usize, place: usize, end: usize) -> Option<()> {
    packet.store(transport + place, [0, 0])?;
    let others = sum_of(packet, transport, end)?;
    packet.store(transport + place, finish(others).rotate_right(1).to_ne_bytes())
}

/// Of the words from `start` to `end`.
#[inline(always)]
fn sum_of(packet: &impl Resize, start: usize, end: usize) -> Option<u64> {
    /// An IPv4 header with all options, and a TCP header.
    const WORDS: usize = 20;
    let mut sum = 0;
    let mut i = 0;
    while i < WORDS {
        if start + i * 4 >= end {
            break;
        }
        sum += u64::from(u32::from_ne_bytes(packet.load(start + i * 4)?));
        i += 1;
    }
    Some(sum)
}

#[inline(always)]
fn icmp(error: Error, version: Version, covered: u64) -> [u8; ICMP_HEADER] {
    let (kind, code, low) = error.fields(version);
    let [a, b] = low.to_be_bytes();
    let mut bytes = [kind, code, 0, 0, 0, 0, a, b];
    let sum = finish(covered + sum(&bytes));
    copy(&mut bytes, 2, &sum.to_ne_bytes());
    bytes
}

#[inline(always)]
fn swapped(packet: &impl Resize) -> Option<[u8; ETHERNET]> {
    if !packet.has_link_header() {
        return Some([0; ETHERNET]);
    }
    let old: [u8; ETHERNET] = packet.load(0)?;
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = old;
    Some([g, h, i, j, k, l, a, b, c, d, e, f, m, n])
}

#[inline(always)]
fn store_ethernet(packet: &mut impl Resize, header: [u8; ETHERNET]) -> Option<()> {
    if packet.has_link_header() { packet.store(0, header) } else { Some(()) }
}

#[inline(always)]
fn ipv4(answer: &Tuple, protocol: u8, payload: u16) -> [u8; IPV4_HEADER] {
    const DONT_FRAGMENT: u8 = 0x40;
    let [high, low] = (IPV4_HEADER as u16).wrapping_add(payload).to_be_bytes();
    let mut bytes =
        [0x45, 0, high, low, 0, 0, DONT_FRAGMENT, 0, HOPS, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    copy(&mut bytes, 12, &answer.source.words()[3].to_wire());
    copy(&mut bytes, 16, &answer.destination.words()[3].to_wire());
    let sum = finish(sum(&bytes));
    copy(&mut bytes, 10, &sum.to_ne_bytes());
    bytes
}

#[inline(always)]
fn ipv6(answer: &Tuple, protocol: u8, payload: u16) -> [u8; IPV6_HEADER] {
    let mut bytes = [0; IPV6_HEADER];
    let [high, low] = payload.to_be_bytes();
    copy(&mut bytes, 0, &[0x60, 0, 0, 0, high, low, protocol, HOPS]);
    copy_address(&mut bytes, 8, &answer.source);
    copy_address(&mut bytes, 24, &answer.destination);
    bytes
}

#[inline(always)]
fn sum<const N: usize>(bytes: &[u8; N]) -> u64 {
    let mut sum = 0;
    let mut i = 0;
    while i + 1 < N {
        sum += u64::from(u16::from_ne_bytes([bytes[i], bytes[i + 1]]));
        i += 2;
    }
    sum
}

#[inline(always)]
const fn copy<const N: usize, const M: usize>(to: &mut [u8; N], at: usize, from: &[u8; M]) {
    let mut i = 0;
    while i < M {
        to[at + i] = from[i];
        i += 1;
    }
}

#[inline(always)]
fn copy_address<const N: usize>(to: &mut [u8; N], at: usize, address: &Address) {
    let words = address.words();
    let mut i = 0;
    while i < 4 {
        copy(to, at + i * 4, &words[i].to_wire());
        i += 1;
    }
}

#[cfg(test)]
mod tests;
