//! Any frame, for property tests.

extern crate std;

use core::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::frames::Frame;
use crate::layout::Tuple;
use crate::order::{Address, Be16};
use crate::parse::{SCTP, TCP, UDP};

/// Seldom special ones: all bits set or none are where checksum arithmetic goes wrong.
fn address(v6: bool) -> BoxedStrategy<Address> {
    let word = prop_oneof![8 => any::<u16>(), 1 => Just(0), 1 => Just(0xffff)];
    if v6 {
        // Not one that means an IPv4 address.
        prop::array::uniform8(word)
            .prop_map(|mut words| {
                words[0] |= 0x2000;
                Ipv6Addr::from(words).into()
            })
            .boxed()
    } else {
        (word.clone(), word)
            .prop_map(|(high, low)| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)).into())
            .boxed()
    }
}

pub fn tuple(v6: bool) -> BoxedStrategy<Tuple> {
    let protocol = prop_oneof![Just(TCP), Just(UDP), Just(SCTP)];
    (address(v6), address(v6), any::<u16>(), any::<u16>(), protocol)
        .prop_map(|(source, destination, source_port, destination_port, protocol)| Tuple {
            source,
            destination,
            source_port: Be16::from_host(source_port),
            destination_port: Be16::from_host(destination_port),
            protocol,
            pad: [0; 3],
        })
        .boxed()
}

pub fn frame(v6: bool) -> BoxedStrategy<Frame> {
    let options = if v6 { 0_u8..4 } else { 0..11 };
    (
        tuple(v6),
        any::<(u8, u8, bool, u32, bool)>(),
        options,
        prop::collection::vec(any::<u8>(), 0..400),
    )
        .prop_map(
            move |(tuple, (tcp_flags, ttl, dont_fragment, id, unchecked), options, payload)| {
                Frame {
                    tuple,
                    tcp_flags,
                    ttl,
                    options,
                    // IPv6 has no such flag; what the builder ignores must not differ.
                    dont_fragment: v6 || dont_fragment,
                    id,
                    unchecked: unchecked && !v6,
                    payload,
                    part: None,
                }
            },
        )
        .boxed()
}
