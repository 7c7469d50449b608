use core::net::Ipv4Addr;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::fake::Fake;
use crate::layout::{FrontendId, Prefix, ServiceId, SlotRange};
use crate::unmatched::{address_key, external_key};

const ID: FrontendId = FrontendId(5);
const SERVICE: ServiceId = ServiceId::new(3);
const CALLER: Caller = Caller { cookie: 77, namespace: 1 << 40 | 5, cgroup: 8, pod: 9, now: 0 };

fn key(protocol: u8) -> FrontendKey {
    FrontendKey::new(Ipv4Addr::new(10, 96, 0, 1).into(), Be16::from_host(80), protocol)
}

fn tables() -> Fake {
    let backend = |last: u8| Backend {
        address: Ipv4Addr::new(10, 244, 0, last).into(),
        port: Be16::from_host(8080),
        flags: Backend::IN_USE,
        service: SERVICE,
    };
    let frontend = Frontend {
        node: SlotRange { base: 0, len: 3 },
        id: ID,
        service: SERVICE,
        ..Frontend::default()
    };
    Fake {
        frontends: [(key(TCP), frontend), (key(UDP), frontend)].into(),
        slots: [0, 1, 2].map(BackendId).into(),
        backends: [backend(10), backend(11), backend(12)].into(),
        ..Fake::default()
    }
}

fn translated(tables: &Fake, id: u32) -> SocketVerdict {
    let Backend { address, port, .. } = tables.backends[id as usize];
    SocketVerdict::Translate { backend: BackendId(id), address, port }
}

fn reached(verdict: SocketVerdict) -> (Address, Be16) {
    let SocketVerdict::Translate { address, port, .. } = verdict else { panic!("{verdict:?}") };
    (address, port)
}

fn change(tables: &mut Fake, change: impl Fn(&mut Frontend)) {
    tables.frontends.values_mut().for_each(change);
}

#[test]
fn a_connect_goes_to_one_of_the_nodes_set_and_is_counted() {
    let tables = tables();
    for (random, id) in [(0, 0), (u32::MAX / 3 + 1, 1), (u32::MAX, 2)] {
        assert_eq!(connect(&tables, &CALLER, &key(TCP), random), translated(&tables, id));
        assert_eq!(tables.backend_counters.borrow()[&BackendId(id)].connections, 1);
    }
    assert_eq!(tables.frontend_counters.borrow()[&ID].connections, 3);
    assert_eq!(tables.frontend_counters.borrow()[&ID].refused, 0);
}

#[test]
fn other_connects_pass_uncounted() {
    let tables = tables();
    let elsewhere = FrontendKey::new(Address::default(), Be16::from_host(80), TCP);
    for key in [key(SCTP), key(1), elsewhere] {
        assert_eq!(connect(&tables, &CALLER, &key, 0), SocketVerdict::Pass);
    }
    assert!(tables.frontend_counters.borrow().is_empty());
}

#[test]
fn without_endpoints_tcp_is_refused_and_a_datagram_left_to_the_device() {
    let mut tables = tables();
    change(&mut tables, |frontend| frontend.node.len = 0);
    let refused = SocketVerdict::Refuse(Reason::NoEndpoint);
    assert_eq!(connect(&tables, &CALLER, &key(TCP), 7), refused);
    assert_eq!(tables.frontend_counters.borrow()[&ID].refused, 1);
    assert_eq!(*tables.drops.borrow(), [Reason::NoEndpoint]);
    assert_eq!(connect(&tables, &CALLER, &key(UDP), 7), SocketVerdict::Pass);
    assert_eq!(send(&tables, &CALLER, &key(UDP)), SocketVerdict::Pass);
    // Silence is not refusal.
    change(&mut tables, |frontend| frontend.flags = Frontend::NODE_DROPS);
    assert_eq!(connect(&tables, &CALLER, &key(TCP), 7), SocketVerdict::Pass);
    assert_eq!(tables.drops.borrow().len(), 1);
}

