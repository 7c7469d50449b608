//! What a Service says about how connections are spread over its endpoints, where that
//! differs from the node's default. Kubernetes has no field for it: annotations do
//! (`docs/scheduling.md`).

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::{NodeName, Zone};

/// Weight of an endpoint that nothing is said about.
pub const DEFAULT_WEIGHT: u16 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scheduling {
    /// A scheduler that the kernel may know, by its name.
    pub scheduler: Option<Arc<str>>,
    pub flags: SchedulerFlags,
    pub weights: Weights,
}

/// How ebpf mode finds the endpoint of a connection, where no Service says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selection {
    /// Of its addresses and ports.
    #[default]
    Hash,
    /// By a table that other endpoints' coming and going hardly changes, the same on all nodes.
    Maglev,
    /// Drawn.
    Random,
}

impl fmt::Display for Selection {
    /// The value of the flag.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hash => "hash",
            Self::Maglev => "maglev",
            Self::Random => "random",
        })
    }
}

/// Flags of the schedulers that have some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SchedulerFlags {
    /// When the endpoint that the hash names takes no connections, another one does
    /// (`sh-fallback`, `mh-fallback`).
    pub fallback: bool,
    /// The client's port is hashed besides its address (`sh-port`, `mh-port`).
    pub port: bool,
}

/// Weights of endpoints: the most telling rule counts, that is the address, then the
/// node, then the zone, then the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Weights {
    pub default: Option<u16>,
    pub zones: Vec<(Zone, u16)>,
    pub nodes: Vec<(NodeName, u16)>,
    pub addresses: Vec<(IpAddr, u16)>,
}

impl Weights {
    #[must_use]
    pub fn of(&self, address: IpAddr, node: Option<&NodeName>, zone: Option<&Zone>) -> u16 {
        let by_address = || find(&self.addresses, |known| *known == address);
        let by_node = || find(&self.nodes, |known| Some(known) == node);
        let by_zone = || find(&self.zones, |known| Some(known) == zone);
        by_address().or_else(by_node).or_else(by_zone).or(self.default).unwrap_or(DEFAULT_WEIGHT)
    }
}

fn find<K>(rules: &[(K, u16)], is: impl Fn(&K) -> bool) -> Option<u16> {
    rules.iter().find(|(key, _)| is(key)).map(|(_, weight)| *weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_telling_rule_counts() {
        let weights = Weights {
            default: Some(5),
            zones: vec![(Zone::new("z1"), 6)],
            nodes: vec![(NodeName::new("node-a"), 7)],
            addresses: vec![([10, 0, 0, 1].into(), 8)],
        };
        let (node, zone) = (NodeName::new("node-a"), Zone::new("z1"));
        let (named, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        assert_eq!(weights.of(named, Some(&node), Some(&zone)), 8);
        assert_eq!(weights.of(other, Some(&node), Some(&zone)), 7);
        assert_eq!(weights.of(other, None, Some(&zone)), 6);
        assert_eq!(weights.of(other, None, None), 5);
        assert_eq!(Weights::default().of(other, Some(&node), Some(&zone)), DEFAULT_WEIGHT);
    }
}
