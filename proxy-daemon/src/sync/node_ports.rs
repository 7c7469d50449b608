//! On which addresses of the node its node ports listen.

use std::net::IpAddr;

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

/// The addresses on which node ports listen: pure, so that every case is a unit test.
pub fn node_port_addresses(
    choice: &NodePortAddresses,
    local: &[IpAddr],
    primary: &[IpAddr],
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
        let choose = |choice| node_port_addresses(&choice, &[ip("198.51.100.1")], &primary);
        let of_the_node = choose(NodePortAddresses::Primary);
        assert_eq!(of_the_node, [ip("192.0.2.1"), ip("2001:db8::1")]);
        let own = choose(NodePortAddresses::PrimaryOr(ip("192.0.2.9")));
        assert_eq!(own, [ip("192.0.2.9"), ip("2001:db8::1")]);
    }
}
