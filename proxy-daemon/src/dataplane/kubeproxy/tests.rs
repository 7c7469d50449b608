//! The removal against kernels that are pretended; a real one is in the guest's tests.

use std::collections::BTreeSet;

use super::*;
use crate::kernel::ipset::FakeIpSets;
use crate::kernel::netlink::FakeNetlink;
use crate::kernel::netlink::fake::Exchange;
use crate::kernel::nftables::{
    BaseChain, ChainKind, Expression, Hook, Verdict, decode_chain, decode_rule,
};
use crate::kernel::xtables::FakeXTables;

/// `NFT_MSG_GETCHAIN`, `NFT_MSG_DELCHAIN`, `NFT_MSG_GETRULE`.
const GET_CHAIN: u16 = (10 << 8) | 4;
const DEL_CHAIN: u16 = (10 << 8) | 5;
const GET_RULE: u16 = (10 << 8) | 7;

fn member(address: &str, protocol: Protocol, port: u16) -> Member {
    let address = Some(address.parse().unwrap());
    Member { address, port: Some(port), protocol: Some(protocol.number()) }
}

fn sets(names: &[&str]) -> FakeIpSets {
    let fake = FakeIpSets::default();
    fake.state().sets.extend(names.iter().map(|name| ((*name).to_owned(), Vec::new())));
    fake
}

fn leftovers(netlink: &FakeNetlink, sets: &FakeIpSets) -> Leftovers {
    let xtables = Box::new(FakeXTables::default());
    Leftovers::new(Box::new(netlink.clone()), xtables, Box::new(sets.clone()))
}

/// A table `ip filter` in which INPUT jumps to a chain of kube-proxy's and to another.
fn filter(message: &Message) -> crate::kernel::netlink::fake::Reply {
    let table = Table { family: Family::V4, name: "filter" };
    // The kernel answers for the family asked about.
    if message.payload.first() != Some(&2) {
        return Ok(Vec::new());
    }
    let base = BaseChain { kind: ChainKind::Filter, hook: Hook::Input, priority: 0 };
    let jump =
        |to: &str| table.append_rule("INPUT", &[Expression::Verdict(Verdict::Jump(to.to_owned()))]);
    Ok(match message.kind {
        GET_CHAIN => vec![
            table.add_chain("INPUT", Some(base)),
            table.add_chain("KUBE-IPVS-FILTER", None),
            table.add_chain("KUBE-FIREWALL", None),
        ],
        GET_RULE if decoded_table(message) == "filter" => {
            vec![jump("KUBE-IPVS-FILTER"), jump("KUBE-FIREWALL")]
        }
        _ => Vec::new(),
    })
}

