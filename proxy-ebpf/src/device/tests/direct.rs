//! Direct server return: what a node sends on inside other packets, what another makes of it, and
//! what either remembers.

use super::*;
use crate::direct;
use crate::fake::frames::DIRECT_PORT;
use crate::layout::LocalKey;
use crate::parse::{ETHERNET, Kind, SCTP};

const OTHER: &str = "192.0.2.3";
const POD_OF_OTHER: &str = "10.244.1.5";
const NODE_PORT: (&str, u16) = (NODE, 80);

fn port() -> Be16 {
    Be16::from_host(DIRECT_PORT)
}

/// One that sends, with a frontend whose backend is on another node.
fn sender(flags: u32) -> Node {
    let mut node = Node::new();
    node.tables.config.features = Config::DIRECT_ACCEPT | Config::DIRECT_SEND;
    node.tables.config.direct_port = port();
    for protocol in [TCP, UDP, SCTP] {
        node.frontend(VIP, protocol, flags, 1..2);
        node.frontend(NODE, protocol, flags, 1..2);
    }
    node
}

/// The node where that backend is.
fn receiver() -> Node {
    let mut node = Node::new();
    node.tables.config.features = Config::DIRECT_ACCEPT;
    node.tables.config.direct_port = port();
    node.tables.config.source4 = ip(OTHER);
    node.tables.clients = [(ip(OTHER), client::NODE)].into();
    node.tables.backends[0].flags = Backend::IN_USE;
    node.tables.backends[1].flags = Backend::IN_USE | Backend::LOCAL;
    for service in [SERVICE, LocalKey::ANY] {
        let key = LocalKey { service, address: ip(POD_OF_OTHER) };
        node.tables.locals.insert(key, BackendId(REMOTE));
    }
    for protocol in [TCP, UDP, SCTP] {
        // Its own draw would be the other backend.
        node.frontend(VIP, protocol, Frontend::MASQUERADE_REMOTE, 0..1);
        node.frontend(OTHER, protocol, Frontend::MASQUERADE_REMOTE, 0..1);
    }
    node
}

fn headers(bytes: &[u8]) -> Headers {
    let mut headers = Headers::default();
    parse::ethernet(&bytes, &mut headers).unwrap();
    headers
}

/// What is inside, and between whom it goes.
fn inside(bytes: &[u8]) -> (Tuple, Vec<u8>) {
    check(bytes).unwrap();
    let headers = headers(bytes);
    assert!(direct::is_wrapped(&bytes, &headers, port()), "{bytes:02x?}");
    let mut inner = bytes.to_vec();
    inner.drain(ETHERNET..ETHERNET + direct::overhead(headers.version));
    (headers.tuple, inner)
}

/// As it was sent, after one hop.
fn hop_later(frame: &Frame) -> Vec<u8> {
    Frame { ttl: frame.ttl - 1, ..frame.clone() }.packet()
}

/// It comes by the network between the nodes.
fn take(node: &Node, bytes: &mut Vec<u8>) -> Fate {
    bytes[..6].copy_from_slice(&WAY.ethernet[6..]);
    node.run(bytes)
}

fn flags_of(node: &Node, key: Tuple) -> u32 {
    node.tables.flows.borrow()[&key].flags
}

fn with(flags: u8, tuple: Tuple) -> Frame {
    Frame { tcp_flags: flags, ..Frame::new(tuple, b"") }
}

#[test]
fn a_packet_goes_inside_another_to_the_backend_and_nothing_is_claimed() {
    for hook in [Hook::Ingress, Hook::Xdp] {
        for (to, source) in [((VIP, 80), NODE), (NODE_PORT, NODE)] {
            for protocol in [TCP, UDP, SCTP] {
                let mut node = sender(Frontend::MASQUERADE_REMOTE);
                // Were it masqueraded, there would be no port.
                node.tables.config.port_high = 0;
                let sent = with(tcp::SYN, tuple(protocol, (CLIENT, 4000), to));
                let mut bytes = sent.bytes();
                assert_eq!(node.at(hook).run(&mut bytes), Fate::Redirect);
                let (outer, inner) = inside(&bytes);
                assert_eq!((outer.source, outer.destination), (ip(source), ip(POD_OF_OTHER)));
                assert_eq!(inner[ETHERNET..], hop_later(&sent));
                assert_eq!(bytes[..12], WAY.ethernet);
                assert_eq!(node.tables.flows.borrow().len(), 1);
                let mut again = sent.bytes();
                node.run(&mut again);
                assert_eq!(inside(&again).0, outer, "one port for one flow");
                let counted = node.tables.frontend_counters.borrow()[&ID];
                assert_eq!((counted.connections, counted.requests.packets), (1, 2));
            }
        }
    }
}

