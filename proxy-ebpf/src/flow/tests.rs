use super::*;
use crate::parse::SCTP;

#[test]
fn timeouts_follow_the_state() {
    let t = Timeouts::default();
    let closing = Flow::REPLIED | Flow::FIN | Flow::PEER_FIN;
    for (protocol, flags, expected) in [
        (TCP, 0, t.tcp_opening),
        (TCP, Flow::REPLIED, t.tcp_established),
        (TCP, Flow::REPLIED | Flow::FIN, t.tcp_established),
        (TCP, closing, t.tcp_closing),
        (TCP, Flow::RESET, t.tcp_closing),
        (UDP, 0, t.udp),
        (UDP, Flow::REPLIED, t.udp_replied),
        (SCTP, 0, t.sctp),
        (SCTP, Flow::RESET, t.tcp_closing),
    ] {
        assert_eq!(timeout(protocol, flags, &t), expected, "{protocol} {flags:#x}");
    }
}
