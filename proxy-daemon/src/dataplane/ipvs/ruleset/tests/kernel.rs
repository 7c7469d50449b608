//! What the kernel has after a call, and how many requests that took.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use super::{Set, config, ensured, in_namespace, ip, open, run, tcp};
use crate::dataplane::ipvs::ruleset::{
    Element, ElementKey, Ensured, Operation, Ruleset, RulesetError,
};
use crate::kernel::netlink::{Counters, Netlink, Socket};
use crate::kernel::nftables::Shape;
use crate::model::{Family, HostPort, LocalDetect, Protocol};

fn listing() -> String {
    run("nft", &["list", "ruleset"])
}

/// `nft` lists elements in the order of the kernel's hash.
fn nft_elements(family: &str, set: &str) -> BTreeSet<String> {
    let listing = run("nft", &["list", "set", family, "proxy-daemon", set]);
    let Some((_, rest)) = listing.split_once("elements = {") else {
        return BTreeSet::new();
    };
    let (inside, _) = rest.split_once('}').unwrap();
    inside
        .split(',')
        .map(|element| element.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

fn cost<T>(
    ruleset: &mut Ruleset<Socket>,
    act: impl FnOnce(&mut Ruleset<Socket>) -> T,
) -> (T, Counters) {
    let before = ruleset.netlink().counters();
    let result = act(ruleset);
    let after = ruleset.netlink().counters();
    let cost = Counters {
        requests: after.requests - before.requests,
        dumps: after.dumps - before.dumps,
        sends: after.sends - before.sends,
    };
    (result, cost)
}

fn both(state: Ensured) -> Vec<(Family, Ensured)> {
    Family::ALL.map(|family| (family, state)).to_vec()
}

fn add_all(ruleset: &mut Ruleset<Socket>, elements: &BTreeSet<Element>) {
    let changes: Vec<_> = elements.iter().map(|element| (Operation::Add, *element)).collect();
    let results = ruleset.apply(&changes).unwrap();
    assert_eq!(results.len(), changes.len());
    assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|r| r.is_err()));
}

/// On port 53; of what else the set wants, the address itself.
fn element(set: Set, address: IpAddr, protocol: Protocol) -> Element {
    let port = 53;
    let key = match set.shape() {
        Shape::Key => return Element::port(set, address, protocol, port),
        Shape::Interval => ElementKey::Range { address, protocol, port, from: address.into() },
        Shape::Data => {
            ElementKey::Redirect { address, protocol, port, to: HostPort::new(address, 80) }
        }
    };
    Element { set, key }
}

fn some_elements() -> BTreeSet<Element> {
    let mut elements = BTreeSet::new();
    for address in ["10.96.0.10", "fd00:10:96::10"] {
        elements.insert(Element::vip(ip(address)));
        for set in &Set::ALL[1..] {
            for protocol in Protocol::ALL {
                elements.insert(element(*set, ip(address), protocol));
            }
        }
    }
    elements
}

/// It changes with every change of the rules, which are shown whole anyway.
fn without_fingerprint(line: &str) -> String {
    match line.split_once("set proxy-daemon-") {
        Some((indent, rest)) => {
            assert!(rest.split_once(' ').is_some_and(|(hex, _)| hex.len() == 16), "{line}");
            format!("{indent}set proxy-daemon-FINGERPRINT {{")
        }
        None => line.to_owned(),
    }
}

#[test]
fn the_kernel_has_the_rules_that_were_meant() {
    in_namespace(|| {
        assert_eq!(open().ensure(&config()).unwrap(), both(Ensured::Created));
        let expected = include_str!("expected.nft");
        let listing: Vec<_> = listing().lines().map(without_fingerprint).collect();
        let listing = listing.join("\n");
        assert!(listing.trim() == expected.trim(), "{listing}");
    });
}

#[test]
fn a_second_ensure_writes_nothing() {
    in_namespace(|| {
        drop(ensured());
        let (states, cost) = cost(&mut open(), |ruleset| ruleset.ensure(&config()).unwrap());
        assert_eq!(states, both(Ensured::Unchanged));
        assert_eq!(cost, Counters { requests: 0, dumps: 4, sends: 4 });
    });
}

