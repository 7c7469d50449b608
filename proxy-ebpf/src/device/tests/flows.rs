//! Flows: whose a port is, when they end, and what may follow them.

use super::*;

#[test]
fn two_services_with_one_backend_do_not_mix_up_a_clients_port() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    node.frontend("198.51.100.2", TCP, 0, 0..1);
    let other = tuple(TCP, (CLIENT, 4000), ("198.51.100.2", 80));
    let first = node.syn(client(4000)).1.unwrap();
    let second = node.syn(other).1.unwrap();
    assert_ne!(first, second);
    assert_eq!(second.source, ip(CLIENT), "only the port makes the difference");
    let reply = |seen: Tuple| Frame::new(seen.inverse(), b"");
    let node = node.at(Hook::Egress);
    assert_eq!(node.send(&reply(first)).1, Some(client(4000).inverse()));
    assert_eq!(node.send(&reply(second)).1, Some(other.inverse()));
}

#[test]
fn ports_run_out_loudly_and_come_back_when_flows_end() {
    let mut node = Node::new();
    node.tables.config.port_high = node.tables.config.port_low + 3;
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    let fates: Vec<Fate> = (0..40).map(|port| node.syn(client(4000 + port)).0).collect();
    assert_eq!(fates.iter().filter(|fate| **fate == Fate::Redirect).count(), 4);
    assert!(node.drops().iter().all(|reason| *reason == Reason::PortsExhausted));
    // Nobody answered the four; what opens for longer than a minute never will.
    node.now += 61 * SECOND;
    assert_eq!(node.syn(client(5000)).0, Fate::Redirect);
    assert_eq!(node.tables.flows.borrow().len(), 8, "an ended flow is gone whole");
}

#[test]
fn a_port_that_a_socket_of_the_node_uses_is_not_taken() {
    let mut node = Node::new();
    node.tables.config.port_high = node.tables.config.port_low + 1;
    node.tables.sockets_of_node = [50_000].into();
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    assert_eq!(node.syn(client(4000)).1.unwrap().source_port.to_host(), 50_001);
    assert_eq!(node.syn(client(4001)).0, Fate::Drop);
}

#[test]
fn a_full_table_of_flows_drops_and_says_so() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    node.tables.room = Some(1);
    assert_eq!(node.syn(client(4000)).0, Fate::Drop);
    assert_eq!(node.drops(), [Reason::FlowsFull]);
    assert!(node.tables.flows.borrow().is_empty());
    // With ports to try that are all free.
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    node.tables.room = Some(0);
    assert_eq!(node.syn(client(4000)).0, Fate::Drop);
    assert_eq!(node.drops(), [Reason::FlowsFull; 2]);
}

#[test]
fn a_connection_lives_on_when_its_backend_is_removed_and_a_new_one_goes_elsewhere() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    let first = node.syn(client(4000)).1.unwrap();
    node.tables.backends[0].flags = 0;
    node.frontend(VIP, TCP, 0, 1..2);
    let data = Frame { tcp_flags: tcp::ACK, ..Frame::new(client(4000), b"data") };
    assert_eq!(node.send(&data).1, Some(first));
    // The port is used again: nothing of the old connection may hold the new one.
    assert_eq!(node.syn(client(4000)).1.unwrap().destination, ip("10.244.1.5"));
}

#[test]
fn a_port_used_again_after_the_end_gets_a_new_choice() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    let seen = node.syn(client(4000)).1.unwrap();
    node.frontend(VIP, TCP, 0, 1..2);
    assert_eq!(node.syn(client(4000)).1, Some(seen), "a repeated SYN is the same connection");
    let fin = |tuple| Frame { tcp_flags: tcp::FIN | tcp::ACK, ..Frame::new(tuple, b"") };
    node.send(&fin(client(4000)));
    node.at(Hook::Egress).send(&fin(seen.inverse()));
    assert_eq!(node.at(Hook::Ingress).syn(client(4000)).1.unwrap().destination, ip("10.244.1.5"));
}

