//! The Node this proxy runs on.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub Arc<str>);

        impl $name {
            #[must_use]
            pub fn new(name: &str) -> Self {
                Self(super::intern(name))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// `metadata.name` of a Node.
    NodeName
);
name_type!(
    /// Value of the label `topology.kubernetes.io/zone`.
    Zone
);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: NodeName,
    pub zone: Option<Zone>,
    /// `status.addresses` of type InternalIP, then ExternalIP, in API order: the first
    /// of each family is the node's primary address.
    pub addresses: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNetwork>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// Tainted `ToBeDeletedByClusterAutoscaler`.
    pub scaling_down: bool,
}