#[test]
fn elements_are_written_and_read_back() {
    in_namespace(|| {
        let mut ruleset = ensured();
        let elements = some_elements();
        add_all(&mut ruleset, &elements);
        assert_eq!(ruleset.elements().unwrap(), elements);
        for family in ["ip", "ip6"] {
            let address = if family == "ip" { "10.96.0.10" } else { "fd00:10:96::10" };
            assert_eq!(nft_elements(family, "vips"), [address.to_owned()].into());
            let ports = ["tcp", "udp", "sctp"].map(|p| format!("{address} . {p} . 53"));
            assert_eq!(nft_elements(family, "frontends"), ports.clone().into());
            let hairpins = ports.map(|port| format!("{address} . {port}"));
            assert_eq!(nft_elements(family, "hairpin"), hairpins.into());
        }
        // What is there is added once more, what is not is deleted: both succeed.
        let mut changes: Vec<_> = elements.iter().map(|e| (Operation::Add, *e)).collect();
        let absent = tcp(Set::Reject, "10.96.0.99", 1);
        changes.extend([
            (Operation::Delete, absent),
            (Operation::Delete, tcp(Set::Drop, "10.96.0.10", 53)),
        ]);
        assert!(ruleset.apply(&changes).unwrap().iter().all(Result::is_ok));
        let mut left = elements;
        left.remove(&tcp(Set::Drop, "10.96.0.10", 53));
        assert_eq!(ruleset.elements().unwrap(), left);
    });
}

#[test]
fn the_last_change_of_an_element_counts() {
    in_namespace(|| {
        let mut ruleset = ensured();
        let [kept, gone] = [tcp(Set::Reject, "10.0.0.1", 1), tcp(Set::Reject, "10.0.0.2", 1)];
        let changes = [
            (Operation::Add, gone),
            (Operation::Delete, kept),
            (Operation::Delete, gone),
            (Operation::Add, kept),
        ];
        assert_eq!(ruleset.apply(&changes).unwrap(), [Ok(()); 4]);
        assert_eq!(ruleset.elements().unwrap(), [kept].into());
    });
}

#[test]
fn another_configuration_keeps_the_elements() {
    in_namespace(|| {
        let mut ruleset = ensured();
        add_all(&mut ruleset, &some_elements());
        let mut changed = config();
        changed.masquerade_bit = 3;
        changed.local_detect = LocalDetect::Bridge("cni0".into());
        assert_eq!(ruleset.ensure(&changed).unwrap(), both(Ensured::Replaced));
        assert_eq!(ruleset.elements().unwrap(), some_elements());
        let bridge = listing();
        assert!(bridge.contains("iifname \"cni0\" return"), "{bridge}");
        assert!(bridge.contains("meta mark set meta mark | 0x00000008"), "{bridge}");
        assert!(!bridge.contains("0x00004000") && !bridge.contains("10.244"), "{bridge}");
        assert_eq!(ruleset.ensure(&changed).unwrap(), both(Ensured::Unchanged));

        changed.local_detect = LocalDetect::InterfacePrefix("veth".into());
        assert_eq!(ruleset.ensure(&changed).unwrap(), both(Ensured::Replaced));
        assert!(listing().contains("iifname \"veth*\" return"));
        changed.masquerade_all = true;
        assert_eq!(ruleset.ensure(&changed).unwrap(), both(Ensured::Replaced));
        assert!(!listing().contains("iifname \"veth*\" return"));
        changed.families = vec![Family::V4];
        let states = ruleset.ensure(&changed).unwrap();
        assert_eq!(states, [(Family::V4, Ensured::Unchanged), (Family::V6, Ensured::Deleted)]);
        assert!(!listing().contains("table ip6"));
    });
}

#[test]
fn what_somebody_else_deleted_comes_back() {
    in_namespace(|| {
        let mut ruleset = ensured();
        let whole = listing();
        for damage in [
            "flush chain ip proxy-daemon input",
            "flush table ip proxy-daemon ; delete chain ip proxy-daemon output",
            "flush table ip proxy-daemon ; delete set ip proxy-daemon rejected",
            "flush table ip proxy-daemon ; delete set ip proxy-daemon dropped ; \
             add set ip proxy-daemon dropped { type ipv4_addr; }",
        ] {
            run("nft", &[damage]);
            assert_ne!(listing(), whole, "{damage}");
            let states = ruleset.ensure(&config()).unwrap();
            let repaired = [(Family::V4, Ensured::Replaced), (Family::V6, Ensured::Unchanged)];
            assert_eq!(states, repaired, "{damage}");
            let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
            assert_eq!(sorted(&listing()), sorted(&whole), "{damage}");
        }
        run("nft", &["flush", "ruleset"]);
        assert_eq!(ruleset.ensure(&config()).unwrap(), both(Ensured::Created));
        assert_eq!(listing(), whole);
    });
}

/// As administrators save and restore rules.
#[test]
fn nft_can_load_what_it_lists() {
    in_namespace(|| {
        let mut ruleset = ensured();
        add_all(&mut ruleset, &some_elements());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, listing()).unwrap();
        run("nft", &["flush", "ruleset"]);
        run("nft", &["-f", file.path().to_str().unwrap()]);
        assert_eq!(ruleset.ensure(&config()).unwrap(), both(Ensured::Unchanged));
        assert_eq!(ruleset.elements().unwrap(), some_elements());
    });
}