#[test]
fn an_unused_port_of_a_services_address_is_refused() {
    let mut tables = tables();
    let unused = FrontendKey::new(key(TCP).address(), Be16::from_host(22), TCP);
    let nobodys = FrontendKey::new(Ipv4Addr::new(10, 96, 0, 2).into(), Be16::from_host(22), TCP);
    assert_eq!(connect(&tables, &CALLER, &unused, 0), SocketVerdict::Pass, "no range is known");
    tables.config.prefixes = 1;
    tables.config.service_prefixes[0] = Prefix::new(Ipv4Addr::new(10, 96, 0, 0).into(), 96 + 16);
    tables.frontends.insert(address_key(key(TCP).address()), Frontend::default());
    let refused = SocketVerdict::Refuse(Reason::UnusedPort);
    assert_eq!(connect(&tables, &CALLER, &unused, 0), refused);
    assert_eq!(connect(&tables, &CALLER, &nobodys, 0), SocketVerdict::Pass, "dropped later");
}

#[test]
fn who_opted_out_and_whose_range_counts_goes_by_the_device() {
    let mut tables = tables();
    let opted_out = |tables: &Fake| connect(tables, &CALLER, &key(TCP), 0) == SocketVerdict::Pass;
    for (id, kind) in [
        (CALLER.namespace, OptOut::NAMESPACE),
        (CALLER.cgroup, OptOut::CGROUP),
        (CALLER.pod, OptOut::CGROUP),
    ] {
        tables.opt_outs = [OptOut { id, kind, pad: 0 }].into();
        tables.config.features = 0;
        assert!(!opted_out(&tables), "the table is said to be empty");
        tables.config.features = Config::OPT_OUTS;
        assert!(opted_out(&tables), "{id}");
    }
    tables.opt_outs = [OptOut { id: CALLER.cgroup, kind: OptOut::NAMESPACE, pad: 0 }].into();
    assert!(!opted_out(&tables), "a namespace is no cgroup");
    for flag in [Frontend::SOURCE_RANGES, Frontend::MASQUERADE_ALL] {
        change(&mut tables, |frontend| frontend.flags = flag);
        assert!(opted_out(&tables));
    }
    tables.clients.insert(key(TCP).address(), client::NODE);
    assert!(!opted_out(&tables), "to the node itself no packet leaves by a device");
}

#[test]
fn a_socket_sends_all_its_datagrams_to_one_backend() {
    let tables = tables();
    let mut chosen = Vec::new();
    for cookie in 0..50 {
        let caller = Caller { cookie, ..CALLER };
        let first = send(&tables, &caller, &key(UDP));
        assert!(matches!(first, SocketVerdict::Translate { .. }));
        for _ in 0..3 {
            assert_eq!(send(&tables, &caller, &key(UDP)), first);
        }
        if !chosen.contains(&first) {
            chosen.push(first);
        }
    }
    assert_eq!(chosen.len(), 3, "and not all sockets to the same");
}

#[test]
fn datagrams_of_a_socket_stay_with_their_backend_as_long_as_it_serves() {
    let mut tables = tables();
    let sent = |tables: &Fake, cookie| send(tables, &Caller { cookie, ..CALLER }, &key(UDP));
    let before: Vec<_> = (0..40).map(|cookie| sent(&tables, cookie)).collect();
    let known = tables.backends[0];
    let at = |last: u8| Backend { address: Ipv4Addr::new(10, 244, 0, last).into(), ..known };
    // Another endpoint, so that the range is another one, too.
    tables.backends.push(at(13));
    tables.slots = [3, 0, 1, 2].map(BackendId).into();
    change(&mut tables, |frontend| frontend.node.len = 4);
    let after: Vec<_> = (0..40).map(|cookie| sent(&tables, cookie)).collect();
    assert_eq!(before, after);
    assert_eq!(tables.frontend_counters.borrow()[&ID].connections, 40, "they began once");
    assert!((40..80).any(|cookie| sent(&tables, cookie) == translated(&tables, 3)));
    // One that is terminating and serves has no slot; one that is gone is none.
    tables.backends[0].flags = Backend::SERVING;
    tables.backends[1].flags = Backend::LEAVING;
    tables.slots = [3, 3, 3, 2].map(BackendId).into();
    for (cookie, before) in (0..40).zip(&before) {
        let now = sent(&tables, cookie);
        if *before == translated(&tables, 1) {
            assert!([translated(&tables, 2), translated(&tables, 3)].contains(&now));
        } else {
            assert_eq!(now, *before);
        }
    }
    // Its id is another backend's.
    let gone = translated(&tables, 2);
    tables.backends[2] = at(99);
    assert!(before.contains(&gone));
    assert!((0..40).all(|cookie| sent(&tables, cookie) != gone));
}

