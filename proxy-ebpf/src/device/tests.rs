use core::net::IpAddr;
use std::collections::HashMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::checksum;
use crate::fake::Fake;
use crate::fake::frames::{Frame, MACS, check, icmp_error};
use crate::fake::program::{Fate, Way, run};
use crate::layout::{Backend, Prefix, ServiceId, SlotRange, Timeouts};
use crate::order::Be32;
use crate::parse::{self, UDP};
use crate::verdict::Reason;

mod direct;
mod flows;

const WAY: Way = Way {
    ethernet: [4, 4, 4, 4, 4, 4, 2, 0, 0, 0, 0, 2],
    mtu: 1500,
    tells_mtu: true,
    own: [Address::v4(Be32::from_host(0xc000_0202)); 2],
};

fn ip(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

pub fn tuple(protocol: u8, source: (&str, u16), destination: (&str, u16)) -> Tuple {
    Tuple {
        source: ip(source.0),
        destination: ip(destination.0),
        source_port: Be16::from_host(source.1),
        destination_port: Be16::from_host(destination.1),
        protocol,
        pad: [0; 3],
    }
}

/// A node with a Service port of two backends, one of them here; and its clock.
struct Node {
    tables: Fake,
    now: u64,
    hook: Hook,
    device: u32,
}

const SERVICE: ServiceId = ServiceId::new(3);
const ID: FrontendId = FrontendId(5);
const LOCAL: u32 = 0;
const REMOTE: u32 = 1;
const VIP: &str = "198.51.100.1";
const NODE: &str = "192.0.2.2";
const CLIENT: &str = "203.0.113.7";
const POD: &str = "10.244.0.9";

impl Node {
    fn new() -> Self {
        let backend = |address: &str, flags| Backend {
            address: ip(address),
            port: Be16::from_host(8080),
            flags: Backend::IN_USE | flags,
            service: SERVICE,
        };
        let config = Config {
            source4: ip(NODE),
            source6: ip("2001:db8::2"),
            port_low: 50_000,
            port_high: 50_099,
            timeouts: Timeouts::default(),
            ..Config::default()
        };
        let tables = Fake {
            config,
            slots: [LOCAL, REMOTE].map(BackendId).into(),
            backends: [backend("10.244.0.5", Backend::LOCAL), backend("10.244.1.5", 0)].into(),
            clients: [(ip(NODE), client::NODE), (ip(POD), client::CLUSTER)].into(),
            ..Fake::default()
        };
        Self { tables, now: 1000 * SECOND, hook: Hook::Ingress, device: Device::XDP_TX }
    }

    /// The Service has this address too, with the backends in these slots for anybody.
    fn frontend(&mut self, address: &str, protocol: u8, flags: u32, slots: core::ops::Range<u32>) {
        let range = SlotRange { base: slots.start, len: slots.end - slots.start };
        let value =
            Frontend { node: range, outside: range, id: ID, service: SERVICE, affinity: 0, flags };
        self.tables
            .frontends
            .insert(FrontendKey::new(ip(address), Be16::from_host(80), protocol), value);
    }

    fn change(&mut self, address: &str, change: impl FnOnce(&mut Frontend)) {
        let key = FrontendKey::new(ip(address), Be16::from_host(80), TCP);
        change(self.tables.frontends.get_mut(&key).unwrap());
    }

    fn run(&self, frame: &mut Vec<u8>) -> Fate {
        let arrival = Arrival {
            hook: self.hook,
            device: self.device,
            wrapped: false,
            now: self.now,
            random: 7,
            traffic: Traffic { packets: 1, bytes: frame.len() as u64 },
        };
        run(&self.tables, &arrival, &WAY, frame)
    }

    /// Sends a packet through the program: what it looks like afterwards.
    fn send(&self, frame: &Frame) -> (Fate, Option<Tuple>) {
        let mut bytes = frame.bytes();
        let fate = self.run(&mut bytes);
        if fate == Fate::Drop {
            return (fate, None);
        }
        check(&bytes).unwrap();
        let mut headers = Headers::default();
        let tuple = parse::ethernet(&bytes.as_slice(), &mut headers).ok().map(|()| headers.tuple);
        (fate, tuple)
    }

    fn syn(&self, tuple: Tuple) -> (Fate, Option<Tuple>) {
        self.send(&Frame { tcp_flags: tcp::SYN, ..Frame::new(tuple, b"") })
    }

    fn at(&mut self, hook: Hook) -> &Self {
        self.hook = hook;
        self
    }

    fn drops(&self) -> Vec<Reason> {
        self.tables.drops.borrow().clone()
    }
}

fn client(port: u16) -> Tuple {
    tuple(TCP, (CLIENT, port), (VIP, 80))
}

#[test]
fn a_local_backend_sees_the_client_and_its_reply_is_the_services_again() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 0..1);
    let (fate, seen) = node.syn(client(4000));
    let expected = tuple(TCP, (CLIENT, 4000), ("10.244.0.5", 8080));
    assert_eq!((fate, seen), (Fate::Next, Some(expected)));
    // On its way in from the pod it is left alone: the stack has to see both directions
    // with the same addresses.
    let reply = Frame::new(expected.inverse(), b"hello");
    assert_eq!(node.send(&reply), (Fate::Next, Some(expected.inverse())));
    assert_eq!(node.at(Hook::Egress).send(&reply), (Fate::Next, Some(client(4000).inverse())));
    let counted = node.tables.frontend_counters.borrow()[&ID];
    assert_eq!((counted.connections, counted.requests.packets, counted.replies.packets), (1, 1, 1));
}

