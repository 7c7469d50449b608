use std::collections::HashSet;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::device::{Arrival, Work};
use crate::fake::Fake;
use crate::fake::frames::Frame;
use crate::fake::strategy::{frame, tuple};
use crate::layout::{Backend, BackendId, Traffic};
use crate::parse::{Headers, Kind};
use crate::{parse as long, rewrite as slow};

impl Fields for Vec<u8> {
    fn has(&self, length: usize) -> bool {
        length <= self.len()
    }
    fn get16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self[at..at + 2].try_into().unwrap())
    }
    fn get32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self[at..at + 4].try_into().unwrap())
    }
    fn put16(&mut self, at: usize, value: u16) {
        self[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }
    fn put32(&mut self, at: usize, value: u32) {
        self[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
}

const ETHERNET: [u8; 12] = [4, 4, 4, 4, 4, 4, 2, 0, 0, 0, 0, 2];

fn words(bytes: [u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_ne_bytes(bytes[i..i + 4].try_into().unwrap());
    [word(0), word(4), word(8)]
}

fn headers(bytes: &Vec<u8>) -> Headers {
    let mut headers = Headers::default();
    long::ethernet(&bytes.as_slice(), &mut headers).unwrap();
    headers
}

fn parse(frame: &Vec<u8>) -> Option<Head> {
    match version(frame)? {
        Version::V4 => super::parse::<false>(frame),
        Version::V6 => super::parse::<true>(frame),
    }
}

fn rewrite(frame: &mut Vec<u8>, head: &Head, to: &Tuple) -> bool {
    match version(frame) {
        Some(Version::V4) => super::rewrite::<false>(frame, head, to, words(ETHERNET)),
        _ => super::rewrite::<true>(frame, head, to, words(ETHERNET)),
    }
}

fn translate(frame: &mut Vec<u8>, head: &Head, to: &Tuple, hop: bool) -> Option<()> {
    match version(frame) {
        Some(Version::V4) => super::translate::<false>(frame, head, to, hop),
        _ => super::translate::<true>(frame, head, to, hop),
    }
}

fn is_usual(frame: &Frame) -> bool {
    let ends = frame.tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0;
    frame.options == 0
        && frame.part.is_none()
        && match frame.tuple.protocol {
            TCP => !ends,
            UDP => true,
            _ => false,
        }
}

/// Frames of which many are usual ones.
fn frames() -> impl Strategy<Value = (Frame, Tuple)> {
    (any::<bool>(), any::<bool>()).prop_flat_map(|(v6, usual)| {
        (frame(v6), tuple(v6)).prop_map(move |(frame, to)| {
            let plain = Frame { options: 0, tcp_flags: tcp::ACK, ..frame.clone() };
            let frame = if usual { plain } else { frame };
            let to = Tuple { protocol: frame.tuple.protocol, ..to };
            (frame, to)
        })
    })
}

proptest! {
    /// What is taken is the usual packet, all of it, and understood as on the long way.
    #[test]
    fn usual_packets_are_parsed_alike((frame, _) in frames()) {
        let bytes = frame.bytes();
        let head = parse(&bytes);
        prop_assert_eq!(head.is_some(), is_usual(&frame));
        if let Some(head) = head {
            let headers = headers(&bytes);
            prop_assert_eq!(head.tuple, headers.tuple);
            prop_assert_eq!((version(&bytes), head.ttl), (Some(headers.version), headers.ttl));
            prop_assert_eq!((head.length, Kind::Whole), (headers.length, headers.kind));
        }
    }

    /// Pieces have no ports, or not the whole of what the checksum covers.
    #[test]
    fn fragments_are_not_taken((frame, _) in frames(), cut in 1_usize..4) {
        let whole = Frame { payload: std::vec![1; 40], dont_fragment: false, ..frame };
        let (cut, length) = (cut * 8, whole.transport_length());
        for part in [(0, cut), (cut, length - cut)] {
            let part = Frame { part: Some(part), ..whole.clone() };
            prop_assert_eq!(parse(&part.bytes()), None);
        }
    }

    #[test]
    fn any_bytes_are_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..100), v6: bool) {
        let mut bytes = bytes;
        if bytes.len() > 14 {
            bytes[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
            bytes[14] = if v6 { 0x60 } else { 0x45 };
        }
        if let Some(head) = parse(&bytes) {
            prop_assert_eq!(head.tuple, headers(&bytes).tuple);
            rewrite(&mut bytes, &head, &head.tuple);
        }
    }

    /// Byte by byte as on the long way.
    #[test]
    fn rewritten_alike((frame, to) in frames()) {
        let mut bytes = Frame { ttl: frame.ttl.max(2), ..frame }.bytes();
        if let Some(head) = parse(&bytes) {
            let mut expected = bytes.clone();
            let headers = headers(&bytes);
            let finished = slow::is_finished(&bytes, &headers) == Some(true);
            if finished {
                slow::translate(&mut expected, &headers, &to).unwrap();
                slow::take_hop(&mut expected, &headers).unwrap();
                expected.store(0, ETHERNET).unwrap();
            }
            prop_assert_eq!(rewrite(&mut bytes, &head, &to), finished);
            prop_assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn translated_alike((frame, to) in frames(), hop: bool) {
        let mut bytes = Frame { ttl: frame.ttl.max(2), ..frame }.bytes();
        if let Some(head) = parse(&bytes) {
            let mut expected = bytes.clone();
            let headers = headers(&bytes);
            slow::translate(&mut expected, &headers, &to).unwrap();
            if hop {
                slow::take_hop(&mut expected, &headers).unwrap();
            }
            prop_assert_eq!(translate(&mut bytes, &head, &to, hop), Some(()));
            prop_assert_eq!(bytes, expected);
        }
    }

    /// The sum of the pseudo-header instead of a checksum: nothing is changed.
    #[test]
    fn unfinished_packets_stay_as_they_are((frame, to) in frames()) {
        let mut bytes = frame.bytes();
        if let Some(head) = parse(&bytes) {
            let headers = headers(&bytes);
            let transport = usize::from(headers.transport);
            let at = transport + if head.tuple.protocol == TCP { 16 } else { 6 };
            let length = u16::try_from(bytes.len() - transport).unwrap();
            let sum = checksum::pseudo_sum(&head.tuple, head.tuple.protocol, length);
            bytes.put16(at, !checksum::finish(sum));
            prop_assert_eq!(slow::is_finished(&bytes, &headers), Some(false));
            let before = bytes.clone();
            prop_assert!(!rewrite(&mut bytes, &head, &to));
            prop_assert_eq!(bytes, before);
        }
    }

    /// Where the short way sends a packet on, or leaves it alone, so does the long one; and it
    /// changes nothing but the time at which the flow was seen.
    #[test]
    fn courses_are_those_of_the_long_way(
        (frame, to) in frames(),
        flags in 0_u32..128,
        hook in prop_oneof![Just(Hook::Xdp), Just(Hook::Ingress), Just(Hook::Egress)],
        seen in prop_oneof![Just(0_u64), Just(5)],
        gone in 0_usize..4,
    ) {
        let bytes = frame.bytes();
        let Some(head) = parse(&bytes) else { return Ok(()) };
        let backend = Backend {
            address: if gone == 1 { to.source } else { to.destination },
            port: if gone == 2 { to.source_port } else { to.destination_port },
            flags: if gone == 3 { 0 } else { Backend::IN_USE },
            ..Backend::default()
        };
        let tables = Fake { backends: [backend].into(), ..Fake::default() };
        let flow = Flow { to, seen, backend: BackendId(0), flags, ..Flow::default() };
        let other = Flow { to: head.tuple.inverse(), seen: 5, ..Flow::default() };
        tables.flows.borrow_mut().insert(head.tuple, flow);
        tables.flows.borrow_mut().insert(to.inverse(), other);
        let course = course(&tables, hook, &flow);
        let mut work = Work { headers: headers(&bytes), ..Work::default() };
        let arrival = Arrival {
            hook,
            device: 0,
            wrapped: false,
            now: 9,
            random: 0,
            traffic: Traffic::default(),
        };
        let verdict = device::decide(&tables, &tables, &arrival, &mut work);
        match course {
            Course::Long => return Ok(()),
            Course::Forward => {
                prop_assert_eq!(verdict, Verdict::Translate { forward: true });
                prop_assert_eq!(work.to, to);
            }
            Course::Translate => {
                prop_assert_eq!(verdict, Verdict::Translate { forward: false });
                prop_assert_eq!(work.to, to);
            }
            Course::Leave => prop_assert_eq!(verdict, Verdict::Pass),
        }
        let flows = tables.flows.borrow();
        prop_assert_eq!(flows.len(), 2);
        prop_assert_eq!(flows[&head.tuple], Flow { seen: 9, ..flow });
        prop_assert_eq!(flows[&to.inverse()], other);
    }

    #[test]
    fn there_is_a_place_for_every_way(to in any::<bool>().prop_flat_map(tuple), came_in: u32) {
        prop_assert!(Way::place::<false>(&to, came_in) < WAYS);
        prop_assert!(Way::place::<true>(&to, came_in) < WAYS);
    }
}

fn v4(n: u32) -> Address {
    Address::v4(Be32::from_host(0x0af4_0000 + n))
}

#[test]
fn a_way_is_good_for_what_it_was_found_for_and_not_for_long() {
    let to = Tuple {
        source: v4(1),
        destination: v4(2),
        source_port: Be16::from_host(7),
        destination_port: Be16::from_host(80),
        protocol: TCP,
        pad: [0; 3],
    };
    let way = Way { to, since: 100, came_in: 3, longest: 1500, how: 1, ..Way::default() };
    let is_for = |to: &Tuple, came_in, length, now| way.is_for::<false>(to, came_in, length, now);
    assert!(is_for(&to, 3, 1500, 100) && is_for(&to, 3, 40, 100 + TICKS - 1));
    assert!(!is_for(&to, 3, 40, 100 + TICKS), "too old");
    assert!(!is_for(&to, 3, 40, 99), "of another time");
    assert!(!is_for(&to, 3, 1501, 100), "longer than what fits");
    assert!(!is_for(&to, 4, 40, 100), "routes may depend on where a packet comes in");
    for (what, other) in [
        ("source", Tuple { source: v4(3), ..to }),
        ("destination", Tuple { destination: v4(3), ..to }),
        ("source port", Tuple { source_port: Be16::from_host(8), ..to }),
        ("port", Tuple { destination_port: Be16::from_host(8), ..to }),
        ("protocol", Tuple { protocol: UDP, ..to }),
    ] {
        assert!(!is_for(&other, 3, 40, 100), "another {what}");
    }
    assert!(!way.is_for::<true>(&to, 3, 40, 100), "of the other family");
    let nothing = Way::default();
    assert!(!nothing.is_for::<false>(&nothing.to, 0, 0, 0), "nothing is remembered there");
}

/// Every word of an IPv6 address counts.
#[test]
fn ways_of_ipv6_differ_by_any_word() {
    let words = |words: [u32; 4]| Address::v6(words.map(Be32::from_host));
    let (one, two) = ([0x2001_0db8, 1, 2, 3], [0xfd00_0000, 4, 5, 6]);
    let to = |source, destination| Tuple {
        source: words(source),
        destination: words(destination),
        protocol: UDP,
        ..Tuple::default()
    };
    let way = Way { to: to(one, two), longest: 1500, how: 1, v6: 1, ..Way::default() };
    assert!(way.is_for::<true>(&to(one, two), 0, 40, 0));
    for i in 0..4 {
        let changed = |mut words: [u32; 4]| {
            words[i] ^= 1;
            words
        };
        assert!(!way.is_for::<true>(&to(changed(one), two), 0, 40, 0));
        assert!(!way.is_for::<true>(&to(one, changed(two)), 0, 40, 0));
    }
}

/// Flows that differ in one number only do not all fall on one place.
#[test]
fn ways_are_spread() {
    let base = Tuple { source: v4(1), destination: v4(2), protocol: TCP, ..Tuple::default() };
    let count = |tuple: &dyn Fn(u16) -> Tuple| {
        let places = (0..500).map(|n| Way::place::<false>(&tuple(n), 2));
        places.collect::<HashSet<_>>().len()
    };
    let port = |n: u16| Tuple { source_port: Be16::from_host(50_000 + n), ..base };
    let counts = [
        count(&port),
        count(&|n| port(n).inverse()),
        count(&|n| Tuple { destination: v4(n.into()), ..base }),
    ];
    assert!(counts.iter().all(|count| *count > 350), "{counts:?} places of 500");
}
