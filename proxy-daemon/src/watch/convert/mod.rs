//! API objects to model types: pure functions, one object at a time.
//!
//! Nothing that the API (or a manifest) holds may stop another object from being
//! programmed, so there is no error that aborts a batch: an object is ours, not ours,
//! or rejected, and an unusable part of a usable object is dropped with a
//! [`Complaint`]. The rules are those of kube-proxy 1.36 (`pkg/proxy`:
//! `serviceport.go`, `servicechangetracker.go`, `endpointslicecache.go`), except that
//! a port no packet can carry costs that port alone.

mod cidr;
mod node;
mod scheduling;
mod service;
mod slice;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;

use ipnetwork::IpNetwork;

use super::wire::Metadata;
use crate::model::{ObjectName, Protocol, Rejected};

pub use cidr::service_cidr;
pub use node::node;
pub use service::service;
pub use slice::slice;

/// The API server hides what carries this label from service proxies.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Whoever sets this label on a Service programs it with a proxy of its own.
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Ties a slice to its Service, in the slice's namespace.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The labels and annotations that are read here; no other is kept of an object.
pub(super) const READ_ENTRIES: [&str; 8] = [
    LABEL_HEADLESS,
    LABEL_PROXY_NAME,
    LABEL_SERVICE_NAME,
    node::LABEL_ZONE,
    slice::ANNOTATION_TRIGGERED,
    scheduling::ANNOTATION_SCHEDULER,
    scheduling::ANNOTATION_FLAGS,
    scheduling::ANNOTATION_WEIGHTS,
];

/// What became of one API object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Converted<T> {
    /// Usable, apart from the parts complained of.
    Ours(T, Vec<Complaint>),
    /// Programs nothing here, with the reason: an object that was ours before and is
    /// now this is gone.
    NotOurs(&'static str),
    /// Unusable as a whole: the last good version stays.
    Rejected(Rejected),
}

/// Which part of an object was dropped: a label value for counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    Port,
    Endpoint,
    Address,
    Setting,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::Port, Self::Endpoint, Self::Address, Self::Setting];

    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Endpoint => "endpoint",
            Self::Address => "address",
            Self::Setting => "setting",
        }
    }
}

/// A part of an object that cannot be used, while the rest of the object can.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Complaint {
    pub part: Part,
    /// Path of the field in the API object, as `spec.ports[0].port`.
    pub field: String,
    /// Names the value and what is wrong with it.
    pub reason: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

/// The complaints gathered while one object is converted.
#[derive(Debug, Default)]
struct Complaints(Vec<Complaint>);

impl Complaints {
    fn add(&mut self, part: Part, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Complaint { part, field: field.into(), reason: reason.into() });
    }

    /// Keeps the value; an error becomes a complaint about `field`.
    fn keep<T>(
        &mut self,
        part: Part,
        field: impl Into<String>,
        value: Result<T, String>,
    ) -> Option<T> {
        value.map_err(|reason| self.add(part, field, reason)).ok()
    }
}

fn object_name(kind: &'static str, metadata: &Metadata) -> Result<ObjectName, Rejected> {
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let name = metadata.name.as_deref().unwrap_or_default();
    let missing = match (namespace.is_empty(), name.is_empty()) {
        (false, false) => return Ok(ObjectName::new(namespace, name)),
        (true, _) => "metadata.namespace",
        (false, true) => "metadata.name",
    };
    Err(Rejected {
        kind,
        name: ObjectName::new(namespace, name),
        reason: format!("{missing} is missing"),
    })
}

fn has_label(metadata: &Metadata, label: &str) -> bool {
    metadata.labels.get(label).is_some()
}

/// The API type of every port is int32, and EndpointSlice validation has let 70000 and
/// -1 through.
fn port(number: i32) -> Result<NonZeroU16, String> {
    u16::try_from(number)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("{number} is not a port (1 to 65535)"))
}

/// `TCP` when absent (API default; manifests leave it out).
fn protocol(name: Option<&str>) -> Result<Protocol, String> {
    match name {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!("{other:?} is not TCP, UDP or SCTP")),
    }
}

/// Addresses as the API has always taken them: IPv4 octets may have leading zeros and
/// are decimal (Kubernetes' `ParseIPSloppy`; objects stored long ago still have them),
/// and an IPv4-mapped IPv6 address is the IPv4 address.
fn ip(text: &str) -> Result<IpAddr, String> {
    raw_ip(text).map(|address| address.to_canonical())
}

fn raw_ip(text: &str) -> Result<IpAddr, String> {
    text.parse()
        .ok()
        .or_else(|| sloppy_ipv4(text).map(IpAddr::V4))
        .ok_or_else(|| format!("{text:?} is not an IP address"))
}

fn sloppy_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?)?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// Digits only: `u8::from_str` alone would take `+1`.
fn decimal(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// A range in CIDR notation; host bits are cleared. A bare address is not a range, nor
/// is a netmask a prefix length, both of which `IpNetwork` would take.
fn cidr(text: &str) -> Result<IpNetwork, String> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let network = IpNetwork::new(raw_ip(address).ok()?, decimal(prefix)?).ok()?;
        IpNetwork::new(network.network(), network.prefix()).ok()
    };
    parse().ok_or_else(|| format!("{text:?} is not a CIDR range"))
}

/// Why packets can never be sent to this address as a destination of our choosing.
fn unusable(address: IpAddr) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    unusable_anywhere(address).or(link_local.then_some("a link-local address"))
}

/// As [`unusable`], but link-local passes: such addresses are odd, yet they can be
/// bound and reached on the node itself.
fn unusable_anywhere(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else if address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("the broadcast address")
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
