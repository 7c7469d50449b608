//! A frontend: one address, protocol and port that clients use, and what is behind it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::model::{Family, HostPort, ObjectName, Protocol, Scheduling};

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
    /// No client knows it: a second set of endpoints on a ClusterIP, at a port that the
    /// Service does not have, for frontends that lead here.
    Hidden,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    pub address: IpAddr,
    pub port: NonZeroU16,
    /// On this node.
    pub local: bool,
    /// Share of the new connections, for schedulers that weigh; 0: none.
    pub weight: u16,
}

/// Sorted, without repetition; shared by all frontends of a Service port.
pub type BackendSet = Arc<[Backend]>;

/// An endpoint of a Service port, whoever may reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Known {
    pub at: HostPort,
    /// On this node.
    pub local: bool,
    /// Flows that lead to it may go on.
    pub serving: bool,
}

/// All that are in the slices, sorted; shared by all frontends of a Service port.
pub type KnownSet = Arc<[Known]>;

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
    /// Endpoints that connections of earlier may lead to.
    pub endpoints: KnownSet,
    /// The set is the one that a Local policy leaves, not the Cluster set.
    pub local_only: bool,
    /// What pods of this node and the node itself get instead, where that differs: the
    /// Cluster set.
    pub short_circuit_set: Option<BackendSet>,
    /// The frontend of the same Service port that serves pods of this node and the node
    /// itself instead: it has the Cluster set where this one has the Local set.
    pub short_circuit: Option<FrontendKey>,
    /// The frontend of the same Service port that serves everybody instead, so that a
    /// client has one endpoint at all of them: it has this one's set.
    pub shared: Option<FrontendKey>,
    pub when_empty: WhenEmpty,
    pub masquerade: Masquerade,
    /// The address is the node's own: it is there without us, and its other ports are
    /// none of our business.
    pub on_node_address: bool,
    /// Another external address of the Service is this node's, so this one may be another node's: a
    /// load balancer of nodes has the addresses of all.
    pub among_nodes: bool,
    /// Client IP affinity with its timeout.
    pub affinity: Option<Duration>,
    /// Allowed clients, disjoint; empty means all. Load-balancer addresses only.
    pub source_ranges: Arc<[IpNetwork]>,
    /// What the Service says about balancing, where it does.
    pub scheduling: Option<Arc<Scheduling>>,
}