#[test]
fn an_external_address_of_another_node_is_not_sent_from() {
    let mut node = sender(Frontend::MASQUERADE_REMOTE);
    node.tables.clients.insert(ip(VIP), client::NODE);
    let mut bytes = with(tcp::SYN, client(4000)).bytes();
    node.run(&mut bytes);
    assert_eq!(inside(&bytes).0.source, ip(VIP), "it has that address itself");
}

#[test]
fn who_is_masqueraded_for_another_reason_still_is() {
    let remote = Frontend::MASQUERADE_REMOTE;
    for (what, flags, source, hook, device) in [
        ("everybody is", remote | Frontend::MASQUERADE_ALL, CLIENT, Hook::Ingress, 0),
        ("a ClusterIP", Frontend::MASQUERADE_OUTSIDE, CLIENT, Hook::Ingress, 0),
        ("a pod", remote, POD, Hook::Ingress, 0),
        ("behind a pod's device", remote, CLIENT, Hook::Ingress, Device::PODS),
        ("hairpin", remote, POD_OF_OTHER, Hook::Ingress, 0),
        ("on the way out", remote, CLIENT, Hook::Egress, 0),
    ] {
        let mut node = sender(flags);
        node.device |= device;
        let (fate, seen) = node.at(hook).syn(tuple(TCP, (source, 4000), (VIP, 80)));
        assert_eq!(fate, Fate::Redirect, "{what}");
        assert_eq!(seen.unwrap().destination_port.to_host(), 8080, "{what}");
        assert_eq!(node.tables.flows.borrow().len(), 2, "{what}");
    }
    let mut off = sender(remote);
    off.tables.config.features = Config::DIRECT_ACCEPT;
    assert_eq!(off.syn(client(4000)).1.unwrap().destination_port.to_host(), 8080);
}

#[test]
fn the_other_node_gives_it_to_that_backend_and_answers_for_the_frontend() {
    for to in [(VIP, 80), NODE_PORT] {
        for protocol in [TCP, UDP, SCTP] {
            let (a, mut b) = (sender(Frontend::MASQUERADE_REMOTE), receiver());
            let request = tuple(protocol, (CLIENT, 4000), to);
            let mut bytes = with(tcp::SYN, request).bytes();
            a.run(&mut bytes);
            assert_eq!(take(&b, &mut bytes), Fate::Next);
            assert_eq!(check(&bytes).unwrap().ttl, 63);
            let seen = tuple(protocol, (CLIENT, 4000), (POD_OF_OTHER, 8080));
            assert_eq!(headers(&bytes).tuple, seen, "the backend sees the client");
            let reply = Frame::new(seen.inverse(), b"hello");
            assert_eq!(b.at(Hook::Egress).send(&reply), (Fate::Next, Some(request.inverse())));
            let counted = b.tables.frontend_counters.borrow()[&ID];
            assert_eq!((counted.requests.packets, counted.replies.packets), (1, 1));
        }
    }
}

