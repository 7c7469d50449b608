use std::collections::HashSet;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::device::{Arrival, Work};
use crate::fake::Fake;
use crate::fake::frames::Frame;
use crate::fake::strategy::{frame, tuple};
use crate::layout::{Backend, BackendId, Frontend, Prefix, Traffic};
use crate::parse::{Headers, Kind};
use crate::unmatched::{address_key, external_key};
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

    /// Nothing is read of a header that is not all there.
    #[test]
    fn what_is_cut_short_is_not_taken((frame, _) in frames()) {
        let bytes = frame.bytes();
        let after = if frame.is_v4() { AFTER_V4 } else { AFTER_V6 };
        let header = if frame.tuple.protocol == TCP { TCP_LENGTH } else { UDP_LENGTH };
        for length in 0..bytes.len().min(after + header) {
            prop_assert_eq!(parse(&bytes[..length].to_vec()), None, "{} bytes", length);
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

fn v6(words: [u32; 4]) -> Address {
    Address::v6(words.map(Be32::from_host))
}

fn of(protocol: u8, source: Address, destination: Address, port: u16) -> Tuple {
    let (source_port, destination_port) = (Be16::from_host(40_000), Be16::from_host(port));
    Tuple { source, destination, source_port, destination_port, protocol, pad: [0; 3] }
}

fn of_v6(protocol: u8) -> Tuple {
    of(protocol, v6([0x2001_0db8, 1, 2, 3]), v6([0xfd00_0000, 4, 5, 6]), 80)
}

/// To the tables they would look like those of IPv4.
#[test]
fn ipv6_with_an_address_of_ipv4_in_it_is_not_taken() {
    let bytes = Frame::new(of_v6(UDP), b"query").bytes();
    assert!(parse(&bytes).is_some());
    for at in [22, 38] {
        let mut mapped = bytes.clone();
        mapped[at..at + 12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        assert_eq!(parse(&mapped), None);
    }
}

/// Zeros stand for no checksum with UDP, so that one which comes out so is written otherwise. Of
/// all ports one makes it come out so.
#[test]
fn a_datagrams_checksum_is_never_zeros() {
    let tuples = [
        (of(UDP, v4(1), v4(2), 80), of(UDP, v4(3), v4(4), 8080), 40),
        (of_v6(UDP), of_v6(UDP), 60),
    ];
    for (from, to, at) in tuples {
        let before = Frame::new(from, b"query").bytes();
        let (head, headers) = (parse(&before).unwrap(), headers(&before));
        let mut turned = 0;
        for port in 0..=u16::MAX {
            let to = Tuple { source_port: Be16::from_host(port), ..to };
            let (mut bytes, mut expected) = (before.clone(), before.clone());
            slow::translate(&mut expected, &headers, &to).unwrap();
            assert!(rewrite(&mut bytes, &head, &to));
            assert_eq!(bytes[at..at + 2], expected[at..at + 2], "port {port}");
            turned += u32::from(bytes.get16(at) == 0xffff);
        }
        assert!(turned > 0);
    }
}

#[test]
fn a_connection_that_opens_takes_the_long_way() {
    let flow = Flow { to: of(TCP, v4(1), v4(2), 80), seen: 5, ..Flow::default() };
    let flags = Flow::FORWARD | Flow::REPLIED;
    for (flags, expected) in [(flags, Course::Forward), (flags | Flow::OPENING, Course::Long)] {
        assert_eq!(course(&Fake::default(), Hook::Ingress, &Flow { flags, ..flow }), expected);
    }
}

/// Their backend is whom they come from: nobody asks whether it is one still.
#[test]
fn replies_of_a_backend_that_is_gone_take_the_short_way() {
    let flags = Flow::REPLY | Flow::FORWARD;
    let flow = Flow { to: of(UDP, v4(1), v4(2), 80), seen: 5, flags, ..Flow::default() };
    assert_eq!(course(&Fake::default(), Hook::Ingress, &flow), Course::Forward);
}

#[test]
fn foreign_is_what_no_service_and_none_of_their_ranges_has() {
    let mut tables = Fake::default();
    let ours = of(TCP, v4(1), v4(2), 80);
    let elsewhere = Tuple { destination: v4(0x1_0000), ..ours };
    for Tuple { destination, destination_port, protocol, .. } in [ours, elsewhere] {
        let key = FrontendKey::new(destination, destination_port, protocol);
        tables.frontends.insert(key, Frontend::default());
    }
    tables.frontends.insert(address_key(ours.destination), Frontend::default());
    let mut config = Config { prefixes: 1, dropping: 1, ..Config::default() };
    config.service_prefixes[0] = Prefix::new(v4(0), 96 + 16);
    let is_foreign = |tuple: Tuple| super::is_foreign(&tables, &config, Hook::Ingress, &tuple);
    assert!(!is_foreign(ours) && !is_foreign(elsewhere), "Services");
    assert!(!is_foreign(Tuple { destination_port: Be16::from_host(81), ..ours }), "refused");
    assert!(!is_foreign(Tuple { destination: v4(3), ..ours }), "dropped");
    assert!(is_foreign(Tuple { destination: v4(0x1_0001), ..ours }));
    assert!(is_foreign(Tuple { destination_port: Be16::from_host(81), ..elsewhere }));
    // What leaves for another port of an external address is nobody's business.
    config.dropping = 0;
    tables.frontends.insert(external_key(v4(4)), Frontend::default());
    let external = Tuple { destination: v4(4), ..ours };
    let is_foreign = |hook| super::is_foreign(&tables, &config, hook, &external);
    assert!(!is_foreign(Hook::Ingress) && is_foreign(Hook::Egress));
}

#[test]
fn only_a_datagram_to_the_nodes_port_may_have_a_packet_inside() {
    let direct_port = Be16::from_host(6081);
    let config = Config { features: Config::DIRECT_ACCEPT, direct_port, ..Config::default() };
    let may = |protocol, port, config| {
        let head = parse(
            &Frame { tcp_flags: tcp::ACK, ..Frame::new(of(protocol, v4(1), v4(2), port), b"") }
                .bytes(),
        );
        head.unwrap().may_have_one_inside(config)
    };
    assert!(may(UDP, 6081, &config));
    assert!(!may(UDP, 6082, &config) && !may(TCP, 6081, &config));
    assert!(!may(UDP, 6081, &Config { features: 0, ..config }), "none are taken");
}

#[test]
fn a_packet_that_stands_for_several_is_as_long_as_each_of_them() {
    let frame = |tuple| Frame { tcp_flags: tcp::ACK, ..Frame::new(tuple, &[7; 3000]) }.bytes();
    let tcp_of_v4 = parse(&frame(of(TCP, v4(1), v4(2), 80))).unwrap();
    assert_eq!(tcp_of_v4.segment_length::<false>(1400), 20 + 20 + 1400);
    let udp_of_v6 = parse(&frame(of_v6(UDP))).unwrap();
    assert_eq!(udp_of_v6.segment_length::<true>(1200), 40 + 8 + 1200);
}

#[test]
fn a_way_is_good_for_what_it_was_found_for_and_not_for_long() {
    let to = of(TCP, v4(1), v4(2), 80);
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
    let (one, two) = ([0x2001_0db8, 1, 2, 3], [0xfd00_0000, 4, 5, 6]);
    let to = |source, destination| of(UDP, v6(source), v6(destination), 80);
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
    // Hosts of IPv6 that have the last word in common.
    let host = |n: u32| Tuple { source: v6([0x2001_0db8, 0, n, 1]), ..of_v6(TCP) };
    let places = (0..500).map(|n| Way::place::<true>(&host(n), 2)).collect::<HashSet<_>>();
    assert!(places.len() > 350, "{} places of 500", places.len());
}
