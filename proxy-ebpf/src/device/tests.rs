use core::net::IpAddr;
use std::vec::Vec;

use super::*;
use crate::fake::Fake;
use crate::fake::frames::{Frame, MACS, check, icmp_error};
use crate::fake::program::{Fate, Way, run};
use crate::layout::{Backend, Prefix, ServiceId, SlotRange, Timeouts};
use crate::order::{Be16, Be32};
use crate::parse::{self, UDP};
use crate::unmatched::{address_key, external_key};
use crate::verdict::Reason;

mod direct;
mod flows;
mod fragments;
mod properties;
mod xdp;

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

/// An external address may be that of another node, which this one and its pods speak with.
#[test]
fn other_ports_of_external_addresses_are_refused_only_where_packets_come_in() {
    let mut node = Node::new();
    node.tables.config.prefixes = 1;
    node.tables.config.service_prefixes[0] = Prefix::new(ip("198.51.100.0"), 96 + 24);
    node.frontend(VIP, TCP, 0, 0..1);
    node.tables.frontends.insert(external_key(ip(VIP)), Frontend::default());
    let unused = tuple(TCP, (CLIENT, 4000), (VIP, 22));
    let same = (Fate::Next, Some(unused));
    assert_eq!(node.syn(unused), same, "a pod's device");
    node.device = Device::UPLINK;
    assert_eq!(node.at(Hook::Egress).syn(unused), same);
    assert_eq!(node.at(Hook::Ingress).syn(unused).0, Fate::Redirect, "a reset");
    assert_ne!(node.syn(tuple(TCP, (CLIENT, 4000), (VIP, 80))).1, None);
    assert_eq!(node.drops(), [Reason::UnusedPort]);
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