/// A socket that `connect(2)` has translated talks to the backend itself.
#[test]
fn a_direct_connection_from_the_port_of_an_ended_flow_gets_its_own_replies() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    let direct = node.syn(client(4000)).1.unwrap();
    let with = |flags, tuple| Frame { tcp_flags: flags, ..Frame::new(tuple, b"") };
    let (fin, answer) = (tcp::FIN | tcp::ACK, with(tcp::SYN | tcp::ACK, direct.inverse()));
    node.send(&with(fin, client(4000)));
    node.syn(direct);
    let reply = node.at(Hook::Egress).send(&answer);
    assert_eq!(reply.1, Some(client(4000).inverse()), "the flow lives until both have ended it");
    node.send(&with(fin, direct.inverse()));
    for device in [0, Device::PORT] {
        node.device = device;
        assert_eq!(node.syn(direct), (Fate::Next, Some(direct)));
        assert_eq!(node.send(&answer), (Fate::Next, Some(direct.inverse())));
    }
    assert_eq!(node.tables.flows.borrow().len(), 0);
}

/// The same, by datagrams: nothing in them tells that the flow is over.
#[test]
fn datagrams_straight_to_the_backend_of_a_flow_get_their_own_replies() {
    let by_frontend = Tuple { protocol: UDP, ..client(4000) };
    let query = |tuple| Frame::new(tuple, b"query");
    let mut node = Node::new();
    node.frontend(VIP, UDP, 0, 0..1);
    let direct = node.send(&query(by_frontend)).1.unwrap();
    let answer = Frame::new(direct.inverse(), b"answer");
    // The translated packet itself leaves by another device, after waiting for its neighbour.
    node.now += 3 * SECOND;
    assert_eq!(node.at(Hook::Egress).send(&query(direct)).1, Some(direct));
    assert_eq!(node.send(&answer).1, Some(by_frontend.inverse()));
    // Nothing that comes in was translated here before.
    for hook in [Hook::Ingress, Hook::Xdp] {
        node.at(Hook::Ingress).send(&query(by_frontend));
        assert_eq!(node.at(hook).send(&query(direct)).1, Some(direct));
        // What XDP lets through comes by there, and looking once is enough.
        let left = if hook == Hook::Xdp { 2 } else { 0 };
        assert_eq!(node.tables.flows.borrow().len(), left);
        assert_eq!(node.at(Hook::Ingress).send(&query(direct)).1, Some(direct));
        assert_eq!(node.at(Hook::Egress).send(&answer).1, Some(direct.inverse()));
    }
    node.at(Hook::Ingress).send(&query(by_frontend));
    node.now += 4 * SECOND;
    for device in [0, Device::PORT] {
        node.device = device;
        assert_eq!(node.at(Hook::Egress).send(&query(direct)).1, Some(direct));
        assert_eq!(node.send(&answer).1, Some(direct.inverse()));
    }
    assert_eq!(node.tables.flows.borrow().len(), 0);
}

/// The address of a backend is a Service's as well, and XDP sends on by that what goes there: such
/// a packet does not come by again.
#[test]
fn xdp_makes_way_for_what_it_sends_on() {
    let by_frontend = Tuple { protocol: UDP, ..client(4000) };
    let mut node = Node::new();
    node.tables.backends[0].port = Be16::from_host(80);
    node.frontend(VIP, UDP, 0, 0..1);
    let direct = node.send(&Frame::new(by_frontend, b"query")).1.unwrap();
    node.frontend("10.244.0.5", UDP, Frontend::MASQUERADE_REMOTE, 1..2);
    assert_eq!(node.at(Hook::Xdp).send(&Frame::new(direct, b"query")).0, Fate::Redirect);
    let flows = node.tables.flows.borrow();
    assert!(!flows.contains_key(&by_frontend) && flows.len() == 2, "{flows:?}");
}

#[test]
fn udp_leaves_a_backend_that_is_gone_at_once() {
    let mut node = Node::new();
    node.frontend(VIP, UDP, 0, 0..1);
    let query = Frame::new(Tuple { protocol: UDP, ..client(4000) }, b"query");
    assert_eq!(node.send(&query).1.unwrap().destination, ip("10.244.0.5"));
    node.frontend(VIP, UDP, 0, 1..2);
    assert_eq!(node.send(&query).1.unwrap().destination, ip("10.244.0.5"), "it still serves");
    // In no set any more, which another client notices.
    node.tables.backends[0].flags = Backend::SERVING;
    assert_eq!(node.send(&query).1.unwrap().destination, ip("10.244.0.5"), "it still serves");
    node.tables.backends[0].flags = 0;
    assert_eq!(node.send(&query).1.unwrap().destination, ip("10.244.1.5"));
    // The id is somebody else's now, or another port's.
    node.tables.backends[1].address = ip("10.244.2.5");
    assert_eq!(node.send(&query).1.unwrap().destination, ip("10.244.2.5"));
    node.tables.backends[1].port = Be16::from_host(9090);
    assert_eq!(node.send(&query).1.unwrap().destination_port.to_host(), 9090);
    assert_eq!(node.tables.flows.borrow().len(), 2, "nothing is left of the old flows");
}

