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
    Cidrs(Vec<IpNetwork>),
}

impl NodePortAddresses {
    fn includes(&self, address: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::Primary | Self::PrimaryOr(_) => false,
            Self::Cidrs(cidrs) => cidrs.iter().any(|cidr| cidr.contains(address)),
        }
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
            .filter(|address| cidrs.iter().any(|cidr| cidr.contains(*address)))
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
        assert!(choose(&within(&["127.0.0.0/8"]), false).is_empty());
    }
}