#[test]
fn connections_of_another_proxys_are_left_to_it() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    node.tables.config.features = Config::OTHERS_CONNECTIONS;
    let later = |port| Frame { tcp_flags: tcp::ACK, ..Frame::new(client(port), b"x") };
    for hook in [Hook::Ingress, Hook::Egress] {
        assert_eq!(node.at(hook).send(&later(4000)), (Fate::Next, Some(client(4000))));
    }
    // One that begins is ours, with all that follows.
    let seen = node.at(Hook::Ingress).syn(client(4001));
    assert_eq!(seen.1, Some(tuple(TCP, (CLIENT, 4001), ("10.244.0.5", 8080))));
    assert_eq!(node.send(&later(4001)), seen);
    node.tables.config.features = 0;
    assert_ne!(node.send(&later(4000)).1, Some(client(4000)), "there is no other proxy");
}

/// A client of the node that was bound to the node port, or a server that had the port before.
#[test]
fn connections_of_the_node_itself_are_not_taken_for_the_node_ports() {
    let mut node = Node::new();
    node.frontend(NODE, TCP, 0, 0..1);
    node.frontend(NODE, UDP, 0, 0..1);
    let own = |protocol| tuple(protocol, (CLIENT, 443), (NODE, 80));
    node.tables.connections_of_node = [own(TCP), own(UDP)].into();
    for tcp_flags in [tcp::SYN | tcp::ACK, tcp::ACK, tcp::FIN | tcp::ACK, tcp::RST] {
        let seen = node.send(&Frame { tcp_flags, ..Frame::new(own(TCP), b"") });
        assert_eq!(seen, (Fate::Next, Some(own(TCP))), "{tcp_flags}");
    }
    assert_eq!(node.send(&Frame::new(own(UDP), b"x")).1, Some(own(UDP)));
    assert!(node.tables.flows.borrow().is_empty() && node.drops().is_empty());
    // What begins there is the Service's, and so is what comes from elsewhere.
    let to = |seen: (Fate, Option<Tuple>)| seen.1.unwrap().destination;
    assert_eq!(to(node.syn(own(TCP))), ip("10.244.0.5"));
    let other = |protocol| tuple(protocol, (CLIENT, 444), (NODE, 80));
    assert_eq!(to(node.send(&Frame::new(other(UDP), b"x"))), ip("10.244.0.5"));
    assert_eq!(to(node.send(&Frame::new(other(TCP), b"x"))), ip("10.244.0.5"));
}

