//! What XDP does by itself, and for whom.

use super::*;
use crate::checksum;

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