#[test]
fn what_is_not_for_this_node_is_left_alone_and_what_it_cannot_place_is_dropped() {
    let a = sender(Frontend::MASQUERADE_REMOTE);
    let wrapped = |tuple| {
        let mut bytes = with(tcp::SYN, tuple).bytes();
        assert_eq!(a.run(&mut bytes), Fate::Redirect);
        bytes
    };
    let untouched = |node: &Node, mut bytes: Vec<u8>| {
        bytes[..6].copy_from_slice(&WAY.ethernet[6..]);
        let before = bytes.clone();
        assert_eq!((node.run(&mut bytes), bytes), (Fate::Next, before));
        assert!(node.drops().is_empty() && node.tables.flows.borrow().is_empty());
    };
    let mut off = receiver();
    off.tables.config.features = 0;
    untouched(&off, wrapped(client(4000)));
    let mut other_port = receiver();
    other_port.tables.config.direct_port = Be16::from_host(6082);
    untouched(&other_port, wrapped(client(4000)));
    let mut nobodys = receiver();
    nobodys.tables.locals.clear();
    untouched(&nobodys, wrapped(client(4000)));
    // A pod that speaks for others.
    let mut from_pod = receiver();
    from_pod.tables.clients.insert(ip(NODE), client::CLUSTER);
    untouched(&from_pod, wrapped(client(4000)));
    let mut behind = receiver();
    behind.device |= Device::PODS;
    untouched(&behind, wrapped(client(4000)));
    for hook in [Hook::Xdp, Hook::Egress] {
        untouched(receiver().at(hook), wrapped(client(4000)));
    }

    let dropped = |node: &Node, mut bytes: Vec<u8>, reason| {
        assert_eq!(take(node, &mut bytes), Fate::Drop);
        assert_eq!(node.drops(), [reason]);
        assert!(node.tables.flows.borrow().is_empty());
    };
    let mut unknown = receiver();
    unknown.tables.frontends.clear();
    dropped(&unknown, wrapped(client(4000)), Reason::Misdirected);
    // An address that is nobody's frontend here counts only when it sends by itself.
    let forged = |source: &str| {
        let mut bytes = wrapped(tuple(TCP, (CLIENT, 4000), NODE_PORT));
        let outer = Tuple { source: ip(source), ..headers(&bytes).tuple };
        let length = headers(&bytes).length - 36;
        direct::wrap(&mut bytes, &outer, port(), parse::Version::V4, length).unwrap();
        bytes
    };
    dropped(&receiver(), forged("192.0.2.9"), Reason::Misdirected);
    let mut bytes = forged(NODE);
    assert_eq!(take(&receiver(), &mut bytes), Fate::Next);
    // A backend of another Service, or one that is none any more.
    let mut gone = receiver();
    gone.tables.locals.remove(&LocalKey { service: SERVICE, address: ip(POD_OF_OTHER) });
    dropped(&gone, wrapped(client(4000)), Reason::Misdirected);
    let mut vacant = receiver();
    vacant.tables.backends[1] = Backend::default();
    dropped(&vacant, wrapped(client(4000)), Reason::Misdirected);
    // Ranges are asked for here as well.
    let mut guarded = receiver();
    guarded.change(VIP, |frontend| frontend.flags |= Frontend::SOURCE_RANGES);
    dropped(&guarded, wrapped(client(4000)), Reason::SourceRange);
}

#[test]
fn nodes_do_not_send_a_packet_to_each_other() {
    let a = sender(Frontend::MASQUERADE_REMOTE);
    let mut b = receiver();
    b.tables.config.features |= Config::DIRECT_SEND;
    // It had the client's packets itself, and sent them elsewhere.
    b.tables.backends[0].address = ip("10.244.2.5");
    let mut bytes = with(tcp::SYN, client(4000)).bytes();
    assert_eq!(b.run(&mut bytes), Fate::Redirect);
    assert_eq!(inside(&bytes).0.destination, ip("10.244.2.5"));
    let mut bytes = with(tcp::ACK, client(4000)).bytes();
    a.run(&mut bytes);
    assert_eq!(take(&b, &mut bytes), Fate::Next);
    assert_eq!(headers(&bytes).tuple.destination, ip(POD_OF_OTHER));
}

