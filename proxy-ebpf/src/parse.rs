//! An Ethernet frame to the five-tuple that Services are keyed by.
//!
//! Reads what it needs and no more: a packet that is not understood here is passed on to
//! the stack, which checks the rest (lengths, checksums, options).

use crate::order::{Address, Be16, Be32};

/// Bytes of a packet, bounds-checked at each read: the verifier wants the check next to
/// the access, and a slice on the host behaves the same.
pub trait Bytes {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl Bytes for &[u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FiveTuple {
    pub source: Address,
    pub destination: Address,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
}

/// Why a packet has no five-tuple. None of these is a reason to drop it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unparsed {
    /// ARP, or anything else that is neither IPv4 nor IPv6.
    NotIp,
    /// The bytes at hand end before the ports; there may be more in the packet.
    Truncated,
    /// The IP header contradicts itself.
    Malformed,
    /// A later fragment: it has no ports.
    Fragment,
    /// A protocol that Services do not have.
    Protocol,
    /// IPv6 with a routing header that is not used up: the destination is a waypoint.
    SourceRouted,
    /// More IPv6 extension headers than [`MAX_EXTENSIONS`].
    Extensions,
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Bounds the loop for the verifier. RFC 8200 section 4.1 lists six kinds, of which only
/// destination options may occur twice; AH and ESP end what can be read anyway.
pub const MAX_EXTENSIONS: usize = 6;

/// Enough of a packet, in bytes, for everything up to the ports in all but freak
/// packets: Ethernet, IPv4 with all options or IPv6 with some, and the ports.
pub const USUAL_HEADERS: u32 = 128;

/// # Errors
/// [`Unparsed`] says what kind of packet it is instead.
#[inline(always)]
pub fn ethernet(packet: &impl Bytes) -> Result<FiveTuple, Unparsed> {
    match packet.load::<2>(12).ok_or(Unparsed::Truncated)? {
        ETHERTYPE_IPV4 => ipv4(packet, ETHERNET),
        ETHERTYPE_IPV6 => ipv6(packet, ETHERNET),
        _ => Err(Unparsed::NotIp),
    }
}

/// RFC 791 section 3.1; `start` is where the header is.
#[inline(always)]
fn ipv4(packet: &impl Bytes, start: usize) -> Result<FiveTuple, Unparsed> {
    let header: [u8; 20] = packet.load(start).ok_or(Unparsed::Truncated)?;
    let length = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || length < 20 {
        return Err(Unparsed::Malformed);
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        return Err(Unparsed::Fragment);
    }
    let protocol = header[9];
    let (source_port, destination_port) = ports(packet, start + length, protocol)?;
    Ok(FiveTuple {
        source: Address::v4(Be32::from_wire([header[12], header[13], header[14], header[15]])),
        destination: Address::v4(Be32::from_wire([header[16], header[17], header[18], header[19]])),
        source_port,
        destination_port,
        protocol,
    })
}

/// RFC 8200 section 3.
#[inline(always)]
fn ipv6(packet: &impl Bytes, start: usize) -> Result<FiveTuple, Unparsed> {
    let header: [u8; 8] = packet.load(start).ok_or(Unparsed::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(Unparsed::Malformed);
    }
    let source = ipv6_address(packet, start + 8)?;
    let destination = ipv6_address(packet, start + 24)?;
    let (protocol, payload) = skip_extensions(packet, header[6], start + 40)?;
    let (source_port, destination_port) = ports(packet, payload, protocol)?;
    Ok(FiveTuple { source, destination, source_port, destination_port, protocol })
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

/// The protocol behind the extension headers and where it starts.
#[inline(always)]
fn skip_extensions(
    packet: &impl Bytes,
    mut next: u8,
    mut offset: usize,
) -> Result<(u8, usize), Unparsed> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;

    let mut seen = 0;
    while seen < MAX_EXTENSIONS {
        if !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION) {
            return Ok((next, offset));
        }
        let header: [u8; 4] = packet.load(offset).ok_or(Unparsed::Truncated)?;
        let length = usize::from(header[1]);
        offset += match next {
            FRAGMENT if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 => {
                return Err(Unparsed::Fragment);
            }
            FRAGMENT => 8,
            // Segments left, RFC 8200 section 4.4.
            ROUTING if header[3] != 0 => return Err(Unparsed::SourceRouted),
            // Units of 4 bytes less 2, RFC 4302 section 2.2; all others 8 bytes less 1.
            AUTHENTICATION => (length + 2) * 4,
            _ => (length + 1) * 8,
        };
        next = header[0];
        seen += 1;
    }
    match next {
        TCP | UDP | SCTP => Ok((next, offset)),
        _ => Err(Unparsed::Extensions),
    }
}

/// The first four bytes of TCP, UDP and SCTP alike.
#[inline(always)]
fn ports(packet: &impl Bytes, offset: usize, protocol: u8) -> Result<(Be16, Be16), Unparsed> {
    if !matches!(protocol, TCP | UDP | SCTP) {
        return Err(Unparsed::Protocol);
    }
    let bytes: [u8; 4] = packet.load(offset).ok_or(Unparsed::Truncated)?;
    Ok((Be16::from_wire([bytes[0], bytes[1]]), Be16::from_wire([bytes[2], bytes[3]])))
}

#[cfg(test)]
mod tests;
