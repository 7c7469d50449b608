//! A kernel that refuses.

use std::collections::BTreeSet;

use nix::libc::{EINVAL, ENFILE, EPERM};

use super::{Set, ip, tcp};
use crate::dataplane::ipvs::ruleset::{Element, ElementKey, Operation, Ruleset};
use crate::kernel::netlink::{Errno, FakeNetlink, NetlinkError};
use crate::kernel::nftables::decode_elements;

fn additions(ports: std::ops::RangeInclusive<u16>) -> Vec<(Operation, Element)> {
    ports.map(|port| (Operation::Add, tcp(Set::Frontends, "10.0.0.1", port))).collect()
}

#[test]
fn the_refused_elements_are_found_and_the_others_applied() {
    let bad = [77, 500, 501].map(|port| tcp(Set::Frontends, "10.0.0.1", port));
    let bad_keys = bad.map(|element| element.encode().unwrap());
    let accepted = std::sync::Arc::new(std::sync::Mutex::new(BTreeSet::new()));
    let netlink = FakeNetlink::new({
        let accepted = accepted.clone();
        move |message| {
            let keys = decode_elements(&message.payload).unwrap();
            if keys.iter().any(|key| bad_keys.iter().any(|bad| bad == key)) {
                return Err(Errno(ENFILE));
            }
            accepted.lock().unwrap().extend(keys);
            Ok(Vec::new())
        }
    });
    let changes = additions(1..=1000);
    let results = Ruleset::new(netlink.clone()).apply(&changes).unwrap();
    for ((_, element), result) in changes.iter().zip(results) {
        let expected = if bad.contains(element) { Err(Errno(ENFILE)) } else { Ok(()) };
        assert_eq!(result, expected, "{element}");
    }
    assert_eq!(accepted.lock().unwrap().len(), 997);
    let transactions = netlink.take_exchanges().len();
    assert!(transactions <= 64, "{transactions}");
}

#[test]
fn refusing_everything_costs_a_bounded_number_of_transactions() {
    let netlink = FakeNetlink::new(|message| {
        // The frame of a batch has no attributes.
        if message.payload.len() > 4 { Err(Errno(ENFILE)) } else { Ok(Vec::new()) }
    });
    let results = Ruleset::new(netlink.clone()).apply(&additions(1..=1024)).unwrap();
    assert!(results.iter().all(|result| *result == Err(Errno(ENFILE))));
    let transactions = netlink.take_exchanges().len();
    assert!(transactions <= 300, "{transactions}");

    // Refused as a whole, as without CAP_NET_ADMIN: nothing to search for.
    let netlink = FakeNetlink::new(|_| Err(Errno(EPERM)));
    let results = Ruleset::new(netlink.clone()).apply(&additions(1..=1000)).unwrap();
    assert!(results.iter().all(|result| *result == Err(Errno(EPERM))));
    assert_eq!(netlink.take_exchanges().len(), 1);
}

#[test]
fn a_key_in_the_wrong_set_never_reaches_the_kernel() {
    let netlink = FakeNetlink::default();
    let wrong = Element { set: Set::Reject, key: ElementKey::Address(ip("10.0.0.1")) };
    let right = tcp(Set::Reject, "10.0.0.1", 80);
    let changes = [(Operation::Add, wrong), (Operation::Add, right)];
    let results = Ruleset::new(netlink.clone()).apply(&changes).unwrap();
    assert_eq!(results, [Err(Errno(EINVAL)), Ok(())]);
    assert_eq!(netlink.messages().len(), 3);
    assert_eq!(Ruleset::new(netlink.clone()).apply(&changes[..1]).unwrap().len(), 1);
    assert_eq!(netlink.messages().len(), 3);
}

#[test]
fn a_failing_socket_is_not_a_refusal() {
    let netlink = FakeNetlink::default();
    netlink.fail_next(NetlinkError::Malformed("for the test"));
    assert!(Ruleset::new(netlink).apply(&additions(1..=2)).is_err());
}