#[test]
fn a_remote_backend_sees_the_node_and_both_directions_are_sent_on() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    let (fate, seen) = node.syn(client(4000));
    let seen = seen.unwrap();
    assert_eq!(fate, Fate::Redirect);
    assert_eq!((seen.source, seen.destination), (ip(NODE), ip("10.244.1.5")));
    assert!((50_000..=50_099).contains(&seen.source_port.to_host()));
    assert_eq!(node.syn(client(4000)), (Fate::Redirect, Some(seen)), "the same flow");
    let reply = Frame::new(seen.inverse(), b"hello");
    assert_eq!(node.send(&reply), (Fate::Redirect, Some(client(4000).inverse())));
    let mut bytes = reply.bytes();
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    assert_eq!(bytes[..12], WAY.ethernet);
    assert_eq!(check(&bytes).unwrap().ttl, 63);
}

#[test]
fn who_is_masqueraded() {
    let cases = [
        // Flags, client, slot, whether the node's address takes the client's place.
        (0, CLIENT, REMOTE, false),
        (Frontend::MASQUERADE_REMOTE, CLIENT, REMOTE, true),
        (Frontend::MASQUERADE_REMOTE, CLIENT, LOCAL, false),
        (Frontend::MASQUERADE_REMOTE, POD, REMOTE, true),
        (Frontend::MASQUERADE_OUTSIDE, CLIENT, LOCAL, true),
        (Frontend::MASQUERADE_OUTSIDE, CLIENT, REMOTE, true),
        (Frontend::MASQUERADE_OUTSIDE, POD, REMOTE, false),
        (Frontend::MASQUERADE_OUTSIDE, NODE, REMOTE, false),
        (Frontend::MASQUERADE_ALL, POD, LOCAL, true),
        (Frontend::MASQUERADE_ALL, CLIENT, REMOTE, true),
        // Hairpin.
        (0, "10.244.0.5", LOCAL, true),
        (0, "10.244.0.5", REMOTE, false),
    ];
    for (flags, source, slot, expected) in cases {
        let mut node = Node::new();
        node.frontend(VIP, TCP, flags, slot..slot + 1);
        let (_, seen) = node.syn(tuple(TCP, (source, 4000), (VIP, 80)));
        let masqueraded = seen.unwrap().source == ip(NODE) && source != NODE
            || seen.unwrap().source_port != Be16::from_host(4000);
        assert_eq!(masqueraded, expected, "flags {flags:#x}, {source} to backend {slot}");
    }
}

#[test]
fn a_backend_that_is_a_process_of_the_node_sees_the_client() {
    let mut node = Node::new();
    node.tables.backends[0] = Backend {
        address: ip(NODE),
        flags: Backend::IN_USE | Backend::LOCAL | Backend::HOST,
        ..node.tables.backends[0]
    };
    node.frontend(VIP, TCP, Frontend::MASQUERADE_ALL, 0..1);
    assert_eq!(node.syn(client(4000)).1, Some(tuple(TCP, (CLIENT, 4000), (NODE, 8080))));
}

#[test]
fn pods_behind_a_device_are_inside_the_cluster() {
    let mut node = Node::new();
    node.device = Device::PODS;
    node.frontend(VIP, TCP, Frontend::MASQUERADE_OUTSIDE, 1..2);
    let (fate, seen) = node.syn(client(4000));
    assert_eq!((fate, seen.unwrap().source), (Fate::Next, ip(CLIENT)));
}

