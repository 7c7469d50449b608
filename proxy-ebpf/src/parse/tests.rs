use core::net::{Ipv4Addr, Ipv6Addr};
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::fake::frames::{Frame, icmp_error_to};

const CLIENT4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const SERVICE4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);

/// Source port 4660, destination port 8080, and as much of TCP as is looked at.
const TRANSPORT: [u8; 16] = [0x12, 0x34, 0x1f, 0x90, 0, 8, 0, 0, 0, 0, 0, 0, 5 << 4, 0x12, 0, 0];

/// The tuple, and what kind of packet has it.
fn ethernet(packet: &&[u8]) -> Result<(Tuple, Kind), Unparsed> {
    let mut headers = Headers::default();
    super::ethernet(packet, &mut headers).map(|()| (headers.tuple, headers.kind))
}

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

fn expected(
    source: impl Into<Address>,
    destination: impl Into<Address>,
    kind: Kind,
) -> Result<(Tuple, Kind), Unparsed> {
    let later = kind == Kind::LaterFragment;
    let tuple = Tuple {
        source: source.into(),
        destination: destination.into(),
        source_port: Be16::from_host(if later { 0 } else { 4660 }),
        destination_port: Be16::from_host(if later { 0 } else { 8080 }),
        protocol: TCP,
        pad: [0; 3],
    };
    Ok((tuple, kind))
}

#[test]
fn ipv4_with_and_without_options() {
    for words in [5, 6, 15] {
        let packet = ipv4(words, 0, TCP);
        let expected = expected(CLIENT4, SERVICE4, Kind::Whole);
        assert_eq!(ethernet(&&packet[..]), expected, "{words} words");
    }
}

#[test]
fn the_first_fragment_has_ports_and_later_ones_do_not() {
    const MORE: u16 = 0x2000;
    let v4 = |fragment| ethernet(&&ipv4(5, fragment, TCP)[..]);
    assert_eq!(v4(MORE), expected(CLIENT4, SERVICE4, Kind::FirstFragment));
    assert_eq!(v4(MORE | 185), expected(CLIENT4, SERVICE4, Kind::LaterFragment));
    assert_eq!(v4(185), expected(CLIENT4, SERVICE4, Kind::LaterFragment));

    let v6 = |place: [u8; 2]| {
        let header: &[u8] = &[0, place[0], place[1], 0, 0, 0, 9];
        ethernet(&&ipv6(&[(44, header)], TCP)[..])
    };
    assert_eq!(v6([0, 0]), expected(CLIENT6, SERVICE6, Kind::Whole));
    assert_eq!(v6([0, 1]), expected(CLIENT6, SERVICE6, Kind::FirstFragment));
    assert_eq!(v6([0x05, 0xa8]), expected(CLIENT6, SERVICE6, Kind::LaterFragment));
    // The first header of what was cut off may say anything about the rest.
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let later = ipv6(&[(44, &[0, 0x05, 0xa8, 0, 0, 0, 9]), (60, options)], TCP);
    assert_eq!(ethernet(&&later[..]), Err(Unparsed::Protocol));
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
        let first = extensions.iter().any(|(kind, _)| *kind == 44);
        let kind = if first { Kind::FirstFragment } else { Kind::Whole };
        assert_eq!(ethernet(&&packet[..]), expected(CLIENT6, SERVICE6, kind), "{extensions:?}");
    }
    let packet = ipv6(&[(60, options); MAX_EXTENSIONS + 1], TCP);
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::Extensions));
    let packet = ipv6(&[(43, &[0, 0, 1, 0, 0, 0, 0])], TCP);
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::SourceRouted));
    let mut longest = [0; 2047];
    longest[0] = 255;
    let packet = ipv6(&[(60, &longest)], TCP);
    assert_eq!(ethernet(&&packet[..]), Err(Unparsed::Extensions));
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
    for (packet, ports_end) in [
        (ipv4(6, 0, UDP), 14 + 24 + 4),
        (ipv6(&[], UDP), 14 + 40 + 4),
        (ipv4(6, 0, TCP), 14 + 24 + 14),
    ] {
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

/// An error about a packet of this flow, quoted in part.
fn error(v6: bool, receiver: Option<Address>) -> Vec<u8> {
    let (client, service): (Address, Address) =
        if v6 { (CLIENT6.into(), SERVICE6.into()) } else { (CLIENT4.into(), SERVICE4.into()) };
    let Ok((tuple, _)) = expected(client, service, Kind::Whole) else { unreachable!() };
    let about = Frame::new(tuple, b"payload");
    let kind = if v6 { [2, 0] } else { [3, 4] };
    icmp_error_to(service, receiver.unwrap_or(client), &about, kind, 64)
}

#[test]
fn an_icmp_error_has_the_tuple_of_a_reply_to_what_it_is_about() {
    for v6 in [false, true] {
        let mut headers = Headers::default();
        super::ethernet(&&error(v6, None)[..], &mut headers).unwrap();
        let Ok((about, _)) = (if v6 {
            expected(CLIENT6, SERVICE6, Kind::Whole)
        } else {
            expected(CLIENT4, SERVICE4, Kind::Whole)
        }) else {
            unreachable!()
        };
        assert_eq!(headers.kind, Kind::IcmpError);
        assert_eq!(headers.tuple, about.inverse());
        assert_eq!(headers.source, about.destination);
        assert_eq!(headers.quoted, headers.transport + 8);
    }
}

#[test]
fn an_icmp_error_to_another_than_the_sender_is_made_up() {
    let elsewhere = Ipv4Addr::new(192, 0, 2, 8).into();
    assert_eq!(ethernet(&&error(false, Some(elsewhere))[..]), Err(Unparsed::Malformed));
    let elsewhere = Ipv6Addr::LOCALHOST.into();
    assert_eq!(ethernet(&&error(true, Some(elsewhere))[..]), Err(Unparsed::Malformed));
}
