//! Addresses and their monitor against the running kernel, in a network namespace that
//! the test's thread owns; they need root. Dummy links are tested in a guest: not every
//! kernel that builds the project has them.

use std::net::IpAddr;
use std::time::Duration;

use super::{AddressChange, AddressMonitor, LinkAddress, Links, NetlinkLinks};
use crate::kernel::namespace::in_new_namespace;
use crate::kernel::netlink::{Socket, Subsystem};

/// The loopback device, the only link of a new namespace.
const LOOPBACK: u32 = 1;

fn links() -> NetlinkLinks<Socket> {
    NetlinkLinks::new(Socket::open(Subsystem::Route).unwrap())
}

fn addresses(count: u16) -> Vec<IpAddr> {
    (1..=count)
        .flat_map(|number| {
            let [high, low] = number.to_be_bytes();
            [IpAddr::from([10, 96, high, low]), IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, number])]
        })
        .collect()
}

fn changes(of: fn(IpAddr) -> AddressChange, addresses: &[IpAddr]) -> Vec<AddressChange> {
    addresses.iter().copied().map(of).collect()
}

#[test]
fn addresses_are_added_listed_and_deleted() {
    in_new_namespace(|| {
        let mut links = links();
        let all = addresses(300);
        for _ in 0..2 {
            let added =
                links.change_addresses(LOOPBACK, &changes(AddressChange::Add, &all)).unwrap();
            assert!(added.iter().all(Result::is_ok), "{added:?}");
        }
        let mut held = links.addresses().unwrap();
        held.sort_unstable();
        let mut expected: Vec<_> =
            all.iter().map(|&address| LinkAddress { link: LOOPBACK, address }).collect();
        expected.sort_unstable();
        assert_eq!(held, expected);
        for _ in 0..2 {
            let deleted =
                links.change_addresses(LOOPBACK, &changes(AddressChange::Delete, &all)).unwrap();
            assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
        }
        assert_eq!(links.addresses().unwrap(), []);
        let counters = links.counters();
        assert_eq!(counters.requests, 2400);
        // Duplicate address detection ends at a time of its own, and a dump that meets its
        // end is interrupted (`NLM_F_DUMP_INTR`) and made again.
        assert!((2..=30).contains(&counters.dumps), "{counters:?}");
        assert!(counters.sends <= 10, "{counters:?}");
    });
}

#[test]
fn the_monitor_hears_each_burst_once() {
    in_new_namespace(|| {
        let (mut links, mut monitor) = (links(), AddressMonitor::open().unwrap());
        let (soon, long) = (Duration::from_millis(1), Duration::from_secs(10));
        assert!(!monitor.wait(soon).unwrap(), "nothing happened yet");
        for (family, address) in addresses(1).into_iter().enumerate() {
            links.change_addresses(LOOPBACK, &[AddressChange::Add(address)]).unwrap();
            assert!(monitor.wait(long).unwrap(), "family {family}");
            assert!(!monitor.wait(soon).unwrap(), "one notice for one burst");
        }
    });
}

#[test]
fn the_monitor_is_deaf_to_the_link_it_is_told_to_ignore() {
    in_new_namespace(|| {
        let (mut links, mut monitor) = (links(), AddressMonitor::open().unwrap());
        monitor.ignore(Some(LOOPBACK));
        links.change_addresses(LOOPBACK, &changes(AddressChange::Add, &addresses(20))).unwrap();
        assert!(!monitor.wait(Duration::from_millis(50)).unwrap());
    });
}

#[test]
fn link_local_addresses_of_pods_interfaces_are_no_news() {
    in_new_namespace(|| {
        let mut monitor = AddressMonitor::open().unwrap();
        let add = |address: &str, scope: &str| {
            let arguments = ["addr", "add", address, "dev", "lo", "scope", scope];
            assert!(std::process::Command::new("ip").args(arguments).status().unwrap().success());
        };
        add("fe80::7/64", "link");
        assert!(!monitor.wait(Duration::from_millis(50)).unwrap());
        add("fd00::7/64", "global");
        assert!(monitor.wait(Duration::from_secs(10)).unwrap());
    });
}

/// More notices than the socket's buffer takes: the kernel drops some and says ENOBUFS.
#[test]
fn the_monitor_survives_an_overflow() {
    in_new_namespace(|| {
        let (mut links, mut monitor) = (links(), AddressMonitor::open().unwrap());
        let all = addresses(2000);
        links.change_addresses(LOOPBACK, &changes(AddressChange::Add, &all)).unwrap();
        assert!(monitor.wait(Duration::from_secs(10)).unwrap());
        links.change_addresses(LOOPBACK, &[AddressChange::Delete(all[0])]).unwrap();
        assert!(monitor.wait(Duration::from_secs(10)).unwrap(), "it still listens");
    });
}