#[test]
fn a_local_policy_keeps_outsiders_here_and_lets_the_nodes_own_go_anywhere() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::OUTSIDE_LOCAL_SET | Frontend::OUTSIDE_DROPS, 0..1);
    node.change(VIP, |frontend| frontend.node = SlotRange { base: 1, len: 1 });
    let to = |seen: Option<Tuple>| seen.unwrap().destination;
    assert_eq!(to(node.syn(client(4000)).1), ip("10.244.0.5"));
    assert_eq!(to(node.syn(tuple(TCP, (POD, 4000), (VIP, 80))).1), ip("10.244.1.5"));
    assert_eq!(to(node.syn(tuple(TCP, (NODE, 4000), (VIP, 80))).1), ip("10.244.1.5"));
    node.change(VIP, |frontend| frontend.outside.len = 0);
    assert_eq!(node.syn(client(4001)), (Fate::Drop, None));
    assert_eq!(node.drops(), [Reason::NoLocalEndpoint]);
}

#[test]
fn without_endpoints_the_client_is_told_at_once() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..0);
    node.frontend(VIP, UDP, 0, 0..0);
    let mut bytes = Frame { tcp_flags: tcp::SYN, ..Frame::new(client(4000), b"") }.bytes();
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    let seen = check(&bytes).unwrap();
    assert_eq!((Address::from(seen.source), seen.protocol), (ip(VIP), TCP));
    assert_eq!(seen.body[13], tcp::RST | tcp::ACK);

    let mut bytes = Frame::new(Tuple { protocol: UDP, ..client(4000) }, b"query").bytes();
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    let seen = check(&bytes).unwrap();
    assert_eq!((seen.protocol, seen.body[0], seen.body[1]), (parse::ICMP, 3, 3));
    assert_eq!(node.drops(), [Reason::NoEndpoint; 2]);
    assert_eq!(node.tables.frontend_counters.borrow()[&ID].refused, 2);
    assert!(node.tables.flows.borrow().is_empty());
}

#[test]
fn the_service_range_holds_nothing_but_services() {
    let mut node = Node::new();
    node.tables.config.prefixes = 1;
    node.tables.config.service_prefixes[0] = Prefix::new(ip("198.51.100.0"), 96 + 24);
    node.frontend(VIP, TCP, 0, 0..1);
    node.tables.frontends.insert(address_key(ip(VIP)), Frontend::default());
    let to = |address, port| tuple(TCP, (CLIENT, 4000), (address, port));
    assert_eq!(node.syn(to(VIP, 80)).0, Fate::Next);
    assert_eq!(node.syn(to(VIP, 22)).0, Fate::Redirect, "a reset");
    assert_eq!(node.syn(to("198.51.100.2", 80)).0, Fate::Next, "perhaps somebody else's");
    node.tables.config.dropping = 1;
    assert_eq!(node.syn(to("198.51.100.2", 80)).0, Fate::Drop);
    assert_eq!(node.syn(to("198.51.101.2", 80)), (Fate::Next, Some(to("198.51.101.2", 80))));
    assert_eq!(node.drops(), [Reason::UnusedPort, Reason::UnusedAddress]);
}

#[test]
fn service_ranges_beyond_those_in_the_configuration_hold_nothing_but_services_either() {
    let mut node = Node::new();
    node.tables.config.prefixes = 1;
    // Around a range and other addresses of Services.
    node.tables.config.service_prefixes[0] = Prefix::new(ip("198.51.0.0"), 96 + 16);
    node.frontend(VIP, TCP, 0, 0..1);
    node.tables.frontends.insert(address_key(ip(VIP)), Frontend::default());
    let free = "198.51.100.2";
    node.tables.clients.insert(ip(VIP), client::SERVICE);
    node.tables.clients.insert(ip(free), client::SERVICE | client::CLUSTER);
    let to = |address, port| tuple(TCP, (CLIENT, 4000), (address, port));
    assert_eq!(node.syn(to(free, 80)).0, Fate::Next, "nobody says that there are more");
    node.tables.config.features = Config::MORE_RANGES;
    assert_eq!(node.syn(to(VIP, 80)).0, Fate::Next);
    assert_eq!(node.syn(to(VIP, 22)).0, Fate::Redirect, "a reset");
    assert_eq!(node.syn(to(free, 80)).0, Fate::Drop);
    assert_eq!(node.syn(to("198.51.7.2", 80)).0, Fate::Next, "perhaps somebody else's");
    assert_eq!(node.drops(), [Reason::UnusedPort, Reason::UnusedAddress]);
    // Being there makes nobody a client of the node.
    node.tables.clients.insert(ip(CLIENT), client::SERVICE);
    node.change(VIP, |frontend| {
        frontend.flags = Frontend::OUTSIDE_DROPS;
        frontend.outside.len = 0;
    });
    assert_eq!(node.syn(to(VIP, 80)).0, Fate::Next, "the connection that there is");
    assert_eq!(node.syn(tuple(TCP, (CLIENT, 4001), (VIP, 80))).0, Fate::Drop);
}