#[test]
fn a_process_of_the_other_node_is_sent_to_without_the_stack() {
    let a = sender(Frontend::MASQUERADE_REMOTE);
    let mut b = receiver();
    let mut bytes = with(tcp::SYN, tuple(TCP, (OTHER, 4000), NODE_PORT)).bytes();
    a.run(&mut bytes);
    // The stack would take its own address for forged.
    assert_eq!(take(&b, &mut bytes), Fate::Redirect);
    let seen = tuple(TCP, (OTHER, 4000), (POD_OF_OTHER, 8080));
    assert_eq!(headers(&bytes).tuple, seen);
    let reply = b.at(Hook::Ingress).send(&Frame::new(seen.inverse(), b""));
    assert_eq!(reply, (Fate::Redirect, Some(tuple(TCP, NODE_PORT, (OTHER, 4000)))));
}

#[test]
fn errors_and_fragments_go_the_same_way() {
    let (mut a, b) = (sender(Frontend::MASQUERADE_REMOTE), receiver());
    let request = tuple(UDP, (CLIENT, 4000), (VIP, 80));
    let whole = Frame { id: 7, ..Frame::new(request, &[3; 2000]) };
    let part = |from, length| Frame { part: Some((from, length)), ..whole.clone() };
    for (frame, kind) in
        [(part(0, 1000), Kind::FirstFragment), (part(1000, 1008), Kind::LaterFragment)]
    {
        let mut bytes = frame.bytes();
        assert_eq!(a.run(&mut bytes), Fate::Redirect);
        assert_eq!(inside(&bytes).1[ETHERNET..], hop_later(&frame));
        assert_eq!(take(&b, &mut bytes), Fate::Next);
        let headers = headers(&bytes);
        assert_eq!((headers.kind, headers.tuple.destination), (kind, ip(POD_OF_OTHER)));
    }
    // About what the other node sent to the client in the frontend's name.
    let about = Frame::new(request.inverse(), b"data");
    let mut bytes = icmp_error(ip("203.0.113.1"), &about, [3, 4], 60);
    let before = bytes.clone();
    assert_eq!((a.at(Hook::Xdp).run(&mut bytes), &bytes), (Fate::Next, &before));
    assert_eq!(a.at(Hook::Ingress).run(&mut bytes), Fate::Redirect);
    assert_eq!(inside(&bytes).0.destination, ip(POD_OF_OTHER));
    assert_eq!(take(&b, &mut bytes), Fate::Next);
    let backends = tuple(UDP, (POD_OF_OTHER, 8080), (CLIENT, 4000));
    let expected = icmp_error(ip("203.0.113.1"), &Frame::new(backends, b"data"), [3, 4], 60);
    assert_eq!(check(&bytes).unwrap().body, check(&expected).unwrap().body);
    // What nobody knows here does not go on as it came.
    let stranger = receiver();
    let mut bytes = before;
    a.run(&mut bytes);
    assert_eq!(take(&stranger, &mut bytes), Fate::Drop);
    assert_eq!(stranger.drops(), [Reason::Misdirected]);
}

#[test]
fn a_sender_is_told_what_fits_inside() {
    let node = sender(Frontend::MASQUERADE_REMOTE);
    for (payload, dont_fragment) in [(1500 - 36 - 39, true), (1500 - 36 - 39, false)] {
        let frame = Frame { dont_fragment, ..Frame::new(client(4000), &std::vec![1; payload]) };
        let mut bytes = frame.bytes();
        assert_eq!(node.run(&mut bytes), Fate::Redirect);
        let error = check(&bytes).unwrap();
        assert_eq!(error.body[..2], [3, 4]);
        assert_eq!(error.body[6..8], 1464_u16.to_be_bytes());
        assert_eq!(bytes[..6], MACS[6..]);
    }
    let fits = Frame::new(client(4000), &[1; 1500 - 36 - 40]);
    let mut bytes = fits.bytes();
    assert_eq!(node.run(&mut bytes), Fate::Redirect);
    assert_eq!(headers(&bytes).length, 1500);
}

