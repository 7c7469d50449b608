//! Keys and values of the proxy: plain, validated, free of wire types.
//!
//! Everything here is immutable data. What arrives from outside was checked by
//! [`crate::watch`] before it got one of these types, so the rooms above never
//! meet a port 0 or a name-only endpoint.

mod cidr;
mod host_port;
mod intern;
mod local;
mod node;
#[cfg(test)]
pub mod sample;
mod scheduling;
mod service;
mod slice;
mod update;

pub use cidr::ServiceCidr;
pub use host_port::HostPort;
pub use intern::{Pool, intern};
pub use local::LocalDetect;
pub use node::{Node, NodeName, Zone};
pub use scheduling::{DEFAULT_WEIGHT, SchedulerFlags, Scheduling, Selection, Weights};
pub use service::{
    DEFAULT_AFFINITY_TIMEOUT, Family, ObjectName, Protocol, Service, ServicePort, TrafficPolicy,
};
pub use slice::{Endpoint, EndpointSlice, Placement, SlicePort};
pub use update::{Change, Event, Rejected};
