//! One EndpointSlice, converted.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::SystemTime;

use super::{Family, NodeName, ObjectName, Protocol, Zone};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SlicePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: NonZeroU16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The first address of the API object's endpoint; the others are not used
    /// (Kubernetes API: consumers must handle one address per endpoint).
    pub address: IpAddr,
    /// Absent in the API means true.
    pub ready: bool,
    /// Absent in the API means true.
    pub serving: bool,
    pub terminating: bool,
    /// Shared by all endpoints of a node that are meant for the same clients.
    pub placement: Arc<Placement>,
}

/// Where an endpoint is, and for whom it is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Placement {
    pub node: Option<NodeName>,
    pub zone: Option<Zone>,
    /// `hints.forZones`; empty when there is no hint.
    pub hint_zones: Box<[Zone]>,
    /// `hints.forNodes`; empty when there is no hint.
    pub hint_nodes: Box<[NodeName]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    pub name: ObjectName,
    /// From the label `kubernetes.io/service-name`, in the slice's own namespace.
    pub service: ObjectName,
    pub family: Family,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`.
    pub triggered: Option<SystemTime>,
}
