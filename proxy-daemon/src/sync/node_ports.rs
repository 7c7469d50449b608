//! On which addresses of the node its node ports listen.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;

use crate::model::Family;

/// `--nodeport-addresses`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NodePortAddresses {
    /// Every address of the node except loopback and link-local ones.
    #[default]
    All,
    /// The addresses of the Node object.
    Primary,
    /// The same, with this one in place of the Node's of its family.
    PrimaryOr(IpAddr),
    /// Those in these; all of a family of which none is here, or the one that holds everything.
    Cidrs(Vec<IpNetwork>),
}

impl NodePortAddresses {
    /// Loopback's is the one address that is not among those of [`NodePortAddresses::All`].
    fn includes(&self, address: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::Primary | Self::PrimaryOr(_) => false,
            Self::Cidrs(cidrs) => is_chosen(cidrs, address, |_| true),
        }
    }
}

/// As kube-proxy: a choice is made for each family by itself.
fn is_chosen(cidrs: &[IpNetwork], address: IpAddr, among_all: impl Fn(&IpAddr) -> bool) -> bool {
    let family = Family::of(address);
    let mut chosen = cidrs.iter().filter(|cidr| Family::of(cidr.ip()) == family).peekable();
    if chosen.peek().is_none() || chosen.clone().any(|cidr| cidr.prefix() == 0) {
        among_all(&address)
    } else {
        chosen.any(|cidr| cidr.contains(address))
    }
}

/// The addresses on which node ports listen: pure, so that every case is a unit test.
///
/// With `localhost` they do on 127.0.0.1 too, unless the choice excludes it.
pub fn node_port_addresses(
    choice: &NodePortAddresses,
    local: &[IpAddr],
    primary: &[IpAddr],
    localhost: bool,
) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = match choice {
        NodePortAddresses::All => local.iter().copied().filter(usable_for_node_ports).collect(),
        NodePortAddresses::Primary => first_of_each_family(primary.iter().copied()),
        NodePortAddresses::PrimaryOr(own) => {
            first_of_each_family(std::iter::once(*own).chain(primary.iter().copied()))
        }
        NodePortAddresses::Cidrs(cidrs) => local
            .iter()
            .copied()
            .filter(|address| is_chosen(cidrs, *address, usable_for_node_ports))
            .collect(),
    };
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    addresses.retain(|address| *address != loopback);
    if localhost && choice.includes(loopback) {
        addresses.push(loopback);
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn first_of_each_family(addresses: impl Iterator<Item = IpAddr> + Clone) -> Vec<IpAddr> {
    [Family::V4, Family::V6]
        .into_iter()
        .filter_map(|family| addresses.clone().find(|address| Family::of(*address) == family))
        .collect()
}

/// Loopback is never a node-port address in IPVS mode: IPVS cannot send a packet with a
/// loopback source to another host. Link-local addresses are not unique on the node.
pub fn usable_for_node_ports(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_ones_own_goes_before_the_nodes_of_its_family() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let primary = [ip("192.0.2.1"), ip("192.0.2.2"), ip("2001:db8::1")];
        let choose = |choice| node_port_addresses(&choice, &[ip("198.51.100.1")], &primary, false);
        let of_the_node = choose(NodePortAddresses::Primary);
        assert_eq!(of_the_node, [ip("192.0.2.1"), ip("2001:db8::1")]);
        let own = choose(NodePortAddresses::PrimaryOr(ip("192.0.2.9")));
        assert_eq!(own, [ip("192.0.2.9"), ip("2001:db8::1")]);
    }

    #[test]
    fn each_family_is_chosen_by_itself_and_a_network_of_everything_is_no_choice() {
        let local = [
            "127.0.0.1",
            "169.254.0.1",
            "192.0.2.1",
            "198.51.100.1",
            "::1",
            "fe80::1",
            "2001:db8::1",
            "2001:db8:1::1",
        ]
        .map(|ip| ip.parse::<IpAddr>().unwrap());
        let choose = |cidrs: &str| {
            let cidrs = cidrs.split(',').map(|cidr| cidr.parse().unwrap()).collect();
            let choice = NodePortAddresses::Cidrs(cidrs);
            let chosen = node_port_addresses(&choice, &local, &[], false);
            chosen.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        let (all_v4, all_v6) = ("192.0.2.1 198.51.100.1", "2001:db8::1 2001:db8:1::1");
        assert_eq!(choose("192.0.2.0/24"), format!("192.0.2.1 {all_v6}"));
        assert_eq!(choose("2001:db8:1::/64"), format!("{all_v4} 2001:db8:1::1"));
        assert_eq!(choose("192.0.2.0/24,2001:db8:1::/64"), "192.0.2.1 2001:db8:1::1");
        assert_eq!(choose("0.0.0.0/0"), format!("{all_v4} {all_v6}"));
        assert_eq!(choose("0.0.0.0/0,::/0"), format!("{all_v4} {all_v6}"));
        assert_eq!(choose("192.0.2.0/24,0.0.0.0/0,2001:db8::/64"), format!("{all_v4} 2001:db8::1"));
        assert_eq!(choose("203.0.113.0/24"), all_v6, "none of the family is there");
    }

    #[test]
    fn localhost_is_one_of_all_and_of_the_networks_that_hold_it() {
        let [own, localhost] = ["198.51.100.1", "127.0.0.1"].map(|ip| ip.parse().unwrap());
        let choose = |choice: &NodePortAddresses, on| {
            node_port_addresses(choice, &[own, localhost], &[own], on)
        };
        let within = |cidrs: &[&str]| {
            NodePortAddresses::Cidrs(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect())
        };
        assert_eq!(choose(&NodePortAddresses::All, true), [localhost, own]);
        assert_eq!(choose(&NodePortAddresses::All, false), [own]);
        assert_eq!(choose(&NodePortAddresses::Primary, true), [own]);
        assert_eq!(choose(&within(&["198.51.100.0/24"]), true), [own]);
        assert_eq!(choose(&within(&["127.0.0.0/8"]), true), [localhost]);
        assert_eq!(choose(&within(&["0.0.0.0/0"]), true), [localhost, own]);
        assert_eq!(choose(&within(&["2001:db8::/32"]), true), [localhost, own]);
        assert!(choose(&within(&["127.0.0.0/8"]), false).is_empty());
    }
}
