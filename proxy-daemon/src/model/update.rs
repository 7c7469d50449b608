//! What a source of objects tells the engine.

use super::{EndpointSlice, Node, ObjectName, Service, ServiceCidr};

/// One change of a set of objects of type `T`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<T> {
    Applied(T),
    /// Deleted in the API, or turned into something that is not ours (a Service that
    /// became headless, a slice that lost its label).
    Gone(ObjectName),
    /// A whole list: what is not in it is gone. `rejected` names objects that exist
    /// but could not be used: the receiver keeps their last good version.
    Reset {
        objects: Vec<T>,
        rejected: Vec<ObjectName>,
    },
}

/// An object that could not be used as a whole. It costs no other object anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// `Service`, `EndpointSlice`, `Node` or `ServiceCIDR`.
    pub kind: &'static str,
    pub name: ObjectName,
    /// Names the field and the value, for the log line and the Event.
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Services(Change<Service>),
    Slices(Change<EndpointSlice>),
    /// The Node as it is now; `None` when it does not exist.
    Node(Option<Node>),
    /// May never come: older API servers have none.
    ServiceCidrs(Change<ServiceCidr>),
    /// For the counters; the last good version of the object stays.
    Rejected(Rejected),
}

impl Event {
    /// It holds all objects of a kind.
    #[must_use]
    pub const fn is_list(&self) -> bool {
        matches!(self, Self::Services(Change::Reset { .. }) | Self::Slices(Change::Reset { .. }))
    }
}
