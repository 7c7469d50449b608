//! Pure policy: a Service, its slices and the node in; frontends with backends out.
//!
//! No clock, no kernel, no logging. `CategorizeEndpoints` of kube-proxy 1.36
//! (`pkg/proxy/topology.go`) is the contract for which endpoints a client reaches.

mod endpoints;
mod frontend;
mod lower;
#[cfg(test)]
pub mod sample;

pub use endpoints::{Candidate, Categories, candidates, categorize};
pub use frontend::{
    Backend, BackendSet, Frontend, FrontendKey, FrontendKind, Known, KnownSet, Masquerade,
    PortName, WhenEmpty,
};
pub use lower::{FamilyCounts, LocalReady, Lowered, NoLocal, NodeView, lower};

#[cfg(test)]
mod tests;