/// As a TCP client that uses its port again: what begins anew looks for an endpoint anew, when the
/// old one has gone or the old association was ended.
#[test]
fn an_sctp_association_from_the_same_port_begins_anew() {
    use parse::sctp::{ABORT, INIT, SHUTDOWN_COMPLETE};
    const DATA: u8 = 0;
    let mut node = Node::new();
    node.frontend(VIP, SCTP, 0, 0..1);
    let request = tuple(SCTP, (CLIENT, 4000), (VIP, 80));
    let send = |node: &Node, chunk: u8| {
        node.send(&Frame::new(request, &[chunk, 0, 0, 4])).1.unwrap().destination
    };
    let (old, new) = (ip("10.244.0.5"), ip("10.244.1.5"));
    assert_eq!(send(&node, INIT), old);
    node.tables.slots = [REMOTE, REMOTE].map(BackendId).into();
    for chunk in [DATA, INIT] {
        assert_eq!(send(&node, chunk), old, "it is there");
    }
    node.tables.backends[0].flags = 0;
    assert_eq!(send(&node, DATA), old, "the association goes on");
    assert_eq!(send(&node, INIT), new);
    for (end, slot) in [(ABORT, LOCAL), (SHUTDOWN_COMPLETE, REMOTE)] {
        node.tables.backends[0].flags = Backend::IN_USE | Backend::LOCAL;
        let before = send(&node, DATA);
        node.tables.slots = [slot, slot].map(BackendId).into();
        assert_eq!(send(&node, INIT), before);
        assert_eq!(send(&node, end), before);
        assert_ne!(send(&node, INIT), before, "{end}");
    }
}

/// Who asks in another's name never acknowledges the answer: such connections must not take room
/// for a day (the kernel's conntrack gives a minute to `SYN_RECV`).
#[test]
fn a_connection_is_established_when_the_client_has_acknowledged() {
    use parse::sctp::{COOKIE_ECHO, INIT};
    let mut node = Node::new();
    for protocol in [TCP, SCTP] {
        node.frontend(VIP, protocol, 0, 0..1);
        let request = tuple(protocol, (CLIENT, 4000), (VIP, 80));
        let send = |node: &Node, tuple, tcp_flags, chunk: u8| {
            node.send(&Frame { tcp_flags, ..Frame::new(tuple, &[chunk, 0, 0, 4]) }).1.unwrap()
        };
        let lasts = |node: &Node| {
            let flags = node.tables.flows.borrow()[&request].flags;
            flow::timeout(protocol, flags, &node.tables.config.timeouts)
        };
        let seen = send(&node, request, tcp::SYN, INIT);
        assert_eq!(lasts(&node), 60);
        send(node.at(Hook::Egress), seen.inverse(), tcp::SYN | tcp::ACK, 2);
        node.hook = Hook::Ingress;
        send(&node, request, tcp::SYN, INIT);
        assert_eq!(lasts(&node), 60, "answered, and asked again");
        send(&node, request, tcp::ACK, COOKIE_ECHO);
        assert_eq!(lasts(&node), if protocol == TCP { 86_400 } else { 3_600 });
    }
}

#[test]
fn what_ends_no_connection_that_is_known_begins_none() {
    let mut node = Node::new();
    node.frontend(VIP, TCP, 0, 0..1);
    node.frontend(VIP, SCTP, 0, 0..1);
    for (protocol, tcp_flags) in [(TCP, tcp::RST), (SCTP, 0)] {
        let request = tuple(protocol, (CLIENT, 4000), (VIP, 80));
        let end = Frame { tcp_flags, ..Frame::new(request, &[parse::sctp::ABORT, 0, 0, 4]) };
        assert_eq!(node.send(&end).0, Fate::Drop);
    }
    assert_eq!(node.drops(), [Reason::NoFlow; 2]);
    assert!(node.tables.flows.borrow().is_empty());
}
