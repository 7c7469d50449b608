//! An Ethernet frame to what Services are keyed by, and where in the frame it stands.
//!
//! Reads what it needs and no more: a packet that is not understood here is passed on to
//! the stack, which checks the rest (lengths, checksums, options).

use crate::layout::Tuple;
use crate::order::{Address, Be16, Be32};
use crate::packet::Bytes;

/// What a packet is, and where its parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Headers {
    /// The packet's own; without ports for a later fragment. Of an ICMP error: that of a
    /// reply to the packet that the error is about, since the error travels like one.
    pub tuple: Tuple,
    /// Source of the frame's own IP header: another than the tuple's for an ICMP error,
    /// which any router may send.
    pub source: Address,
    pub kind: Kind,
    pub version: Version,
    /// The flag byte of TCP; of SCTP, what its first chunk says in those terms ([`sctp`]).
    pub tcp_flags: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Where the transport header is, or that of ICMP.
    pub transport: u16,
    /// Where an ICMP error's quoted packet is, and that packet's transport header.
    pub quoted: u16,
    pub quoted_transport: u16,
    /// Of the IP packet, from its header.
    pub length: u16,
    /// Names the datagram a fragment is of, as it stands in the packet.
    pub fragment: u32,
    /// IPv4 only; IPv6 is never fragmented on the way.
    pub dont_fragment: bool,
    pub pad: [u8; 3],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Kind {
    #[default]
    Whole,
    /// With the ports, and more to come.
    FirstFragment,
    LaterFragment,
    /// About a packet of a TCP, UDP or SCTP flow.
    IcmpError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Version {
    #[default]
    V4,
    V6,
}

/// Why a packet is nothing of ours. None of these is a reason to drop it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unparsed {
    /// ARP, or anything else that is neither IPv4 nor IPv6.
    NotIp,
    /// The bytes at hand end before the ports; there may be more in the packet.
    Truncated,
    /// The IP header contradicts itself.
    Malformed,
    /// A protocol that Services do not have.
    Protocol,
    /// IPv6 with a routing header that is not used up: the destination is a waypoint.
    SourceRouted,
    /// More IPv6 extension headers than [`MAX_EXTENSIONS`], or longer ones than fit into
    /// [`MAX_TRANSPORT`].
    Extensions,
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Flags of TCP, RFC 9293 section 3.1.
pub mod tcp {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const ACK: u8 = 1 << 4;
}

/// Types of SCTP's chunks, RFC 9260 section 3.2: those that begin or end an association. They come
/// first in their packet, if not alone (an ABORT may follow others, and is missed then).
pub mod sctp {
    use super::tcp;

    pub const INIT: u8 = 1;
    pub const ABORT: u8 = 6;
    pub const COOKIE_ECHO: u8 = 10;
    pub const SHUTDOWN_COMPLETE: u8 = 14;

    /// The flags of the TCP segment that does the same.
    #[must_use]
    #[inline(always)]
    pub const fn flags(chunk: u8) -> u8 {
        match chunk {
            INIT => tcp::SYN,
            COOKIE_ECHO => tcp::ACK,
            ABORT | SHUTDOWN_COMPLETE => tcp::RST,
            _ => 0,
        }
    }
}

/// Where the IP header is.
pub const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
pub const IPV4_HEADER: usize = 20;
pub const IPV6_HEADER: usize = 40;
pub const ICMP_HEADER: usize = 8;

/// Bounds the loop for the verifier. RFC 8200 section 4.1 lists six kinds, of which only
/// destination options may occur twice; AH and ESP end what can be read anyway.
pub const MAX_EXTENSIONS: usize = 6;

/// A power of two less one: offsets that went through memory are bounded by a mask, which
/// is all the verifier knows about them then.
pub const MAX_TRANSPORT: usize = 0x3ff;

/// Enough of a packet, in bytes, for everything up to the ports in all but freak
/// packets: Ethernet, IPv4 with all options or IPv6 with some, and the ports; and for what
/// an ICMP error quotes.
pub const USUAL_HEADERS: u32 = 128;

/// Whom a frame is for.
#[inline(always)]
pub fn receiver(packet: &impl Bytes) -> Option<[u8; 6]> {
    packet.load(0)
}

/// # Errors
/// [`Unparsed`] says what kind of packet it is instead.
#[inline(always)]
pub fn ethernet(packet: &impl Bytes, headers: &mut Headers) -> Result<(), Unparsed> {
    ip(packet.load(12).ok_or(Unparsed::Truncated)?, packet, headers)
}

/// What follows an Ethernet header that says so, or would follow one.
///
/// # Errors
/// As [`ethernet`].
#[inline(always)]
pub fn ip(ethertype: [u8; 2], packet: &impl Bytes, headers: &mut Headers) -> Result<(), Unparsed> {
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet, headers),
        ETHERTYPE_IPV6 => ipv6(packet, headers),
        _ => Err(Unparsed::NotIp),
    }
}

