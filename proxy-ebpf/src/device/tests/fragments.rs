//! Pieces of packets, and SCTP, whose pieces cannot be changed.

use super::*;

#[test]
fn sctp_changes_its_ports_as_others_do() {
    let mut node = Node::new();
    node.frontend(VIP, SCTP, Frontend::MASQUERADE_REMOTE, 1..2);
    let mut sources = Vec::new();
    for address in [CLIENT, "203.0.113.8"] {
        let by_client = tuple(SCTP, (address, 4000), (VIP, 80));
        let (fate, seen) = node.send(&Frame::new(by_client, b"chunk"));
        let seen = seen.unwrap();
        assert_eq!((fate, seen.source), (Fate::Redirect, ip(NODE)));
        assert_eq!((seen.destination, seen.destination_port.to_host()), (ip("10.244.1.5"), 8080));
        let reply = node.send(&Frame::new(seen.inverse(), b"chunk"));
        assert_eq!(reply, (Fate::Redirect, Some(by_client.inverse())));
        sources.push(seen.source_port);
    }
    assert_ne!(sources[0], sources[1]);
    assert_eq!(node.drops(), []);
}

#[test]
fn a_fragment_of_sctp_keeps_its_ports_or_is_dropped() {
    let mut node = Node::new();
    node.frontend(VIP, SCTP, 0, 0..1);
    let whole = Frame {
        dont_fragment: false,
        ..Frame::new(Tuple { protocol: SCTP, ..client(4000) }, &[5; 100])
    };
    let (cut, length) = (48, whole.transport_length());
    for port in [8080, 80] {
        node.tables.backends[0].port = Be16::from_host(port);
        node.tables.flows.borrow_mut().clear();
        for part in [(0, cut), (cut, length - cut)] {
            let piece = Frame { part: Some(part), ..whole.clone() };
            let expected = if port == 80 { Fate::Next } else { Fate::Drop };
            assert_eq!(node.send(&piece).0, expected);
        }
    }
    assert_eq!(node.drops(), [Reason::SctpPort; 2]);
}

#[test]
fn fragments_follow_the_first() {
    let mut node = Node::new();
    node.frontend(VIP, UDP, 0, 0..1);
    let whole = Frame {
        dont_fragment: false,
        id: 77,
        ..Frame::new(Tuple { protocol: UDP, ..client(4000) }, &[7; 100])
    };
    let part = |from, length| Frame { part: Some((from, length)), ..whole.clone() };
    let seen = whole.with(tuple(UDP, (CLIENT, 4000), ("10.244.0.5", 8080)));
    let run = |from, length| {
        let mut bytes = part(from, length).bytes();
        (node.run(&mut bytes), bytes)
    };
    assert_eq!(run(48, 60), (Fate::Next, part(48, 60).bytes()), "before the first");
    for (from, length) in [(0, 48), (48, 60)] {
        let expected = Frame { part: Some((from, length)), ..seen.clone() }.bytes();
        assert_eq!(run(from, length), (Fate::Next, expected));
    }
}
