//! What tests begin with.

use std::net::IpAddr;

use super::{ObjectName, Service, ServicePort, TrafficPolicy};

/// A Service with a ClusterIP and nothing besides.
pub fn service(name: ObjectName, cluster_ip: impl Into<IpAddr>, port: ServicePort) -> Service {
    Service {
        name,
        created: 1,
        cluster_ips: vec![cluster_ip.into()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![port],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        source_ranges: vec![],
        health_check_node_port: None,
        scheduling: None,
    }
}
