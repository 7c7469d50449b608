//! Frames built from scratch, and checked from scratch: what the packet logic makes by
//! changing bytes has to be the same as what this makes anew.

extern crate std;

use core::net::IpAddr;
use std::vec::Vec;

use crate::layout::Tuple;
use crate::order::{Address, Be16};
use crate::parse::{ICMP, ICMPV6, SCTP, TCP, UDP};

/// An Ethernet frame with one packet, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub tuple: Tuple,
    pub tcp_flags: u8,
    pub ttl: u8,
    /// IPv4: options, in words. IPv6: destination options, in headers of 8 bytes.
    pub options: u8,
    pub dont_fragment: bool,
    pub id: u32,
    /// UDP without a checksum.
    pub unchecked: bool,
    pub payload: Vec<u8>,
    /// Which bytes of the transport header and payload are in this frame: from, length.
    pub part: Option<(usize, usize)>,
}

impl Frame {
    #[must_use]
    pub fn new(tuple: Tuple, payload: &[u8]) -> Self {
        Self {
            tuple,
            tcp_flags: 0,
            ttl: 64,
            options: 0,
            dont_fragment: true,
            id: 0,
            unchecked: false,
            payload: payload.to_vec(),
            part: None,
        }
    }

    #[must_use]
    pub fn is_v4(&self) -> bool {
        self.tuple.source.to_v4().is_some()
    }

    /// The same packet between others.
    #[must_use]
    pub fn with(&self, tuple: Tuple) -> Self {
        Self { tuple, ..self.clone() }
    }

    /// Length of the transport header and payload of the whole packet.
    #[must_use]
    pub fn transport_length(&self) -> usize {
        self.transport().len()
    }