fn decoded_table(message: &Message) -> String {
    // A request to list rules holds the table's name alone: the first attribute.
    let name = message.payload.get(8..).unwrap_or_default();
    String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[test]
fn chains_go_in_one_transaction_and_sets_after_them() {
    let netlink = FakeNetlink::new(filter);
    let fake = sets(&["KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP", "mine"]);
    let removed = leftovers(&netlink, &fake).remove(Forwarding::Keep).unwrap();
    assert_eq!((removed.rules, removed.chains, removed.sets), (1, 1, 2));
    assert_eq!(fake.state().sets.keys().collect::<Vec<_>>(), ["mine"]);
    let transactions: Vec<_> = netlink
        .take_exchanges()
        .into_iter()
        .filter_map(|exchange| match exchange {
            Exchange::Transaction(messages) => Some(messages),
            _ => None,
        })
        .collect();
    let [messages] = transactions.as_slice() else { panic!("{} transactions", transactions.len()) };
    let chains: Vec<String> = messages[1..3]
        .iter()
        .map(|message| decode_rule(message).unwrap().chain)
        .chain([decode_chain(&messages[3]).unwrap().chain])
        .collect();
    assert_eq!(chains, ["INPUT", "KUBE-IPVS-FILTER", "KUBE-IPVS-FILTER"]);
}

#[test]
fn a_chain_that_the_kernel_holds_stays_and_so_do_sets_while_chains_fail() {
    let fake = sets(&["KUBE-CLUSTER-IP"]);
    let busy = FakeNetlink::new(|message| match message.kind {
        DEL_CHAIN => Err(Errno(libc::EBUSY)),
        _ => filter(message),
    });
    let removed = leftovers(&busy, &fake).remove(Forwarding::Keep).unwrap();
    // The jump to it goes, the chain is somebody's.
    assert_eq!((removed.rules, removed.chains), (1, 0));
    assert_eq!(removed.kept.keys().collect::<Vec<_>>(), ["KUBE-IPVS-FILTER"]);

    let fake = sets(&["KUBE-CLUSTER-IP"]);
    let refusing = FakeNetlink::new(|message| match message.kind {
        DEL_CHAIN => Err(Errno(libc::EPERM)),
        _ => filter(message),
    });
    let error = leftovers(&refusing, &fake).remove(Forwarding::Keep).unwrap_err();
    assert!(error.to_string().contains("EPERM"), "{error}");
    assert_eq!(fake.state().sets.len(), 1, "rules may still refer to it");
}

#[test]
fn sets_are_waited_for_while_rules_let_go_of_them() {
    let fake = sets(&["KUBE-CLUSTER-IP", "KUBE-LOOP-BACK"]);
    fake.state().busy.insert("KUBE-CLUSTER-IP".to_owned(), 2);
    let removed = leftovers(&FakeNetlink::default(), &fake).remove(Forwarding::Keep).unwrap();
    assert_eq!(removed.sets, 2);
    let fake = sets(&["KUBE-CLUSTER-IP"]);
    fake.state().busy.insert("KUBE-CLUSTER-IP".to_owned(), u32::MAX);
    let error = leftovers(&FakeNetlink::default(), &fake).remove(Forwarding::Keep).unwrap_err();
    assert!(error.to_string().contains("KUBE-CLUSTER-IP"), "{error}");
}

#[test]
fn frontends_in_the_sets_are_evidence() {
    let fake = FakeIpSets::default();
    {
        let mut state = fake.state();
        let mut insert = |set: &str, members| state.sets.insert(set.to_owned(), members);
        insert("KUBE-CLUSTER-IP", vec![member("10.96.0.1", Protocol::Tcp, 443)]);
        insert("KUBE-6-CLUSTER-IP", vec![member("fd00::1", Protocol::Udp, 53)]);
        let port = Member { port: Some(30900), ..Member::default() };
        insert("KUBE-NODE-PORT-TCP", vec![port]);
        insert("foreign", vec![member("10.96.0.2", Protocol::Tcp, 80)]);
    }
    let evidence = leftovers(&FakeNetlink::default(), &fake).evidence().unwrap();
    let names = |address: &str, protocol, port, of_node| {
        evidence.names(address.parse().unwrap(), protocol, port, of_node)
    };
    assert!(names("10.96.0.1", Protocol::Tcp, 443, false));
    assert!(names("fd00::1", Protocol::Udp, 53, false));
    assert!(!names("10.96.0.1", Protocol::Udp, 443, true));
    assert!(!names("10.96.0.2", Protocol::Tcp, 80, true));
    assert!(names("192.0.2.7", Protocol::Tcp, 30900, true));
    assert!(!names("192.0.2.7", Protocol::Tcp, 30900, false), "not an address of the node");
    assert!(!names("2001:db8::7", Protocol::Tcp, 30900, true), "the other family's ports");
    let read: BTreeSet<String> = fake.state().read.clone();
    assert!(!read.contains("foreign"));
}

#[test]
fn presence_is_seen_in_sets_and_chains() {
    let nothing = FakeNetlink::default();
    assert!(!leftovers(&nothing, &sets(&["mine"])).present().unwrap());
    assert!(leftovers(&nothing, &sets(&["KUBE-IPVS-IPS"])).present().unwrap());
    let services = FakeNetlink::new(|message| {
        let table = Table { family: Family::V6, name: "nat" };
        let chain = table.add_chain("KUBE-SERVICES", None);
        Ok(if message.kind == GET_CHAIN { vec![chain] } else { Vec::new() })
    });
    assert!(leftovers(&services, &sets(&[])).present().unwrap());
}
