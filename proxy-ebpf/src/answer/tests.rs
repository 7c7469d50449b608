use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::fake::frames::{Frame, MACS, check};
use crate::fake::strategy::frame;
use crate::packet::{Bytes, Packet};
use crate::parse;

fn parsed(bytes: &Vec<u8>) -> Headers {
    let mut headers = Headers::default();
    parse::ethernet(&bytes.as_slice(), &mut headers).unwrap();
    headers
}

/// A packet whose transport checksum is left to the hardware: `complete` is what that does.
struct Offloaded {
    bytes: Vec<u8>,
    /// Counted from the end, since room may be made in front.
    start: usize,
    place: usize,
}

impl Offloaded {
    fn new(frame: &Frame) -> Self {
        let bytes = frame.bytes();
        let headers = parsed(&bytes);
        let place = if headers.tuple.protocol == TCP { 16 } else { 6 };
        let mut packet = Self { start: headers.transport.into(), place, bytes };
        let length = (packet.bytes.len() - packet.start) as u16;
        let pseudo = !finish(pseudo_sum(&headers.tuple, headers.tuple.protocol, length));
        packet.bytes.store(packet.start + place, pseudo.to_ne_bytes()).unwrap();
        packet
    }

    /// `skb_checksum_help`.
    fn complete(mut self) -> Vec<u8> {
        let mut covered = self.bytes[self.start..].to_vec();
        if covered.len() % 2 == 1 {
            covered.push(0);
        }
        let sum = covered
            .chunks(2)
            .map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])))
            .sum::<u64>();
        let field = match finish(sum) {
            0 => 0xffff,
            field => field,
        };
        self.bytes.store(self.start + self.place, field.to_ne_bytes()).unwrap();
        self.bytes
    }
}

impl Bytes for Offloaded {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.load(offset)
    }
}

impl Packet for Offloaded {
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.bytes.store(offset, bytes)
    }
}

impl Resize for Offloaded {
    fn truncate(&mut self, length: usize) -> Option<()> {
        // `__bpf_skb_min_len`
        (length >= self.start + self.place + 2).then(|| self.bytes.truncate(length))
    }

    fn push_front(&mut self, length: usize) -> Option<()> {
        self.start += length;
        Resize::push_front(&mut self.bytes, length)
    }

    fn is_sum_partial(&mut self, _: usize) -> Option<bool> {
        Some(true)
    }
}

fn any_frame() -> impl Strategy<Value = Frame> {
    any::<bool>().prop_flat_map(frame).prop_map(|frame| Frame {
        // Longer IPv6 headers are not answered.
        options: if frame.is_v4() { frame.options } else { 0 },
        ..frame
    })
}

proptest! {
    /// RFC 9293 section 3.5.2, and whatever the checksum's state.
    #[test]
    fn a_reset_is_right(frame in any_frame(), offloaded: bool) {
        let tuple = Tuple { protocol: TCP, ..frame.tuple };
        let options = if offloaded { 0 } else { frame.options };
        let frame = Frame { options, ..frame.with(tuple) };
        let headers = parsed(&frame.bytes());
        let (result, bytes) = if offloaded {
            let mut packet = Offloaded::new(&frame);
            (refuse(&mut packet, &headers), packet.complete())
        } else {
            let mut bytes = frame.bytes();
            (refuse(&mut bytes, &headers), bytes)
        };
        if frame.tcp_flags & tcp::RST != 0 {
            prop_assert_eq!(result, None, "a reset is never answered");
            return Ok(());
        }
        prop_assert_eq!(result, Some(()));
        let seen = check(&bytes).unwrap();
        prop_assert_eq!(Address::from(seen.source), tuple.destination);
        prop_assert_eq!(Address::from(seen.destination), tuple.source);
        prop_assert_eq!(&bytes[..12], &[&MACS[6..], &MACS[..6]].concat()[..]);
        let number = |at: usize| u32::from_be_bytes(seen.body[at..at + 4].try_into().unwrap());
        if frame.tcp_flags & tcp::ACK != 0 {
            prop_assert_eq!((number(4), number(8), seen.body[13]), (0x0506_0708, 0, tcp::RST));
        } else {
            let marks = u32::from(frame.tcp_flags & tcp::SYN != 0)
                + u32::from(frame.tcp_flags & tcp::FIN != 0);
            let end = 0x0102_0304 + frame.payload.len() as u32 + marks;
            prop_assert_eq!((number(4), number(8), seen.body[13]), (0, end, tcp::RST | tcp::ACK));
        }
    }

    #[test]
    fn an_error_is_right_and_quotes_the_packet(frame in any_frame(), offloaded: bool, which in 0_usize..3) {
        let offloaded = offloaded && matches!(frame.tuple.protocol, TCP | UDP) && !frame.unchecked;
        let what = [Error::PortUnreachable, Error::TooBig(1400), Error::TimeExceeded][which];
        let headers = parsed(&frame.bytes());
        let bytes = if offloaded {
            let mut packet = Offloaded::new(&frame);
            prop_assert_eq!(error(&mut packet, &headers, what), Some(()));
            packet.complete()
        } else {
            let mut bytes = frame.bytes();
            prop_assert_eq!(error(&mut bytes, &headers, what), Some(()));
            bytes
        };
        let seen = check(&bytes).unwrap();
        prop_assert_eq!(Address::from(seen.source), frame.tuple.destination);
        prop_assert_eq!(Address::from(seen.destination), frame.tuple.source);
        let (kind, code, low) = what.fields(headers.version);
        prop_assert_eq!(&seen.body[..2], &[kind, code]);
        prop_assert_eq!(&seen.body[6..8], &low.to_be_bytes());
        let quote = &seen.body[8..];
        let original = frame.packet();
        let header = usize::from(headers.transport) - ETHERNET;
        let least = match frame.tuple.protocol {
            TCP => 20,
            UDP => 8,
            _ => 12,
        };
        prop_assert_eq!(quote.len(), header + least);
        // All but a checksum that was not there yet.
        let place = header + if frame.tuple.protocol == TCP { 16 } else { 6 };
        for (at, byte) in quote.iter().enumerate() {
            if !offloaded || !(place..place + 2).contains(&at) {
                prop_assert_eq!(*byte, original[at], "byte {}", at);
            }
        }
    }
}

#[test]
fn broadcasts_and_later_fragments_are_not_answered() {
    let tuple = Tuple {
        source: core::net::Ipv4Addr::new(192, 0, 2, 1).into(),
        destination: core::net::Ipv4Addr::new(198, 51, 100, 1).into(),
        protocol: UDP,
        ..Tuple::default()
    };
    let frame = Frame::new(tuple, &[7; 40]);
    let mut bytes = frame.bytes();
    bytes[0] = 0xff;
    let headers = parsed(&bytes);
    assert_eq!(refuse(&mut bytes, &headers), None);
    let mut bytes = Frame { part: Some((16, 24)), dont_fragment: false, ..frame }.bytes();
    let headers = parsed(&bytes);
    assert_eq!(refuse(&mut bytes, &headers), None);
}

#[test]
fn who_is_not_told_a_length_comes_down_to_one_that_fits() {
    for (sent, takes, told) in
        [(1500, 1300, vec![1492, 1400, 1280]), (1492, 1400, vec![1400]), (576, 68, vec![508, 68])]
    {
        let mut length = sent;
        let mut all = Vec::new();
        while length > takes {
            length = next_shorter(length);
            all.push(length);
        }
        assert_eq!(all, told, "{sent}");
    }
}