    /// Transport header and payload.
    fn transport(&self) -> Vec<u8> {
        let Tuple { source_port, destination_port, protocol, .. } = self.tuple;
        let mut bytes = Vec::new();
        bytes.extend(source_port.to_wire());
        bytes.extend(destination_port.to_wire());
        let checksum = match protocol {
            TCP => {
                bytes.extend([
                    1,
                    2,
                    3,
                    4,
                    5,
                    6,
                    7,
                    8,
                    5 << 4,
                    self.tcp_flags,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]);
                Some(16)
            }
            UDP => {
                let length = u16::try_from(8 + self.payload.len()).unwrap_or(u16::MAX);
                bytes.extend(length.to_be_bytes());
                bytes.extend([0, 0]);
                (!self.unchecked).then_some(6)
            }
            // Verification tag and CRC32c.
            _ => {
                bytes.extend([9, 9, 9, 9, 0, 0, 0, 0]);
                None
            }
        };
        bytes.extend(&self.payload);
        if protocol == SCTP {
            let sum = crc32c(&bytes);
            bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        }
        if let Some(at) = checksum {
            let sum = transport_sum(&self.tuple, protocol, &bytes);
            let sum = if protocol == UDP && sum == 0 { 0xffff } else { sum };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// The IP packet.
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let whole = self.transport();
        let (from, length) = self.part.unwrap_or((0, whole.len()));
        let body = &whole[from..from + length];
        let more = from + length < whole.len();
        if self.is_v4() {
            self.packet_v4(body, from, more)
        } else {
            self.packet_v6(body, from, more)
        }
    }

    fn packet_v4(&self, body: &[u8], from: usize, more: bool) -> Vec<u8> {
        let header = 20 + usize::from(self.options) * 4;
        let offset = u16::try_from(from / 8).unwrap_or(u16::MAX)
            | if more { 0x2000 } else { 0 }
            | if self.dont_fragment { 0x4000 } else { 0 };
        let [high, low] = u16::try_from(header + body.len()).unwrap_or(u16::MAX).to_be_bytes();
        let words = 5 + self.options;
        let mut bytes = std::vec![0x40 | words, 0, high, low];
        bytes.extend(&self.id.to_ne_bytes()[..2]);
        bytes.extend(offset.to_be_bytes());
        bytes.extend([self.ttl, self.tuple.protocol, 0, 0]);
        bytes.extend(octets(self.tuple.source));
        bytes.extend(octets(self.tuple.destination));
        bytes.resize(header, 1);
        let sum = !sum(&bytes);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn packet_v6(&self, body: &[u8], from: usize, more: bool) -> Vec<u8> {
        const DESTINATION: u8 = 60;
        const FRAGMENT: u8 = 44;
        let mut kinds = std::vec![DESTINATION; self.options.into()];
        if self.part.is_some() {
            kinds.push(FRAGMENT);
        }
        let extensions = kinds.len() * 8;
        let [high, low] = u16::try_from(extensions + body.len()).unwrap_or(u16::MAX).to_be_bytes();
        let next = |i: usize| kinds.get(i).copied().unwrap_or(self.tuple.protocol);
        let mut bytes = std::vec![0x60, 0, 0, 0, high, low, next(0), self.ttl];
        bytes.extend(octets(self.tuple.source));
        bytes.extend(octets(self.tuple.destination));
        for (i, kind) in kinds.iter().enumerate() {
            bytes.push(next(i + 1));
            if *kind == FRAGMENT {
                let place = u16::try_from(from).unwrap_or(u16::MAX) | u16::from(more);
                bytes.push(0);
                bytes.extend(place.to_be_bytes());
                bytes.extend(self.id.to_ne_bytes());
            } else {
                bytes.extend([0, 1, 4, 0, 0, 0, 0]);
            }
        }
        bytes.extend(body);
        bytes
    }

    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        ethernet(self.is_v4(), &self.packet())
    }
}

/// Receiver and sender.
pub const MACS: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

#[must_use]
pub fn ethernet(v4: bool, packet: &[u8]) -> Vec<u8> {
    let mut frame = MACS.to_vec();
    frame.extend(if v4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    frame.extend(packet);
    frame
}

/// An ICMP error from `router` to the sender of `about`, of which it quotes so much.
#[must_use]
pub fn icmp_error(router: Address, about: &Frame, kind: [u8; 2], quoted: usize) -> Vec<u8> {
    icmp_error_to(router, about.tuple.source, about, kind, quoted)
}

/// The same, to anybody.
#[must_use]
pub fn icmp_error_to(
    router: Address,
    receiver: Address,
    about: &Frame,
    kind: [u8; 2],
    quoted: usize,
) -> Vec<u8> {
    let v4 = about.is_v4();
    let protocol = if v4 { ICMP } else { ICMPV6 };
    let quote = about.packet();
    let mut message = std::vec![kind[0], kind[1], 0, 0, 0, 0, 5, 0];
    message.extend(&quote[..quote.len().min(quoted)]);
    let tuple = Tuple { source: router, destination: receiver, protocol, ..Tuple::default() };
    let checksum = if v4 { !sum(&message) } else { transport_sum(&tuple, protocol, &message) };
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    // A frame of a protocol without ports: header and body by hand.
    let shell = Frame { tuple, id: 7, ..Frame::new(tuple, &[]) };
    let packet =
        if v4 { shell.packet_v4(&message, 0, false) } else { shell.packet_v6(&message, 0, false) };
    ethernet(v4, &packet)
}

/// The address's bytes in its own family.
fn octets(address: Address) -> Vec<u8> {
    match IpAddr::from(address) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// RFC 1071, as it is written there.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = bytes.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}

/// The checksum of a transport header and payload whose own field is zero.
fn transport_sum(tuple: &Tuple, protocol: u8, bytes: &[u8]) -> u16 {
    let mut all = octets(tuple.source);
    all.extend(octets(tuple.destination));
    all.extend([0, protocol]);
    all.extend(u16::try_from(bytes.len()).unwrap_or_default().to_be_bytes());
    all.extend(bytes);
    !sum(&all)
}

/// What a frame says once everything about it has been found right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Transport header and payload.
    pub body: Vec<u8>,
    pub ttl: u8,
}

/// Checks a frame with one whole packet: lengths, and all checksums.
///
/// # Errors
/// What is wrong.
pub fn check(frame: &[u8]) -> Result<Seen, &'static str> {
    let packet = frame.get(14..).ok_or("no packet")?;
    match frame[12..14] {
        [0x08, 0x00] => check_v4(packet),
        [0x86, 0xdd] => check_v6(packet),
        _ => Err("neither IPv4 nor IPv6"),
    }
}

fn check_v4(packet: &[u8]) -> Result<Seen, &'static str> {
    let header = usize::from(packet.first().ok_or("no packet")? & 15) * 4;
    if packet[0] >> 4 != 4 || header < 20 || packet.len() < header {
        return Err("header length");
    }
    if usize::from(u16::from_be_bytes([packet[2], packet[3]])) != packet.len() {
        return Err("packet length");
    }
    if sum(&packet[..header]) != 0xffff {
        return Err("header checksum");
    }
    let address =
        |at: usize| IpAddr::from([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
    let seen = Seen {
        source: address(12),
        destination: address(16),
        protocol: packet[9],
        body: packet[header..].to_vec(),
        ttl: packet[8],
    };
    if u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff == 0 {
        check_transport(&seen)?;
    }
    Ok(seen)
}

fn check_v6(packet: &[u8]) -> Result<Seen, &'static str> {
    if packet.len() < 40 || packet[0] >> 4 != 6 {
        return Err("header length");
    }
    if usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40 != packet.len() {
        return Err("packet length");
    }
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&packet[at..at + 16]);
        IpAddr::from(octets)
    };
    let (mut next, mut start, mut part) = (packet[6], 40, false);
    while matches!(next, 60 | 44) {
        part |= next == 44;
        next = *packet.get(start).ok_or("extension header")?;
        start += 8;
    }
    let seen = Seen {
        source: address(8),
        destination: address(24),
        protocol: next,
        body: packet.get(start..).ok_or("extension header")?.to_vec(),
        ttl: packet[7],
    };
    if !part {
        check_transport(&seen)?;
    }
    Ok(seen)
}

