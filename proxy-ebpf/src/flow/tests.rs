use super::*;
use crate::parse::SCTP;

#[test]
fn timeouts_follow_the_state() {
    let t = Timeouts::default();
    let closing = Flow::REPLIED | Flow::FIN | Flow::PEER_FIN;
    for (protocol, flags, expected) in [
        (TCP, 0, t.tcp_opening),
        (TCP, Flow::REPLIED, t.tcp_established),
        (TCP, Flow::REPLIED | Flow::OPENING, t.tcp_opening),
        (TCP, Flow::REPLIED | Flow::FIN, 3_600),
        (TCP, Flow::REPLIED | Flow::PEER_FIN, 3_600),
        (TCP, Flow::DIRECT | Flow::REPLIED, t.tcp_established),
        (TCP, Flow::DIRECT | Flow::REPLIED | Flow::FIN, t.tcp_opening),
        (TCP, closing, t.tcp_closing),
        (TCP, Flow::RESET, t.tcp_closing),
        (UDP, 0, t.udp),
        (UDP, Flow::REPLIED, t.udp_replied),
        (SCTP, 0, t.tcp_opening),
        (SCTP, Flow::OPENING | Flow::REPLIED, t.tcp_opening),
        (SCTP, Flow::REPLIED, t.sctp),
        (SCTP, Flow::DIRECT, t.sctp),
        (SCTP, Flow::RESET, t.tcp_closing),
    ] {
        assert_eq!(timeout(protocol, flags, &t), expected, "{protocol} {flags:#x}");
    }
}