/// RFC 791 section 3.1.
#[inline(always)]
fn ipv4(packet: &impl Bytes, headers: &mut Headers) -> Result<(), Unparsed> {
    let header: [u8; IPV4_HEADER] = packet.load(ETHERNET).ok_or(Unparsed::Truncated)?;
    let (header_length, fragmentation) = ipv4_lengths(&header)?;
    let transport = ETHERNET + header_length;
    let protocol = header[9];
    headers.version = Version::V4;
    headers.kind = match (fragmentation & 0x1fff, fragmentation & 0x2000) {
        (0, 0) => Kind::Whole,
        (0, _) => Kind::FirstFragment,
        _ => Kind::LaterFragment,
    };
    headers.dont_fragment = fragmentation & 0x4000 != 0;
    headers.fragment = u32::from(u16::from_ne_bytes([header[4], header[5]]));
    headers.ttl = header[8];
    headers.length = u16::from_be_bytes([header[2], header[3]]);
    headers.source = ipv4_address(&header, 12);
    let destination = ipv4_address(&header, 16);
    if protocol == ICMP && headers.kind == Kind::Whole {
        return icmp_error(packet, transport, destination, headers);
    }
    transport_header(packet, protocol, transport, destination, headers)
}

/// Length of the header, and the flags and offset of fragmentation.
#[inline(always)]
fn ipv4_lengths(header: &[u8; IPV4_HEADER]) -> Result<(usize, u16), Unparsed> {
    let length = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || length < IPV4_HEADER {
        return Err(Unparsed::Malformed);
    }
    Ok((length, u16::from_be_bytes([header[6], header[7]])))
}

#[inline(always)]
const fn ipv4_address(header: &[u8; IPV4_HEADER], at: usize) -> Address {
    Address::v4(Be32::from_wire([header[at], header[at + 1], header[at + 2], header[at + 3]]))
}

/// RFC 8200 section 3.
#[inline(always)]
fn ipv6(packet: &impl Bytes, headers: &mut Headers) -> Result<(), Unparsed> {
    let header: [u8; 8] = packet.load(ETHERNET).ok_or(Unparsed::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(Unparsed::Malformed);
    }
    headers.version = Version::V6;
    headers.kind = Kind::Whole;
    headers.dont_fragment = true;
    headers.fragment = 0;
    headers.ttl = header[7];
    headers.length = u16::from_be_bytes([header[4], header[5]]).saturating_add(40);
    headers.source = ipv6_address(packet, ETHERNET + 8)?;
    let destination = ipv6_address(packet, ETHERNET + 24)?;
    let (protocol, transport) = skip_extensions(packet, header[6], headers)?;
    if protocol == ICMPV6 && headers.kind == Kind::Whole {
        return icmp_error(packet, transport, destination, headers);
    }
    transport_header(packet, protocol, transport, destination, headers)
}

#[inline(always)]
fn ipv6_address(packet: &impl Bytes, offset: usize) -> Result<Address, Unparsed> {
    let mut words = [Be32::default(); 4];
    let mut i = 0;
    while i < 4 {
        words[i] = Be32::from_wire(packet.load(offset + i * 4).ok_or(Unparsed::Truncated)?);
        i += 1;
    }
    Ok(Address::v6(words))
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// The protocol behind the extension headers and where it starts.
#[inline(always)]
fn skip_extensions(
    packet: &impl Bytes,
    mut next: u8,
    headers: &mut Headers,
) -> Result<(u8, usize), Unparsed> {
    let mut offset = ETHERNET + IPV6_HEADER;
    let mut seen = 0;
    while seen < MAX_EXTENSIONS {
        // What follows in a later fragment are not headers, whatever `next` says.
        if headers.kind == Kind::LaterFragment
            || !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION)
        {
            return Ok((next, offset));
        }
        let header: [u8; 8] = packet.load(offset).ok_or(Unparsed::Truncated)?;
        let length = usize::from(header[1]);
        offset += match next {
            FRAGMENT => {
                fragment_header(header, headers);
                8
            }
            // Segments left, RFC 8200 section 4.4.
            ROUTING if header[3] != 0 => return Err(Unparsed::SourceRouted),
            // Units of 4 bytes less 2, RFC 4302 section 2.2; all others 8 bytes less 1.
            AUTHENTICATION => (length + 2) * 4,
            _ => (length + 1) * 8,
        };
        if offset > MAX_TRANSPORT {
            return Err(Unparsed::Extensions);
        }
        next = header[0];
        seen += 1;
    }
    match next {
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
            if headers.kind != Kind::LaterFragment =>
        {
            Err(Unparsed::Extensions)
        }
        _ => Ok((next, offset)),
    }
}

