use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::device::tests::tuple;
use crate::fake::frames::{DIRECT_PORT, Frame, check};
use crate::fake::strategy::frame;
use crate::parse::{self, TCP};

const PORT: Be16 = Be16::from_host(DIRECT_PORT);

fn headers(bytes: &[u8]) -> Headers {
    let mut headers = Headers::default();
    parse::ethernet(&bytes, &mut headers).unwrap();
    headers
}

/// A packet inside another one.
fn wrapped(inner: &Frame, outer: &Tuple) -> Vec<u8> {
    let mut bytes = inner.bytes();
    let Headers { version, length, .. } = headers(&bytes);
    let room = core::iter::repeat_n(0xee, overhead(version));
    bytes.splice(ETHERNET..ETHERNET, room);
    wrap(&mut bytes, outer, PORT, version, length).unwrap();
    bytes
}

#[test]
fn the_bytes_are_those_of_the_standards() {
    let inner = Frame::new(tuple(TCP, ("203.0.113.7", 4000), ("192.0.2.2", 80)), b"hello");
    let outer = tuple(UDP, ("192.0.2.2", 0xc123), ("10.244.1.5", 0));
    let bytes = wrapped(&inner, &outer);
    assert_eq!(bytes[..ETHERNET], inner.bytes()[..ETHERNET]);
    // 45 bytes inside, 36 around them.
    let ip = [0x45, 0, 0, 81, 0, 0, 0x40, 0, 64, 17];
    assert_eq!(bytes[14..24], ip);
    assert_eq!(bytes[26..34], [192, 0, 2, 2, 10, 244, 1, 5]);
    let udp = [0xc1, 0x23, 0x17, 0xc1, 0, 61, 0, 0];
    assert_eq!(bytes[34..42], udp);
    let geneve = [0, 0, 0x08, 0x00, 0xd5, 0x7e, 0x51, 0];
    assert_eq!(bytes[42..50], geneve);
    assert_eq!(bytes[50..], inner.bytes()[ETHERNET..]);
    check(&bytes).unwrap();

    let inner = Frame::new(tuple(TCP, ("2001:db8:7::7", 4000), ("2001:db8::2", 80)), b"hello");
    let outer = tuple(UDP, ("2001:db8::2", 0xc123), ("fd00:244:1::5", 0));
    let bytes = wrapped(&inner, &outer);
    let ip = [0x60, 0, 0, 0, 0, 81, 17, 64];
    assert_eq!(bytes[14..22], ip);
    assert_eq!(
        bytes[54..70],
        [0xc1, 0x23, 0x17, 0xc1, 0, 81, 0, 0, 0, 0, 0x86, 0xdd, 0xd5, 0x7e, 0x51, 0]
    );
    assert_eq!(bytes[70..], inner.bytes()[ETHERNET..]);
    check(&bytes).unwrap();
}

#[test]
fn what_others_send_to_the_port_is_theirs() {
    for (client, node, backend) in
        [("203.0.113.7", "192.0.2.2", "10.244.1.5"), ("2001:db8:7::7", "2001:db8::2", "fd00:1::5")]
    {
        let inner = Frame::new(tuple(TCP, (client, 4000), (node, 80)), b"hello");
        let outer = tuple(UDP, (node, 0xc123), (backend, 0));
        let bytes = wrapped(&inner, &outer);
        let is_ours = |bytes: &[u8], port| is_wrapped(&bytes, &headers(bytes), port);
        assert!(is_ours(&bytes, PORT));
        assert!(!is_ours(&bytes, Be16::from_host(8472)), "another port");
        let udp = ETHERNET + overhead(headers(&bytes).version) - HEADERS;
        // Length; Geneve's version and options, its flags, what is inside, whose network.
        for place in [5, 8, 9, 10, 11, 12, 13, 14].map(|place| udp + place) {
            let mut other = bytes.clone();
            other[place] ^= 0x41;
            assert!(!is_ours(&other, PORT), "byte {place} is another");
        }
        let mut other = bytes.clone();
        // The packet inside ends before the datagram does.
        let length = udp + HEADERS + if other[12] == 0x08 { 3 } else { 5 };
        other[length] -= 1;
        assert!(!is_ours(&other, PORT));
        assert!(!is_ours(&bytes[..udp + 12], PORT), "cut off");
        assert!(!is_ours(&inner.bytes(), PORT));
    }
}

proptest! {
    #[test]
    fn what_was_put_inside_comes_out(
        inner in prop_oneof![frame(false), frame(true)],
        hash in any::<u32>(),
    ) {
        let sent = inner.bytes();
        let port = source_port(hash);
        prop_assert!(port.to_host() >= 0xc000);
        let outer = Tuple {
            source: inner.tuple.destination,
            destination: inner.tuple.source,
            source_port: port,
            protocol: UDP,
            ..Tuple::default()
        };
        let mut bytes = wrapped(&inner, &outer);
        prop_assert!(check(&bytes).is_ok());
        let headers = headers(&bytes);
        prop_assert_eq!(headers.tuple, Tuple { destination_port: PORT, ..outer });
        prop_assert!(is_wrapped(&bytes.as_slice(), &headers, PORT));
        bytes.drain(ETHERNET..ETHERNET + overhead(headers.version));
        prop_assert_eq!(bytes, sent);
    }
}