#[test]
fn a_flow_of_one_direction_ends_by_what_the_client_sends() {
    let t = Timeouts::default();
    let limit = |node: &Node, key: Tuple| flow::timeout(key.protocol, flags_of(node, key), &t);
    let node = sender(Frontend::MASQUERADE_REMOTE);
    let tcp = client(4000);
    node.send(&with(tcp::SYN, tcp));
    assert_eq!(limit(&node, tcp), t.tcp_opening);
    node.send(&with(tcp::SYN, tcp));
    assert_eq!(limit(&node, tcp), t.tcp_opening, "a repeated SYN");
    node.send(&with(tcp::ACK, tcp));
    assert_eq!(limit(&node, tcp), t.tcp_established);
    // It may still receive, and acknowledge, for as long as that takes.
    node.send(&with(tcp::FIN | tcp::ACK, tcp));
    node.send(&with(tcp::ACK, tcp));
    assert_eq!(limit(&node, tcp), t.tcp_opening);
    node.send(&with(tcp::RST, tcp));
    assert_eq!(limit(&node, tcp), t.tcp_closing);
    let udp = tuple(UDP, (CLIENT, 4000), (VIP, 80));
    node.send(&Frame::new(udp, b"query"));
    node.send(&Frame::new(udp, b"query"));
    assert_eq!(limit(&node, udp), t.udp);
}

#[test]
fn a_port_that_is_used_again_gets_a_new_choice_and_nobody_elses_flow_ends() {
    let mut node = sender(Frontend::MASQUERADE_REMOTE);
    let (first, second) = (POD_OF_OTHER, "10.244.2.5");
    let backend = Backend { address: ip(second), ..node.tables.backends[1] };
    node.tables.backends.push(backend);
    node.tables.slots.push(BackendId(2));
    let to = |node: &Node, flags| {
        let mut bytes = with(flags, client(4000)).bytes();
        assert_eq!(node.run(&mut bytes), Fate::Redirect);
        inside(&bytes).0.destination
    };
    assert_eq!(to(&node, tcp::SYN), ip(first));
    // Where the other half of a flow would be there is another flow.
    let key = client(4000);
    let theirs = node.tables.flows.borrow()[&key].to.inverse();
    let flow = Flow { to: client(5000), flags: Flow::REPLY, ..Flow::default() };
    node.tables.flows.borrow_mut().insert(theirs, flow);

    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 2..3);
    assert_eq!(to(&node, tcp::SYN), ip(first), "a repeated SYN is the same connection");
    assert_eq!(to(&node, tcp::FIN | tcp::ACK), ip(first));
    assert_eq!(to(&node, tcp::ACK), ip(first));
    assert_eq!(to(&node, tcp::SYN), ip(second));
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 1..2);
    assert_eq!(to(&node, tcp::RST), ip(second));
    assert_eq!(to(&node, tcp::SYN), ip(first));
    node.tables.backends[1].flags = 0;
    node.frontend(VIP, TCP, Frontend::MASQUERADE_REMOTE, 2..3);
    assert_eq!(to(&node, tcp::ACK), ip(first), "it lives on");
    assert_eq!(to(&node, tcp::SYN), ip(second), "and a new one does not begin there");
    assert_eq!(node.tables.flows.borrow().get(&theirs), Some(&flow), "untouched");
}

#[test]
fn a_tuple_that_a_flow_of_one_direction_has_is_free_when_that_has_ended() {
    let mut node = sender(Frontend::MASQUERADE_REMOTE);
    node.tables.config.features = 0;
    node.tables.config.port_high = node.tables.config.port_low;
    // One whose key is the only reply tuple that there is for the backend.
    let reply = tuple(TCP, (POD_OF_OTHER, 8080), (NODE, 50_000));
    let to = tuple(TCP, (NODE, 1), ("10.244.9.9", 2));
    let flow = Flow { to, seen: node.now, flags: Flow::DIRECT, ..Flow::default() };
    // Where its other half would be, if it had one; much in use.
    let seen = node.now + 61 * SECOND;
    let other = Flow { to: client(1), seen, flags: Flow::REPLY, ..Flow::default() };
    node.tables.flows.borrow_mut().extend([(reply, flow), (to.inverse(), other)]);
    assert_eq!(node.syn(client(4000)).0, Fate::Drop);
    node.now += 61 * SECOND;
    assert_eq!(node.syn(client(4000)).0, Fate::Redirect);
    assert_eq!(node.tables.flows.borrow().get(&to.inverse()), Some(&other), "nobody's half");
}
