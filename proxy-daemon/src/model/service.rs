//! A Service as the proxy sees it: which addresses and ports it claims, and how
//! traffic to them is to be treated.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::Scheduling;

/// `sessionAffinityConfig.clientIP.timeoutSeconds` when absent (Kubernetes API default).
pub const DEFAULT_AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

/// Namespace and name of a namespaced object. One word: a Service's is in a dozen places.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<NameParts>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NameParts {
    pub namespace: Arc<str>,
    pub name: Box<str>,
}

impl ObjectName {
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(Arc::new(NameParts { namespace: super::intern(namespace), name: name.into() }))
    }
}

impl Deref for ObjectName {
    type Target = NameParts;

    fn deref(&self) -> &NameParts {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    /// kube-proxy's value of the `ip_family` label.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IP protocol number (IANA).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Empty when the Service has one unnamed port.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: NonZeroU16,
    /// Only for types NodePort and LoadBalancer, and only when allocated.
    pub node_port: Option<NonZeroU16>,
}

/// A Service that has at least one address to program. Headless, ExternalName and
/// Services of another proxy never become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: ObjectName,
    /// `metadata.creationTimestamp`, seconds since the epoch: the older Service keeps
    /// a frontend that two claim. 0 when the source has none.
    pub created: i64,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose ipMode is absent or VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP` with its timeout.
    pub affinity: Option<Duration>,
    /// Guards the load-balancer addresses only, each family by its own ranges: a family
    /// without any is open to everyone.
    pub source_ranges: Vec<IpNetwork>,
    pub health_check_node_port: Option<NonZeroU16>,
    /// Most Services say nothing.
    pub scheduling: Option<Arc<Scheduling>>,
}