/// RFC 8200 section 4.5. Offset 0 and nothing to follow is a whole packet (RFC 6946).
#[inline(always)]
const fn fragment_header(header: [u8; 8], headers: &mut Headers) {
    let place = u16::from_be_bytes([header[2], header[3]]);
    headers.fragment = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    headers.kind = match (place & 0xfff8, place & 1) {
        (0, 0) => Kind::Whole,
        (0, _) => Kind::FirstFragment,
        _ => Kind::LaterFragment,
    };
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "not above MAX_TRANSPORT")]
fn transport_header(
    packet: &impl Bytes,
    protocol: u8,
    transport: usize,
    destination: Address,
    headers: &mut Headers,
) -> Result<(), Unparsed> {
    if !matches!(protocol, TCP | UDP | SCTP) {
        return Err(Unparsed::Protocol);
    }
    let (mut source_port, mut destination_port) = (Be16::default(), Be16::default());
    if headers.kind != Kind::LaterFragment {
        (source_port, destination_port) = ports(packet, transport)?;
        if protocol != UDP {
            // The offset and the flags of TCP, or type and flags of SCTP's first chunk: read by one
            // pointer, of which the verifier knows one bound.
            headers.tcp_flags = match packet.load(transport + 12) {
                Some([_, flags]) if protocol == TCP => flags,
                Some([chunk, _]) => sctp::flags(chunk),
                None if protocol == TCP => return Err(Unparsed::Truncated),
                None => 0,
            };
        }
    }
    headers.transport = transport as u16;
    let source = headers.source;
    headers.tuple =
        Tuple { source, destination, source_port, destination_port, protocol, pad: [0; 3] };
    Ok(())
}

/// The first four bytes of TCP, UDP and SCTP alike.
#[inline(always)]
fn ports(packet: &impl Bytes, offset: usize) -> Result<(Be16, Be16), Unparsed> {
    let bytes: [u8; 4] = packet.load(offset).ok_or(Unparsed::Truncated)?;
    Ok((Be16::from_wire([bytes[0], bytes[1]]), Be16::from_wire([bytes[2], bytes[3]])))
}

/// RFC 792 and RFC 4443: the errors quote the packet that they are about. An IPv6 packet
/// with extension headers is not looked into: none of a Service's has any in practice, and
/// two loops are more than the verifier should go through for each packet.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "not above MAX_TRANSPORT and a header")]
fn icmp_error(
    packet: &impl Bytes,
    transport: usize,
    destination: Address,
    headers: &mut Headers,
) -> Result<(), Unparsed> {
    let [kind, _] = packet.load(transport).ok_or(Unparsed::Truncated)?;
    let quoted = transport + ICMP_HEADER;
    let (sender, receiver, protocol, quoted_transport) = match (headers.version, kind) {
        // Destination unreachable, time exceeded, parameter problem.
        (Version::V4, 3 | 11 | 12) => {
            let header: [u8; IPV4_HEADER] = packet.load(quoted).ok_or(Unparsed::Truncated)?;
            let (length, fragmentation) = ipv4_lengths(&header)?;
            if fragmentation & 0x1fff != 0 {
                return Err(Unparsed::Protocol);
            }
            let (source, destination) = (ipv4_address(&header, 12), ipv4_address(&header, 16));
            (source, destination, header[9], quoted + length)
        }
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        (Version::V6, 1..=4) => {
            let header: [u8; 8] = packet.load(quoted).ok_or(Unparsed::Truncated)?;
            if header[0] >> 4 != 6 {
                return Err(Unparsed::Malformed);
            }
            let source = ipv6_address(packet, quoted + 8)?;
            let destination = ipv6_address(packet, quoted + 24)?;
            (source, destination, header[6], quoted + IPV6_HEADER)
        }
        _ => return Err(Unparsed::Protocol),
    };
    if !matches!(protocol, TCP | UDP | SCTP) {
        return Err(Unparsed::Protocol);
    }
    // An error goes to who sent what it is about: anything else is made up.
    if sender != destination {
        return Err(Unparsed::Malformed);
    }
    let (sender_port, receiver_port) = ports(packet, quoted_transport)?;
    headers.kind = Kind::IcmpError;
    headers.transport = transport as u16;
    headers.quoted = quoted as u16;
    headers.quoted_transport = quoted_transport as u16;
    headers.tuple = Tuple {
        source: receiver,
        destination: sender,
        source_port: receiver_port,
        destination_port: sender_port,
        protocol,
        pad: [0; 3],
    };
    Ok(())
}

#[cfg(test)]
mod tests;
