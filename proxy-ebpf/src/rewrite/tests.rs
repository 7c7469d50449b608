use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::fake::frames::{Frame, check, icmp_error};
use crate::fake::strategy::{frame, tuple};
use crate::parse::{self, SCTP};

fn parsed(bytes: &Vec<u8>) -> Headers {
    let mut headers = Headers::default();
    parse::ethernet(&bytes.as_slice(), &mut headers).unwrap();
    headers
}

/// Ports of fragments stay where they cannot be changed.
fn fitting(frame: &Frame, to: Tuple) -> Tuple {
    let Tuple { source_port, destination_port, .. } = frame.tuple;
    match frame.tuple.protocol {
        SCTP => Tuple { source_port, destination_port, ..to },
        _ => to,
    }
}

proptest! {
    /// A translated packet is, byte by byte, the one that a sender would have made.
    #[test]
    fn translated_is_made_anew((from, to) in any::<bool>().prop_flat_map(|v6| (frame(v6), tuple(v6)))) {
        let to = Tuple { protocol: from.tuple.protocol, ..to };
        let mut bytes = from.bytes();
        let headers = parsed(&bytes);
        prop_assert_eq!(translate(&mut bytes, &headers, &to), Some(()));
        prop_assert_eq!(&bytes, &from.with(to).bytes());
        check(&bytes).unwrap();
    }

    /// In pieces: each translated for itself, the first by its ports, the rest by those.
    #[test]
    fn fragments_are_made_anew(
        (whole, to) in any::<bool>().prop_flat_map(|v6| (frame(v6), tuple(v6))),
        cut in 3_usize..40,
    ) {
        let payload = if whole.payload.len() < 40 { std::vec![3; 40] } else { whole.payload };
        let whole = Frame { payload, ..whole };
        let to = fitting(&whole, Tuple { protocol: whole.tuple.protocol, ..to });
        let length = whole.transport_length();
        let cut = (cut * 8).min((length - 1) / 8 * 8);
        for part in [(0, cut), (cut, length - cut)] {
            let piece = Frame { part: Some(part), dont_fragment: false, ..whole.clone() };
            let mut bytes = piece.bytes();
            let mut headers = parsed(&bytes);
            // As the decision does for a later fragment.
            headers.tuple = piece.tuple;
            prop_assert_eq!(translate(&mut bytes, &headers, &to), Some(()));
            prop_assert_eq!(bytes, piece.with(to).bytes());
        }
    }

    /// An error about a packet becomes one about the packet as the other side knows it.
    #[test]
    fn errors_are_made_anew(
        (about, to, router) in any::<bool>().prop_flat_map(|v6| (frame(v6), tuple(v6), tuple(v6))),
        quoted in 0_usize..60,
    ) {
        let v6 = !about.is_v4();
        let about = Frame { options: if v6 { 0 } else { about.options }, ..about };
        let to = Tuple { protocol: about.tuple.protocol, ..to };
        let header = if v6 { 40 } else { 20 + usize::from(about.options) * 4 };
        let quoted = header + 8 + quoted;
        let kind = if v6 { [2, 0] } else { [3, 4] };
        let mut bytes = icmp_error(router.source, &about, kind, quoted);
        let headers = parsed(&bytes);
        prop_assert_eq!(translate(&mut bytes, &headers, &to), Some(()));
        // What is quoted is what the receiver sent; the rest of it has the old payload.
        let renamed = about.with(to.inverse());
        let expected = icmp_error(to.source, &renamed, kind, quoted);
        let comparable = match about.tuple.protocol {
            TCP => quoted >= header + 18,
            // Nobody checks the sum of what is only quoted.
            SCTP => quoted <= header + 8,
            _ => true,
        };
        if comparable {
            prop_assert_eq!(&bytes, &expected);
        }
        let seen = check(&bytes).unwrap();
        prop_assert_eq!(Address::from(seen.source), to.source);
        prop_assert_eq!(Address::from(seen.destination), to.destination);
    }

    /// The hardware sums up the packet with zeros for the checksum.
    #[test]
    fn an_unfinished_sum_of_sctp_stays(from in any::<bool>().prop_flat_map(frame), port: u16) {
        let from = from.with(Tuple { protocol: SCTP, ..from.tuple });
        let to = Tuple { destination_port: Be16::from_host(port), ..from.tuple };
        let unfinished = |frame: &Frame| {
            let mut bytes = frame.bytes();
            let at = usize::from(parsed(&bytes).transport) + 8;
            bytes[at..at + 4].fill(0);
            bytes
        };
        let mut bytes = unfinished(&from);
        let headers = parsed(&bytes);
        prop_assert_eq!(translate(&mut bytes, &headers, &to), Some(()));
        prop_assert_eq!(bytes, unfinished(&from.with(to)));
        prop_assert_eq!(is_finished(&from.bytes(), &headers), Some(true));
        prop_assert_eq!(is_finished(&unfinished(&from), &headers), Some(false));
    }

    #[test]
    fn a_hop_is_taken_and_nothing_else(frame in any::<bool>().prop_flat_map(frame)) {
        let frame = Frame { ttl: frame.ttl.max(2), ..frame };
        let mut bytes = frame.bytes();
        let headers = parsed(&bytes);
        prop_assert_eq!(take_hop(&mut bytes, &headers), Some(()));
        prop_assert_eq!(bytes, Frame { ttl: frame.ttl - 1, ..frame }.bytes());
    }
}
