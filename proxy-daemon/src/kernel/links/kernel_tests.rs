//! Addresses and their monitor against the running kernel, in a network namespace that
//! the test's thread owns; they need root. Dummy links are tested in a guest: not every
//! kernel that builds the project has them.

use std::net::IpAddr;
use std::time::Duration;

use super::{AddressChange, AddressMonitor, LinkAddress, Links, LinksError, NetlinkLinks};
use crate::kernel::namespace::in_new_namespace;
use crate::kernel::netlink::{NetlinkError, Socket, Subsystem};

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

/// Duplicate address detection ends for each address at a time of its own, and a dump that meets
/// such an end is interrupted (`NLM_F_DUMP_INTR`) and made again, and given up when that goes on.
fn listed(links: &mut NetlinkLinks<Socket>) -> Vec<LinkAddress> {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        match links.addresses() {
            Err(LinksError::Netlink(NetlinkError::Interrupted { .. }))
                if std::time::Instant::now() < end =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            listed => return listed.unwrap(),
        }
    }
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
        let mut held = listed(&mut links);
        held.sort_unstable();
        let mut expected: Vec<_> =
            all.iter().map(|&address| LinkAddress::alone(LOOPBACK, address)).collect();
        expected.sort_unstable();
        assert_eq!(held, expected);
        for _ in 0..2 {
            let deleted =
                links.change_addresses(LOOPBACK, &changes(AddressChange::Delete, &all)).unwrap();
            assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
        }
        assert_eq!(listed(&mut links), []);
        let counters = links.counters();
        assert_eq!(counters.requests, 2400);
        assert!(counters.dumps >= 2, "{counters:?}");
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