/// Bridged from the backend to the client, which the bridge itself never sees.
#[test]
fn a_bridges_port_undoes_what_the_bridge_did_and_nothing_else() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    let request = client(4000);
    let seen = node.syn(request).1.unwrap();
    node.hook = Hook::Egress;
    node.device = Device::PORT;
    assert_eq!(node.send(&Frame::new(seen.inverse(), b"")).1, Some(request.inverse()));
    assert_eq!(node.send(&Frame::new(request, b"")), (Fate::Next, Some(request)));
    assert_eq!(node.syn(client(4001)), (Fate::Next, Some(client(4001))));
}

#[test]
fn source_ranges_keep_others_out() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::SOURCE_RANGES, 0..1);
    assert_eq!(node.syn(client(4000)).0, Fate::Drop);
    assert_eq!(node.drops(), [Reason::SourceRange]);
    node.tables.source_ranges.insert((SERVICE, ip(CLIENT)), 1);
    assert_eq!(node.syn(client(4000)).0, Fate::Next);
}

#[test]
fn a_reset_of_nothing_is_dropped() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    let reset = Frame { tcp_flags: tcp::RST, ..Frame::new(client(4000), b"") };
    assert_eq!(node.send(&reset).0, Fate::Drop);
    assert_eq!(node.drops(), [Reason::NoFlow]);
}

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

#[test]
fn icmp_errors_go_the_way_of_their_flow() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    let seen = node.syn(client(4000)).1.unwrap();
    // A router on the way to the backend.
    let mut bytes = icmp_error(ip("10.0.0.1"), &Frame::new(seen, b"data"), [3, 4], 60);
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    let mut expected = icmp_error(ip(VIP), &Frame::new(client(4000), b"data"), [3, 4], 60);
    expected[..12].copy_from_slice(&WAY.ethernet);
    assert_eq!(check(&bytes).unwrap().body, check(&expected).unwrap().body);
    assert_eq!(Address::from(check(&bytes).unwrap().destination), ip(CLIENT));
    // One on the way to the client.
    let about = Frame::new(client(4000).inverse(), b"data");
    let mut bytes = icmp_error(ip("203.0.113.1"), &about, [3, 4], 60);
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    let error = check(&bytes).unwrap();
    assert_eq!(
        (Address::from(error.source), Address::from(error.destination)),
        (ip(NODE), ip("10.244.1.5"))
    );
    // One about nothing that is known.
    let stranger = Frame::new(client(4001).inverse(), b"data");
    let mut bytes = icmp_error(ip("203.0.113.1"), &stranger, [3, 4], 60);
    let before = bytes.clone();
    assert_eq!((node.run(&mut bytes), bytes), (Fate::Next, before));
}

