//! The ruleset against the running kernel, each test in a network namespace that its
//! thread owns and that goes when the thread does. They need root, `nft` (only here: to
//! see with other eyes) and `ip`.

mod faults;
mod kernel;
mod traffic;

use std::net::IpAddr;
use std::process::Command;

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};

use super::{Element, Ruleset, RulesetConfig, Set};
use crate::kernel::netlink::{Socket, Subsystem};
use crate::model::{Family, LocalDetect, Protocol};

fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("a network namespace of the test's own (needs root)");
        run("ip", &["link", "set", "lo", "up"]);
        test();
    })
    .join()
    .expect("the test in its namespace");
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} (install it for this test): {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn config() -> RulesetConfig {
    RulesetConfig {
        masquerade_all: false,
        masquerade_bit: super::DEFAULT_MASQUERADE_BIT,
        local_detect: LocalDetect::Cidrs(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/56".parse().unwrap(),
        ]),
        families: Family::ALL.to_vec(),
    }
}

fn open() -> Ruleset<Socket> {
    Ruleset::new(Socket::open(Subsystem::Netfilter).unwrap())
}

fn ensured() -> Ruleset<Socket> {
    let mut ruleset = open();
    ruleset.ensure(&config()).unwrap();
    ruleset
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn tcp(set: Set, address: &str, port: u16) -> Element {
    Element::port(set, ip(address), Protocol::Tcp, port)
}

fn any_element() -> impl Strategy<Value = Element> {
    let set = proptest::sample::select(&Set::ALL[1..]);
    let protocol = proptest::sample::select(&Protocol::ALL[..]);
    let port = (set, any::<IpAddr>(), protocol, any::<u16>())
        .prop_map(|(set, address, protocol, port)| Element::port(set, address, protocol, port));
    prop_oneof![any::<IpAddr>().prop_map(Element::vip), port]
}

proptest! {
    #[test]
    fn an_element_survives_the_encoding(element in any_element()) {
        let key = element.encode().unwrap();
        prop_assert_eq!(key.len(), element.set.key_length(element.family()) as usize);
        prop_assert_eq!(Element::decode(element.set, element.family(), &key), Some(element));
    }

    #[test]
    fn arbitrary_keys_are_decoded_or_ignored(
        set in proptest::sample::select(&Set::ALL[..]),
        family in prop_oneof![Just(Family::V4), Just(Family::V6)],
        key in vec(any::<u8>(), 0..64),
    ) {
        if let Some(element) = Element::decode(set, family, &key) {
            prop_assert_eq!(element.encode().unwrap().len(), key.len());
        }
    }
}
