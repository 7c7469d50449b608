//! A frontend: one address, protocol and port that clients use, and what is behind it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::model::{Family, ObjectName, Protocol};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    pub address: IpAddr,
    pub protocol: Protocol,
    pub port: NonZeroU16,
}

impl FrontendKey {
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.address)
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, SocketAddr::new(self.address, self.port.get()))
    }
}

/// A port of a Service: `namespace/name:port-name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortName {
    pub service: ObjectName,
    pub port: Arc<str>,
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// Declared in the order in which one Service's own addresses win when two of them are
/// the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    ClusterIp,
    ExternalIp,
    LoadBalancer,
    NodePort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    pub address: IpAddr,
    pub port: NonZeroU16,
    /// On this node.
    pub local: bool,
}

/// Sorted, without repetition; shared by all frontends of a Service port.
pub type BackendSet = Arc<[Backend]>;

/// What a client meets when the set is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WhenEmpty {
    /// TCP reset or ICMP unreachable.
    Reject,
    /// Silence: endpoints exist, but not where this traffic may go.
    Drop,
}

/// Whose source address is replaced by the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Masquerade {
    /// Every client's, so that the reply comes back through this node.
    Always,
    /// That of clients outside the cluster, as local detection tells.
    FromOutside,
    /// Nobody's: the endpoint sees the client.
    Never,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontend {
    pub port: PortName,
    pub kind: FrontendKind,
    pub backends: BackendSet,
    /// Set when pods of this node and the node itself use another set than clients
    /// from outside (external frontend of a Service with `externalTrafficPolicy: Local`).
    pub short_circuit: Option<BackendSet>,
    pub when_empty: WhenEmpty,
    pub masquerade: Masquerade,
    /// The address is the node's own: it is there without us, and its other ports are
    /// none of our business.
    pub on_node_address: bool,
    /// Client IP affinity with its timeout.
    pub affinity: Option<Duration>,
    /// Allowed clients; empty means all. Load-balancer addresses only.
    pub source_ranges: Arc<[IpNetwork]>,
}
