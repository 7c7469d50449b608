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

use ipnetwork::IpNetwork;

use super::{Element, ElementKey, Ruleset, RulesetConfig, Set};
use crate::kernel::namespace::in_new_namespace;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::nftables::{ElementBytes, Shape, length};
use crate::model::{Family, LocalDetect, Protocol};

fn in_namespace(test: impl FnOnce() + Send + 'static) {
    in_new_namespace(move || {
        run("ip", &["link", "set", "lo", "up"]);
        test();
    });
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
        service_cidrs: Vec::new(),
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

/// One of any set and family.
fn any_element() -> impl Strategy<Value = Element> {
    let set = proptest::sample::select(&Set::ALL[..]);
    let protocol = proptest::sample::select(&Protocol::ALL[..]);
    let other = (any::<std::net::Ipv4Addr>(), any::<std::net::Ipv6Addr>());
    (set, any::<IpAddr>(), protocol, any::<u16>(), other, 0..=128_u8).prop_map(
        |(set, address, protocol, port, (v4, v6), prefix)| {
            let (other, longest) = match address {
                IpAddr::V4(_) => (IpAddr::V4(v4), 32),
                IpAddr::V6(_) => (IpAddr::V6(v6), 128),
            };
            let key = match set.shape() {
                _ if set == Set::Vips => ElementKey::Address(address),
                Shape::Key => ElementKey::Port { address, protocol, port },
                Shape::Data => {
                    let to = crate::model::HostPort::new(other, port ^ 0x55);
                    ElementKey::Redirect { address, protocol, port, to }
                }
                Shape::Interval => {
                    let network = IpNetwork::new(other, prefix.min(longest)).unwrap();
                    let from = IpNetwork::new(network.network(), network.prefix()).unwrap();
                    ElementKey::Range { address, protocol, port, from }
                }
            };
            Element { set, key }
        },
    )
}

proptest! {
    #[test]
    fn an_element_survives_the_encoding(element in any_element()) {
        let bytes = element.encode().unwrap();
        let layout = element.set.layout(element.family());
        prop_assert_eq!(bytes.key.len(), length(layout.key) as usize);
        let more = match layout.shape {
            Shape::Key => 0,
            Shape::Interval => length(layout.key),
            Shape::Data => length(layout.data),
        };
        prop_assert_eq!(bytes.more.len(), more as usize);
        prop_assert_eq!(Element::decode(element.set, element.family(), &bytes), Some(element));
    }

    #[test]
    fn arbitrary_elements_are_decoded_or_ignored(
        set in proptest::sample::select(&Set::ALL[..]),
        family in prop_oneof![Just(Family::V4), Just(Family::V6)],
        key in vec(any::<u8>(), 0..64),
        more in vec(any::<u8>(), 0..64),
    ) {
        let bytes = ElementBytes { key, more };
        if let Some(element) = Element::decode(set, family, &bytes) {
            prop_assert_eq!(element.encode().unwrap().key.len(), bytes.key.len());
        }
    }
}