#[test]
fn datagrams_follow_affinity_while_their_backend_can_be_chosen() {
    let mut tables = tables();
    change(&mut tables, |frontend| frontend.affinity = 10);
    let first = send(&tables, &CALLER, &key(UDP));
    let at = |seconds| Caller { now: seconds * crate::select::SECOND, ..CALLER };
    assert_eq!(send(&tables, &at(9), &key(UDP)), first);
    assert_eq!(send(&tables, &at(18), &key(UDP)), first, "it slides");
    let sibling = Caller { cookie: 78, ..at(19) };
    assert_eq!(send(&tables, &sibling, &key(UDP)), first);
    let SocketVerdict::Translate { backend, .. } = first else { panic!() };
    tables.backends[backend.0 as usize].flags = Backend::SERVING;
    assert_eq!(send(&tables, &at(20), &key(UDP)), first, "the flow goes on");
    let stranger = Caller { cookie: 79, ..at(20) };
    tables.slots = vec![BackendId((backend.0 + 1) % 3); 3];
    assert_ne!(send(&tables, &stranger, &key(UDP)), first, "no other begins there");
}

#[test]
fn a_peer_is_known_as_the_frontend() {
    let mut tables = tables();
    let Backend { address, port, .. } = tables.backends[0];
    let known = |tables: &Fake| known_as(tables, CALLER.cookie, address, port);
    let _ = connect(&tables, &CALLER, &key(TCP), 0);
    assert_eq!(known(&tables), None, "not asked for");
    tables.config.features = Config::TCP_PEER_NAMES;
    let _ = connect(&tables, &CALLER, &key(TCP), 0);
    assert_eq!(known(&tables), Some((key(TCP).address(), key(TCP).port())));
    tables.config.features = 0;
    let (address, port) = reached(connect(&tables, &CALLER, &key(UDP), 0));
    let known = known_as(&tables, CALLER.cookie, address, port);
    assert_eq!(known, Some((key(UDP).address(), key(UDP).port())));
    assert_eq!(known_as(&tables, CALLER.cookie + 1, address, port), None);
}

#[test]
fn a_connected_udp_socket_is_remembered_apart_and_until_it_is_closed() {
    let mut tables = tables();
    tables.config.features = Config::TCP_PEER_NAMES;
    let _ = connect(&tables, &CALLER, &key(TCP), 0);
    let other = Caller { cookie: CALLER.cookie + 1, ..CALLER };
    let _ = send(&tables, &other, &key(UDP));
    assert_eq!(tables.peers.borrow().len(), 3, "one of them by its frontend");
    assert!(tables.udp_peers.borrow().is_empty(), "these are many");
    let (address, port) = reached(connect(&tables, &CALLER, &key(UDP), 0));
    assert_eq!((tables.peers.borrow().len(), tables.udp_peers.borrow().len()), (3, 1));
    closed(&tables, CALLER.cookie + 1, address, port);
    assert_eq!(tables.udp_peers.borrow().len(), 1, "another socket");
    closed(&tables, CALLER.cookie, address, port);
    assert!(tables.udp_peers.borrow().is_empty());
}

#[test]
fn affinity_is_the_namespaces() {
    let mut tables = tables();
    change(&mut tables, |frontend| frontend.affinity = 10);
    assert_eq!(connect(&tables, &CALLER, &key(TCP), 0), translated(&tables, 0));
    let sibling = Caller { cookie: 78, ..CALLER };
    assert_eq!(connect(&tables, &sibling, &key(TCP), u32::MAX), translated(&tables, 0));
    assert_eq!(connect(&tables, &sibling, &key(UDP), u32::MAX), translated(&tables, 0));
    let stranger = Caller { namespace: CALLER.namespace + 1, ..CALLER };
    assert_eq!(connect(&tables, &stranger, &key(TCP), u32::MAX), translated(&tables, 2));
}

#[test]
fn localhost_is_the_node_in_its_own_namespace_only() {
    let mut tables = tables();
    let frontend = tables.frontends[&key(TCP)];
    let localhost = FrontendKey::new(Ipv4Addr::LOCALHOST.into(), Be16::from_host(30_000), TCP);
    tables.frontends.insert(localhost, frontend);
    tables.frontends.get_mut(&localhost).unwrap().flags |= Frontend::MASQUERADE_ALL;
    assert_eq!(connect(&tables, &CALLER, &localhost, 0), SocketVerdict::Pass);
    tables.config.namespace = CALLER.namespace;
    assert_eq!(connect(&tables, &CALLER, &localhost, 0), translated(&tables, 0));
    let other = Caller { namespace: CALLER.namespace + 1, ..CALLER };
    assert_eq!(connect(&tables, &other, &localhost, 0), SocketVerdict::Pass);
}

