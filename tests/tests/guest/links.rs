//! The dummy link and its addresses on a kernel that has dummy links.

use std::net::IpAddr;

use proxy_daemon::kernel::links::{AddressChange, LinkAddress, Links, NetlinkLinks};
use proxy_daemon::kernel::netlink::{Socket, Subsystem};

use crate::{in_namespace, run};

const NAME: &str = "kube-ipvs0";

fn on_the_link(links: &mut impl Links, index: u32) -> Vec<LinkAddress> {
    links.addresses().unwrap().into_iter().filter(|address| address.link == index).collect()
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn the_link_and_its_addresses_are_as_kube_proxy_has_them() {
    in_namespace(|| {
        let mut links = NetlinkLinks::new(Socket::open(Subsystem::Route).unwrap());
        let index = links.ensure_dummy(NAME).unwrap();
        assert_eq!(links.ensure_dummy(NAME).unwrap(), index, "the second time it is there");
        let shown = run("ip", &["-d", "link", "show", NAME]);
        assert!(shown.contains("<BROADCAST,NOARP>"), "{shown}");
        assert!(shown.contains("state DOWN"), "{shown}");
        assert!(shown.contains("dummy"), "{shown}");

        let addresses: Vec<IpAddr> = (1..=500u16)
            .flat_map(|number| {
                let [high, low] = number.to_be_bytes();
                [
                    IpAddr::from([10, 96, high, low]),
                    IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, number]),
                ]
            })
            .collect();
        let add: Vec<_> = addresses.iter().copied().map(AddressChange::Add).collect();
        let before = links.counters().sends;
        assert!(links.change_addresses(index, &add).unwrap().iter().all(Result::is_ok));
        assert!(links.counters().sends - before <= 2);
        assert!(links.change_addresses(index, &add).unwrap().iter().all(Result::is_ok));
        let mut held = on_the_link(&mut links, index);
        held.sort_unstable();
        let mut expected: Vec<_> =
            addresses.iter().map(|&address| LinkAddress::alone(index, address)).collect();
        expected.sort_unstable();
        assert_eq!(held, expected);
        let shown = run("ip", &["address", "show", "dev", NAME]);
        assert!(shown.contains("inet 10.96.0.1/32 scope global"), "{shown}");
        assert!(shown.contains("inet6 fd00:96::1/128 scope global"), "{shown}");
        assert!(!shown.contains("tentative"), "{shown}");
        // Local to the node although the link is down.
        for address in ["10.96.0.1", "fd00:96::1"] {
            let route = run("ip", &["route", "get", address]);
            assert!(route.starts_with("local "), "{route}");
        }

        let delete: Vec<_> = addresses.iter().copied().map(AddressChange::Delete).collect();
        assert!(links.change_addresses(index, &delete).unwrap().iter().all(Result::is_ok));
        assert!(links.change_addresses(index, &delete).unwrap().iter().all(Result::is_ok));
        assert_eq!(on_the_link(&mut links, index), []);
        links.delete_dummy(NAME).unwrap();
        links.delete_dummy(NAME).unwrap();
        assert!(!run("ip", &["link"]).contains(NAME));
    });
}
