use core::net::{Ipv4Addr, Ipv6Addr};
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const CLIENT4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const SERVICE4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);

/// Source port 4660, destination port 8080, and some payload.
const TRANSPORT: [u8; 8] = [0x12, 0x34, 0x1f, 0x90, 0, 8, 0, 0];

fn frame(ethertype: [u8; 2]) -> Vec<u8> {
    let mut frame = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ethertype);
    frame
}

/// `words` is the header length in 32-bit words.
fn ipv4(words: u8, fragment: u16, protocol: u8) -> Vec<u8> {
    let mut packet = frame(ETHERTYPE_IPV4);
    packet.extend([0x40 | words, 0, 0, 60, 0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(CLIENT4.octets());
    packet.extend(SERVICE4.octets());
    packet.resize(packet.len() + usize::from(words.saturating_sub(5)) * 4, 1);
    packet.extend(TRANSPORT);
    packet
}

/// `extensions`: each its own kind, body after the next-header byte, in order.
fn ipv6(extensions: &[(u8, &[u8])], protocol: u8) -> Vec<u8> {
    let mut packet = frame(ETHERTYPE_IPV6);
    packet.extend([0x60, 0, 0, 0, 0, 40]);
    packet.push(extensions.first().map_or(protocol, |first| first.0));
    packet.push(64);
    packet.extend(CLIENT6.octets());
    packet.extend(SERVICE6.octets());
    for (i, (_, body)) in extensions.iter().enumerate() {
        packet.push(extensions.get(i + 1).map_or(protocol, |next| next.0));
        packet.extend(*body);
    }
    packet.extend(TRANSPORT);
    packet
}

fn expected(source: impl Into<Address>, destination: impl Into<Address>) -> FiveTuple {
    FiveTuple {
        source: source.into(),
        destination: destination.into(),
        source_port: Be16::from_host(4660),
        destination_port: Be16::from_host(8080),
        protocol: TCP,
    }
}

#[test]
fn ipv4_with_and_without_options() {
    for words in [5, 6, 15] {
        let packet = ipv4(words, 0, TCP);
        assert_eq!(ethernet(&&packet[..]), Ok(expected(CLIENT4, SERVICE4)), "{words} words");
    }
}

#[test]
fn the_first_fragment_has_ports_and_later_ones_do_not() {
    const MORE: u16 = 0x2000;
    assert_eq!(ethernet(&&ipv4(5, MORE, TCP)[..]), Ok(expected(CLIENT4, SERVICE4)));
    assert_eq!(ethernet(&&ipv4(5, MORE | 185, TCP)[..]), Err(Unparsed::Fragment));
    assert_eq!(ethernet(&&ipv4(5, 185, TCP)[..]), Err(Unparsed::Fragment));

    let first = ipv6(&[(44, &[0, 0, 1, 0, 0, 0, 9])], TCP);
    assert_eq!(ethernet(&&first[..]), Ok(expected(CLIENT6, SERVICE6)));
    let later = ipv6(&[(44, &[0, 0x05, 0xa8, 0, 0, 0, 9])], TCP);
    assert_eq!(ethernet(&&later[..]), Err(Unparsed::Fragment));
}

#[test]
fn ipv6_extension_headers_are_skipped() {
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let long: &[u8] = &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let routing_done: &[u8] = &[0, 0, 0, 0, 0, 0, 0];
    let authentication: &[u8] =
        &[4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
    for extensions in [
        &[][..],
        &[(0, options)],
        &[(60, long)],
        &[(51, authentication)],
        &[
            (0, long),
            (60, options),
            (43, routing_done),
            (44, &[0, 0, 1, 0, 0, 0, 9]),
            (60, options),
        ],
        &[(60, options); MAX_EXTENSIONS],
    ] {
        let packet = ipv6(extensions, TCP);
        assert_eq!(ethernet(&&packet[..]), Ok(expected(CLIENT6, SERVICE6)), "{extensions:?}");
    }
    let packet = ipv6(&[(60, options); MAX_EXTENSIONS + 1], TCP);
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::Extensions));
    let packet = ipv6(&[(43, &[0, 0, 1, 0, 0, 0, 0])], TCP);
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::SourceRouted));
}

#[test]
fn what_is_not_for_services_is_named() {
    assert_eq!(ethernet(&&frame([0x08, 0x06])[..]), Err(Unparsed::NotIp));
    assert_eq!(ethernet(&&ipv4(5, 0, 1)[..]), Err(Unparsed::Protocol));
    assert_eq!(ethernet(&&ipv6(&[], 58)[..]), Err(Unparsed::Protocol));
    assert_eq!(ethernet(&&ipv4(4, 0, TCP)[..]), Err(Unparsed::Malformed));
    let mut packet = ipv6(&[], TCP);
    packet[14] = 0x45;
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::Malformed));
}

#[test]
fn a_packet_cut_anywhere_before_the_ports_end_is_truncated() {
    for (packet, ports_end) in [(ipv4(6, 0, UDP), 14 + 24 + 4), (ipv6(&[], UDP), 14 + 40 + 4)] {
        for length in 0..ports_end {
            assert_eq!(ethernet(&&packet[..length]), Err(Unparsed::Truncated), "{length}");
        }
        assert!(ethernet(&&packet[..ports_end]).is_ok());
    }
}

proptest! {
    /// Whatever the bytes, parsing ends, and more bytes never change what was understood.
    #[test]
    fn any_bytes(mut packet in proptest::collection::vec(any::<u8>(), 14..200), v6: bool, tail: [u8; 4]) {
        packet[12..14].copy_from_slice(if v6 { &ETHERTYPE_IPV6 } else { &ETHERTYPE_IPV4 });
        if let Some(first) = packet.get_mut(14) {
            *first = if v6 { 0x60 } else { 0x40 | (*first & 0x0f) };
        }
        let parsed = ethernet(&&packet[..]);
        packet.extend(tail);
        if parsed != Err(Unparsed::Truncated) {
            prop_assert_eq!(ethernet(&&packet[..]), parsed);
        }
    }
}