fn check_transport(seen: &Seen) -> Result<(), &'static str> {
    let tuple = Tuple {
        source: seen.source.into(),
        destination: seen.destination.into(),
        source_port: Be16::default(),
        destination_port: Be16::default(),
        protocol: seen.protocol,
        pad: [0; 3],
    };
    let body = &seen.body;
    let right = match seen.protocol {
        TCP => body.len() >= 20 && transport_sum(&tuple, TCP, body) == 0,
        UDP if body.len() < 8 => false,
        UDP if body[2..4] == DIRECT_PORT.to_be_bytes() => is_geneve_right(body),
        UDP => {
            let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
            let unchecked = body[6..8] == [0, 0] && seen.source.is_ipv4();
            length == body.len() && (unchecked || transport_sum(&tuple, UDP, body) == 0)
        }
        ICMP => sum(body) == 0xffff,
        ICMPV6 => transport_sum(&tuple, ICMPV6, body) == 0,
        SCTP => body.len() >= 12 && is_sctp_right(body),
        _ => true,
    };
    if right { Ok(()) } else { Err("transport length or checksum") }
}

/// RFC 6935: tunnels may do without a sum, in IPv6 too. What is inside has its own.
fn is_geneve_right(body: &[u8]) -> bool {
    let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
    length == body.len()
        && body[6..8] == [0, 0]
        && match body.get(10..12) {
            Some([0x08, 0x00]) => check_v4(&body[16..]).is_ok(),
            Some([0x86, 0xdd]) => check_v6(&body[16..]).is_ok(),
            _ => false,
        }
}

/// The usual port of packets inside others.
pub const DIRECT_PORT: u16 = 6081;

fn is_sctp_right(body: &[u8]) -> bool {
    let mut whole = body.to_vec();
    whole[8..12].fill(0);
    body[8..12] == crc32c(&whole).to_le_bytes()
}

/// RFC 9260 appendix A, bit by bit.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 == 0 { sum >> 1 } else { sum >> 1 ^ 0x82f6_3b78 };
        }
    }
    !sum
}

/// Whether the transport checksum of a frame with one whole packet, otherwise right, holds
/// the sum of the pseudo-header, and whoever puts it on a wire is to complete it.
#[must_use]
pub fn is_partial(frame: &[u8]) -> bool {
    let place = |protocol| if protocol == TCP { 16 } else { 6 };
    let v4 = frame[12..14] == [0x08, 0x00];
    let (protocol, start) =
        if v4 { (frame[23], 14 + usize::from(frame[14] & 15) * 4) } else { (frame[20], 54) };
    let field = start + place(protocol);
    if !matches!(protocol, TCP | UDP) || frame.len() < field + 2 {
        return false;
    }
    // Nothing but the pseudo-header is covered so far: complete it, and it has to be right.
    let mut whole = frame.to_vec();
    let sum = !sum(&whole[start..]);
    whole[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    check(&whole).is_ok() && check(frame).is_err()
}
