//! Ranges that ClusterIPs are taken from.

use ipnetwork::IpNetwork;

use super::ObjectName;

/// A ServiceCIDR object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Without a namespace.
    pub name: ObjectName,
    /// Without host bits.
    pub ranges: Vec<IpNetwork>,
}