#[test]
fn a_foreign_table_stays_as_it_is() {
    in_namespace(|| {
        run(
            "nft",
            &["add table ip6 proxy-daemon ; add set ip6 proxy-daemon vips { type ipv6_addr; } ; \
                      add table ip other ; add chain ip other proxy-daemon"],
        );
        let before = listing();
        let mut ruleset = open();
        let (result, cost) = cost(&mut ruleset, |ruleset| {
            let only_v6 = super::RulesetConfig { families: vec![Family::V6], ..config() };
            ruleset.ensure(&only_v6)
        });
        let error = result.unwrap_err();
        assert!(matches!(error, RulesetError::Foreign(Family::V6)), "{error}");
        assert!(error.to_string().contains("ip6 proxy-daemon"), "{error}");
        assert_eq!(cost.requests, 0);
        assert_eq!(ruleset.delete_table().unwrap(), []);
        assert_eq!(listing(), before);
    });
}

#[test]
fn deleting_leaves_nothing_but_others() {
    in_namespace(|| {
        run("nft", &["add table inet proxy-daemon ; add table ip kube-proxy"]);
        let before = listing();
        let mut ruleset = ensured();
        add_all(&mut ruleset, &some_elements());
        // As after a start that only cleans up.
        let mut ruleset = open();
        assert_eq!(ruleset.elements().unwrap(), [].into());
        ruleset.find().unwrap();
        assert_eq!(ruleset.elements().unwrap(), some_elements());
        assert_eq!(ruleset.delete_table().unwrap(), Family::ALL);
        assert_eq!(listing(), before);
        assert_eq!(ruleset.delete_table().unwrap(), []);
    });
}

#[test]
fn one_change_costs_the_same_at_any_size() {
    in_namespace(|| {
        let mut ruleset = ensured();
        let element = tcp(Set::Frontends, "10.99.0.1", 443);
        let change =
            |operation| move |r: &mut Ruleset<Socket>| r.apply(&[(operation, element)]).unwrap();
        let one = Counters { requests: 3, dumps: 0, sends: 1 };
        assert_eq!(cost(&mut ruleset, change(Operation::Add)).1, one);

        let many: BTreeSet<_> = (0..100_000_u32)
            .map(|n| IpAddr::from(Ipv4Addr::from_bits(0x0a60_0000 + n)))
            .map(|address| Element::port(Set::Frontends, address, Protocol::Tcp, 443))
            .collect();
        let (_, bulk) = cost(&mut ruleset, |ruleset| add_all(ruleset, &many));
        // Frame and one message for each 1024 elements.
        assert_eq!(bulk, Counters { requests: 3 * 98, dumps: 0, sends: 98 });

        assert_eq!(cost(&mut ruleset, change(Operation::Delete)).1, one);
        assert_eq!(cost(&mut ruleset, change(Operation::Add)).1, one);
        // One for each set; while the kernel resizes it, a dump has to begin again.
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let (found, readback) = cost(&mut ruleset, |ruleset| ruleset.elements().unwrap());
            assert_eq!((found.len(), readback.requests), (100_001, 0));
            if (16..26).contains(&readback.dumps) {
                break;
            }
            assert!(readback.dumps >= 16 && Instant::now() < end, "{readback:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}

#[test]
fn a_table_that_is_gone_is_reported_at_once() {
    in_namespace(|| {
        let mut ruleset = ensured();
        run("nft", &["flush", "ruleset"]);
        let changes: Vec<_> = (1..=1000)
            .flat_map(|port| {
                let [a, b] = [Set::Reject, Set::Drop].map(|set| tcp(set, "10.0.0.1", port));
                [(Operation::Add, a), (Operation::Delete, b)]
            })
            .collect();
        let (results, cost) = cost(&mut ruleset, |ruleset| ruleset.apply(&changes).unwrap());
        assert!(results.iter().all(|result| result.unwrap_err().0 == nix::libc::ENOENT));
        assert!(cost.sends <= 6, "{cost:?}");
    });
}

#[test]
fn impossible_configurations_are_refused_before_anything_is_written() {
    in_namespace(|| {
        let mut impossible = config();
        impossible.masquerade_bit = 32;
        let error = open().ensure(&impossible).unwrap_err();
        assert!(matches!(error, RulesetError::MasqueradeBit(32)), "{error}");
        impossible = config();
        impossible.local_detect = LocalDetect::Bridge("sixteen-letters-".into());
        let error = open().ensure(&impossible).unwrap_err();
        assert!(matches!(error, RulesetError::InterfaceName(_)), "{error}");
        assert_eq!(listing(), "");
    });
}