/// The kernel takes 0.0.0.0 for 127.0.0.1, and any of 127.0.0.0/8 is the node.
#[test]
fn other_addresses_that_are_localhost_are_that_too() {
    let mut tables = tables();
    let at = |address: [u8; 4], protocol| {
        FrontendKey::new(Ipv4Addr::from(address).into(), Be16::from_host(30_000), protocol)
    };
    for protocol in [TCP, UDP] {
        let frontend = tables.frontends[&key(protocol)];
        tables.frontends.insert(at([127, 0, 0, 1], protocol), frontend);
    }
    tables.config.namespace = CALLER.namespace;
    tables.config.features = Config::TCP_PEER_NAMES;
    let other = Caller { namespace: CALLER.namespace + 1, ..CALLER };
    // What the socket's owner knows the peer as afterwards.
    for (address, known) in [([0; 4], [127, 0, 0, 1]), ([127, 0, 0, 2], [127, 0, 0, 2])] {
        for protocol in [TCP, UDP] {
            let key = at(address, protocol);
            let (backend, port) = reached(connect(&tables, &CALLER, &key, 0));
            let known_as = known_as(&tables, CALLER.cookie, backend, port);
            assert_eq!(known_as, Some((at(known, protocol).address(), key.port())));
            assert_eq!(connect(&tables, &other, &key, 0), SocketVerdict::Pass);
        }
        let _ = reached(send(&tables, &CALLER, &at(address, UDP)));
    }
    assert_eq!(connect(&tables, &CALLER, &at([128, 0, 0, 1], TCP), 0), SocketVerdict::Pass);
}

#[test]
fn a_connected_udp_socket_that_sends_by_address_meets_the_same_backend() {
    let tables = tables();
    let mut chosen = Vec::new();
    for cookie in 0..50 {
        let caller = Caller { cookie, ..CALLER };
        let connected = connect(&tables, &caller, &key(UDP), 12_345);
        assert_eq!(send(&tables, &caller, &key(UDP)), connected, "{cookie}");
        if !chosen.contains(&connected) {
            chosen.push(connected);
        }
    }
    assert_eq!(chosen.len(), 3, "and not all sockets the same one");
}

/// Its packets have the node's address, whatever becomes of other sources; and a process of the
/// node is reached by no device.
#[test]
fn sockets_of_the_node_itself_need_no_packets() {
    let mut tables = tables();
    let own: Address = Ipv4Addr::new(192, 0, 2, 2).into();
    tables.config.source4 = own;
    let pod = Caller { namespace: CALLER.namespace + 1, ..CALLER };
    let by_packets =
        |tables: &Fake, caller| connect(tables, caller, &key(TCP), 0) == SocketVerdict::Pass;
    change(&mut tables, |frontend| frontend.flags = Frontend::MASQUERADE_ALL);
    assert!(by_packets(&tables, &CALLER), "whose the socket is is not known");
    tables.config.namespace = CALLER.namespace;
    assert!(!by_packets(&tables, &CALLER) && by_packets(&tables, &pod));
    change(&mut tables, |frontend| frontend.flags = Frontend::SOURCE_RANGES);
    assert!(by_packets(&tables, &CALLER) && by_packets(&tables, &pod), "out of range");
    tables.source_ranges.insert((SERVICE, own), 1);
    assert!(!by_packets(&tables, &CALLER) && by_packets(&tables, &pod));
}

/// Whose ports they are is for the device to tell where packets come in.
#[test]
fn other_ports_of_external_addresses_are_left_alone() {
    let mut tables = tables();
    tables.config.prefixes = 1;
    tables.config.service_prefixes[0] = Prefix::new(Ipv4Addr::new(10, 96, 0, 0).into(), 96 + 16);
    tables.frontends.insert(external_key(key(TCP).address()), Frontend::default());
    let unused = FrontendKey::new(key(TCP).address(), Be16::from_host(22), TCP);
    assert_eq!(connect(&tables, &CALLER, &unused, 0), SocketVerdict::Pass);
}
