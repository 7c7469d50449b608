//! Which traffic comes from pods of this node (`--detect-local-mode`).

use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::Family;

/// How a packet from a pod of this node is told from others. Cluster-internal
/// short-circuits and the masquerading of traffic from outside depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LocalDetect {
    /// Nothing is known to be a pod.
    #[default]
    Unknown,
    /// ClusterCIDR and NodeCIDR modes: source address in one of these.
    Cidrs(Vec<IpNetwork>),
    /// BridgeInterface mode: comes in by this bridge.
    Bridge(Arc<str>),
    /// InterfaceNamePrefix mode: comes in by an interface with this prefix.
    InterfacePrefix(Arc<str>),
}

impl LocalDetect {
    /// Whether it can tell a pod from others by packets of this family.
    #[must_use]
    pub fn tells(&self, family: Family) -> bool {
        match self {
            Self::Unknown => false,
            Self::Cidrs(cidrs) => cidrs.iter().any(|cidr| Family::of(cidr.ip()) == family),
            Self::Bridge(_) | Self::InterfacePrefix(_) => true,
        }
    }
}