#[test]
fn what_cannot_go_on_is_answered() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    node.syn(client(4000));
    let frame = |payload: usize, ttl, dont_fragment| Frame {
        tcp_flags: tcp::ACK,
        ttl,
        dont_fragment,
        ..Frame::new(client(4000), &std::vec![1; payload])
    };
    for (sent, kind, mtu) in
        [(frame(1500, 64, true), [3, 4], 1500_u16), (frame(10, 1, true), [11, 0], 0)]
    {
        let mut bytes = sent.bytes();
        assert_eq!(node.run(&mut bytes), Fate::Redirect);
        let error = check(&bytes).unwrap();
        assert_eq!(error.body[..2], kind);
        assert_eq!(error.body[6..8], mtu.to_be_bytes());
        assert_eq!(error.body[8..36], sent.packet()[..28], "quotes what the client sent");
        assert_eq!(bytes[..6], MACS[6..]);
    }
    assert_eq!(node.send(&frame(1500, 64, false)).0, Fate::Drop);
    assert_eq!(node.drops(), [Reason::TooBig, Reason::TimeToLive, Reason::TooBig]);
}

#[test]
fn xdp_does_what_needs_no_stack_and_leaves_the_rest_as_it_is() {
    let mut node = Node::new();
    node.hook = Hook::Xdp;
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 0..1);
    let untouched = |node: &Node, tuple| assert_eq!(node.syn(tuple), (Fate::Next, Some(tuple)));
    untouched(&node, client(4000));
    // tc finds the flow, and is the one that counts the packet.
    assert_eq!(node.at(Hook::Ingress).syn(client(4000)).1.unwrap().destination, ip("10.244.0.5"));
    let counted = node.tables.frontend_counters.borrow()[&ID];
    assert_eq!((counted.connections, counted.requests.packets), (1, 1));
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    assert_eq!(node.at(Hook::Xdp).syn(client(4001)).0, Fate::Redirect);
    let counted = |node: &Node| node.tables.frontend_counters.borrow()[&ID];
    assert_eq!((counted(&node).connections, counted(&node).requests.packets), (2, 2));
    // A checksum that hardware is to finish, a frame for another machine, a device that would
    // lose it: nothing is sent, and tc counts.
    let frame = Frame { tcp_flags: tcp::SYN, ..Frame::new(client(4001), b"") };
    let mut unfinished = frame.bytes();
    let pseudo = checksum::pseudo_sum(&frame.tuple, TCP, 20);
    unfinished[14 + 20 + 16..][..2].copy_from_slice(&(!checksum::finish(pseudo)).to_ne_bytes());
    let mut of_others = frame.bytes();
    of_others[5] = 9;
    for bytes in [unfinished, of_others] {
        assert_eq!(node.run(&mut bytes.clone()), Fate::Next);
    }
    node.device = 0;
    untouched(&node, client(4001));
    assert_eq!((counted(&node).connections, counted(&node).requests.packets), (2, 2));
    node.frontend(VIP, TCP, 0, 0..0);
    untouched(&node, client(4002));
    assert_eq!(node.drops(), [], "tc refuses, and counts");
}

#[test]
fn a_frame_for_another_machine_is_left_alone() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..0);
    let frame = Frame { tcp_flags: tcp::SYN, ..Frame::new(client(4000), b"") };
    for (receiver, fate) in [(2, Fate::Redirect), (9, Fate::Next)] {
        let mut bytes = frame.bytes();
        bytes[5] = receiver;
        assert_eq!(node.run(&mut bytes), fate);
    }
    let mut bytes = frame.bytes();
    bytes[0] = 3;
    assert_eq!(node.run(&mut bytes), Fate::Drop, "to many: refused, and not answered");
}

#[test]
fn xdp_redirects_only_where_frames_are_taken() {
    use Device as D;
    for (came_in, out, may) in [
        (D::XDP_TX, D::XDP_TX, false),
        (D::XDP_TAKES, 0, false),
        (0, D::XDP_TAKES, true),
        (D::XDP_GENERIC, 0, true),
    ] {
        assert_eq!(Device::xdp_may_redirect(came_in, out), may, "{came_in} {out}");
    }
}

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
