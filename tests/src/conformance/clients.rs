//! Everybody in the cluster by a short name: pods `a0` to `b3`, `node-a` and `node-b`,
//! `outside`, and `extra`, which is the outside client with its second address.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};

use crate::cluster::{Cluster, Host, OUTSIDE_EXTRA_V4, OUTSIDE_EXTRA_V6, Pod};
use crate::traffic::Protocol;

pub(super) fn pod_name(node: usize, pod: usize) -> String {
    format!("{}{pod}", if node == 0 { 'a' } else { 'b' })
}

/// `b2` is the third pod of the second node.
pub(super) fn pod_at(name: &str) -> Result<(usize, usize)> {
    let (node, pod) = name.split_at_checked(1).context("a pod has a name")?;
    let node = match node {
        "a" => 0,
        "b" => 1,
        _ => bail!("{name:?} is no pod"),
    };
    Ok((node, pod.parse().with_context(|| format!("{name:?} is no pod"))?))
}

pub(super) fn pod<'c>(cluster: &'c Cluster, name: &str) -> Result<&'c Pod> {
    let (node, pod) = pod_at(name)?;
    cluster
        .nodes()
        .get(node)
        .and_then(|node| node.pods().get(pod))
        .with_context(|| format!("there is no pod {name}"))
}

/// Who connects.
pub(super) struct Client<'c> {
    pub host: &'c Host,
    node: Option<usize>,
    second_address: bool,
}

impl<'c> Client<'c> {
    pub(super) fn named(cluster: &'c Cluster, name: &str) -> Result<Self> {
        let (host, node, second_address): (&Host, _, _) = match name {
            "node-a" => (cluster.node(0), Some(0), false),
            "node-b" => (cluster.node(1), Some(1), false),
            "outside" => (cluster.outside()?, None, false),
            "extra" => (cluster.outside()?, None, true),
            pod_name => (pod(cluster, pod_name)?, Some(pod_at(pod_name)?.0), false),
        };
        Ok(Self { host, node, second_address })
    }

    /// What to bind to, where the kernel's choice is not good enough.
    pub(super) fn source(&self, protocol: Protocol, target: IpAddr) -> Option<SocketAddr> {
        // An SCTP client offers all its addresses of the target's scope, and leaves by one of
        // them (`sctp_bind_addr_copy`, `sctp_v4_get_dst`): from outside that could be either,
        // and a node offers those of all Services, by which the endpoint then tries to answer.
        let choosy = protocol == Protocol::Sctp;
        (self.second_address || choosy)
            .then(|| self.address(target).ok())
            .flatten()
            .map(|address| SocketAddr::new(address, 0))
    }

    pub(super) fn address(&self, like: IpAddr) -> Result<IpAddr> {
        match (self.second_address, like) {
            (true, IpAddr::V4(_)) => Ok(OUTSIDE_EXTRA_V4.into()),
            (true, IpAddr::V6(_)) => Ok(OUTSIDE_EXTRA_V6.into()),
            (false, _) => crate::bed::address_like(self.host, like),
        }
    }

    /// Addresses of the node it is on or, from outside, of the first node, which traffic of
    /// the outside enters by.
    pub(super) fn node_addresses(&self, cluster: &Cluster) -> BTreeSet<IpAddr> {
        node_addresses(cluster, self.node.unwrap_or(0))
    }
}

/// Of its own interface and of the bridge its pods hang on.
pub(super) fn node_addresses(cluster: &Cluster, node: usize) -> BTreeSet<IpAddr> {
    let mut addresses: BTreeSet<IpAddr> = cluster.node(node).addresses().into_iter().collect();
    addresses.extend(bridge_addresses(cluster, node));
    addresses
}

/// The first of each pod range.
pub(super) fn bridge_addresses(cluster: &Cluster, node: usize) -> Vec<IpAddr> {
    let ranges = cluster.node(node).pod_cidrs(cluster.families());
    ranges
        .iter()
        .filter_map(|range| range.parse::<ipnetwork::IpNetwork>().ok())
        .filter_map(|range| range.iter().nth(1))
        .collect()
}
