//! Any packets in any order, and any bytes.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    /// A client sends from a port to a frontend.
    Request {
        client: u8,
        port: u16,
        frontend: u8,
    },
    /// The backend answers what it saw, the how-manieth it was.
    Reply(prop::sample::Index),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..4, 4000_u16..4006, 0_u8..3)
            .prop_map(|(client, port, frontend)| Step::Request { client, port, frontend }),
        4 => any::<prop::sample::Index>().prop_map(Step::Reply),
        1 => (0_u64..40).prop_map(Step::Wait),
    ]
}

proptest! {
    /// The model of NAT: one translation for each flow, no two flows with the same, and the
    /// reply to it leads to that flow. Whatever the order of packets.
    #[test]
    fn translation_is_one_to_one(
        udp: bool,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let protocol = if udp { UDP } else { TCP };
        let mut node = Node::new();
        for (address, flags) in [
            (VIP, Frontend::MASQUERADE_REMOTE),
            ("198.51.100.2", Frontend::MASQUERADE_ALL),
            ("198.51.100.3", 0),
        ] {
            node.frontend(address, protocol, flags, 0..2);
        }
        let mut model: HashMap<Tuple, Tuple> = HashMap::new();
        for step in steps {
            match step {
                Step::Request { client, port, frontend } => {
                    let source = std::format!("203.0.113.{client}");
                    let destination = std::format!("198.51.100.{}", frontend + 1);
                    let from = tuple(protocol, (&source, port), (&destination, 80));
                    let (fate, seen) = node.at(Hook::Ingress).syn(from);
                    let seen = seen.unwrap();
                    prop_assert_eq!(*model.entry(from).or_insert(seen), seen);
                    let kept = seen.source == from.source;
                    prop_assert_eq!(fate, if kept { Fate::Next } else { Fate::Redirect });
                    prop_assert!(kept || seen.source == ip(NODE));
                }
                Step::Reply(index) if !model.is_empty() => {
                    let mut flows: Vec<_> = model.iter().collect();
                    flows.sort_by_key(|(from, _)| std::format!("{from:?}"));
                    let (from, seen) = flows[index.index(flows.len())];
                    let kept = seen.source == from.source;
                    let hook = if kept { Hook::Egress } else { Hook::Ingress };
                    let (_, reply) = node.at(hook).send(&Frame::new(seen.inverse(), b"reply"));
                    prop_assert_eq!(reply, Some(from.inverse()));
                }
                Step::Reply(_) => {}
                Step::Wait(seconds) => node.now += seconds * SECOND / 100,
            }
            let mut seen: Vec<_> = model.values().collect();
            seen.sort_by_key(|tuple| std::format!("{tuple:?}"));
            seen.dedup();
            prop_assert_eq!(seen.len(), model.len());
            prop_assert_eq!(node.tables.flows.borrow().len(), model.len() * 2);
        }
    }

    /// Whatever the bytes, what leaves is as right as what came: no wrong length or
    /// checksum is made of a right one, and nothing panics.
    #[test]
    fn any_bytes(
        (frame, hook) in (any::<bool>().prop_flat_map(crate::fake::strategy::frame), 0_usize..3),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        to_service: bool,
        cut in any::<prop::sample::Index>(),
        do_cut: bool,
    ) {
        let mut node = Node::new();
        node.hook = [Hook::Ingress, Hook::Egress, Hook::Xdp][hook];
        let mut frame = frame;
        frame.tuple.destination_port = Be16::from_host(80);
        if to_service && frame.is_v4() {
            frame.tuple.destination = ip(VIP);
        }
        for (protocol, slots) in [(TCP, 0..2), (UDP, 0..0), (SCTP, 1..2)] {
            node.frontend(VIP, protocol, Frontend::MASQUERADE_REMOTE, slots);
        }
        let mut bytes = frame.bytes();
        for (index, value) in damage {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        if do_cut {
            bytes.truncate(14 + cut.index(bytes.len() - 14));
        }
        let right = check(&bytes).is_ok();
        let before = bytes.clone();
        let fate = node.run(&mut bytes);
        if right && fate != Fate::Drop {
            prop_assert!(check(&bytes).is_ok(), "{fate:?} {before:02x?} became {bytes:02x?}");
        }
        if fate == Fate::Next {
            prop_assert_eq!(bytes.len(), before.len());
        }
    }
}
