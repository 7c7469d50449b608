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
        NodePortAddresses::Primary => [Family::V4, Family::V6]
            .into_iter()
            .filter_map(|family| primary.iter().find(|a| Family::of(**a) == family).copied())
            .collect(),
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

/// Loopback is never a node-port address in IPVS mode: IPVS cannot send a packet with a
/// loopback source to another host. Link-local addresses are not unique on the node.
pub fn usable_for_node_ports(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}
